"""The engine behind `aligner bench --adapters`: what the LangChain adapters themselves cost per chunk.

A chat model that replays words is streamed with and without an adapter, whose aligner does nothing: its
sentences pass without a model. Both are interleaved in shuffled order; a cost is the difference of medians.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig

from aligner_integrations.aligner import Aligner
from aligner_integrations.correction import Correction
from aligner_integrations.langchain import (
    AlignedChatModel,
    AlignerRunnable,
    AsyncStreamAlignerCallbackHandler,
    StreamAlignerCallbackHandler,
)
from aligner_integrations.stream import StreamCorrector

_SENTENCE = 20  # chunks, a word each


@dataclass(frozen=True, slots=True)
class AdapterCost:
    """Microseconds that an adapter adds to a chunk, in a stream of `chunks` and in one twice as long."""

    name: str
    chunks: int
    added: float
    added_at_twice: float


class _Idle(StreamCorrector):
    """Cuts sentences and corrects none."""

    def _corrections(self) -> Iterator[Correction]:
        while self._pending:
            yield self._aligner.untouched(self._question, str(self._pending.popleft()))


class _IdleAligner(Aligner):
    def stream(self, question: str, **options: Any) -> StreamCorrector:
        return _Idle(self, question, **options)


class _Words(BaseChatModel):
    words: list[str]

    @property
    def _llm_type(self) -> str:
        return "words"

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage("".join(self.words)))])

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        for word in self.words:
            yield ChatGenerationChunk(message=AIMessageChunk(content=word))

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        for word in self.words:
            yield ChatGenerationChunk(message=AIMessageChunk(content=word))


def run_adapters(*, rounds: int = 10, chunks: int = 2000) -> list[AdapterCost]:
    """Measure every adapter, sync and async.

    Raises:
        ValueError: `rounds` or `chunks` is not positive.
    """
    if rounds < 1 or chunks < 1:
        raise ValueError(f"rounds and chunks must be at least 1, got {rounds} and {chunks}")
    once, twice = (_measure(rounds, count) for count in (chunks, 2 * chunks))
    return [AdapterCost(name, chunks, once[name], twice[name]) for name in once]


def _measure(rounds: int, chunks: int) -> dict[str, float]:
    """Return what each adapter adds to one of `chunks` chunks, in microseconds."""
    ways = _ways(chunks)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    draw = random.Random(0)
    for turn in range(rounds + 1):
        for name in draw.sample(list(ways), len(ways)):
            start = perf_counter()
            ways[name]()
            if turn:  # the first round warms up
                seconds[name].append(perf_counter() - start)
    cost = {name: 1e6 * median(samples) / chunks for name, samples in seconds.items()}
    return {
        name: cost[name] - cost["async" if name.endswith("async") else "sync"]
        for name in cost
        if name not in ("sync", "async")
    }


def _ways(chunks: int) -> dict[str, Callable[[], None]]:
    words = [f"word{at} " if at % _SENTENCE else "End here. " for at in range(1, chunks + 1)]
    model, aligner = _Words(words=words), _idle_aligner()
    asked: RunnableConfig = {"configurable": {"question": "What?"}}
    aligned = AlignedChatModel(model=model, aligner=aligner)
    chain: Runnable[Any, Any] = model | AlignerRunnable(aligner)

    def heard() -> RunnableConfig:
        return {"callbacks": [StreamAlignerCallbackHandler(aligner, sink=_ignore)]}

    def aheard() -> RunnableConfig:
        return {"callbacks": [AsyncStreamAlignerCallbackHandler(aligner, sink=_ignore)]}

    return {
        "sync": lambda: _drain(model, asked),
        "async": lambda: asyncio.run(_adrain(model, asked)),
        "AlignerRunnable": lambda: _drain(chain, asked),
        "AlignerRunnable, async": lambda: asyncio.run(_adrain(chain, asked)),
        "AlignedChatModel": lambda: _drain(aligned, asked),
        "AlignedChatModel, async": lambda: asyncio.run(_adrain(aligned, asked)),
        "StreamAlignerCallbackHandler": lambda: _drain(model, heard()),
        "AsyncStreamAlignerCallbackHandler, async": lambda: asyncio.run(_adrain(model, aheard())),
    }


def _idle_aligner() -> Aligner:
    bundled = Aligner.from_pretrained()
    return _IdleAligner(bundled.backend, bundled.tokenizer, bundled.config)


def _drain(runnable: Runnable[Any, Any], config: RunnableConfig) -> None:
    for _ in runnable.stream("What?", config):
        pass


async def _adrain(runnable: Runnable[Any, Any], config: RunnableConfig) -> None:
    async for _ in runnable.astream("What?", config):
        pass


def _ignore(segment: object) -> None:
    """A sink that shows nothing."""


def as_rows(costs: Sequence[AdapterCost]) -> dict[str, str]:
    """Return the costs as lines to print."""
    return {
        cost.name: f"{cost.added:.1f} us a chunk ({cost.chunks} chunks), {cost.added_at_twice:.1f} "
        f"({2 * cost.chunks})"
        for cost in costs
    }
