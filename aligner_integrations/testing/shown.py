"""What one surface showed, and how it differs from what it should have shown."""

from __future__ import annotations

import dataclasses
import difflib
import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

# Random digits: a piece of a canary would be found there by chance, but not one of this many characters.
_NO_CHANCE = 8
_IDS = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|\b0x[0-9a-f]+")
_INPUTS = ("human", "user", "system", "developer")
_OF_HISTORY = ("ai", "assistant", "tool")  # went in, or is new: its id tells

Path = tuple[str, ...]
WentIn = Mapping[str, Any]  # the content of each message that went in, by its id


class Shown:
    """Text as it was shown, kept by message, and all else that a reader of the surface could find."""

    def __init__(
        self,
        canary: str,
        *,
        handed_out: Callable[[], int] | None = None,
        went_in: WentIn | None = None,
        judged: bool = True,
    ) -> None:
        self.judged = judged
        self.has_text = True
        self.error: str | None = None
        self.models: Shown | None = None  # the model runs of a chain, where they are apart
        self._canary = canary
        # As an int has it: without zeros in front. Fewer than four digits are found in any count.
        number = canary.lstrip("0") if canary.isdecimal() else ""
        self._number = number if len(number) >= 4 else ""
        self._handed_out = handed_out
        self._went_in = went_in or {}
        self._pieces: dict[str, list[str]] = {}
        self._held: dict[str, int] = {}
        self._finals: list[tuple[str | None, str]] = []
        self._with_tools: set[str] = set()
        self._seen: list[str] = []
        self._series: dict[tuple[str, Path], list[str]] = defaultdict(list)

    def place(self, *, of_model: bool, is_root: bool) -> Shown | None:
        """Return where a run's output counts; None for a chain's inner steps, which come before its guard."""
        if self.models is None or is_root:
            return self
        return self.models if of_model else None

    def see(self, output: Any, source: str = "") -> None:
        """Note every string in `output`, whatever it is for; messages that went in are left out.

        Strings that one source shows in the same place, one after the other, are read as one text too: raw
        tokens may come one by one.
        """
        for path, value in leaves_in(output, self._went_in):
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

    def message(self, message: AIMessage) -> None:
        """Note a whole message, which takes the place of what was shown under its id."""
        if calls_tools(message):
            self.calls_tools(str(message.id))
        self.put(self.text_of(message), str(message.id))

    def final(self, text: str, message: str | None = None) -> None:
        """Note a whole text that has to equal what was streamed: of one message, or of the last one."""
        self._finals.append((message, text))

    def chunk(self, chunk: Any, message: str = "") -> None:
        """Note a chunk of a stream, all of it, and its text."""
        if _has_gone_in(chunk, self._went_in):
            return
        self.see(chunk, message)
        if calls_tools(chunk):
            self.calls_tools(message)
        self.add(self.text_of(chunk), message)

    def calls_tools(self, message: str) -> None:
        """Note that a message calls tools: it is not the answer."""
        self._with_tools.add(message)

    def text_of(self, output: Any) -> str:
        """Return the text that a reader of this output is shown; of a graph's state, the last answer."""
        return text_of(output, self._went_in)

    def messages_in(self, output: Any) -> list[AIMessage]:
        """Return the model's messages in a state or an update of one, in order."""
        return messages_in(output, self._went_in)

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


def text_of(output: Any, went_in: WentIn) -> str:
    """Return the text that a reader of this output is shown; see `Shown.text_of`."""
    if isinstance(output, str):
        return output
    if isinstance(output, Mapping):
        if "messages" in output:
            answers = [message for message in messages_in(output, went_in) if not calls_tools(message)]
            return str(answers[-1].text) if answers else ""
        if "generations" in output:
            return str(output["generations"][0][0]["text"])
        return next((text_of(output[key], went_in) for key in ("answer", "output") if key in output), "")
    text = getattr(output, "text", "")
    return str(text) if isinstance(text, str) else ""


def messages_in(output: Any, went_in: WentIn) -> list[AIMessage]:
    """Return the model's messages, without those that went in; see `Shown.messages_in`."""
    if isinstance(output, AIMessage):
        return [] if _has_gone_in(output, went_in) else [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [message for part in output for message in messages_in(part, went_in)]
    return []


def calls_tools(output: Any) -> bool:
    """Return whether this is a message, or a chunk of one, that calls tools."""
    names = ("tool_calls", "tool_call_chunks", "invalid_tool_calls")
    return isinstance(output, BaseMessage) and any(getattr(output, name, None) for name in names)


def leaves_in(
    value: Any, went_in: WentIn, path: Path = (), around: tuple[int, ...] = ()
) -> Iterator[tuple[Path, str | int]]:
    """Yield every string and int in an output, with the keys that lead there.

    The items of a list have the list's own path. Floats, times, and messages that went in are left out.
    """
    if isinstance(value, str | int):
        yield path, value
    elif not _is_input(value, went_in) and id(value) not in around:
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
                yield from leaves_in(part, went_in, where, (*around, id(value)))


def _is_input(value: Any, went_in: WentIn) -> bool:
    if isinstance(value, HumanMessage | SystemMessage | float | datetime | uuid.UUID | None):
        return True
    if isinstance(value, Mapping) and "content" in value and value.get("role") in _INPUTS:
        return True
    return _has_gone_in(value, went_in)


def _has_gone_in(value: Any, went_in: WentIn) -> bool:
    """Return whether this is a message that went in, as it was: one rewritten under its id is not."""
    if isinstance(value, BaseMessage):
        return value.id is not None and value.id in went_in and bool(went_in[value.id] == value.content)
    if isinstance(value, Mapping) and "content" in value and isinstance(value.get("id"), str):
        return value["id"] in went_in and bool(went_in[value["id"]] == value["content"])
    return False


def with_ids(given: Any) -> Any:
    """Return an input whose messages have ids, so that each is known where it comes out again."""
    if isinstance(given, BaseMessage):
        return given if given.id else given.model_copy(update={"id": str(uuid.uuid4())})
    if isinstance(given, list):
        return [with_ids(part) for part in given]
    if isinstance(given, dict):
        filled = {key: with_ids(part) for key, part in given.items()}
        if isinstance(said := filled.get("messages"), list):
            filled["messages"] = [with_ids(_from_pair(message)) for message in said]
        is_message = "content" in given and given.get("role") in _OF_HISTORY
        return {"id": str(uuid.uuid4()), **filled} if is_message else filled
    return given


def _from_pair(message: Any) -> Any:
    if isinstance(message, tuple) and len(message) == 2 and message[0] in _OF_HISTORY[:2]:
        return AIMessage(message[1])
    return message


def messages_that_went_in(given: Any) -> dict[str, Any]:
    """Return the content of each message of an input, by its id."""
    if isinstance(given, BaseMessage):
        return {given.id: given.content} if given.id else {}
    if isinstance(given, dict):
        if {"role", "content", "id"} <= given.keys():
            return {given["id"]: given["content"]}
        given = list(given.values())
    if not isinstance(given, list):
        return {}
    return {id: content for part in given for id, content in messages_that_went_in(part).items()}


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
