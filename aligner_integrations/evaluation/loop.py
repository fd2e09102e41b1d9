"""What a closed loop asks of upstream, and how long its reader waits: answers replayed, no model, no clock.

Time is counted in tokens: one is what upstream takes to write one. Words stand for tokens.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import Any, TypeAlias

from aligner_integrations.closed_loop import MAX_RESTARTS, LoopState
from aligner_integrations.read_ahead import READ_AHEAD
from aligner_integrations.sentences import Piece, SentenceBuffer, has_words
from aligner_integrations.testing.doubles import scripted_aligner

_ANSWERS = "noncommercial/alpaca_eval_aligner2b"
_TOKEN = re.compile(r"\s*\S+|\s+$")
_ROUNDS = 16  # as in Stream Aligner's scripts
_ADDED = "Well,"  # a changed sentence has one token more
_SHARES = (0.0, 0.1, 0.3)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long things take, in tokens of upstream.

    Attributes:
        correction: What the aligner takes for a sentence.
        start: What upstream takes, once asked, before it writes its first token.
        read_ahead: How many tokens may wait for the correction of what comes before them.
    """

    correction: int = 20
    start: int = 10
    read_ahead: int = READ_AHEAD


@dataclass(slots=True)
class Course:
    """How one answer went: what was asked for, and when which tokens of it were shown."""

    requested: int = 0
    shown: int = 0
    rounds: int = 0
    first: int | None = None
    waited: int = 0
    end: int = 0

    def show(self, tokens: int, time: int) -> None:
        """Take it that so many tokens are shown at `time`, to a reader who takes a token's time for each."""
        self.first = time if self.first is None else self.first
        self.waited += max(0, time - self.end)
        self.end = max(time, self.end) + tokens
        self.shown += tokens


Way: TypeAlias = Callable[[Sequence[Piece], Sequence[bool], Pace], Course]


@dataclass(frozen=True, slots=True)
class LoopCosts:
    """One way of correcting, over all answers of which a share of the sentences changes.

    `requested` is per shown token; the times are means per answer, in tokens. `wait` is how long a reader who
    reads as fast as upstream writes has nothing verified to read.
    """

    way: str
    share: float
    requested: float
    rounds: float
    first: float
    wait: float


@dataclass(frozen=True, slots=True)
class LoopReport:
    """The costs of every way and share."""

    costs: tuple[LoopCosts, ...]
    setting: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {"setting": self.setting, "costs": [asdict(cost) for cost in self.costs]}

    def shown(self) -> dict[str, dict[str, str]]:
        """Return titles with rows of text, for people."""
        tables = {"setting": {name: f"{value:g}" for name, value in self.setting.items()}}
        for share in dict.fromkeys(cost.share for cost in self.costs):
            tables[f"{share:.0%} of the sentences change"] = {
                cost.way: f"requested {cost.requested:.2f} x shown in {cost.rounds:.1f} rounds; "
                f"first sentence after {cost.first:.0f}, waiting {cost.wait:.0f} in all"
                for cost in self.costs
                if cost.share == share
            }
        return tables


def run_loop(data: Path, *, answers: int = 300, pace: Pace | None = None) -> LoopReport:
    """Replay published answers as each way would ask for them.

    Args:
        data: the folder with the sources; the answers lie in its `noncommercial` folder.
        answers: at most so many, evenly spread.
        pace: how long things take.

    Raises:
        ValueError: `data` lacks the answers; the message names the file.
    """
    pace = pace or Pace()
    whole = _read(data)
    texts = [cut(text) for text in whole[:: ceil(len(whole) / answers)]]
    costs = [_costs(name, way, texts, share, pace) for share in _SHARES for name, way in WAYS.items()]
    lengths = [len(pieces) for pieces in texts]
    setting = {
        "answers": len(texts),
        "sentences per answer": sum(lengths) / len(lengths),
        "tokens per sentence": sum(_count(piece) for each in texts for piece in each) / sum(lengths),
        **{f"tokens: {name}": value for name, value in asdict(pace).items()},
    }
    return LoopReport(tuple(costs), setting)


def cut(text: str) -> list[Piece]:
    """Return the sentences of a finished answer."""
    buffer = SentenceBuffer()
    return [piece for piece in (*buffer.push(text), *buffer.flush()) if piece]


def draw_changes(pieces: Sequence[Piece], share: float, seed: object) -> list[bool]:
    """Say of each sentence whether it changes: that share of those that can."""
    draw = random.Random(str(seed))
    return [draw.random() < share and _is_corrected(piece) for piece in pieces]


