"""What one surface showed, and how it differs from what it should have shown."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

# Random digits: a piece of a canary would be found there by chance.
_IDS = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|\b0x[0-9a-f]+")
_INPUTS = ("human", "user", "system", "developer")


class Shown:
    """Text as it was shown, kept by message, and all else that a reader of the surface could find."""

    def __init__(self, handed_out: Callable[[], int] | None = None, *, judged: bool = True) -> None:
        self.judged = judged
        self.has_text = True
        self.error: str | None = None
        self.models: Shown | None = None  # the model runs of a chain, where they are apart
        self._handed_out = handed_out
        self._pieces: dict[str, list[str]] = {}
        self._held: dict[str, int] = {}
        self._finals: list[tuple[str | None, str]] = []
        self._with_tools: set[str] = set()
        self._seen: list[str] = []

    def place(self, *, of_model: bool, is_root: bool) -> Shown | None:
        """Return where a run's output counts; None for a chain's inner steps, which come before its guard."""
        if self.models is None or is_root:
            return self
        return self.models if of_model else None

    def see(self, output: Any) -> None:
        """Note every string in `output`, whatever it is for; messages that went in are left out."""
        self._seen += strings_in(output)

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

    def message(self, message: AIMessage) -> None:
        """Note a whole message, which takes the place of what was shown under its id."""
        if calls_tools(message):
            self.calls_tools(str(message.id))
        self.put(text_of(message), str(message.id))

    def final(self, text: str, message: str | None = None) -> None:
        """Note a whole text that has to equal what was streamed: of one message, or of the last one."""
        self._finals.append((message, text))

    def chunk(self, chunk: Any, message: str = "") -> None:
        """Note a chunk of a stream, all of it, and its text."""
        self.see(chunk)
        if calls_tools(chunk):
            self.calls_tools(message)
        self.add(text_of(chunk), message)

    def calls_tools(self, message: str) -> None:
        """Note that a message calls tools: it is not the answer."""
        self._with_tools.add(message)

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
        joined = ["".join(pieces) for pieces in self._pieces.values()]
        return [*joined, *(text for _, text in self._finals), *self._seen]


def text_of(output: Any) -> str:
    """Return the text that a reader of this output is shown; of a graph's state, the last answer."""
    if isinstance(output, str):
        return output
    if isinstance(output, Mapping):
        if "messages" in output:
            answers = [message for message in messages_in(output) if not calls_tools(message)]
            return str(answers[-1].text) if answers else ""
        if "generations" in output:
            return str(output["generations"][0][0]["text"])
        return next((text_of(output[key]) for key in ("answer", "output") if key in output), "")
    text = getattr(output, "text", "")
    return str(text) if isinstance(text, str) else ""


def messages_in(output: Any) -> list[AIMessage]:
    """Return the model's messages in a state or an update of one, in order."""
    if isinstance(output, AIMessage):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [message for part in output for message in messages_in(part)]
    return []


def calls_tools(output: Any) -> bool:
    """Return whether this is a message, or a chunk of one, that calls tools."""
    names = ("tool_calls", "tool_call_chunks", "invalid_tool_calls")
    return isinstance(output, BaseMessage) and any(getattr(output, name, None) for name in names)


def strings_in(value: Any, around: tuple[int, ...] = ()) -> Iterator[str]:
    """Yield every string in an output; ids, numbers, and what a person or the system said are none."""
    if isinstance(value, str):
        yield _IDS.sub("", value)
    elif not _is_input(value) and id(value) not in around:
        parts: Iterable[Any] | None = None
        if isinstance(value, Mapping):
            parts = [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            parts = value
        elif isinstance(value, type):
            pass
        elif dataclasses.is_dataclass(value):
            parts = [getattr(value, one.name) for one in dataclasses.fields(value)]
        elif hasattr(value, "__pydantic_fields__"):
            parts = [*vars(value).values(), value.__pydantic_extra__]
        if parts is None:
            yield _IDS.sub("", repr(value))
        else:
            for part in parts:
                yield from strings_in(part, (*around, id(value)))


def _is_input(value: Any) -> bool:
    if isinstance(value, HumanMessage | SystemMessage | int | float | datetime | UUID | None):
        return True
    return isinstance(value, Mapping) and "content" in value and value.get("role") in _INPUTS


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
