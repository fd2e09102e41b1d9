"""Tell prose from what a program reads: JSON, a ReAct agent's labels and actions, a code agent's code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, TypeAlias

from llama_index.core.base.llms.types import ChatMessage, MessageRole

PartKind: TypeAlias = Literal["as it is", "thought", "prose"]
# How an agent that calls no functions says in its text what is to be done (llama_index.core.agent).
Protocol: TypeAlias = Literal["react", "code"]

_PROTOCOL_SIGNS: dict[Protocol, str] = {"react": "Action Input:", "code": "<execute>"}
_MARKS: dict[Protocol, tuple[str, ...]] = {
    "react": ("Thought:", "Answer:", "Action:", "Action Input:"),
    "code": ("<execute>", "</execute>"),
}
_PATTERNS: dict[Protocol, re.Pattern[str]] = {
    "react": re.compile(r"(?<!\S)(?:Thought|Answer|Action(?: Input)?):"),
    "code": re.compile(r"</?execute>"),
}
_AFTER: dict[str, PartKind] = {
    **{"Thought:": "thought", "Answer:": "prose", "Action:": "as it is", "Action Input:": "as it is"},
    **{"<execute>": "as it is", "</execute>": "prose"},
}
# What comes after these is the rest, whatever it looks like; an action without an input is none.
_LAST_MARKS = ("Answer:", "Action Input:")
# What follows the bracket where a text is JSON: data for a program, although nobody asked for it by name.
_JSON = {"{": "\"'}", "[": '"{]'}


def protocol_of(messages: Sequence[ChatMessage]) -> Protocol | None:
    """Return the protocol that the system's messages ask for; nobody else's can."""
    system = [
        each.content or "" for each in messages if each.role in (MessageRole.SYSTEM, MessageRole.DEVELOPER)
    ]
    signs = _PROTOCOL_SIGNS.items()
    return next((protocol for protocol, sign in signs if any(sign in text for text in system)), None)


class PartReader:
    """Reads one answer as it arrives. Joined, the parts are the answer.

    JSON passes as it is if the answer begins with it; prose after it does not. Under a protocol so do its
    marks, and what is after `Action:` and its input, or between `<execute>` tags.
    """

    def __init__(self, protocol: Protocol | None = None) -> None:
        self._protocol = protocol
        self._kind: PartKind | None = "prose" if protocol else None  # None: not known yet
        self._held = ""
        self._is_rest = False  # whether no mark can come any more
        self._in_word = False  # whether the text before `_held` ends within a word
        self._depth, self._quote, self._escaped = 0, "", False  # where in the JSON we are

    def read(self, text: str, *, last: bool = False) -> list[tuple[PartKind, str]]:
        """Take text and return the parts that are certain now; with `last` all that is left."""
        text, self._held = self._held + text, ""
        if self._kind is None:
            self._kind = _guess(text, last)
        if self._kind is None:
            self._held = text
            return []
        if self._protocol:
            parts = self._split(text, self._protocol, last)
        elif self._kind == "as it is":
            end = self._end_of_json(text)
            parts = [("as it is", text[:end]), ("prose", text[end:])]
        else:
            parts = [("prose", text)]
        return [(kind, part) for kind, part in parts if part]

    def rewind(self, shown: str) -> None:
        """Forget what came after `shown`: another continuation of it comes."""
        self._held = ""
        if self._protocol:
            self._kind, self._is_rest, self._in_word = "prose", False, False
            self.read(shown, last=True)

    def _end_of_json(self, text: str) -> int:
        """Return where in `text` the JSON ends that began with the answer."""
        for index, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quote:
                self._escaped = char == "\\"
                self._quote = "" if char == self._quote else self._quote
            elif char in "\"'":
                self._quote = char
            else:
                self._depth += (char in "{[") - (char in "}]")
                if char in "}]" and self._depth <= 0:
                    self._kind = "prose"
                    return index + 1
        return len(text)

    def _split(self, text: str, protocol: Protocol, last: bool) -> list[tuple[PartKind, str]]:
        parts: list[tuple[PartKind, str]] = []
        kind, start = self._kind or "prose", 0
        for mark in _PATTERNS[protocol].finditer(text):
            within_word = protocol == "react" and mark.start() == 0 and self._in_word
            within_code = protocol == "code" and kind == "as it is" and mark[0] != "</execute>"
            without_action = mark[0] == "Action Input:" and kind != "as it is"
            if within_word or within_code or without_action or self._is_rest:
                continue
            parts += [(kind, text[start : mark.start()]), ("as it is", mark[0])]
            kind, start = _AFTER[mark[0]], mark.end()
            self._is_rest = mark[0] in _LAST_MARKS
        self._kind = kind
        end = len(text) if last or self._is_rest else len(text) - self._open_end(text[start:], protocol)
        self._held = text[end:]
        self._in_word = not text[end - 1].isspace() if end else self._in_word
        return [*parts, (kind, text[start:end])]

    def _open_end(self, text: str, protocol: Protocol) -> int:
        """Return how many characters at the end of `text` may yet become a mark."""
        marks = _MARKS[protocol]
        for length in range(min(len(text), max(map(len, marks)) - 1), 0, -1):
            end, before = text[-length:], text[-length - 1 : -length]
            in_word = not before.isspace() if before else self._in_word
            if (protocol == "code" or not in_word) and any(mark.startswith(end) for mark in marks):
                return length
        return 0


def _guess(text: str, last: bool) -> PartKind | None:
    """Say what an answer is that begins with `text`; None if that is not certain yet."""
    start = text.lstrip()
    bracket, rest = start[:1], start[1:].lstrip()
    if not last and (not start or (bracket in _JSON and not rest)):
        return None
    return "as it is" if rest and rest[0] in _JSON.get(bracket, "") else "prose"
