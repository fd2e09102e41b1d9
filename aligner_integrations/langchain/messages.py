"""Correct the text of messages, and leave everything else as it came.

What is pushed into a stream and what comes out join to the same message, apart from the corrected text:
metadata, usage, tool calls and other blocks are passed on once, unchanged and in order.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, cast

from langchain_core.messages import BaseMessage, BaseMessageChunk

from aligner_integrations.closed_loop import LoopState
from aligner_integrations.correction import Segment
from aligner_integrations.langchain.jobs import Steps
from aligner_integrations.stream import StreamCorrector

# Opens a corrector for an answer that begins with this text, in the message with this id.
OpenCorrector: TypeAlias = Callable[[str, str | None], StreamCorrector]
# The same for an answer that comes, and whose upstream may be asked anew.
OpenLoop: TypeAlias = Callable[[str, str | None], StreamCorrector | LoopState]

_Block: TypeAlias = dict[str, Any]

# What a message is cut into: text, content blocks, and the message itself less its content.
_Part: TypeAlias = str | _Block | BaseMessageChunk

_NO_SLOT = object()
# What providers say of the tokens they made. Gemini's citations quote whole sentences.
_RAW_KEYS = frozenset({"logprobs", "logprobs_result", "grounding_metadata"})
_TEXT_KEYS = frozenset({"type", "text", "index", "id"})
# Blocks by which a model calls the user's tools, as providers name them. What a provider runs itself
# (a web search) is part of the answer.
_CALLS = frozenset({"tool_call", "tool_call_chunk", "invalid_tool_call", "tool_use", "function_call"})
_CALL_FIELDS = ("tool_calls", "invalid_tool_calls", "tool_call_chunks")
# Chunks with nothing but these carry no more than their text.
_PLAIN_FIELDS = frozenset({"content", "type", "id", "name", "role"})


class MessageStream:
    """Message chunks in, chunks with corrected text out.

    One text runs at a time: a string content, or a text block. It ends when another block begins, when
    the chunk says that it is the last, or when the input ends. What is not text waits until the text
    before it has gone out, so the order never changes.

    Without `thoughts` the sentence that a tool call ends, and what comes after the call, stay as they are.
    Once a corrector that is a loop is stale, nothing more is taken: a new stream goes on with it.
    """

    def __init__(self, open_corrector: OpenLoop, *, thoughts: bool = True) -> None:
        self._open = open_corrector
        self._thoughts = thoughts
        self._calling = False  # a tool call has begun, and thoughts are left alone
        self._corrector: StreamCorrector | LoopState | None = None
        self._slot: object = None  # which text runs: None for string content, else its block's index
        self._frame: _Block | None = None  # the running text's block without its text
        self._received = 0  # characters of text so far ...
        self._released = 0  # ... and how many of them have gone out
        self._held: deque[tuple[int, _Part]] = deque()  # what waits, and after how much text it came
        self._latest: BaseMessageChunk | None = None

    @property
    def running(self) -> object:
        """The index of the text block that is coming now; None for none, and for string content."""
        return self._slot

    def push(self, chunk: BaseMessage) -> Steps[list[BaseMessage]]:
        if not isinstance(chunk, BaseMessage):
            raise TypeError(f"a stream of messages goes on with {type(chunk).__name__}; give messages only")
        if not isinstance(chunk, BaseMessageChunk):
            rest = yield from self.close()
            opened = cast(OpenCorrector, self._open)  # a loop is fed with chunks
            whole = functools.partial(correct_message, chunk, opened, thoughts=self._thoughts)
            return [*rest, (yield whole)]
        chunk = cast(BaseMessageChunk, without_raw(chunk))
        self._latest = chunk
        blocks = [chunk.content] if isinstance(chunk.content, str) else chunk.content
        before = self._received
        parts: list[_Part] = []
        for block in blocks:
            if not _is_stale(self._corrector):
                parts += yield from self._take(block, chunk.id)
        if not self._thoughts and getattr(chunk, "tool_call_chunks", None):
            parts += self.leave()
        if getattr(chunk, "chunk_position", None) == "last":
            parts += yield from self._finish()
            self._calling = False
        # An empty chunk is a sign of life: it goes on, unless it only carried text that now waits.
        if _carries_more(chunk) or (self._received == before and not parts and not self._held):
            empty: str | list[Any] = "" if isinstance(chunk.content, str) else []
            parts += self._hold(chunk.model_copy(update={"content": empty}))
        return self._assemble(parts)

    def close(self) -> Steps[list[BaseMessage]]:
        return self._assemble((yield from self._finish()))

    def _take(self, block: str | _Block, message_id: str | None) -> Steps[list[_Part]]:
        """Take one block of a chunk's content."""
        if not self._thoughts and _is_call(block):
            return [*self.leave(), *self._hold(cast(_Block, block))]
        if self._calling:
            return [block] if block else []
        text = text_of(block)
        index = block.get("index", "") if isinstance(block, dict) else None
        parts: list[_Part] = []
        if index != self._slot and (text or text is None):
            parts += yield from self._finish()
        if text is None:
            if index == "":
                parts += yield from self._finish()  # without indices any other block ends the text before it
            return [*parts, *self._hold(cast(_Block, block))]
        if text:
            if self._corrector is None:
                self._corrector = yield functools.partial(self._open, text, message_id)
                self._slot = index
                self._frame = (
                    {key: block[key] for key in ("type", "index", "id") if key in block}
                    if isinstance(block, dict)
                    else None
                )
            self._received += len(text)
            waits = self._corrector.feed(text)
            self._released += _skipped(self._corrector)
            if waits:
                parts += self._release((yield functools.partial(self._corrector.push, "")))
        if isinstance(block, dict) and (not block.keys() <= _TEXT_KEYS or self._is_new_id(block)):
            parts += self._hold({**block, "text": ""})  # annotations and the like
        return parts

    def _is_new_id(self, block: _Block) -> bool:
        """Whether the block tells an id that its text has not been sent with."""
        return "id" in block and (self._frame is None or "id" not in self._frame)

    def _finish(self) -> Steps[list[_Part]]:
        """End the running text."""
        corrector = self._let_go()
        if corrector is None:
            return []
        segments = yield corrector.close
        self._released += _skipped(corrector)
        return self._release(segments)

    def leave(self) -> list[_Part]:
        """A tool call begins: what is held of the text before it goes out as it is."""
        self._calling = True
        corrector = self._let_go()
        if corrector is None:
            return []
        segments = corrector.release()
        self._released += _skipped(corrector)
        return self._release(segments)

    def _let_go(self) -> StreamCorrector | LoopState | None:
        """Return the corrector of the running text, which is none any more."""
        corrector, self._corrector, self._slot = self._corrector, None, None
        return corrector

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


