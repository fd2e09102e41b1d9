"""What one surface showed: its text, by message, and all else a reader could find. It knows no framework."""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

# Random digits: a piece of a canary would be found there by chance, but not one of this many characters.
_NO_CHANCE = 8
_IDS = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|\b0x[0-9a-f]+")

Path = tuple[str, ...]
IsInput = Callable[[Any], bool]  # whether a value went in, and is therefore not searched


class Seen:
    """Text as it was shown, kept by message, and all else that a reader of the surface could find."""

    def __init__(
        self,
        canary: str,
        *,
        is_input: IsInput = lambda value: False,
        handed_out: Callable[[], int] | None = None,
        judged: bool = True,
    ) -> None:
        self.judged = judged
        self.has_text = True
        self.error: str | None = None
        self.absent = False  # there is no such surface here
        self.differs = False  # found while it was driven: two texts that have to be the same are not
        self._canary = canary
        # As an int has it: without zeros in front. Fewer than four digits are found in any count.
        number = canary.lstrip("0") if canary.isdecimal() else ""
        self._number = number if len(number) >= 4 else ""
        self._is_input = is_input
        self._handed_out = handed_out
        self._pieces: dict[str, list[str]] = {}
        self._held: dict[str, int] = {}
        self._finals: list[tuple[str | None, str]] = []
        self._with_tools: set[str] = set()
        self._seen: list[str] = []
        self._series: dict[tuple[str, Path], list[str]] = defaultdict(list)

    def see(self, output: Any, source: str = "") -> None:
        """Note every string in `output`, whatever it is for; what went in is left out.

        Strings that one source shows in the same place, one after the other, are read as one text too: raw
        tokens may come one by one.
        """
        for path, value in leaves_in(output, self._is_input):
            if isinstance(value, int):
                if self._number and self._number in str(value):
                    self._seen.append(str(value))
                continue
            text = _IDS.sub(self._unless_telling, value)
            self._seen.append(text)
            self._series[source, path].append(text)

    def _unless_telling(self, found: re.Match[str]) -> str:
        """Keep of an id only what tells of the canary, which may look like an id itself."""
        text = found[0]
        tells = text in self._canary or longest_piece(self._canary, [text]) >= _NO_CHANCE
        return text if tells else ""

    def add(self, text: str, message: str = "") -> None:
        """Note that `text` was appended to what is shown of a message."""
        pieces = self._pieces.setdefault(message, [])
        if text:
            if self._handed_out:
                self._held.setdefault(message, self._handed_out())
            pieces.append(text)

    def put(self, text: str, message: str = "") -> None:
        """Note that a message is now shown as `text`, whatever was shown of it before."""
        self._pieces.pop(message, None)
        self.add(text, message)

    def final(self, text: str, message: str | None = None) -> None:
        """Note a whole text that has to equal what was streamed: of one message, or of the last one."""
        self._finals.append((message, text))

    def calls_tools(self, message: str) -> None:
        """Note that a message calls tools: it is not the answer."""
        self._with_tools.add(message)

    def note(self, error: Exception) -> None:
        """Note what was raised while the surface was driven; the reader of a log sees it too."""
        self.see(str(error))
        self.error = f"{type(error).__name__}: {error}"

    @property
    def answer(self) -> tuple[list[str], int | None]:
        """The pieces of the answer, and what upstream had handed out when the first one was shown.

        The answer is the last message that calls no tools. An earlier one with the same text is the same
        answer shown twice.
        """
        texts = {
            message: "".join(pieces)
            for message, pieces in self._pieces.items()
            if message not in self._with_tools and any(pieces)
        }
        if not texts:
            return [], None
        last = list(texts)[-1]
        same = [message for message, text in texts.items() if text == texts[last]]
        return [piece for message in same for piece in self._pieces[message]], self._held.get(same[0])

    @property
    def whole_texts(self) -> list[str]:
        """The whole texts that the answer has to equal."""
        shown = [m for m in self._pieces if m not in self._with_tools and any(self._pieces[m])]
        return [text for message, text in self._finals if message is None or message in shown[-1:]]

    @property
    def everything(self) -> list[str]:
        """All that could be read, with each message's pieces joined: a canary may be cut in two."""
        joined = ["".join(pieces) for pieces in (*self._pieces.values(), *self._series.values())]
        return [*joined, *(text for _, text in self._finals), *self._seen]


def leaves_in(
    value: Any, is_input: IsInput, path: Path = (), around: tuple[int, ...] = ()
) -> Iterator[tuple[Path, str | int]]:
    """Yield every string and int in an output, with the keys that lead there.

    The items of a list have the list's own path. Floats, times, and what went in are left out.
    """
    if isinstance(value, str | int):
        yield path, value
    elif isinstance(value, float | datetime | uuid.UUID | None) or is_input(value) or id(value) in around:
        return
    else:
        parts: Iterable[tuple[Path, Any]] | None = None
        if isinstance(value, Mapping):
            parts = [((*path, str(key)), part) for key, part in value.items()]
            parts += [((*path, "", str(key)), key) for key in value]  # the keys can be read too
        elif isinstance(value, list | tuple | set | frozenset):
            parts = [(path, part) for part in value]
        elif isinstance(value, type):
            pass
        elif dataclasses.is_dataclass(value):
            parts = [((*path, one.name), getattr(value, one.name)) for one in dataclasses.fields(value)]
        elif hasattr(value, "__pydantic_fields__"):
            fields = {**vars(value), **(value.__pydantic_extra__ or {})}
            parts = [((*path, name), part) for name, part in fields.items()]
        if parts is None:
            yield path, repr(value)
        else:
            for where, part in parts:
                yield from leaves_in(part, is_input, where, (*around, id(value)))


def longest_piece(canary: str, texts: Iterable[str], *, allowed: str = "") -> int:
    """Return the length of the longest piece of `canary` in any of `texts` that tells of it.

    Pieces shorter than four characters or a third of the canary, and pieces that are also in `allowed`,
    tell nothing.
    """
    shortest = min(len(canary), max(4, -(-len(canary) // 3)))
    longest = 0
    for text in set(texts):
        for start in range(len(canary) - shortest + 1):
            end = start + max(shortest, longest + 1)
            while end <= len(canary) and canary[start:end] in text:
                if canary[start:end] not in allowed:
                    longest = end - start
                end += 1
    return longest