def closed_loop(
    pieces: Sequence[Piece], changes: Sequence[bool], pace: Pace, *, max_restarts: int = MAX_RESTARTS
) -> Course:
    """Go through an answer as `ClosedLoop` does, driving its own `LoopState`."""
    answer = "".join(pieces)
    starts = accumulate(map(len, pieces), initial=0)
    changing = {at for at, changed in zip(starts, changes, strict=False) if changed}
    place = 0  # in the answer, of the sentence under correction

    def rule(question: str, prefix: str, sentence: str) -> str:
        return f"{_ADDED} {sentence}" if place in changing else sentence

    state = LoopState(scripted_aligner(rule).stream("Well?"), max_restarts=max_restarts)
    course, now = Course(), 0
    while course.rounds == 0 or state.stale:
        if state.stale:
            state.restart()
        course.rounds += 1
        upstream = _Upstream(_TOKEN.findall(answer[place:]), now + pace.start, pace.read_ahead)
        while not state.stale:
            token, now = upstream.take(now)
            waits = state.feed(token) if token else state.end()
            while waits and state.waiting:
                segment = state.step()
                now += pace.correction * (segment.stats.forwards > 0)
                place += len(segment.original)
                course.show(_count(segment.text), now)
            if not token:
                break
        course.requested += upstream.written(now)
    return course


def open_loop(pieces: Sequence[Piece], changes: Sequence[bool], pace: Pace) -> Course:
    """Correct each sentence on its way out, and never interrupt."""
    return closed_loop(pieces, changes, pace, max_restarts=0)


def one_by_one(pieces: Sequence[Piece], changes: Sequence[bool], pace: Pace) -> Course:
    """Ask anew for every sentence, of an upstream that stops at the end of one."""
    course, now = Course(), 0
    for piece, changed in zip(pieces, changes, strict=True):
        course.rounds += 1
        course.requested += _count(piece)
        now += pace.start + _count(piece) + _correction(piece, pace)
        course.show(_count(piece) + changed, now)
    return course


def reference(pieces: Sequence[Piece], changes: Sequence[bool], pace: Pace) -> Course:
    """As Stream Aligner's scripts: in each of 16 rounds all the rest is asked for, and one sentence used."""
    course, now = Course(), 0
    for number, piece in enumerate(pieces[:_ROUNDS]):
        rest = sum(map(_count, pieces[number:]))
        course.rounds += 1
        course.requested += rest
        now += pace.start + rest + _correction(piece, pace)
        course.show(_count(piece) + changes[number], now)
    return course


def whole_answer(pieces: Sequence[Piece], changes: Sequence[bool], pace: Pace) -> Course:
    """Wait for all of the answer, then correct it; the correction streams."""
    asked = sum(map(_count, pieces))
    course, now = Course(requested=asked, rounds=1), pace.start + asked
    for piece, changed in zip(pieces, changes, strict=True):
        now += _correction(piece, pace)
        course.show(_count(piece) + changed, now)
    return course


WAYS: dict[str, Way] = {
    "closed loop": closed_loop,
    "open loop": open_loop,
    "one sentence a request": one_by_one,
    "Stream Aligner's scripts": reference,
    "whole answer": whole_answer,
}


class _Upstream:
    """Writes a token in each unit of time, as long as there is room for it."""

    def __init__(self, tokens: Sequence[str], start: int, read_ahead: int) -> None:
        self._tokens = tokens
        self._start = start
        self._read_ahead = read_ahead
        self._written: list[int] = []  # when each token was there ...
        self._taken: list[int] = []  # ... and when it was taken

    def take(self, now: int) -> tuple[str, int]:
        """Return the next token and when one has it; at the end "", and when that is known."""
        self.written(now)
        at = len(self._taken)
        if at == len(self._tokens):
            return "", max(now, self._latest)
        if at == len(self._written):
            self._written.append(self._latest + 1)
        self._taken.append(max(now, self._written[at]))
        return self._tokens[at], self._taken[at]

    def written(self, now: int) -> int:
        """Return how many tokens are there at a time."""
        while len(self._written) < len(self._tokens):
            if len(self._written) - self._read_ahead >= len(self._taken) or self._next() > now:
                break
            self._written.append(self._next())
        return len(self._written)

    @property
    def _latest(self) -> int:
        return self._written[-1] if self._written else self._start

    def _next(self) -> int:
        """Return when the next token will be there: after the one before it, once there is room."""
        behind = len(self._written) - self._read_ahead
        return max(self._latest, self._taken[behind] if behind >= 0 else 0) + 1


def _costs(name: str, way: Way, texts: Sequence[list[Piece]], share: float, pace: Pace) -> LoopCosts:
    courses = [way(pieces, draw_changes(pieces, share, number), pace) for number, pieces in enumerate(texts)]
    return LoopCosts(
        way=name,
        share=share,
        requested=sum(each.requested for each in courses) / sum(each.shown for each in courses),
        rounds=_mean(each.rounds for each in courses),
        first=_mean(each.first or 0 for each in courses),
        wait=_mean(each.waited for each in courses),
    )


def _mean(values: Iterable[int]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _count(text: str) -> int:
    return len(text.split())


def _correction(piece: Piece, pace: Pace) -> int:
    return pace.correction * _is_corrected(piece)


def _is_corrected(piece: Piece) -> bool:
    return piece.kind == "prose" and has_words(piece)


def _read(data: Path) -> list[str]:
    path = data / _ANSWERS / f"{_ANSWERS.rpartition('/')[2]}.jsonl.gz"
    if not path.is_file():
        raise ValueError(f"data: {path} does not exist; give the folder that holds {_ANSWERS}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["answer"].strip() for line in lines]
