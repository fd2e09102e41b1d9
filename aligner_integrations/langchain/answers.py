"""The answer of a chain as it comes: text, a message, or a mapping with an `answer`, whole or in chunks.

Each kind is a stream with the same two methods: `push(chunk)` gives what can be sent now and `close()`
the rest, both as the steps that lead there (`jobs.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from langchain_core.messages import BaseMessage, BaseMessageChunk
from langchain_core.runnables.utils import AddableDict

from aligner_integrations.langchain.jobs import Steps
from aligner_integrations.langchain.messages import MessageStream, OpenCorrector, cut_message
from aligner_integrations.stream import StreamCorrector

# A long chunk is taken in pieces of this many characters, so that its first sentence goes out first.
_SLICE = 256


class AnswerStream(Protocol):
    """An answer that is being corrected while it comes."""

    def push(self, chunk: Any) -> Steps[list[Any]]:
        """Take a chunk; what is ready comes of it."""
        ...

    def close(self) -> Steps[list[Any]]:
        """End the answer; what is left comes of it."""
        ...


class TextStream:
    """Text in, corrected sentences out."""

    def __init__(self, open_corrector: OpenCorrector) -> None:
        self._open = open_corrector
        self._corrector: StreamCorrector | None = None

    def push(self, chunk: str) -> Steps[list[str]]:
        if not isinstance(chunk, str):
            raise TypeError(f"a stream of text goes on with {type(chunk).__name__}; give str chunks only")
        if not chunk:
            return []
        if self._corrector is None:
            self._corrector = yield functools.partial(self._open, chunk, None)
        if not self._corrector.feed(chunk):
            return []
        return [
            segment.text for segment in (yield functools.partial(self._corrector.push, "")) if segment.text
        ]

    def close(self) -> Steps[list[str]]:
        corrector, self._corrector = self._corrector, None
        return [segment.text for segment in (yield corrector.close) if segment.text] if corrector else []


class MappingStream:
    """Mappings with a `question` and an `answer`: the answer is corrected, all other keys pass.

    Keys may come one by one (as from `RunnablePassthrough.assign`); the answer waits for the question.
    """

    def __init__(
        self, open_corrector: OpenCorrector, *, question_key: str, found: Callable[[object], None]
    ) -> None:
        self._open = open_corrector
        self._key = question_key
        self._found = found
        self._waiting: list[object] | None = []  # pieces of the answer; None once the question is known
        self._answer: AnswerStream | None = None
        self._any = False  # whether a part of the answer has been sent

    def push(self, chunk: Mapping[str, Any]) -> Steps[list[AddableDict]]:
        if not isinstance(chunk, Mapping):
            raise TypeError(f"a stream of mappings goes on with {type(chunk).__name__}; give mappings only")
        others = AddableDict({key: value for key, value in chunk.items() if key != "answer"})
        pieces = [chunk["answer"]] if "answer" in chunk else []
        if self._waiting is not None:
            self._waiting += pieces
            pieces = []
            if self._key in chunk:
                self._found(chunk[self._key])
                pieces, self._waiting = self._waiting, None
        out = [others] if others else []
        for piece in pieces:
            if self._answer is None:
                self._answer = open_answer(piece, self._open)
            out += self._sent((yield from self._answer.push(piece)))
        return out

    def close(self) -> Steps[list[AddableDict]]:
        if self._waiting is not None or self._answer is None:
            raise TypeError(mapping_cure(self._key))
        out = self._sent((yield from self._answer.close()))
        # A key of the input is a key of the output, even if nothing is left of its text.
        return out if self._any or not isinstance(self._answer, TextStream) else [AddableDict(answer="")]

    def _sent(self, parts: list[Any]) -> list[AddableDict]:
        self._any = self._any or bool(parts)
        return [AddableDict(answer=part) for part in parts]


def slices(chunk: Any) -> Iterable[Any]:
    """Cut a chunk with a long text into several that join to the same."""
    text = chunk.content if isinstance(chunk, BaseMessageChunk) else chunk
    mapping = isinstance(chunk, Mapping)
    text = chunk.get("answer") if mapping else text
    if not isinstance(text, str) or len(text) <= _SLICE:
        return (chunk,)
    texts = [text[start : start + _SLICE] for start in range(0, len(text), _SLICE)]
    if isinstance(chunk, BaseMessageChunk):
        return cut_message(chunk, texts)
    return [{**chunk, "answer": texts[0]}, *({"answer": each} for each in texts[1:])] if mapping else texts


def open_answer(first: object, open_corrector: OpenCorrector) -> AnswerStream:
    """Return the stream for an answer that begins with `first`."""
    if isinstance(first, str):
        return TextStream(open_corrector)
    if isinstance(first, BaseMessage):
        return MessageStream(open_corrector)
    raise TypeError(
        f"an answer must be a str or a message, got {type(first).__name__}; put a step before the aligner "
        "that gives one, for example StrOutputParser()"
    )


def mapping_cure(question_key: str) -> str:
    """Say what a mapping for the aligner must look like."""
    return (
        f"a mapping for the aligner must have {question_key!r} and 'answer'; "
        f'give {{"{question_key}": ..., "answer": ...}}, a str or a message'
    )
