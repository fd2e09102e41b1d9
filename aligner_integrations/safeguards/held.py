"""What an answer holds that a correction may not lose or alter: code, tables, formulas, JSON, links."""

from __future__ import annotations

import json
import re
import textwrap
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

_FENCE = re.compile(r"[ \t>]*(`{3,}|~{3,})([^\n]*)")
_DELIMITER_CELL = re.compile(r":?-+:?")
_INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
# Inline mathematics between single dollars, which amounts of money are not.
_DOLLARS = re.compile(r"(?<![\\$\w])\$(?![\s$])([^$\n]*[^$\s\\])\$(?![\w$])")
_MATHEMATICS = re.compile(r"[\\^_={]")
_BLOCKS = (("\\[", "\\]"), ("$$", "$$"), ("\\begin{", "\\end{"))
_DISPLAYS = (("\\[", "\\]"), ("\\(", "\\)"), ("$$", "$$"), ("\\begin{", "\\end{"))
_URL = re.compile(r"https?://[^\s<>\"'`)\]]+")
_LINK = re.compile(r"\[([^\[\]\n]{1,200})\]\((https?://[^\s()]{1,2000})\)")
_QUOTE = re.compile(r"\"([^\"\n]{3,300})\"|“([^“”\n]{3,300})”")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# A line of JSON that was cut: a key with its value, or a string or number with the comma behind it.
_KEY = re.compile(
    r"(?:\s*(?:\"[^\"\n]*\"|-?\d[\d.eE+-]*),\s*\Z)|[\[{\s]*\"[^\"\n]*\"\s*:\s*(?:[\"\[{\d-]|true\b|false\b|null\b)"
)
# A citation, whole with its link; or inline code, where brackets are none. Counted from 1: [0, 1] is none.
_CITATION = re.compile(
    r"""`[^`\n]*`
      | (?P<mark>
            \[(?: \^[\w.:-]{1,32} | [1-9]\d{0,2} (?:\s?[,;–-]\s?[1-9]\d{0,2})* )\]
            (?: \( [^()\s]* (?:\([^()\s]*\)[^()\s]*)* (?:[ ]"[^"\n]*")? \) )?
        )""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """A fenced block: `text[start:end]` with its fences, what is between them, and the opening line."""

    start: int
    end: int
    body: str
    opening: str
    closed: bool

    @property
    def code(self) -> str:
        """The body as far as it matters: without common indentation and white space at the ends of lines."""
        lines = textwrap.dedent(self.body.expandtabs(4)).split("\n")
        return "\n".join(line.rstrip() for line in lines).strip("\n")


def code_blocks(text: str) -> list[CodeBlock]:
    """Return the fenced code blocks of `text`; one that is never closed runs to its end."""
    blocks: list[CodeBlock] = []
    start = inner = at = 0
    opening = ""
    for line in text.splitlines(keepends=True):
        match = _FENCE.match(line)
        if match and not opening:
            start, inner, opening = at, at + len(line), line.rstrip()
        elif match and not match[2].strip() and match[1].startswith(_marks(opening)):
            blocks.append(CodeBlock(start, at + len(line), text[inner:at], opening, closed=True))
            opening = ""
        at += len(line)
    if opening:
        blocks.append(CodeBlock(start, len(text), text[inner:], opening, closed=False))
    return blocks


def prose_of(text: str) -> str:
    """Return `text` without its code, its addresses, and its formulas between marks of their own."""
    prose = _DOLLARS.sub(" ", without_code(text))
    for opener, closer in _DISPLAYS[:3]:
        parts, at = list[str](), 0
        for start, end in _between(prose, opener, closer):
            parts.append(prose[at:start])
            at = end
        prose = " ".join((*parts, prose[at:]))
    return prose


def without_code(text: str) -> str:
    """Return `text` with nothing in place of its code blocks, inline code and addresses."""
    parts, at = list[str](), 0
    for block in code_blocks(text):
        parts.append(text[at : block.start])
        at = block.end
    return _URL.sub(" ", _INLINE_CODE.sub(" ", "\n".join((*parts, text[at:]))))


def inline_code(text: str) -> set[str]:
    """Return what stands between single backticks outside code blocks."""
    return {match[1].strip() for match in _INLINE_CODE.finditer(text)}


def tables(text: str) -> list[tuple[tuple[str, ...], ...]]:
    """Return the cells of each table, row by row, without the delimiter row."""
    found: list[tuple[tuple[str, ...], ...]] = []
    lines, at = text.split("\n"), 1
    while at < len(lines):
        # Some write the row of dashes without its pipes; then a row with pipes has to follow.
        row, after = lines[at], lines[at + 1] if at + 1 < len(lines) else ""
        delimits = "|" in lines[at - 1] and "-" in row and "|" in (row + after)
        if delimits and all(map(_DELIMITER_CELL.fullmatch, _cells(row))):
            end = at + 1
            while end < len(lines) and "|" in lines[end]:
                end += 1
            found.append(tuple(_cells(line) for line in (lines[at - 1], *lines[at + 1 : end])))
            at = end
        at += 1
    return found


def formulas(text: str) -> set[str]:
    """Return the LaTeX of `text` without its delimiters and white space."""
    found = {
        match[1]
        for match in _DOLLARS.finditer(text)
        if _MATHEMATICS.search(match[1]) or (len(match[1]) == 1 and match[1].isalpha())
    }
    for opener, closer in _DISPLAYS:
        found.update(text[start:end] for start, end in _between(text, opener, closer))
    return {bare for body in found if (bare := "".join(body.split()))}


class OpenBlocks:
    """Follows an answer line by line: is it inside a display formula, or in JSON of several lines?

    Both begin at the start of a line, JSON with a bracket alone, and end at a blank one at the latest.
    """

    def __init__(self) -> None:
        self._awaited, self._depth = "", 0

    def holds(self, line: str) -> tuple[bool, bool]:
        """Return whether `line`, which comes next, belongs to a formula, and whether to JSON."""
        return bool(self._awaited or _opened(line)), bool(self._depth or line.strip() in ("{", "["))

    def take(self, line: str) -> None:
        """Go on by `line`."""
        formula, is_json = self.holds(line)
        is_last = len(line[len(line.rstrip()) :].splitlines()) > 1
        if is_json:
            self._depth = max(0, self._depth + sum(map(line.count, "{[")) - sum(map(line.count, "}]")))
        if formula:
            opener = "" if self._awaited else _opened(line)
            closer = self._awaited or dict(_BLOCKS)[opener]
            self._awaited = "" if closer in line.lstrip()[len(opener) :] else closer
        if is_last:
            self._awaited, self._depth = "", 0


def _opened(line: str) -> str:
    start = line.lstrip()
    return next((opener for opener, _ in _BLOCKS if start.startswith(opener)), "")


def is_other_json(answer: str, proposed: str) -> bool:
    """Return whether `answer` is JSON, or a line of it, and `proposed` does not say the same."""
    try:
        value = _as_json(answer)
        if value is None:
            bare = _KEY.match(answer) is not None
            return bare and "".join(proposed.split()) != "".join(answer.split())
        return _as_json(proposed) != value
    except RecursionError:  # nested too deeply to compare
        return proposed != answer


def links(text: str) -> set[str]:
    """Return the web addresses of `text`."""
    return {match[0].rstrip(".,;:!?*_") for match in _URL.finditer(text)}


def named_links(text: str) -> list[tuple[str, str]]:
    """Return name and address of each Markdown link, in order."""
    return [(match[1], match[2]) for match in _LINK.finditer(text)]


def quotations(text: str) -> list[str]:
    """Return what stands in double quotation marks."""
    return [match[1] or match[2] for match in _QUOTE.finditer(text)]


def numbers(text: str) -> list[str]:
    """Return the numbers of `text` as they are written."""
    return _NUMBER.findall(text)


def citations(text: str) -> list[re.Match[str]]:
    """Return the citation marks of `text`, such as `[1]`, `[2, 3]`, `[^1]` and `[1](url)`.

    Code has none, nor has a text with numbers in brackets that do not ascend: they are data.
    """
    marks = citation_marks(text)
    if marks and ("```" in text or "~~~" in text):
        blocks = code_blocks(text)
        starts = [block.start for block in blocks]
        before = [bisect_right(starts, mark.start()) for mark in marks]
        inside = (at and mark.start() < blocks[at - 1].end for mark, at in zip(marks, before, strict=True))
        marks = [mark for mark, is_code in zip(marks, inside, strict=True) if not is_code]
    return marks if all(map(_ascends, marks)) else []


def citation_marks(text: str) -> list[re.Match[str]]:
    """Return what looks like a citation, wherever it stands."""
    return [match for match in _CITATION.finditer(text) if match["mark"]]


def _ascends(mark: re.Match[str]) -> bool:
    if mark[0].startswith("[^"):
        return True
    found = [int(number) for number in re.findall(r"\d+", mark[0].partition("]")[0])]
    return all(first < second for first, second in pairwise(found))


def _marks(opening: str) -> str:
    match = _FENCE.match(opening)
    return match[1] if match else ""


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip(" \t\r>").strip("|").split("|"))


def _between(text: str, opener: str, closer: str) -> Iterator[tuple[int, int]]:
    """Yield where what stands between `opener` and `closer` begins and ends."""
    at = text.find(opener)
    while at >= 0:
        end = text.find(closer, at + len(opener))
        if end < 0:
            return
        yield at + len(opener), end
        at = text.find(opener, end + len(closer))


def _as_json(text: str) -> list[object] | None:
    """Return a JSON object or array, or lines of them; None for any other text."""
    bare = text.strip()
    if bare[:1] not in ("{", "[") or bare[-1] not in "}]":
        return None
    try:
        return [json.loads(bare, parse_constant=str)]
    except ValueError:
        pass
    try:
        return [json.loads(line, parse_constant=str) for line in bare.split("\n") if line.strip()]
    except ValueError:
        return None
