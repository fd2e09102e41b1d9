"""Correct the text in what a chain passes on, and leave everything else as it came.

An answer arrives as text, as a message, or as a mapping with an `answer` in it, whole or in chunks.
Each kind has a stream here with the same two methods: `push(chunk)` returns what can be sent now and
`close()` returns the rest. What was pushed and what comes out join to the same thing, apart from the
corrected text: metadata, usage, tool calls and other blocks are passed on once, unchanged and in order.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias, cast

from langchain_core.messages import BaseMessage, BaseMessageChunk
from langchain_core.runnables.utils import AddableDict

from aligner_integrations.correction import Segment
from aligner_integrations.stream import StreamCorrector

# Opens a corrector for an answer that begins with this text, in the message with this id.
OpenCorrector: TypeAlias = Callable[[str, str | None], StreamCorrector]

_Block: TypeAlias = dict[str, Any]
# A long chunk is taken in pieces of this many characters, so that its first sentence goes out first.
_SLICE = 256

# What a message is cut into: text, content blocks, and the message itself less its content.
_Part: TypeAlias = str | _Block | BaseMessageChunk

_TEXT_KEYS = frozenset({"type", "text", "index", "id"})
# Chunks with nothing but these carry no more than their text.
_PLAIN_FIELDS = frozenset({"content", "type", "id", "name", "role"})


class AnswerStream(Protocol):
    """An answer that is being corrected while it comes."""

    def push(self, chunk: Any) -> list[Any]:
        """Take a chunk and return what is ready."""
        ...

    def close(self) -> list[Any]:
        """Return what is left."""
        ...


class TextStream:
    """Text in, corrected sentences out."""

    def __init__(self, open_corrector: OpenCorrector) -> None:
        self._open = open_corrector
        self._corrector: StreamCorrector | None = None

    def push(self, chunk: str) -> list[str]:
        if not isinstance(chunk, str):
            raise TypeError(f"a stream of text goes on with {type(chunk).__name__}; give str chunks only")
        if not chunk:
            return []
        if self._corrector is None:
            self._corrector = self._open(chunk, None)
        return [segment.text for segment in self._corrector.push(chunk) if segment.text]

    def close(self) -> list[str]:
        corrector, self._corrector = self._corrector, None
        return [segment.text for segment in corrector.close() if segment.text] if corrector else []


class MessageStream:
    """Message chunks in, chunks with corrected text out.

    One text runs at a time: a string content, or a text block. It ends when another block begins, when
    the chunk says that it is the last, or when the input ends. What is not text waits until the text
    before it has gone out, so the order never changes.
    """

    def __init__(self, open_corrector: OpenCorrector) -> None:
        self._open = open_corrector
        self._corrector: StreamCorrector | None = None
        self._slot: object = None  # which text runs: None for string content, else its block's index
        self._frame: _Block | None = None  # the running text's block without its text
        self._received = 0  # characters of text so far ...
        self._released = 0  # ... and how many of them have gone out
        self._held: deque[tuple[int, _Part]] = deque()  # what waits, and after how much text it came
        self._latest: BaseMessageChunk | None = None

    def push(self, chunk: BaseMessage) -> list[BaseMessage]:
        if not isinstance(chunk, BaseMessage):
            raise TypeError(f"a stream of messages goes on with {type(chunk).__name__}; give messages only")
        if not isinstance(chunk, BaseMessageChunk):
            return [*self.close(), correct_message(chunk, self._open)]
        self._latest = chunk
        blocks = [chunk.content] if isinstance(chunk.content, str) else chunk.content
        before = self._received
        parts = [part for block in blocks for part in self._take(block, chunk.id)]
        if getattr(chunk, "chunk_position", None) == "last":
            parts += self._finish()
        # An empty chunk is a sign of life: it goes on, unless it only carried text that now waits.
        if _carries_more(chunk) or (self._received == before and not parts and not self._held):
            empty: str | list[Any] = "" if isinstance(chunk.content, str) else []
            parts += self._hold(chunk.model_copy(update={"content": empty}))
        return self._assemble(parts)

    def close(self) -> list[BaseMessage]:
        return self._assemble(self._finish())

    def _take(self, block: str | _Block, message_id: str | None) -> list[_Part]:
        """Take one block of a chunk's content."""
        text = _text_of(block)
        index = block.get("index", "") if isinstance(block, dict) else None
        parts: list[_Part] = []
        if index != self._slot and (text or text is None):
            parts += self._finish()
        if text is None:
            if index == "":
                parts += self._finish()  # without indices any other block ends the text before it
            return [*parts, *self._hold(cast(_Block, block))]
        if text:
            if self._corrector is None:
                self._corrector = self._open(text, message_id)
                self._slot = index
                self._frame = (
                    {key: block[key] for key in ("type", "index", "id") if key in block}
                    if isinstance(block, dict)
                    else None
                )
            self._received += len(text)
            parts += self._release(self._corrector.push(text))
        if isinstance(block, dict) and not block.keys() <= _TEXT_KEYS:
            parts += self._hold({**block, "text": ""})  # annotations and the like
        return parts

    def _finish(self) -> list[_Part]:
        """End the running text."""
        if self._corrector is None:
            return []
        corrector, self._corrector = self._corrector, None
        parts = self._release(corrector.close())
        self._slot = None
        return parts

    def _release(self, segments: Iterable[Segment]) -> list[_Part]:
        parts: list[_Part] = []
        for segment in segments:
            self._released += len(segment.original)
            if segment.text:
                parts.append(segment.text if self._frame is None else {**self._frame, "text": segment.text})
            while self._held and self._held[0][0] <= self._released:
                parts.append(self._held.popleft()[1])
        return parts

    def _hold(self, part: _Part) -> list[_Part]:
        """Return `part` if all text before it has gone out; else keep it for then."""
        if self._received <= self._released:
            return [part]
        self._held.append((self._received, part))
        return []

    def _assemble(self, parts: Iterable[_Part]) -> list[BaseMessage]:
        """Put parts together to as few chunks as keep everything."""
        chunks: list[BaseMessageChunk] = []
        content: list[str | _Block] = []
        for part in parts:
            if not isinstance(part, BaseMessageChunk):
                _append(content, part)
            elif content or not chunks or not (_is_quiet(chunks[-1]) and _is_quiet(part)):
                chunks.append(_with_content(part, content))
                content = []
            else:
                # Providers that repeat metadata with every token: one chunk a sentence, not one a token.
                chunks[-1] = chunks[-1] + part
        if content and self._latest is not None:
            chunks.append(_with_content(_plain(self._latest), content))
        return list(chunks)


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

    def push(self, chunk: Mapping[str, Any]) -> list[AddableDict]:
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
            out += [AddableDict(answer=part) for part in self._answer.push(piece)]
        return out

    def close(self) -> list[AddableDict]:
        if self._waiting is not None or self._answer is None:
            raise TypeError(mapping_cure(self._key))
        return [AddableDict(answer=part) for part in self._answer.close()]


