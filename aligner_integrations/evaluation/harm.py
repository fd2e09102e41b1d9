"""What published corrections do to answers, and how much of the harm the safeguards stop. No model.

A correction is *damaged* when a reader sees at a glance that it is broken. The definition:

1. fullwidth East Asian punctuation, or a character or word of another script or language, in a text whose
   question and answer have none;
2. words run together: no white space between two words, with a comma or stop between them or not;
3. cut off: it ends within a sentence, a list or code, or announces what does not come;
4. it repeats itself, or holds parts of a prompt, markup that is not the answer's, signs or placeholders in
   place of text, or broken characters;
5. code, a table or formulas of the answer are gone, or not as they were. Where that is all, and the text
   reads well, the label is `structure`.

A doubled or missing full stop, white space before one, a stray quotation mark, bracket or backslash, an odd
line break and a misspelled word are no damage, nor is a worse or a wrong text.

`looks_damaged` is the part of it that was counted where these corrections were first described: fullwidth
marks, or at least 21 small letters in a row. It is a floor, and some of its ideas are the checks' own. The
labels were given by reading `samples`, a round at a time and before the checks had seen that round; the
checks were made on the other half of the questions, and mended after each of the first four rounds. The fifth
is a plain draw of what those had left, and the checks stayed as they were. What each round gave when it was
new is in docs/benchmarks.md.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from math import sqrt
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from aligner_integrations.safeguards import (
    CHECK_NAMES,
    SafeguardPolicy,
    guard_correction,
    inspect_correction,
)

_SOURCE = "noncommercial/alpaca_eval_aligner2b"
_LABELS = Path(__file__).with_name("harm_labels.csv")
_FULLWIDTH = re.compile("[，。！？：；（）、【】「」『』《》]")
_HAN = re.compile("[\u3400-\u9fff]")
_LETTERS = re.compile(r"[a-z]{21,}")
_SEED = 6
_Z = 1.96  # of a normal distribution's 95 %
_STRUCTURE = frozenset(("code_changed", "table_changed", "formula_changed", "json_changed", "citations_lost"))

Damage: TypeAlias = Literal["yes", "structure", "no"]
# How many of (looks damaged, long) are read in each of the first rounds.
_ROUNDS: tuple[dict[tuple[bool, bool], int], ...] = (
    {(True, False): 15, (True, True): 15, (False, False): 35, (False, True): 35},
    {(True, False): 15, (True, True): 15, (False, False): 35, (False, True): 35},
    {(False, False): 50, (False, True): 50},
    {(False, False): 50, (False, True): 50},
)
_LONG = 2000
_LAST_ROUND, _LAST_SEED = 100, 5  # of all that is left, whatever it is


@dataclass(frozen=True, slots=True)
class Published:
    """A published correction of an answer."""

    id: str
    question: str
    answer: str
    correction: str
    upstream: str = ""

    @property
    def is_changed(self) -> bool:
        """Whether there is anything to judge."""
        return self.answer != self.correction

    @property
    def is_held_back(self) -> bool:
        """Whether the checks were made without looking at this row: a half of the questions."""
        return hashlib.sha256(self.question.encode()).digest()[-1] % 2 == 1


def looks_damaged(row: Published) -> bool:
    """Return whether the correction holds fullwidth marks, or runs of letters, that nothing before it has."""
    had = f"{row.question}\n{row.answer}"
    if _FULLWIDTH.search(row.correction) and not _HAN.search(had):
        return True
    return any(run not in had for run in _LETTERS.findall(row.correction))


def read_rows(data: Path) -> list[Published]:
    """Return the published corrections.

    Raises:
        ValueError: `data` lacks them.
    """
    path = data / _SOURCE / f"{_SOURCE.rpartition('/')[2]}.jsonl.gz"
    if not path.is_file():
        raise ValueError(f"data: {path} does not exist; give the folder that holds {_SOURCE}")
    fields = Published.__dataclass_fields__
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Published(**{name: row[name] for name in fields}) for row in rows]


def samples(rows: Sequence[Published]) -> list[list[Published]]:
    """Return the rows to read, round by round: held back, changed, and so many of each stratum.

    The last round takes of what is left without asking for strata.
    """
    strata: dict[tuple[bool, bool], list[Published]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.id):
        if row.is_changed and row.is_held_back:
            strata[looks_damaged(row), len(row.correction) >= _LONG].append(row)
    drawn: list[list[Published]] = []
    for seed, wanted in enumerate(_ROUNDS, start=_SEED):
        chance = random.Random(seed)
        drawn.append([])
        for key, times in wanted.items():
            taken = chance.sample(strata[key], min(times, len(strata[key])))
            drawn[-1] += taken
            strata[key] = [row for row in strata[key] if row not in taken]
    left = sorted((row for some in strata.values() for row in some), key=lambda row: row.id)
    return [*drawn, random.Random(_LAST_SEED).sample(left, min(_LAST_ROUND, len(left)))]


@dataclass(frozen=True, slots=True)
class Label:
    """What a reader says of one row."""

    id: str
    round: int
    damaged: Damage
    reason: str


@dataclass(frozen=True, slots=True)
class Share:
    """`hits` of `rows`, with Wilson's interval of 95 %."""

    hits: int
    rows: int
    low: float
    high: float

    @classmethod
    def of(cls, found: Iterable[bool]) -> Share:
        """Count `found`."""
        hits = list(found)
        return cls(sum(hits), len(hits), *wilson(sum(hits), len(hits)))

    def __str__(self) -> str:
        if not self.rows:
            return "0 of 0"
        share = self.hits / self.rows
        return f"{self.hits} of {self.rows}, {share:.1%} (95 %: {self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True, slots=True)
