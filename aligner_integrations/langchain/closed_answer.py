"""One answer of a closed loop: the wrapped model is asked anew where a sentence changed, as one message."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import aclosing, closing
from typing import Any, TypeAlias

from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata, add_usage

from aligner_integrations.closed_loop import LoopState, LoopStats
from aligner_integrations.correction import Segment
from aligner_integrations.langchain.answers import slices
from aligner_integrations.langchain.chat_answer import ChatAnswer
from aligner_integrations.langchain.jobs import Steps, arun, run
from aligner_integrations.langchain.messages import MessageStream, text_of
from aligner_integrations.read_ahead import read_ahead
from aligner_integrations.read_ahead_async import AsyncReadAhead
from aligner_integrations.stream import StreamCorrector

Ask: TypeAlias = Callable[[str], Generator[BaseMessage]]
AAsk: TypeAlias = Callable[[str], AsyncGenerator[BaseMessage]]

# Blocks that a model may write before its text, and write again when it goes on.
_THOUGHTS = frozenset({"reasoning", "reasoning_content", "thinking", "redacted_thinking"})


# What the receipt says of the loop.
_TOLD = (
    *("rounds", "restarts", "requested_chunks", "requested_chars"),
    *("thrown_away_chars", "shown_chars"),
)


class ClosedAnswer(ChatAnswer):
    """An answer that comes in rounds: when it is `stale`, what comes after `prefix` is asked for anew.

    All rounds are one message: its id is the first one's, text goes on in the block in which it was
    interrupted, metadata comes once. Usage is added up, and comes at the end. An answer that holds more than
    text and reasoning, a tool call for example, is not interrupted any more: no API goes on behind that.
    """

    def __init__(self, *args: Any, max_restarts: int, repeats: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stats = LoopStats()
        self._usage: UsageMetadata | None = None
        self._repeats = repeats
        self._left = max_restarts  # restarts that a text may have that is yet to come
        self._loop: LoopState | None = None
        self._goes_on = False  # whether the next text is the one that was interrupted
        self._first: BaseMessage | None = None  # the first chunk: whose message it is
        self._told: set[str] = set()  # metadata that has gone out ...
        self._told_before: set[str] = set()  # ... in the rounds before this one
        self._slot: object = None  # the block that goes on
        self._indices: dict[Any, Any] = {}  # of this round's blocks, in the message
        self._top = -1  # the greatest index so far

    @property
    def prefix(self) -> str:
        """What was shown so far, less the white space at its end."""
        return "".join(segment.text for segment in self._segments).rstrip()

    @property
    def stale(self) -> bool:
        """Whether the wrapped model is writing what follows text that nobody will see."""
        return self._loop is not None and self._loop.stale

    def note(self, chunk: BaseMessage) -> BaseMessage:
        """Count a chunk that the wrapped model gave, seen or not, and return it without its usage."""
        self.stats.note(str(chunk.text))
        usage = getattr(chunk, "usage_metadata", None)
        if not usage:
            return chunk
        self._usage = add_usage(self._usage, usage)
        return chunk.model_copy(update={"usage_metadata": None})

    def push(self, chunk: BaseMessage) -> Steps[list[BaseMessage]]:
        """Take a chunk of the answer; what can be sent comes of it."""
        if self.stale:
            return []
        if _holds_more(chunk):
            self._leave_alone()
        self._first = self._first or chunk
        chunk = self._as_one_message(chunk)
        parts = yield from super().push(chunk)
        if self._stream.running is not None:
            self._slot = self._stream.running
        for part in parts:
            self._told |= part.response_metadata.keys()
        return parts

    def restart(self) -> None:
        """Go on with another round."""
        assert self._loop is not None
        self._left -= 1
        self._loop.restart()
        self._goes_on = True
        self._indices = {}
        self._told_before = set(self._told)
        self._stream = MessageStream(self._open, thoughts=self._thoughts)

    def receipt(self) -> list[AIMessageChunk]:
        """Return a chunk without text that says what the answer cost."""
        said = super().receipt()
        for receipt in said:
            receipt.response_metadata["aligner"] |= {name: getattr(self.stats, name) for name in _TOLD}
        if self._usage is None:
            return said
        (receipt,) = said or [AIMessageChunk(content="")]
        message_id = self._first.id if self._first else None
        return [receipt.model_copy(update={"id": message_id, "usage_metadata": self._usage})]

    def _open(self, text: str, message_id: str | None) -> StreamCorrector | LoopState:  # type: ignore[override]
        if not self._goes_on or self._loop is None:
            corrector = super()._open(text, message_id)
            self._loop = LoopState(corrector, max_restarts=self._left, repeats=self._repeats)
        self._goes_on = False
        return self._loop

    def _note(self, segment: Segment) -> None:
        self.stats.show(segment)
        super()._note(segment)

    def _leave_alone(self) -> None:
        self._left = 0
        if self._loop is not None:
            self._loop.left = 0

    def _as_one_message(self, chunk: BaseMessage) -> BaseMessage:
        """Return a chunk as a part of the first round's message."""
        if isinstance(chunk.content, list):
            chunk = chunk.model_copy(update={"content": [self._placed(block) for block in chunk.content]})
        if self.stats.rounds < 2 or self._first is None:
            return chunk
        kept = {k: v for k, v in chunk.response_metadata.items() if k not in self._told_before}
        return chunk.model_copy(update={"id": self._first.id, "response_metadata": kept})

    def _placed(self, block: str | dict[str, Any]) -> str | dict[str, Any]:
        """Return a block with its index in the whole message."""
        if not isinstance(block, dict) or "index" not in block:
            return block
        index = block["index"]
        if self.stats.rounds > 1 and index not in self._indices:
            goes_on = text_of(block) is not None and self._slot not in self._indices.values()
            self._indices[index] = self._slot if goes_on else self._top + 1
        index = self._indices.get(index, index)
        self._top = max(self._top, index) if isinstance(index, int) else self._top
        kept = {key: value for key, value in block.items() if key != "id" or self.stats.rounds < 2}
        return {**kept, "index": index}