def correct_text(text: str, open_corrector: OpenCorrector, message_id: str | None = None) -> str:
    """Correct a finished text, as a stream would."""
    return "".join(_corrected([text], open_corrector, message_id, ended_by_call=False)) if text else text


def correct_message(
    message: BaseMessage, open_corrector: OpenCorrector, *, thoughts: bool = True
) -> BaseMessage:
    """Return a copy of a finished message with its text corrected, as a stream would."""
    message = without_raw(message)
    content = message.content
    new: list[Any] = [content] if isinstance(content, str) else list(content)
    calls = len(new)
    if not thoughts:
        calls = next((at for at, block in enumerate(new) if _is_call(block)), calls)
    calling = not thoughts and (
        calls < len(new) or any(getattr(message, kind, None) for kind in _CALL_FIELDS)
    )
    texts, is_open = _texts(new[:calls])
    for places in texts:
        ended_by_call = calling and is_open and places is texts[-1]
        parts = [text_of(new[at]) or "" for at in places]
        corrected = _corrected(parts, open_corrector, message.id, ended_by_call=ended_by_call)
        for at, text in zip(places, corrected, strict=True):
            new[at] = text if isinstance(new[at], str) else {**new[at], "text": text}
    return message.model_copy(update={"content": new[0] if isinstance(content, str) else new})


def _texts(blocks: list[Any]) -> tuple[list[list[int]], bool]:
    """Return for each text which blocks it runs through, and whether the last one may still go on."""
    texts: list[list[int]] = []
    slot: object = _NO_SLOT
    for at, block in enumerate(blocks):
        text = text_of(block)
        if text is None:
            slot = _NO_SLOT
        elif text:
            index = block.get("index", "") if isinstance(block, dict) else None
            if index != slot:
                texts.append([])
            texts[-1].append(at)
            slot = index
    return texts, slot is not _NO_SLOT


def _corrected(
    parts: list[str], open_corrector: OpenCorrector, message_id: str | None, *, ended_by_call: bool
) -> list[str]:
    """Correct a text that stands in `parts`; a sentence goes where it began."""
    with open_corrector("".join(parts), message_id) as corrector:
        done = corrector.push("".join(parts))
        done += corrector.release() if ended_by_call else corrector.close()
    starts = list(itertools.accumulate(map(len, parts), initial=0))
    corrected = [""] * len(parts)
    for segment in done:
        corrected[min(bisect.bisect_right(starts, segment.start), len(parts)) - 1] += segment.text
    return corrected


def without_raw(message: BaseMessage) -> BaseMessage:
    """Return the message without what providers say of its tokens: it spells the raw text."""
    metadata = without_raw_keys(message.response_metadata)
    if metadata is message.response_metadata:
        return message
    return message.model_copy(update={"response_metadata": metadata})


def without_raw_keys(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return metadata without log probabilities and without the sentences that citations quote."""
    if _RAW_KEYS.isdisjoint(metadata):
        return metadata
    kept = {name: value for name, value in metadata.items() if name not in _RAW_KEYS - {"grounding_metadata"}}
    if isinstance(grounding := kept.get("grounding_metadata"), dict):
        kept["grounding_metadata"] = {
            name: value for name, value in grounding.items() if name != "grounding_supports"
        }
    return kept


def cut_message(chunk: BaseMessageChunk, texts: list[str]) -> list[BaseMessageChunk]:
    """Return chunks with these texts that join to `chunk`; the last carries all that is not text."""
    *first, last = texts
    plain = [_plain(chunk).model_copy(update={"content": text}) for text in first]
    return [*plain, chunk.model_copy(update={"content": last}) if first else chunk]


def _is_stale(corrector: StreamCorrector | LoopState | None) -> bool:
    return isinstance(corrector, LoopState) and corrector.stale


def _skipped(corrector: StreamCorrector | LoopState) -> int:
    """Return how many characters, since it was last asked, will be in no segment."""
    return corrector.take_skipped() if isinstance(corrector, LoopState) else 0


def _is_call(block: str | _Block) -> bool:
    return isinstance(block, dict) and block.get("type") in _CALLS


def text_of(block: str | _Block) -> str | None:
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
    for name in _other_fields(type(chunk)):  # a loop: this runs for every chunk
        if getattr(chunk, name):
            return True
    return bool(chunk.model_extra)


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