class CheckCount:
    """In how many rows one check finds something, whatever is done about it."""

    damaged: int
    structure: int
    undamaged: int
    published: int
    swapped: int


@dataclass(frozen=True, slots=True)
class HarmReport:
    """Shares by what they are of, and each check's counts.

    `checks` counts labelled rows by label, then all published rows, then the swapped ones.
    """

    rows: dict[str, int]
    caught: dict[str, Share]
    rejected: dict[str, Share]
    checks: dict[str, CheckCount]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return asdict(self)

    def shown(self) -> dict[str, dict[str, str]]:
        """Return titles with rows of text, for people."""
        return {
            "rows": {name: str(count) for name, count in self.rows.items()},
            "damaged, and caught": {name: str(share) for name, share in self.caught.items()},
            "undamaged, and rejected": {name: str(share) for name, share in self.rejected.items()},
            "found by each check": {
                name: f"{each.damaged} damaged, {each.structure} structure, {each.undamaged} undamaged; "
                f"{each.published} of all published, {each.swapped} swapped"
                for name, each in self.checks.items()
            },
        }


def run_harm(data: Path) -> HarmReport:
    """Look at every published correction, and at answers of other models in its place.

    Raises:
        ValueError: `data` lacks the corrections.
    """
    return measure(read_rows(data), read_labels())


