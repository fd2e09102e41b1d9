"""Streams at length: ten thousand chunkings, two hundred at once, a break at every chunk, linear cost."""

from __future__ import annotations

import asyncio
import functools
import gc
import random
import re
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import Field

import aligner_integrations
from aligner_integrations import Aligner
from aligner_integrations.langchain import AlignedChatModel, AlignerRunnable
from aligner_integrations.testing import scripted_aligner
from tests.langchain.forms import text_of
from tests.test_recorded_answers import rows


class Replay(BaseChatModel):
    """Streams the chunks that stand in `script` for the last message; `log` says what became of it."""

    script: dict[str, list[str]] = Field(default_factory=dict)
    log: list[str] = Field(default_factory=list)
    # Called with the number of each chunk before it is sent.
    gate: Callable[[int], None] | None = None
    agate: Callable[[int], Awaitable[None]] | None = None

    @property
    def _llm_type(self) -> str:
        return "replay"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        message = AIMessage(content="".join(self.script[messages[-1].text]))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        self.log.append("opened")
        try:
            for number, chunk in enumerate(self.script[messages[-1].text]):
                if self.gate:
                    self.gate(number)
                self.log.append("sent")
                yield ChatGenerationChunk(message=AIMessageChunk(content=chunk))
        finally:
            self.log.append("closed")

    async def _astream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        self.log.append("opened")
        try:
            for number, chunk in enumerate(self.script[messages[-1].text]):
                if self.agate:
                    await self.agate(number)
                self.log.append("sent")
                yield ChatGenerationChunk(message=AIMessageChunk(content=chunk))
        finally:
            self.log.append("closed")


