"""What published corrections do to answers, and how much of the harm the safeguards stop. No model.

A correction is *damaged* when a reader sees at a glance that it is broken. The definition:

1. fullwidth East Asian punctuation, or a character or word of another script or language, in a text whose
   question and answer have none;
2. words run together: no white space between two words, with a comma or stop between them or not;
3. cut off: it ends within a sentence or a list, or announces what does not come;
4. it repeats itself, or holds parts of a prompt, markup that is not the answer's, or broken characters;
5. code, a table or a formula of the answer is gone, or not as it was.

A doubled or missing full stop and white space before one are no damage, nor is a worse or a wrong text.

`looks_damaged` is the part of it that was counted where these corrections were first described: fullwidth
marks, or at least 21 small letters in a row. It is a floor and finds about half of it. The labels were given
by reading `sample`, before the checks were run on these rows.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SOURCE = "noncommercial/alpaca_eval_aligner2b"
_LABELS = Path(__file__).with_name("harm_labels.csv")
_FULLWIDTH = re.compile("[，。！？：；（）、【】「」『』《》]")
_HAN = re.compile("[\u3400-\u9fff]")
_LETTERS = re.compile(r"[a-z]{21,}")
_SEED = 6
# How many of (looks damaged, long) are read in each round: of the first kind all are in two of them.
_ROUNDS: tuple[dict[tuple[bool, bool], int], ...] = (
    {(True, False): 15, (True, True): 15, (False, False): 35, (False, True): 35},
    {(True, False): 15, (True, True): 15, (False, False): 35, (False, True): 35},
    {(False, False): 50, (False, True): 50},
    {(False, False): 50, (False, True): 50},
)
_LONG = 2000


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
    """Return the rows to read, round by round: held back, changed, and so many of each stratum."""
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
    return drawn
