"""Runs side by side do not mix, and nothing stays behind when they end, fail or are dropped."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel, chain

from aligner_integrations.errors import QuestionNotFoundError
from aligner_integrations.langchain import AlignerRunnable
from aligner_integrations.langchain.question import QuestionRecorder, find_question, recorder
from tests.langchain.forms import FORMS, ask, model, run, tell, text_of


@pytest.mark.parametrize("form", FORMS)
def test_parallel_branches_do_not_mix(form: str) -> None:
    branches = {
        name: ask(words=name + " of {%s}?") | model() | StrOutputParser() | AlignerRunnable(tell())
        for name in ("What", "Why", "Who")
    }
    result = run(form, RunnableParallel(branches), {"topic": "bears"})
    assert result == {name: f"<{name} of bears?>" for name in branches}


@pytest.mark.parametrize("form", FORMS)
def test_aligner_inside_a_parallel_step_after_the_model(form: str) -> None:
    aligned = StrOutputParser() | AlignerRunnable(tell())
    chained = ask() | model() | RunnableParallel(raw=StrOutputParser(), aligned=aligned)
    assert run(form, chained, {"topic": "bears"}) == {"raw": "It is so.", "aligned": "<What of bears?>"}


def test_concurrent_threads_do_not_mix() -> None:
    chained = ask() | model() | StrOutputParser() | AlignerRunnable(tell())
    topics = [f"bear {number}" for number in range(60)]
    with ThreadPoolExecutor(8) as pool:
        for form in ("invoke", "stream"):
            told = pool.map(lambda topic, form=form: run(form, chained, {"topic": topic}), topics)
            assert [text_of(each) for each in told] == [f"<What of {topic}?>" for topic in topics]


async def test_concurrent_tasks_do_not_mix() -> None:
    chained = ask() | model() | StrOutputParser() | AlignerRunnable(tell())

    async def one(topic: str) -> str:
        return "".join([part async for part in chained.astream({"topic": topic})])

    topics = [f"bear {number}" for number in range(60)]
    assert await asyncio.gather(*map(one, topics)) == [f"<What of {topic}?>" for topic in topics]
    batched = await chained.abatch([{"topic": topic} for topic in topics])
    assert batched == [f"<What of {topic}?>" for topic in topics]


def test_interleaved_streams_do_not_mix() -> None:
    chained = ask() | model("So. So it is. It is so. ") | StrOutputParser() | AlignerRunnable(tell())
    streams = [chained.stream({"topic": topic}) for topic in ("bears", "bees")]
    bears, bees = (list(parts) for parts in zip(*zip(*streams, strict=True), strict=True))
    assert len(bears) > 1
    assert "bees" not in "".join(bears)
    assert "bears" not in "".join(bees)


def test_failing_chains_leave_nothing() -> None:
    def fail(message: Any) -> Any:
        raise ValueError("broken")

    chained = ask() | model() | fail | AlignerRunnable(tell())
    for form in FORMS:
        with pytest.raises(ValueError, match="broken"):
            run(form, chained, {"topic": "bears"})
        assert len(recorder) == 0


def test_abandoned_streams_leave_nothing() -> None:
    chained = ask() | model("So. It is so. Or not. ") | AlignerRunnable(tell())
    streams = [chained.stream({"topic": "bears"}) for _ in range(10)]
    for stream in streams:
        next(stream)
    assert len(recorder) >= 10
    del stream, streams
    gc.collect()
    assert len(recorder) == 0


def test_runs_that_never_end_leave_nothing() -> None:
    own = QuestionRecorder()
    run_id, inner = uuid4(), uuid4()
    own.on_chain_start({}, "What?", run_id=run_id)
    own.on_chain_start({}, "What?", run_id=inner, parent_run_id=run_id)
    own.on_chat_model_start({}, [[HumanMessage("What?")]], run_id=uuid4(), parent_run_id=inner)
    assert len(own) == 2
    del run_id, inner
    assert len(own) == 0


def test_notes_are_bounded() -> None:
    own, run_id = QuestionRecorder(), uuid4()
    own.on_chain_start({}, "", run_id=run_id)
    for number in range(1000):
        own.on_llm_start({}, [str(number)], run_id=uuid4(), parent_run_id=run_id)
    notes = own.run(run_id)
    assert notes is not None and len(notes.asks) < 100


def test_tokens_cost_nothing() -> None:
    """No method of ours runs per token; `run_inline` spares async chains a thread per event."""
    own = vars(QuestionRecorder)
    assert "on_llm_new_token" not in own and "on_stream_event" not in own
    assert QuestionRecorder.run_inline


def two_models(link: Callable[[AIMessage], Any]) -> Runnable[Any, Any]:
    """Two models answer different questions in one function; then the first answer is corrected."""
    aligner = AlignerRunnable(tell())

    @chain
    def compare(given: dict[str, str]) -> Any:
        first = (ask() | model()).invoke(given)
        (ask(words="Why {%s}?") | model()).invoke(given)
        return aligner.invoke(link(first))

    return compare


def test_a_message_names_its_model() -> None:
    assert two_models(lambda message: message).invoke({"topic": "bears"}).text == "<What of bears?>"


@pytest.mark.parametrize("kind", ["invoke", "stream"])
def test_a_model_in_a_parallel_branch_is_not_upstream(kind: str) -> None:
    told = threading.Event()

    def answer(given: Any) -> str:
        assert told.wait(5)
        return "It is so."

    def tell_so(message: BaseMessage) -> BaseMessage:
        told.set()
        return message

    branches = RunnableParallel(
        told=ask() | model() | tell_so, aligned=RunnableLambda(answer) | AlignerRunnable(tell())
    )
    with pytest.raises(QuestionNotFoundError):
        run(kind, branches, {"topic": "bears"})


def test_two_models_are_no_ground_for_a_guess() -> None:
    with pytest.raises(QuestionNotFoundError, match="2 models upstream were asked different things"):
        two_models(lambda message: message.text).invoke({"topic": "bears"})


def test_looking_up_while_other_branches_start_models() -> None:
    run_id, own, stop = uuid4(), uuid4(), threading.Event()
    recorder.on_chain_start({}, "", run_id=run_id)

    def keep_asking() -> None:
        while not stop.is_set():
            recorder.on_llm_start({}, ["What of bears?"], run_id=uuid4(), parent_run_id=run_id)

    recorder.on_llm_start({}, ["What of bears?"], run_id=uuid4(), parent_run_id=run_id)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(keep_asking) for _ in range(2)]
        try:
            for _ in range(300):
                found = find_question("", run_id=own, parent_run_id=run_id, tags=(), config={})
                assert found == "What of bears?"
        finally:
            stop.set()
            sys.setswitchinterval(interval)
    for writer in writers:
        writer.result()
    recorder.on_chain_end("", run_id=run_id)