def slices(chunk: Any) -> Iterator[Any]:
    """Cut a chunk with a long text into several that join to the same."""
    if isinstance(chunk, str):
        yield from _cut(chunk)
    elif isinstance(chunk, Mapping) and isinstance(chunk.get("answer"), str):
        first, *rest = _cut(chunk["answer"])
        yield {**chunk, "answer": first}
        yield from ({"answer": text} for text in rest)
    elif isinstance(chunk, BaseMessageChunk) and isinstance(chunk.content, str):
        *texts, last = _cut(chunk.content)
        yield from (_plain(chunk).model_copy(update={"content": text}) for text in texts)
        yield chunk.model_copy(update={"content": last}) if texts else chunk
    else:
        yield chunk


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


def correct_text(text: str, open_corrector: OpenCorrector, message_id: str | None = None) -> str:
    """Correct a finished text, as a stream would."""
    if not text:
        return text
    with open_corrector(text, message_id) as corrector:
        return "".join(segment.text for segment in (*corrector.push(text), *corrector.close()))


def correct_message(message: BaseMessage, open_corrector: OpenCorrector) -> BaseMessage:
    """Return a copy of a finished message with its text corrected, block by block."""

    def corrected(block: str | _Block) -> str | _Block:
        text = _text_of(block)
        if not text:
            return block
        text = correct_text(text, open_corrector, message.id)
        return text if isinstance(block, str) else {**block, "text": text}

    content = message.content
    new = corrected(content) if isinstance(content, str) else [corrected(block) for block in content]
    return message.model_copy(update={"content": new})


def mapping_cure(question_key: str) -> str:
    """Say what a mapping for the aligner must look like."""
    return (
        f"a mapping for the aligner must have {question_key!r} and 'answer'; "
        f'give {{"{question_key}": ..., "answer": ...}}, a str or a message'
    )


def _cut(text: str) -> list[str]:
    return [text[start : start + _SLICE] for start in range(0, len(text), _SLICE)] or [text]


def _text_of(block: str | _Block) -> str | None:
    """Return the text of a block, or None if it is no text block."""
    if isinstance(block, str):
        return block
    return (block.get("text") or "") if block.get("type") == "text" else None


@functools.cache
def _other_fields(kind: type[BaseMessageChunk]) -> dict[str, Callable[[], Any]]:
    """Return what a chunk has besides text and identity, with how its empty value is made."""
    return {
        name: functools.partial(field.get_default, call_default_factory=True, validated_data={})
        if field.default_factory is None
        else cast(Callable[[], Any], field.default_factory)
        for name, field in kind.model_fields.items()
        if name not in _PLAIN_FIELDS
    }


def _carries_more(chunk: BaseMessageChunk) -> bool:
    return any(getattr(chunk, name) for name in _other_fields(type(chunk))) or bool(chunk.model_extra)


def _is_quiet(chunk: BaseMessageChunk) -> bool:
    """Whether adding to this chunk loses nothing: no usage, no tool calls, not the last one."""
    loud = ("usage_metadata", "tool_call_chunks", "chunk_position")
    return not any(getattr(chunk, name, None) for name in loud)


def _plain(chunk: BaseMessageChunk) -> BaseMessageChunk:
    """Return the chunk without all that must be sent only once."""
    return chunk.model_copy(update={name: empty() for name, empty in _other_fields(type(chunk)).items()})


def _append(content: list[str | _Block], part: str | _Block) -> None:
    """Append a block, or text to the block of the same text before it."""
    last = content[-1] if content else None
    if isinstance(last, str) and isinstance(part, str):
        content[-1] = last + part
    elif (
        isinstance(last, dict)
        and isinstance(part, dict)
        and last.get("type") == part.get("type") == "text"
        and last.get("index") == part.get("index")
        and not (last.keys() - _TEXT_KEYS and part.keys() - _TEXT_KEYS)
    ):
        content[-1] = {**last, **part, "text": last["text"] + part["text"]}
    else:
        content.append(part)


def _with_content(chunk: BaseMessageChunk, content: list[str | _Block]) -> BaseMessageChunk:
    if not content:
        return chunk
    if len(content) == 1 and isinstance(content[0], str):
        return chunk.model_copy(update={"content": content[0]})
    return chunk.model_copy(update={"content": content})