def stream_closed(answer: ClosedAnswer, ask: Ask) -> Generator[BaseMessage]:
    """Yield the chunks of an answer, asking the wrapped model anew where it is stale."""
    while True:
        answer.stats.rounds += 1
        with closing(read_ahead(_noted(answer, ask(answer.prefix)))) as chunks:
            for piece in (piece for chunk in chunks for piece in slices(chunk)):
                ready = run(answer.push(piece))
                if answer.stale:
                    break  # and the wrapped model's stream is closed before anything else
                yield from ready
            else:
                ready = run(answer.close())
        yield from ready
        if not answer.stale:
            break
        answer.restart()
    yield from answer.receipt()


async def astream_closed(answer: ClosedAnswer, ask: AAsk) -> AsyncGenerator[BaseMessage]:
    """Yield the chunks of an answer as `stream_closed` does; the corrections run in threads."""
    while True:
        answer.stats.rounds += 1
        async with aclosing(AsyncReadAhead(_anoted(answer, ask(answer.prefix)))) as chunks:
            async for piece in (piece async for chunk in chunks for piece in slices(chunk)):
                ready = await arun(answer.push(piece))
                if answer.stale:
                    break
                for part in ready:
                    yield part
            else:
                ready = await arun(answer.close())
        for part in ready:
            yield part
        if not answer.stale:
            break
        answer.restart()
    for part in answer.receipt():
        yield part


def _noted(answer: ClosedAnswer, chunks: Generator[BaseMessage]) -> Generator[BaseMessage]:
    with closing(chunks):
        for chunk in chunks:
            yield answer.note(chunk)


async def _anoted(answer: ClosedAnswer, chunks: AsyncGenerator[BaseMessage]) -> AsyncGenerator[BaseMessage]:
    async with aclosing(chunks):
        async for chunk in chunks:
            yield answer.note(chunk)


def _holds_more(chunk: BaseMessage) -> bool:
    """Whether a chunk holds more than text and reasoning."""
    if getattr(chunk, "tool_call_chunks", None) or getattr(chunk, "tool_calls", None):
        return True
    blocks: Iterable[Any] = chunk.content if isinstance(chunk.content, list) else ()
    return any(text_of(block) is None and block.get("type") not in _THOUGHTS for block in blocks)
