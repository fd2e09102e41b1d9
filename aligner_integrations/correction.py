"""What a correction is: the frozen records that the library hands out."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

FinishReason = Literal["eos", "length", "deadline"]


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace `original[start:end]` (characters) by `replacement`."""

    start: int
    end: int
    replacement: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check noticed about a correction, and what was done about it.

    `action`: `"accepted"` and `"repaired"` proposals are shown, `"kept_original"` and `"withheld"` ones not.
    """

    check: str
    detail: str
    action: str


@dataclass(frozen=True, slots=True)
class DecodeStats:
    """What one correction cost.

    `prompt_tokens` counts the whole prompt, `cached_tokens` the part of it that was already in the
    cache, `new_tokens` what the model wrote (end-of-text included). `forwards` counts runs of the
    network; `seconds` is wall time. `provider` is the execution provider that ran, never the one
    that was merely asked for.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    forwards: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    seconds: float = 0.0
    finish_reason: FinishReason = "eos"
    backend: str = ""
    provider: str = ""


@dataclass(frozen=True, slots=True)
class Correction:
    """A corrected answer. `text` is what to show; `proposed` is what the model wrote."""

    question: str
    answer: str
    text: str
    proposed: str
    edits: tuple[Edit, ...] = ()
    findings: tuple[Finding, ...] = ()
    stats: DecodeStats = DecodeStats()

    @property
    def changed(self) -> bool:
        """Whether the text to show differs from the answer."""
        return self.text != self.answer

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Segment:
    """One sentence of a stream with its correction.

    `index` counts the segments of the stream from 0; `start` is the character offset of
    `original` in the whole uncorrected answer.
    """

    original: str
    text: str
    index: int
    start: int
    edits: tuple[Edit, ...] = ()
    findings: tuple[Finding, ...] = ()
    stats: DecodeStats = DecodeStats()

    @property
    def changed(self) -> bool:
        """Whether the corrected text differs from the original."""
        return self.text != self.original

    def __str__(self) -> str:
        return self.text


# Words, runs of white space and single marks: edits on these read as a person would mark them.
_UNITS = re.compile(r"\w+|\s+|[^\w\s]")
# difflib is quadratic in the worst case; past this many units one edit spans the difference.
_MAX_DIFF_UNITS = 1000
# Where fewer words stay, one edit spans the difference; a few words are always marked one by one.
_LEAST_SHARED_WORDS = 0.4
_FEW_WORDS = 4


def make_edits(original: str, text: str) -> tuple[Edit, ...]:
    """Return the edits that turn `original` into `text`, in order and without overlap."""
    if original == text:
        return ()
    old, new = _UNITS.findall(original), _UNITS.findall(text)
    # A correction is mostly a copy: what is left between the common ends is short.
    start, end = _common_ends(old, new)
    offset = sum(map(len, old[:start]))
    old, new = old[start : len(old) - end], new[start : len(new) - end]
    if len(old) + len(new) > _MAX_DIFF_UNITS:
        return (Edit(offset, offset + sum(map(len, old)), "".join(new)),)
    offsets = list(accumulate(map(len, old), initial=offset))
    matcher = difflib.SequenceMatcher(a=old, b=new, autojunk=False)
    if _shared_words(matcher, old, new) < _LEAST_SHARED_WORDS:
        # Another sentence in its place: marked word by word it could not be read.
        return (Edit(offset, offset + sum(map(len, old)), "".join(new)),)
    return tuple(
        Edit(offsets[a0], offsets[a1], "".join(new[b0:b1]))
        for tag, a0, a1, b0, b1 in matcher.get_opcodes()
        if tag != "equal"
    )


def _shared_words(matcher: difflib.SequenceMatcher[str], old: list[str], new: list[str]) -> float:
    """Share of the words of the longer side that stay; white space says nothing."""
    kept = [unit for block in matcher.get_matching_blocks() for unit in old[block.a : block.a + block.size]]
    kept_words, old_words, new_words = (
        sum(not unit.isspace() for unit in units) for units in (kept, old, new)
    )
    longest = max(old_words, new_words)
    return kept_words / longest if min(old_words, new_words) > _FEW_WORDS else 1.0


def _common_ends(old: list[str], new: list[str]) -> tuple[int, int]:
    limit = min(len(old), len(new))
    start = next((i for i in range(limit) if old[i] != new[i]), limit)
    limit -= start
    end = next((i for i in range(limit) if old[-1 - i] != new[-1 - i]), limit)
    return start, end


def apply_edits(original: str, edits: tuple[Edit, ...]) -> str:
    """Apply `edits` (ordered, not overlapping) to `original`."""
    parts: list[str] = []
    position = 0
    for edit in edits:
        parts += (original[position : edit.start], edit.replacement)
        position = edit.end
    return "".join((*parts, original[position:]))
