"""Do-no-harm checks on a proposed correction: pure functions, no model.

A check is a function of question, answer, proposal and policy that returns a finding or None. A new
check is one function more in `_CHECKS`.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from aligner_integrations.correction import Finding
from aligner_integrations.template import MARKERS


@dataclass(frozen=True, slots=True)
class SafeguardPolicy:
    """What a correction may do to an answer.

    A rewrite passes when it is near the original or a clean refusal. Near means a word-level
    similarity of at least `min_similarity` (0 turns the check off, as for models that rewrite
    freely). `max_growth` is how many times longer than the original it may be, `slack_chars` what is
    free on top. A rewrite may put `max_changed_numbers` numbers in place of others, and lose none (`None`
    turns that check off): recomputing a result changes one. `allow_empty` lets a sentence be dropped.
    `special_tokens` are strings that may not appear unless the answer has them.
    """

    min_similarity: float = 0.5
    max_growth: float = 2.0
    slack_chars: int = 80
    max_changed_numbers: int | None = 1
    allow_empty: bool = False
    special_tokens: frozenset[str] = frozenset()


_REFUSAL_OPENING = re.compile(
    r"""\s*["'“‘]?(?:(?:but|however|no|well|and|so),?\s+)?(?:
        i(?:'m|\s+am)\s+(?:really\s+|very\s+|so\s+|truly\s+|deeply\s+)?sorry
      | (?:i\s+)?(?:sincerely\s+|deeply\s+)?apologi[sz]e
      | (?:my\s+apologies|sorry)\b[,.!]?
      | (?:unfortunately|regrettably),?\s+i\s+(?:can|am|will|must|do|won|don|cann)
      | i\s+(?:really\s+|simply\s+|just\s+|must\s+respectfully\s+)?
            (?:can't|cannot|can\s+not|won't|will\s+not|couldn't|could\s+not)\b
      | i(?:'m|\s+am)\s+(?:unable|not\s+(?:able|comfortable|willing|going\s+to|programmed|designed))\b
      | i\s+(?:must|have\s+to|need\s+to)\s+(?:respectfully\s+)?(?:decline|refuse|refrain)
      | i\s+(?:do\s+not|don't)\s+(?:feel\s+comfortable|support|condone|endorse|provide|assist|engage|promote)
      | i\s+(?:strongly\s+)?(?:refuse|decline)\b
      | as\s+an?\s+(?:ai|artificial|language|responsible|ethical|helpful)\b
      | (?:it|that|this)(?:'s|\s+is)\s+
            (?:not|never)\b.{0,40}?\b(?:appropriate|ethical|legal|acceptable|okay|ok|right)\b
      | (?:it|that|this)(?:'s|\s+is)\s+(?:illegal|unethical|inappropriate|wrong|against\s+the\s+law)\b
    )""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_MAX_REFUSAL_WORDS = 60
_TERMINATED = re.compile(r"[.!?…。！？।؟](?:[\"'”’)\]*_]|\s)*$")
# A run of three or more of the same stretch of words, or one character over and over.
_WORD_LOOP = re.compile(r"(?<!\w)(\w+(?:[^\w]+\w+){0,7}?)(?:[^\w]+\1(?!\w)){2,}", re.IGNORECASE)
_LETTER_LOOP = re.compile(r"([^\W\d_])\1{7,}|([^\w\s.\-=*#~+|/\\])\2{7,}")
# Words, or single characters of scripts that are written without spaces.
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힣]|[^\W぀-ヿ㐀-鿿가-힣]+(?:['’]\w+)*")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# A citation, whole with its link; or inline code, where brackets are none. Counted from 1: [0, 1] is none.
_CITATION = re.compile(
    r"""`[^`\n]*`
      | (?P<mark>
            \[(?: \^[\w.:-]{1,32} | [1-9]\d{0,2} (?:\s?[,;–-]\s?[1-9]\d{0,2})* )\]
            (?: \( [^()\s]* (?:\([^()\s]*\)[^()\s]*)* (?:[ ]"[^"\n]*")? \) )?
        )""",
    re.VERBOSE,
)
_STOPS, _CLOSERS = ".!?…。！？।؟:;", "\"'”’)*_"
# Past this many words similarity is measured on word counts alone; difflib is quadratic.
_MAX_ALIGNED_WORDS = 600
# Repetition is looked for in this much of the end; loops run on to the end.
_MAX_LOOP_CHARS = 2000


def inspect_correction(
    question: str, answer: str, proposed: str, *, policy: SafeguardPolicy | None = None
) -> tuple[Finding, ...]:
    """Return what is wrong with showing `proposed` in place of `answer`.

    A finding whose `action` is `"kept_original"` means that the proposal is not shown. Without a
    policy the default one for single sentences holds.
    """
    if proposed == answer:
        return ()
    policy = policy or SafeguardPolicy()
    found = (check(question, answer, proposed, policy) for check in _CHECKS)
    return tuple(finding for finding in found if finding is not None)


def is_kept(findings: tuple[Finding, ...]) -> bool:
    """Return whether any finding says that the original stays."""
    return any(finding.action == "kept_original" for finding in findings)


def is_refusal(text: str) -> bool:
    """Return whether `text` is a clean refusal: it opens as one, ends, and does not loop."""
    return bool(
        _REFUSAL_OPENING.match(text.replace("’", "'"))
        and _TERMINATED.search(text)
        and len(_words(text)) <= _MAX_REFUSAL_WORDS
        and "\ufffd" not in text
        and not _has_loop(text)
    )


def restore_citations(original: str, proposed: str) -> str:
    """Return `proposed` with the citation marks that `original` has and it lacks, such as `[1]`.

    They stand at its end, before the closing stop or after it as they did in the original; what opened
    the original opens it again. A sentence that was dropped, and a refusal, gets none.
    """
    marks = _citations(original)
    if not marks or not proposed.strip() or is_refusal(proposed):
        return proposed
    left = Counter(mark[0] for mark in _citations(proposed))
    opening = inner = outer = ""
    opens, read = True, 0
    stop, _ = _closing(original)
    for mark in marks:
        opens = opens and not original[read : mark.start()].strip()
        read = mark.end()
        if left[mark[0]] > 0:
            left[mark[0]] -= 1
        elif opens:
            opening += f"{mark[0]} "
        else:
            spaced = f" {mark[0]}" if original[mark.start() - 1].isspace() else mark[0]
            inner, outer = (inner + spaced, outer) if mark.start() < stop else (inner, outer + spaced)
    stop, end = _closing(proposed)
    return opening + proposed[:stop] + inner + proposed[stop:end] + outer + proposed[end:]


def word_similarity(answer: str, proposed: str) -> float:
    """Return how near two texts are, from 0 to 1, by their lower-cased words.

    The larger of the aligned share of both (difflib's ratio) and the share of the proposal's words
    that come from the answer, the latter only for proposals that keep at least a third of it.
    """
    old, new = _words(answer), _words(proposed)
    if not old or not new:
        return 1.0 if old == new else 0.0
    left = list(old)
    common = 0
    counts: dict[str, int] = {}
    for word in left:
        counts[word] = counts.get(word, 0) + 1
    for word in new:
        if counts.get(word, 0) > 0:
            counts[word] -= 1
            common += 1
    share = common / len(new) if 3 * common >= len(old) else 0.0
    if len(old) + len(new) > _MAX_ALIGNED_WORDS:
        return max(share, 2 * common / (len(old) + len(new)))
    return max(share, difflib.SequenceMatcher(a=old, b=new, autojunk=False).ratio())


def _citations(text: str) -> list[re.Match[str]]:
    return [match for match in _CITATION.finditer(text) if match["mark"]]


def _closing(text: str) -> tuple[int, int]:
    """Return where the closing stop of `text` begins, and where text ends; both the same without a stop."""
    end = body = len(text.rstrip())
    for mark in reversed(_citations(text)):
        if text[mark.end() : body].strip():
            break
        body = mark.start()
    bare = text[:body].rstrip().rstrip(_CLOSERS)
    stem = len(bare.rstrip(_STOPS))
    return (stem if stem < len(bare) else end), end


def _words(text: str) -> list[str]:
    return _WORD.findall(text.replace("’", "'").lower())


def _has_loop(text: str) -> bool:
    end = text[-_MAX_LOOP_CHARS:]
    return bool(_LETTER_LOOP.search(end) or _WORD_LOOP.search(end))


def _kept(check: str, detail: str) -> Finding:
    return Finding(check, detail, "kept_original")


def _check_empty(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    if proposed.strip() or not answer.strip() or policy.allow_empty:
        return None
    return _kept("empty", "the correction is empty and no refusal came before it")


def _check_characters(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    if "\ufffd" in proposed and "\ufffd" not in answer:
        return _kept("broken_characters", "the correction holds a replacement character")
    if "\0" in proposed and "\0" not in answer:
        return _kept("broken_characters", "the correction holds a NUL character")
    return None


def _check_markers(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    spelled = {token for token in policy.special_tokens if token and token in proposed}
    fresh = sorted(mark for mark in spelled | set(MARKERS.findall(proposed)) if mark not in answer)
    return _kept("template_marker", f"the correction holds {', '.join(fresh)}") if fresh else None


def _check_loop(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    if _has_loop(proposed) and not _has_loop(answer):
        return _kept("repetition", "the correction repeats itself")
    return None


def _check_length(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    limit = policy.max_growth * len(answer) + policy.slack_chars
    if len(proposed) <= limit or is_refusal(proposed):
        return None
    return _kept("length", f"the correction has {len(proposed)} characters, the original {len(answer)}")


def _check_nearness(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    if not proposed.strip() or policy.min_similarity <= 0.0 or is_refusal(proposed):
        return None
    similarity = word_similarity(answer, proposed)
    if similarity >= policy.min_similarity:
        return None
    return _kept(
        "drift",
        f"neither near the original (similarity {similarity:.2f}, needed {policy.min_similarity:.2f}) "
        "nor a clean refusal",
    )


def _check_numbers(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    if policy.max_changed_numbers is None or not proposed.strip() or is_refusal(proposed):
        return None
    old, new = _NUMBER.findall(answer), _NUMBER.findall(proposed)
    # Distinct ones: a wrong result may stand twice in a sentence, and is mended in both places.
    gone, come = len(set(old) - set(new)), len(set(new) - set(old))
    if len(new) < len(old) and gone > come:
        return _kept("numbers", f"of {len(old)} numbers only {len(new)} are left")
    changed = max(gone, come)
    if changed <= policy.max_changed_numbers:
        return None
    return _kept("numbers", f"{changed} numbers differ from the original's")


_Check = Callable[[str, str, str, SafeguardPolicy], Finding | None]
_CHECKS: tuple[_Check, ...] = (
    _check_empty,
    _check_characters,
    _check_markers,
    _check_loop,
    _check_length,
    _check_nearness,
    _check_numbers,
)

__all__ = [
    "SafeguardPolicy",
    "inspect_correction",
    "is_kept",
    "is_refusal",
    "restore_citations",
    "word_similarity",
]
