"""What is done about a correction that a check objects to: one action per check, and the thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

from aligner_integrations.config import Granularity
from aligner_integrations.correction import Finding
from aligner_integrations.safeguards.repair import REPAIRS

Action: TypeAlias = Literal["keep_original", "repair", "accept", "off"]
SafeguardMode: TypeAlias = Literal["keep_original", "off"]

# Check -> (action for a sentence, action for a whole answer). Published answer-level aligners rewrite
# freely: what a good rewrite loses as often as a bad one is reported there, not refused.
_DEFAULTS: dict[str, tuple[Action, Action]] = {
    "empty": ("keep_original", "keep_original"),
    "broken_characters": ("keep_original", "keep_original"),
    "template_marker": ("keep_original", "keep_original"),
    "repetition": ("keep_original", "keep_original"),
    "truncated": ("keep_original", "keep_original"),
    "script_mixing": ("keep_original", "keep_original"),
    "words_run_together": ("keep_original", "keep_original"),
    "language_changed": ("keep_original", "keep_original"),
    "length": ("keep_original", "keep_original"),
    # To refuse is what an aligner is for, and whether it was called for no pure check can know.
    "refusal": ("accept", "accept"),
    "drift": ("keep_original", "off"),
    "code_changed": ("repair", "repair"),
    "inline_code_changed": ("keep_original", "accept"),
    "table_changed": ("keep_original", "keep_original"),
    "formula_changed": ("keep_original", "keep_original"),
    "json_changed": ("keep_original", "keep_original"),
    "citations_lost": ("repair", "repair"),
    "links_lost": ("repair", "accept"),
    "numbers": ("keep_original", "accept"),
    "quotes_lost": ("accept", "accept"),
}
CHECK_NAMES: tuple[str, ...] = tuple(_DEFAULTS)
REPAIRED_CHECKS = tuple(REPAIRS)
_SENTENCE_ACTIONS: dict[str, Action] = {name: actions[0] for name, actions in _DEFAULTS.items()}
_ANSWER_ACTIONS: dict[str, Action] = {name: actions[1] for name, actions in _DEFAULTS.items()}


@dataclass(frozen=True, slots=True)
class SafeguardPolicy:
    """What a correction may do to an answer, and what is done when it does more.

    `actions` says it for each check: `"keep_original"` shows the original instead; `"repair"` puts back
    what was lost, and keeps the original where that can't be done; `"accept"` shows the correction and
    reports; `"off"` does not look. Checks that are not named keep the action for a sentence; those for a
    whole answer come with `for_granularity("answer")`.

    A rewrite passes the check `drift` when it is near the original or a clean refusal. Near means a
    word-level similarity of at least `min_similarity` (0 turns the check off). `max_growth` is how many
    times longer than the original it may be, `slack_chars` what is free on top; of an original of 1,000
    characters or more at least the share `min_share` of its length must be left. A rewrite may put
    `max_changed_numbers` numbers in place of others, and lose none (`None` turns that check off):
    recomputing a result changes one. `allow_empty` lets a sentence be dropped. `special_tokens` are strings
    that may not appear unless the answer has them.
    """

    min_similarity: float = 0.5
    max_growth: float = 2.0
    slack_chars: int = 80
    min_share: float = 0.15
    max_changed_numbers: int | None = 1
    allow_empty: bool = False
    special_tokens: frozenset[str] = frozenset()
    actions: Mapping[str, Action] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_actions(self.actions)
        object.__setattr__(self, "actions", {**_SENTENCE_ACTIONS, **self.actions})

    def __hash__(self) -> int:
        return hash((self.min_similarity, self.max_growth, tuple(sorted(self.actions.items()))))

    @classmethod
    def for_granularity(cls, granularity: Granularity) -> SafeguardPolicy:
        """Return the defaults for corrections of single sentences, or of whole answers."""
        if granularity == "sentence":
            return cls()
        return cls(min_similarity=0.0, max_growth=4.0, slack_chars=2000, actions=_ANSWER_ACTIONS)

    def with_actions(self, actions: Mapping[str, Action]) -> SafeguardPolicy:
        """Return the policy with these actions in place of its own.

        Raises:
            ValueError: there is no such check or action, or nothing to repair for a check.
        """
        check_actions(actions)
        return replace(self, actions={**self.actions, **actions})

    def find(self, check: str, detail: str) -> Finding:
        """Return the finding of `check` with what this policy does about it."""
        shown = self.actions[check] in ("accept", "off")
        return Finding(check, detail, "accepted" if shown else "kept_original")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON and for the key of a cache."""
        return {**asdict(self), "special_tokens": sorted(self.special_tokens)}


# What `safeguards=` takes: the defaults, nothing, some actions other than the defaults, or all of it.
Safeguards: TypeAlias = SafeguardMode | Mapping[str, Action] | SafeguardPolicy


def resolve_safeguards(safeguards: Safeguards, granularity: Granularity) -> SafeguardPolicy:
    """Return the policy that `safeguards` means for a model of this granularity.

    Raises:
        ValueError: `safeguards` is another word, or names a check or action that does not exist.
    """
    if isinstance(safeguards, SafeguardPolicy):
        return safeguards
    defaults = SafeguardPolicy.for_granularity(granularity)
    if isinstance(safeguards, Mapping):
        return defaults.with_actions(safeguards)
    if safeguards not in get_args(SafeguardMode):
        raise ValueError(
            "safeguards must be 'keep_original', 'off', a mapping of checks to actions or a SafeguardPolicy, "
            f"got {safeguards!r}"
        )
    return (
        defaults
        if safeguards == "keep_original"
        else defaults.with_actions(dict.fromkeys(CHECK_NAMES, "off"))
    )


def check_actions(actions: Mapping[str, Action]) -> None:
    """Refuse what is no check, no action, or cannot be repaired.

    Raises:
        ValueError: as said; the message names what there is.
    """
    for check, action in actions.items():
        if check not in CHECK_NAMES:
            raise ValueError(f"safeguards: no check {check!r}; there are {', '.join(CHECK_NAMES)}")
        if action not in get_args(Action):
            known = ", ".join(get_args(Action))
            raise ValueError(f"safeguards: no action {action!r} (for {check!r}); there are {known}")
        if action == "repair" and check not in REPAIRED_CHECKS:
            known = ", ".join(REPAIRED_CHECKS)
            raise ValueError(f"safeguards: {check!r} has nothing to repair; only {known} have")