def measure(rows: Sequence[Published], labels: Sequence[Label]) -> HarmReport:
    """Measure the policy for whole answers on `rows`.

    Rejected means that the original is shown instead. Swapped rows are another model's own answer to the
    same question in place of the correction: rewrites that nobody damaged. They can't keep the answer's code,
    tables and formulas, so a finding of those alone does not count; where such an answer has letters of
    another script in it, it is damaged by the definition, and left out.
    """
    by_id = {row.id: row for row in rows}
    known = [(label, by_id[label.id]) for label in labels if label.id in by_id]
    last = max((label.round for label, _ in known), default=0)
    kept = {row.id: kept_by(row) for row in rows}
    swapped = _swapped(row for row in rows if row.is_held_back)
    kept_swapped = [kept_by(row) for row in swapped]

    def labelled(*kinds: Damage, rounds: Iterable[int] = range(1, last + 1)) -> Share:
        wanted = (label for label, _ in known if label.damaged in kinds and label.round in rounds)
        return Share.of(bool(kept[label.id]) for label in wanted)

    caught = {
        f"labels, round {last}, read last": labelled("yes", "structure", rounds=[last]),
        "labels, all rounds": labelled("yes", "structure"),
        "labels, all rounds, visible damage alone": labelled("yes"),
        "all rows that look damaged": Share.of(bool(kept[row.id]) for row in rows if looks_damaged(row)),
        "the same, held back": Share.of(
            bool(kept[row.id]) for row in rows if looks_damaged(row) and row.is_held_back
        ),
    }
    rejected = {
        f"labels, round {last}, read last": labelled("no", rounds=[last]),
        "labels, all rounds": labelled("no"),
        "labels, all rounds, with changed structure that reads well": labelled("no", "structure"),
        "another model's answer": Share.of(bool(checks - _STRUCTURE) for checks in kept_swapped),
        "another model's answer, changed structure counted": Share.of(map(bool, kept_swapped)),
    }
    counts = {
        "published": len(rows),
        "changed": sum(row.is_changed for row in rows),
        "look damaged": sum(map(looks_damaged, rows)),
        "rejected": sum(map(bool, kept.values())),
        "labelled": len(known),
        "swapped": len(swapped),
    }
    return HarmReport(counts, caught, rejected, _count_checks(rows, known, swapped))


def kept_by(row: Published) -> set[str]:
    """Return the checks for whole answers that show the original instead of the correction."""
    policy = SafeguardPolicy.for_granularity("answer")
    findings = guard_correction(row.question, row.answer, row.correction, policy=policy)[1]
    return {finding.check for finding in findings if finding.action == "kept_original"}


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """Return Wilson's interval of 95 % for a share."""
    if not rows:
        return 0.0, 1.0
    share, weight = hits / rows, _Z * _Z / rows
    middle = (share + weight / 2) / (1 + weight)
    half = _Z * sqrt(share * (1 - share) / rows + weight / rows / 4) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def read_labels() -> list[Label]:
    """Return the labels: ids and reasons alone, for the texts may not be passed on."""
    with _LABELS.open(encoding="utf-8", newline="") as lines:
        return [
            Label(row["id"], int(row["round"]), cast(Damage, row["damaged"]), row["reason"])
            for row in csv.DictReader(lines)
        ]


def _swapped(rows: Iterable[Published]) -> list[Published]:
    """Return each answer with every other model's answer to the same question as its correction."""
    asked: dict[str, list[Published]] = defaultdict(list)
    for row in rows:
        asked[row.question].append(row)
    pairs = (pair for found in asked.values() for pair in permutations(found, 2))
    swapped = (
        Published(f"{one.id}/{other.id}", one.question, one.answer, other.answer) for one, other in pairs
    )
    return [row for row in swapped if not _is_mixed(row)]


def _is_mixed(row: Published) -> bool:
    had = f"{row.question}\n{row.answer}"
    return _HAN.search(row.correction) is not None and _HAN.search(had) is None


def _count_checks(
    rows: Sequence[Published], known: Sequence[tuple[Label, Published]], swapped: Sequence[Published]
) -> dict[str, CheckCount]:
    everything = replace(
        SafeguardPolicy.for_granularity("answer").with_actions(dict.fromkeys(CHECK_NAMES, "accept")),
        min_similarity=SafeguardPolicy().min_similarity,
    )

    def count(some: Iterable[Published]) -> Counter[str]:
        return Counter(
            finding.check
            for row in some
            for finding in inspect_correction(row.question, row.answer, row.correction, policy=everything)
        )

    by_label = {
        kind: count(row for label, row in known if label.damaged == kind)
        for kind in ("yes", "structure", "no")
    }
    published, other = count(rows), count(swapped)
    return {
        name: CheckCount(
            by_label["yes"][name],
            by_label["structure"][name],
            by_label["no"][name],
            published[name],
            other[name],
        )
        for name in CHECK_NAMES
    }