def graph_of(model: Runnable[Any, Any], **given: Any) -> Any:
    async def anode(state: MessagesState) -> dict[str, list[BaseMessage]]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    def node(state: MessagesState) -> dict[str, list[BaseMessage]]:
        return {"messages": [model.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("answer", RunnableLambda(node, anode))
    graph.add_edge(START, "answer")
    return graph.compile(**given)


def human(question: str) -> dict[str, list[BaseMessage]]:
    return {"messages": [HumanMessage(question)]}


# Ten thousand chunkings

CHUNKINGS = 50  # of each of 200 texts
OPENING = 80  # characters of each answer; some answers are read as a whole, further down
CONFIG: RunnableConfig = {"configurable": {"question": "What?"}}


def rewrite(question: str, prefix: str, sentence: str) -> str:
    """Change four sentences of six: mended, shortened, lengthened, emptied."""
    changed = (
        re.sub(r"\bthe\b", "some", sentence),
        sentence[: len(sentence) // 2],
        f"{sentence} Yes.",
        "",
        sentence,
        sentence,
    )
    return changed[len(sentence) % 6]


ALIGNER = scripted_aligner(rewrite)


def cut(text: str, dice: random.Random, number: int = 2) -> list[str]:
    """Cut into chunks of at most some length; the first cut is the whole, the second every character."""
    if number < 2:
        return list(text) if number else [text]
    longest = round(len(text) ** (dice.random() ** 0.5))
    chunks, start = [], 0
    while start < len(text):
        size = dice.randint(1, longest)
        chunks.append(text[start : start + size])
        start += size
    return chunks


def corrected(question: str, answer: str, aligner: Aligner = ALIGNER) -> str:
    return "".join(segment.text for segment in aligner.correct_stream(question, [answer]))


def openings() -> list[str]:
    return [answer[:OPENING] for _, answer in rows()]


def test_t1_t3_a_thousand_chunkings_through_the_model() -> None:
    replay, dice = Replay(), random.Random(1)
    aligned = AlignedChatModel(model=replay, aligner=ALIGNER)
    cases, differences, counts = 0, list[tuple[str, list[str], str]](), set[int]()
    for text in openings():
        expected = corrected("What?", text)
        replay.script["What?"] = [text]
        assert aligned.invoke("What?").text == expected
        for number in range(5):
            chunks = replay.script["What?"] = cut(text, dice, number)
            parts = list(aligned.stream("What?"))
            final = parts[0]
            for part in parts[1:]:
                final = final + part
            deltas = "".join(part.text for part in parts)
            if not deltas == final.text == expected:
                differences.append((expected, chunks, deltas))
            cases += 1
            counts.add(len(chunks))
    assert differences == []
    assert cases == 1000
    assert 1 in counts and OPENING in counts


def test_t1_t3_ten_thousand_chunkings_through_a_graph() -> None:
    """What is streamed, the state, and what the checkpointer keeps for the next turn are one text."""
    replay, dice = Replay(), random.Random(2)
    aligned = AlignedChatModel(model=replay, aligner=ALIGNER)
    plain, kept = graph_of(aligned), graph_of(aligned, checkpointer=InMemorySaver())
    cases, differences = 0, list[tuple[str, list[str], str]]()
    for text in openings():
        expected = corrected("What?", text)
        for number in range(CHUNKINGS):
            chunks = replay.script["What?"] = cut(text, dice, number)
            graph = plain if number else kept
            config: RunnableConfig = {"configurable": {"thread_id": str(cases)}}
            deltas, states = "", list[dict[str, Any]]()
            for mode, event in graph.stream(human("What?"), config, stream_mode=["messages", "values"]):
                if mode == "messages":
                    deltas += event[0].text
                else:
                    states.append(event)
            stored = states[-1] if number else kept.get_state(config).values
            texts = {deltas, states[-1]["messages"][-1].text, stored["messages"][-1].text}
            if texts != {expected} or len(stored["messages"]) != 2:
                differences.append((expected, chunks, deltas))
            cases += 1
    assert differences == []
    assert cases == 10_000


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_t1_t3_a_thousand_chunkings_through_the_runnable(kind: str) -> None:
    dice, aligner = random.Random(3), AlignerRunnable(ALIGNER)
    cases, differences = 0, list[tuple[str, list[str], str]]()
    for text in openings():
        expected = corrected("What?", text)
        assert aligner.invoke(text, CONFIG) == expected
        for number in range(5):
            chunks: list[Any] = cut(text, dice, number)
            if kind == "messages":
                chunks = [AIMessageChunk(content=chunk, id="1") for chunk in chunks]
            parts = list(aligner.transform(iter(chunks), CONFIG))
            deltas = "".join(map(text_of, parts))
            final = deltas
            if kind == "messages" and parts:
                whole = parts[0]
                for part in parts[1:]:
                    whole = whole + part
                final = whole.text
            if not deltas == final == expected:
                differences.append((expected, chunks, deltas))
            cases += 1
    assert differences == []
    assert cases == 1000


async def test_whole_answers_through_every_surface() -> None:
    replay, dice = Replay(), random.Random(4)
    aligned = AlignedChatModel(model=replay, aligner=ALIGNER)
    chain, graph = replay | AlignerRunnable(ALIGNER), graph_of(aligned, checkpointer=InMemorySaver())
    differences = list[tuple[str, list[str], list[str]]]()
    for number, (question, answer) in enumerate(rows()[::4]):
        chunks = replay.script[question] = cut(answer, dice)
        config: RunnableConfig = {"configurable": {"thread_id": str(number)}}
        modes = ["messages", "values"]
        events = [event async for event in graph.astream(human(question), config, stream_mode=modes)]
        state = await graph.aget_state(config)
        texts = [
            aligned.invoke(question).text,
            "".join([part.text async for part in aligned.astream(question)]),
            "".join([text_of(part) async for part in chain.astream(question)]),
            "".join(part.text for part in chain.stream(question)),
            "".join(event[0].text for mode, event in events if mode == "messages"),
            state.values["messages"][-1].text,
        ]
        if set(texts) != {corrected(question, answer)}:
            differences.append((answer, chunks, texts))
    assert differences == []


# Two hundred at once

STREAMS = 200
CANARY = re.compile(r"canary-\d{3}")


def answer_of(number: int) -> list[str]:
    canary = f"canary-{number:03}"
    return re.findall(r"\s*\S{1,7}", f"Here {canary} sings. Two of them and {canary} fly. Bye.")


def question_of(number: int) -> str:
    return f"What of canary-{number:03}?"


def tell_all(question: str, prefix: str, sentence: str) -> str:
    """Show which canaries the question and the prefix carried."""
    found = [*CANARY.findall(question), *sorted(set(CANARY.findall(prefix)))]
    return f"{sentence[:-1]} {' '.join(found)}."


async def drain(stream: AsyncIterator[Any]) -> list[Any]:
    return [part async for part in stream]


def forms_of(replay: Replay, aligner: Aligner) -> dict[str, tuple[Runnable[Any, Any], dict[str, Any]]]:
    """One shared object of each kind, and how it is streamed."""
    prompt = ChatPromptTemplate.from_messages([("human", "{topic}")])
    aligned = AlignedChatModel(model=replay, aligner=aligner)
    return {
        "runnable": (prompt | replay | AlignerRunnable(aligner), {}),
        "model": (prompt | aligned, {}),
        "graph": (graph_of(aligned), {"stream_mode": ["messages", "values"]}),
    }


def texts_of(kind: str, parts: list[Any]) -> set[str]:
    if kind != "graph":
        return {"".join(map(text_of, parts))}
    deltas = "".join(event[0].text for mode, event in parts if mode == "messages")
    states = [event["messages"][-1].text for mode, event in parts if mode == "values"]
    return {deltas, states[-1]}


@functools.cache
def told_alone(number: int) -> str:
    """What a stream shows that runs on its own."""
    alone = scripted_aligner(tell_all)
    return corrected(question_of(number), "".join(answer_of(number)), alone)


def check_canaries(kind: str, streams: list[list[Any]]) -> None:
    crossings = 0
    for number, parts in enumerate(streams):
        heard = CANARY.findall("".join(map(repr, parts)))
        crossings += sum(canary != f"canary-{number:03}" for canary in heard)
        expected = told_alone(number)
        assert texts_of(kind, parts) == {expected}
        assert len(CANARY.findall(expected)) == 7  # 2 in the answer, 3 in questions, 2 in prefixes
    assert crossings == 0
    assert len(streams) == STREAMS


@pytest.mark.parametrize("kind", ["runnable", "model", "graph"])
def test_t13_two_hundred_threads_on_one_object_do_not_cross(kind: str) -> None:
    together = threading.Barrier(STREAMS)
    script = {question_of(number): answer_of(number) for number in range(STREAMS)}

    def gate(chunk: int) -> None:
        if chunk % 5 == 3:  # now and again all wait for all
            together.wait(60)

    runnable, options = forms_of(Replay(script=script, gate=gate), scripted_aligner(tell_all))[kind]

    def one(number: int) -> list[Any]:
        question = question_of(number)
        return list(runnable.stream(human(question) if kind == "graph" else {"topic": question}, **options))

    with ThreadPoolExecutor(STREAMS) as pool:
        check_canaries(kind, list(pool.map(one, range(STREAMS))))


@pytest.mark.parametrize("kind", ["runnable", "model", "graph"])
async def test_t13_two_hundred_tasks_on_one_object_do_not_cross(kind: str) -> None:
    together = asyncio.Barrier(STREAMS)
    script = {question_of(number): answer_of(number) for number in range(STREAMS)}

    async def agate(chunk: int) -> None:
        if chunk % 5 == 3:
            async with asyncio.timeout(60):
                await together.wait()
        await asyncio.sleep(0)

    runnable, options = forms_of(Replay(script=script, agate=agate), scripted_aligner(tell_all))[kind]

    async def one(number: int) -> list[Any]:
        question = question_of(number)
        given = human(question) if kind == "graph" else {"topic": question}
        return await drain(runnable.astream(given, **options))

    check_canaries(kind, await asyncio.gather(*map(one, range(STREAMS))))


# A break at every chunk

SENTENCES = ["One bear. ", "Two bears. ", "Three bears. ", "No bears."]
CHUNKS = re.findall(r"\s*\S+\s*?", "".join(SENTENCES))
QUESTION = "What of bears?"
WORKERS = 4


def shout(question: str, prefix: str, sentence: str) -> str:
    return sentence.upper()


def of_kind(kind: str, replay: Replay, aligner: Aligner) -> Runnable[Any, Any]:
    if kind == "runnable":
        return replay | AlignerRunnable(aligner)
    aligned = AlignedChatModel(model=replay, aligner=aligner)
    return aligned if kind == "model" else graph_of(aligned)


def astream_of(kind: str, runnable: Runnable[Any, Any]) -> Any:
    """Stream text parts; of a graph, those of its messages."""
    if kind == "graph":
        return runnable.astream(human(QUESTION), stream_mode="messages")
    return runnable.astream(QUESTION)


def text_parts(parts: list[Any]) -> str:
    return "".join(text_of(part[0] if isinstance(part, tuple) else part) for part in parts)


def made(kind: str, **given: Any) -> tuple[Replay, Runnable[Any, Any]]:
    replay = Replay(script={QUESTION: CHUNKS}, **given)
    return replay, of_kind(kind, replay, scripted_aligner(shout))


def check_closed(replay: Replay) -> None:
    """If the model's stream was opened it was closed, and nothing twice."""
    assert replay.log.count("opened") == replay.log.count("closed") <= 1
    replay.log.clear()


async def check_idle() -> None:
    """No task is left, and every worker of the executor is free: all of them can meet.

    langchain-core and LangGraph close what is beneath their own async streams from tasks that run a
    few turns of the loop later, with any model and without an aligner.
    """
    quiet = turns = 0
    while quiet < 30 and turns < 10_000:
        await asyncio.sleep(0)
        turns += 1
        quiet = quiet + 1 if len(asyncio.all_tasks()) == 1 else 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
    meeting = threading.Barrier(WORKERS)
    await asyncio.gather(*(asyncio.to_thread(meeting.wait, 10) for _ in range(WORKERS)))


async def check_next(kind: str, replay: Replay, runnable: Runnable[Any, Any]) -> None:
    """The next call is whole."""
    assert text_parts([part async for part in astream_of(kind, runnable)]) == "".join(SENTENCES).upper()
    check_closed(replay)


def with_few_workers() -> int:
    """Give the loop an executor whose workers can be counted; return how many threads there are without."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(WORKERS))
    return threading.active_count()


ENDS = range(len(SENTENCES) + 4)  # of outputs: none, each, and more than there are


@pytest.mark.parametrize("way", ["break", "close", "error"])
@pytest.mark.parametrize("kind", ["runnable", "model"])
def test_t11_a_sync_stream_ends_after_any_output(kind: str, way: str) -> None:
    replay, runnable = made(kind)
    before, sent = threading.active_count(), 0

    def read(outputs: int) -> None:
        nonlocal sent
        stream = runnable.stream(QUESTION)
        for _ in range(outputs):
            next(stream, None)
        sent = replay.log.count("sent")
        if way == "close":
            stream.close()  # type: ignore[attr-defined]
        for _ in stream:
            sent = replay.log.count("sent")
            if way == "error":
                raise KeyError("reader")
            break

    for outputs in ENDS:
        with suppress(KeyError):
            read(outputs)
        assert replay.log.count("sent") == sent  # the model is not read to its end for nobody
        check_closed(replay)
        assert text_parts(list(runnable.stream(QUESTION))) == "".join(SENTENCES).upper()
        check_closed(replay)
    assert threading.active_count() <= before


@pytest.mark.parametrize("kind", ["runnable", "model", "graph"])
async def test_t11_an_async_stream_is_closed_after_any_output(kind: str) -> None:
    before = with_few_workers()
    replay, runnable = made(kind)
    for outputs in ENDS:
        async with aclosing(astream_of(kind, runnable)) as stream:
            for _ in range(outputs):
                await anext(stream, None)
        if kind == "model":
            check_closed(replay)
        del stream
        await check_idle()
        if kind != "model":
            check_closed(replay)
        await check_next(kind, replay, runnable)
    assert threading.active_count() <= before + WORKERS


@pytest.mark.parametrize("kind", ["runnable", "model", "graph"])
async def test_t11_a_failing_reader_of_an_async_stream_leaves_nothing(kind: str) -> None:
    before = with_few_workers()
    replay, runnable = made(kind)

    async def read(outputs: int) -> None:
        count = 0
        async for _ in astream_of(kind, runnable):
            count += 1
            if count == outputs:
                raise KeyError("reader")

    for outputs in range(1, len(SENTENCES) + 1):
        with pytest.raises(KeyError):
            await read(outputs)
        gc.collect()  # nobody closed it: that happens when it is collected
        await check_idle()
        check_closed(replay)
        await check_next(kind, replay, runnable)
    assert threading.active_count() <= before + WORKERS


@pytest.mark.parametrize("kind", ["runnable", "model", "graph"])
async def test_t11_a_task_is_cancelled_while_it_waits_for_any_chunk(kind: str) -> None:
    before = with_few_workers()
    waiting, stop_at = asyncio.Event(), -1

    async def agate(chunk: int) -> None:
        if chunk == stop_at:
            waiting.set()
            await asyncio.Event().wait()

    replay, runnable = made(kind, agate=agate)
    for stop_at in range(len(CHUNKS)):
        waiting.clear()
        task = asyncio.create_task(drain(astream_of(kind, runnable)))
        await asyncio.wait_for(waiting.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        check_closed(replay)
        await check_idle()
        stop_at = -1
        await check_next(kind, replay, runnable)
    assert threading.active_count() <= before + WORKERS


@pytest.mark.parametrize("kind", ["runnable", "model", "graph"])
async def test_t11_a_task_is_cancelled_while_any_sentence_is_corrected(kind: str) -> None:
    before = with_few_workers()
    busy, go_on, slow_at = threading.Event(), threading.Event(), ""

    def slow(question: str, prefix: str, sentence: str) -> str:
        if sentence == slow_at:
            busy.set()
            assert go_on.wait(10)
        return sentence.upper()

    replay = Replay(script={QUESTION: CHUNKS})
    runnable = of_kind(kind, replay, scripted_aligner(slow))
    for slow_at in map(str.strip, SENTENCES):
        busy.clear()
        go_on.clear()
        task = asyncio.create_task(drain(astream_of(kind, runnable)))
        assert await asyncio.to_thread(busy.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        check_closed(replay)
        go_on.set()
        await check_idle()
        slow_at = ""
        await check_next(kind, replay, runnable)
    assert threading.active_count() <= before + WORKERS


# Linear cost: counted, not timed

PACKAGE = Path(aligner_integrations.__file__).parent
COUNTED = {str(path) for path in (PACKAGE / "langchain").glob("*.py")} | {
    str(PACKAGE / name) for name in ("stream.py", "sentences.py")
}


def calls_in(run: Callable[[], object]) -> int:
    """How many calls of the adapter's functions `run` makes, in this thread and in new ones."""
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename in COUNTED

    before = sys.getprofile()
    threading.setprofile(count)
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    return calls


@pytest.mark.parametrize("form", ["stream", "astream"])
@pytest.mark.parametrize("kind", ["text", "runnable", "model"])
def test_t7_twice_the_chunks_are_at_most_twice_the_calls(kind: str, form: str) -> None:
    copying = scripted_aligner(lambda question, prefix, sentence: sentence)

    def calls(chunks: list[str]) -> int:
        replay = Replay(script={QUESTION: chunks})

        async def given() -> AsyncIterator[str]:
            for chunk in chunks:
                yield chunk

        def run() -> None:
            if kind == "text" and form == "stream":
                parts = list(AlignerRunnable(copying).transform(iter(chunks), CONFIG))
            elif kind == "text":
                parts = asyncio.run(drain(AlignerRunnable(copying).atransform(given(), CONFIG)))
            elif form == "stream":
                parts = list(of_kind(kind, replay, copying).stream(QUESTION))
            else:
                parts = asyncio.run(drain(of_kind(kind, replay, copying).astream(QUESTION)))
            assert text_parts(parts) == "".join(chunks)

        return calls_in(run)

    chunks = ["One ", "more ", "bear ", "came ", "by. "] * 40
    calls(chunks)  # what is done once is done
    once, twice = calls(chunks), calls(chunks * 2)
    assert once > len(chunks)
    assert twice < 2.3 * once
