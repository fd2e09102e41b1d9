"""How a surface is judged, and the report of all of them. Both kits share it; it knows no framework."""

from __future__ import annotations

import asyncio
import difflib
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from aligner_integrations.testing.seen import Seen, longest_piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """What one surface showed. Counts are of characters; None is what cannot be told there.

    Attributes:
        name: Which surface.
        judged: Whether it counts; a chain's model runs come before its guard, and do not.
        leaked: The longest piece of the canary that could be read.
        lost: What of the expected text is missing.
        duplicated: Text too much that the expected text has: shown twice.
        foreign: Text too much that the expected text has not.
        held: What upstream had handed out when the first text was shown.
        chunks: How many pieces showed text.
        equal: Whether streamed text, final message and stored state are the same.
        error: What was raised while it was driven.
    """

    name: str
    judged: bool = True
    leaked: int = 0
    lost: int | None = None
    duplicated: int | None = None
    foreign: int | None = None
    held: int | None = None
    chunks: int = 0
    equal: bool | None = None
    error: str | None = None

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong, in words; empty where nothing is."""
        found = {
            "raises": self.error is not None,
            "leaks": self.leaked > 0,
            "loses": bool(self.lost),
            "duplicates": bool(self.duplicated),
            "adds": bool(self.foreign),
            "differs": self.equal is False,
        }
        return tuple(fault for fault, is_there in found.items() if is_there)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


@dataclass(frozen=True, slots=True)
class Report:
    """One row for each surface; `str(report)` is a Markdown table."""

    surfaces: tuple[Surface, ...]
    expected: str | None = None

    def __getitem__(self, name: str) -> Surface:
        return next(surface for surface in self.surfaces if surface.name == name)

    @property
    def failures(self) -> tuple[Surface, ...]:
        """The judged surfaces that are not clean."""
        return tuple(surface for surface in self.surfaces if surface.judged and not surface.clean)

    @property
    def clean(self) -> bool:
        """Whether every judged surface is clean."""
        return not self.failures

    def assert_clean(self) -> None:
        """Raise an AssertionError with the table unless every judged surface is clean."""
        if not self.clean:
            errors = "".join(f"\n{one.name}: {one.error}" for one in self.failures if one.error)
            names = ", ".join(surface.name for surface in self.failures)
            raise AssertionError(f"not clean: {names}\n\n{self}{errors}")

    def __str__(self) -> str:
        columns = ("leaked", "lost", "duplicated", "foreign", "held", "chunks", "equal")
        lines = [f"| surface | {' | '.join(columns)} | verdict |", "| --- |" + " --- |" * (len(columns) + 1)]
        for surface in self.surfaces:
            verdict = ", ".join(surface.faults) or "clean"
            cells = [_cell(getattr(surface, column)) for column in columns]
            lines.append(
                f"| {' | '.join([surface.name, *cells, verdict if surface.judged else 'not judged'])} |"
            )
        return "\n".join(lines)


def _cell(value: int | bool | None) -> str:
    if value is None:
        return "-"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def judge(name: str, seen: Seen, canary: str, expected: str | None, allowed: str) -> Surface:
    """Return the row of a surface; pieces of the canary that `allowed` has tell nothing."""
    leaked = longest_piece(canary, seen.everything, allowed=allowed)
    if not seen.has_text:
        return Surface(name=name, judged=seen.judged, leaked=leaked, error=seen.error)
    pieces, held = seen.answer
    wholes = seen.whole_texts
    if not pieces and wholes:  # nothing was streamed: what a reader sees is the whole at the end
        pieces = wholes[-1:]
    text = "".join(pieces)
    lost = duplicated = foreign = None
    if expected is not None:
        lost, duplicated, foreign = compare(expected, text)
    equal = not seen.differs and all(whole == text for whole in wholes)
    return Surface(
        name=name,
        judged=seen.judged,
        leaked=leaked,
        lost=lost,
        duplicated=duplicated,
        foreign=foreign,
        held=held,
        chunks=sum(1 for piece in pieces if piece),
        equal=equal if wholes or seen.differs else None,
        error=seen.error,
    )


def compare(expected: str, text: str) -> tuple[int, int, int]:
    """Return how many characters of `expected` are missing from `text`, and how many are too many.

    The latter in two parts: those of pieces that `expected` has (shown twice), and all others.
    """
    if text == expected:
        return 0, 0, 0
    lost = duplicated = foreign = 0
    matcher = difflib.SequenceMatcher(None, expected, text, autojunk=False)
    for tag, start, end, at, to in matcher.get_opcodes():
        if tag == "equal":
            continue
        lost += end - start
        if text[at:to] in expected:
            duplicated += to - at
        else:
            foreign += to - at
    return lost, duplicated, foreign


def look_at_texts(canary: Any, expected: str | None) -> None:
    """Raise an error if a check with these texts could not fail."""
    if not isinstance(canary, str):
        raise TypeError(f"canary must be a str, got {type(canary).__name__}")
    if not canary:
        raise ValueError("canary is empty; give a text that the model writes and nobody may see")
    if expected is not None and canary in expected:
        raise ValueError("canary is part of expected; give a text that must not be shown")


def chosen(drives: Iterable[str], surfaces: Iterable[str] | None) -> list[str]:
    """Return the names of the surfaces to report on, in the order of `drives`."""
    if isinstance(surfaces, str):
        raise TypeError(f"surfaces is a str; give a list: [{surfaces!r}]")
    known = list(drives)
    names = known if surfaces is None else list(surfaces)
    for name in names:
        if name not in known:
            raise ValueError(f"surfaces has {name!r}, which this target has not; choose from {known}")
    return [name for name in known if name in names]


def texts_of(canary: str, expected: str | None, wholes: Iterable[Seen]) -> tuple[str | None, str]:
    """Return the text to be shown, and the one whose pieces of the canary tell nothing."""
    if expected is not None:
        return expected, expected
    answers = ["".join(whole.answer[0]) for whole in wholes if whole.error is None]
    if not answers or canary in answers[0]:  # what one surface lets through is no excuse for the others
        return (answers[0] if answers else None), ""
    return answers[0], answers[0]


def drive_all(
    target: Any, drives: Mapping[str, Callable[[Any, Any], Awaitable[None] | None]], seen: Mapping[str, Seen]
) -> None:
    """Drive the synchronous surfaces, then the others in one event loop: clients are often bound to one."""
    later = []
    for name, drive in drives.items():
        if inspect.iscoroutinefunction(drive):
            later.append((seen[name], drive))
            continue
        try:
            drive(target, seen[name])
        except Exception as error:  # whatever a target raises is a finding, and the next surface is due
            seen[name].note(error)

    async def run() -> None:
        for place, drive in later:
            try:
                await drive(target, place)
            except Exception as error:
                place.note(error)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(run())
        return
    with ThreadPoolExecutor(1) as pool:  # in a notebook or an async test a loop is running here already
        pool.submit(asyncio.run, run()).result()
