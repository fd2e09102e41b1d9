"""Still a stream: sentences leave before the input ends, and a stream cut short stops its input."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessageChunk
from langchain_core.runnables import RunnableConfig

from aligner_integrations.langchain import AlignerRunnable
from aligner_integrations.testing import scripted_aligner
from tests.langchain.forms import ask, shout

QUESTION: RunnableConfig = {"configurable": {"question": "What of bears?"}}
ANSWER = "One bear. Two bears. Three bears."


def watched(log: list[str]) -> Iterator[str]:
    """The answer letter by letter; `log` shows what was asked for and when it was closed."""
    try:
        for letter in ANSWER:
            log.append(letter)
            yield letter
    finally:
        log.append("closed")


async def awatched(log: list[str]) -> AsyncIterator[str]:
    try:
        for letter in ANSWER:
            log.append(letter)
            yield letter
            await asyncio.sleep(0)
    finally:
        log.append("closed")


def test_first_sentence_leaves_when_the_next_word_begins() -> None:
    log: list[str] = []
    out = AlignerRunnable(shout()).transform(watched(log), QUESTION)
    assert next(out) == "ONE BEAR. "
    assert "".join(log) == "One bear. T"
    assert [*out] == ["TWO BEARS. ", "THREE BEARS."]


async def test_first_sentence_leaves_when_the_next_word_begins_async() -> None:
    log: list[str] = []
    out = AlignerRunnable(shout()).atransform(awatched(log), QUESTION)
    assert await anext(out) == "ONE BEAR. "
    assert "".join(log) == "One bear. T"
    assert [part async for part in out] == ["TWO BEARS. ", "THREE BEARS."]


def test_a_long_chunk_is_not_waited_for() -> None:
    corrected: list[str] = []

    def note(question: str, prefix: str, sentence: str) -> str:
        corrected.append(sentence)
        return sentence

    long = "One more bear came by. " * 200
    for given in (long, {"question": "What?", "answer": long}, AIMessageChunk(content=long)):
        out = AlignerRunnable(scripted_aligner(note)).stream(given, QUESTION)
        corrected.clear()
        next(out)
        next(out)
        assert len(corrected) < 30
        out.close()  # type: ignore[attr-defined]


def test_breaking_off_closes_the_input_at_once() -> None:
    log: list[str] = []
    for _ in AlignerRunnable(shout()).transform(watched(log), QUESTION):
        break
    assert "".join(log) == "One bear. Tclosed"


def test_breaking_off_a_chain_stops_its_model() -> None:
    written: list[str] = []

    class Watched(GenericFakeChatModel):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
            for chunk in super()._stream(*args, **kwargs):
                written.append(chunk.text)
                yield chunk

    upstream = Watched(messages=iter([ANSWER]))
    for _ in (ask() | upstream | AlignerRunnable(shout())).stream({"topic": "bears"}):
        break
    assert "".join(written) == "One bear. Two"


async def test_aclose_closes_the_input_at_once() -> None:
    log: list[str] = []
    out = AlignerRunnable(shout()).atransform(awatched(log), QUESTION)
    await anext(out)
    await out.aclose()  # type: ignore[attr-defined]
    assert "".join(log) == "One bear. Tclosed"


async def test_an_input_that_is_slow_to_close_is_closed_once() -> None:
    """The tee of langchain-core closes it as well, from a task of its own."""
    trouble: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: trouble.append(context))

    async def slow() -> AsyncIterator[str]:
        try:
            for letter in ANSWER:
                yield letter
        finally:
            await asyncio.sleep(0.02)
            closed.append(True)

    closed: list[bool] = []
    out = AlignerRunnable(shout()).atransform(slow(), QUESTION)
    await anext(out)
    await out.aclose()  # type: ignore[attr-defined]
    assert closed == [True]
    await asyncio.sleep(0.02)
    assert trouble == []


async def test_cancelling_closes_the_input_and_leaves_no_task() -> None:
    log: list[str] = []
    aligner = AlignerRunnable(shout(delay=0.05))

    async def read() -> None:
        async for _ in aligner.atransform(awatched(log), QUESTION):
            pass

    task = asyncio.create_task(read())
    while "T" not in log:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log[-1] == "closed"
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_a_failing_reader_closes_the_input() -> None:
    log: list[str] = []

    def read() -> None:
        for _ in AlignerRunnable(shout()).transform(watched(log), QUESTION):
            raise KeyError("reader")

    with pytest.raises(KeyError):
        read()
    assert "".join(log) == "One bear. Tclosed"


def test_a_failing_input_fails_the_stream_after_what_was_finished() -> None:
    def broken() -> Iterator[str]:
        yield "One bear. Two"
        raise ValueError("upstream")

    out = AlignerRunnable(shout()).transform(broken(), QUESTION)
    assert next(out) == "ONE BEAR. "
    with pytest.raises(ValueError, match="upstream"):
        next(out)
