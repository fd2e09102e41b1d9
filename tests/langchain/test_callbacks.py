"""The streaming handlers: both ways to stream, every sink, several runs, and runs that break off."""

from __future__ import annotations

import asyncio
import gc
import io
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stdout, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler, StreamingStdOutCallbackHandler
from langchain_core.language_models import LLM, FakeListChatModel, FakeStreamingListLLM, GenericFakeChatModel
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGenerationChunk, LLMResult
from langchain_core.runnables import RunnableConfig, RunnableLambda, RunnableParallel
from langchain_core.tools import tool
from langchain_core.tracers import BaseTracer
from langchain_core.tracers.schemas import Run

from aligner_integrations.errors import AlignerError, CorrectionFailedError
from aligner_integrations.langchain import (
    AsyncStreamAlignerCallbackHandler,
    RunSegment,
    StreamAlignerCallbackHandler,
    TextUpdate,
)
from aligner_integrations.testing import scripted_aligner
from tests.langchain.forms import ask
from tests.langchain.local_model import ANSWER, MENDED, LocalModel

RAW = "2 + 2 = 5"
ALIGNER = scripted_aligner(lambda question, prefix, sentence: sentence.replace("2 + 2 = 5", "2 + 2 = 4"))
SENTENCES = ["Two and two make four. ", "2 + 2 = 4. ", "So it is, said Dr. Who."]
V3 = pytest.mark.filterwarnings("ignore:.*v3.*:Warning")


def broken(question: str, prefix: str, sentence: str) -> str:
    if "2 + 2" in sentence:
        raise RuntimeError("out of memory")
    return sentence


def shown_of(updates: list[TextUpdate]) -> str:
    shown = ""
    for update in updates:
        shown = update.apply(shown)
    return shown


def drive(form: str, model: Any, config: Any) -> Any:
    """Run a model in one of the ways in which a handler hears it."""
    if form == "invoke":
        return model.invoke("2 + 2?", config)
    if form == "stream":
        return list(model.stream("2 + 2?", config))
    return model.stream_events("2 + 2?", config, version="v3").output


async def adrive(form: str, model: Any, config: Any) -> Any:
    if form == "invoke":
        return await model.ainvoke("2 + 2?", config)
    if form == "stream":
        return [chunk async for chunk in model.astream("2 + 2?", config)]
    return await (await model.astream_events("2 + 2?", config, version="v3")).output


FORMS = ["invoke", "stream", "v3"]


@V3
@pytest.mark.parametrize("form", FORMS)
def test_a_callable_gets_corrected_sentences(form: str) -> None:
    got: list[RunSegment] = []
    drive(form, LocalModel(), {"callbacks": [StreamAlignerCallbackHandler(ALIGNER, sink=got.append)]})
    assert [segment.text for segment in got] == SENTENCES
    assert "".join(segment.original for segment in got) == ANSWER
    assert [segment.index for segment in got] == [0, 1, 2]
    assert [segment.changed for segment in got] == [False, True, False]
    assert len({segment.run_id for segment in got}) == 1


@V3
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("awaits", [True, False])
async def test_the_async_handler_awaits_its_sink(form: str, awaits: bool) -> None:
    got: list[RunSegment] = []

    async def note(segment: RunSegment) -> None:
        await asyncio.sleep(0)
        got.append(segment)

    handler = AsyncStreamAlignerCallbackHandler(ALIGNER, sink=note if awaits else got.append)
    await adrive(form, LocalModel(), {"callbacks": [handler]})
    assert [segment.text for segment in got] == SENTENCES


@V3
@pytest.mark.parametrize("form", FORMS)
async def test_the_sync_handler_works_in_async_runs(form: str) -> None:
    got: list[RunSegment] = []
    await adrive(form, LocalModel(), {"callbacks": [StreamAlignerCallbackHandler(ALIGNER, sink=got.append)]})
    assert [segment.text for segment in got] == SENTENCES


@V3
@pytest.mark.parametrize("form", FORMS)
def test_the_async_handler_works_in_sync_runs(form: str) -> None:
    got: list[RunSegment] = []
    handler = AsyncStreamAlignerCallbackHandler(ALIGNER, sink=got.append)
    drive(form, LocalModel(), {"callbacks": [handler]})
    assert [segment.text for segment in got] == SENTENCES


def test_a_handler_is_its_own_iterator() -> None:
    handler = StreamAlignerCallbackHandler(ALIGNER)
    chain = ask() | LocalModel() | StrOutputParser()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(chain.invoke, {"topic": "bears"}, {"callbacks": [handler]})
        assert [segment.text for segment in handler] == SENTENCES
        assert running.result() == ANSWER  # a callback cannot change what the chain returns
    list(chain.stream({"topic": "bees"}, {"callbacks": [handler]}))
    assert "".join(map(str, handler)) == MENDED  # afterwards, and again


async def test_an_async_handler_is_its_own_async_iterator() -> None:
    handler = AsyncStreamAlignerCallbackHandler(ALIGNER)
    chain = ask() | LocalModel() | StrOutputParser()
    running = asyncio.create_task(chain.ainvoke({"topic": "bears"}, {"callbacks": [handler]}))
    assert [segment.text async for segment in handler] == SENTENCES
    await running


def test_the_first_sentence_comes_before_the_model_is_done() -> None:
    said: list[str] = []
    got: list[str] = []

    class Noting(LocalModel):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            for chunk in super()._stream(*args, **kwargs):
                said.append(chunk.text)
                yield chunk

    def note(segment: RunSegment) -> None:
        got.append("".join(said))

    list(Noting().stream("2 + 2?", {"callbacks": [StreamAlignerCallbackHandler(ALIGNER, sink=note)]}))
    assert got[0] == "Two and two make four. 2 "


class Screen(BaseCallbackHandler):
    """A handler as users write them: it shows tokens, and notes everything that it hears."""

    def __init__(self) -> None:
        self.shown: list[Any] = []
        self.heard: list[str] = []

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.heard.append(f"start {messages[0][-1].text}")

    def on_llm_new_token(self, token: Any, *, chunk: Any = None, **kwargs: Any) -> None:
        self.shown.append(token)
        self.heard.append(repr(chunk))

    def on_stream_event(self, event: Any, **kwargs: Any) -> None:
        self.heard.append(repr(event))

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.heard.append(f"end {response!r}")

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.heard.append(f"error {error!r} {kwargs!r}")

    def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
        self.heard.append(repr(outputs))

    def on_tool_start(self, serialized: Any, input_str: str, **kwargs: Any) -> None:
        self.heard.append(f"tool {input_str}")


class AsyncScreen(AsyncCallbackHandler):
    """The same in coroutines, as far as it goes."""

    def __init__(self) -> None:
        self.shown: list[Any] = []
        self.heard: list[str] = []

    async def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.heard.append("start")

    async def on_llm_new_token(self, token: Any, *, chunk: Any = None, **kwargs: Any) -> None:
        await asyncio.sleep(0)
        self.shown.append(token)
        self.heard.append(repr(chunk))

    async def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.heard.append(repr(response))


@V3
@pytest.mark.parametrize("form", [*FORMS, "invoke chain", "stream chain"])  # v3 is not there for chains
def test_another_handler_hears_corrected_text_only(form: str) -> None:
    screen = Screen()
    form, _, in_chain = form.partition(" ")
    runnable: Any = LocalModel() | StrOutputParser() if in_chain else LocalModel()
    drive(form, runnable, {"callbacks": [StreamAlignerCallbackHandler(ALIGNER, sink=screen)]})
    assert "".join(screen.shown) == MENDED
    assert screen.heard[0] == "start 2 + 2?" and screen.heard[-1].startswith("end")
    assert MENDED in screen.heard[-1]
    assert RAW not in "".join(screen.heard)


async def test_an_async_handler_as_sink_is_awaited() -> None:
    screen = AsyncScreen()
    handler = AsyncStreamAlignerCallbackHandler(ALIGNER, sink=screen)
    await adrive("stream", LocalModel(), {"callbacks": [handler]})
    assert "".join(screen.shown) == MENDED and RAW not in "".join(screen.heard)


def test_langchains_own_terminal_handler_prints_corrected_text() -> None:
    printed = io.StringIO()
    handler = StreamAlignerCallbackHandler(ALIGNER, sink=StreamingStdOutCallbackHandler())
    with redirect_stdout(printed):
        list(LocalModel().stream("2 + 2?", {"callbacks": [handler]}))
    assert printed.getvalue() == MENDED


class Tracer(BaseTracer):
    """As Chainlit's handler is: it keeps runs, and looks up their parents."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        self.runs.append(run)


def test_a_tracer_as_sink_traces_corrected_runs() -> None:
    tracer = Tracer()
    chain = ask() | LocalModel() | StrOutputParser()
    for form in ("invoke", "stream"):
        handler = StreamAlignerCallbackHandler(ALIGNER, sink=tracer)
        config, given = RunnableConfig(callbacks=[handler]), {"topic": "bears"}
        _ = chain.invoke(given, config) if form == "invoke" else list(chain.stream(given, config))
    assert len(tracer.runs) == 2
    for run in tracer.runs:
        assert MENDED in repr(run.outputs) and RAW not in repr((run.outputs, run.events))


@tool
def add(left: int, right: int) -> int:
    """Add two numbers."""
    return left + right


def test_a_handler_as_sink_gets_tool_calls_and_tools() -> None:
    screen = Screen()
    config: Any = {"callbacks": [StreamAlignerCallbackHandler(ALIGNER, sink=screen)]}
    whole: Any = None
    for chunk in LocalModel().bind_tools([add]).stream("Add 2 and 2.", config):
        whole = chunk if whole is None else whole + chunk
    add.invoke(whole.tool_calls[0]["args"], config)
    heard = "".join(screen.heard)
    assert "'name': 'add'" in heard and "tool {'left': 2, 'right': 2}" in heard
    assert "".join(screen.shown) == "I look it up: 2 + 2 = 4. " and RAW not in heard


def test_a_completion_model_is_heard() -> None:
    screen = Screen()
    got: list[RunSegment] = []
    for sink in (screen, got.append):
        handler = StreamAlignerCallbackHandler(ALIGNER, sink=sink)
        model = FakeStreamingListLLM(responses=[ANSWER])
        list(model.stream("2 + 2?", {"callbacks": [handler]}))
        model.invoke("2 + 2?", {"callbacks": [handler]})
    assert "".join(screen.shown) == MENDED * 2 == "".join(map(str, got))
    assert RAW not in "".join(screen.heard)


BLOCKS = [
    {"type": "reasoning", "reasoning": "2 + 2 = 5?", "index": 0},
    {"type": "text", "text": "2 + 2 = 5. So it is.", "index": 1},
    {"type": "image", "url": "https://example.org/4.png", "index": 2},
    {"type": "text", "text": "2 + 2 = 5.", "index": 3},
]


@V3
@pytest.mark.parametrize("form", FORMS)
def test_tokens_that_are_block_lists(form: str) -> None:
    got: list[RunSegment] = []
    screen = Screen()
    for sink in (got.append, screen):
        handler = StreamAlignerCallbackHandler(ALIGNER, sink=sink)
        drive(form, LocalModel(answer=BLOCKS), {"callbacks": [handler]})
    assert [segment.text for segment in got] == ["2 + 2 = 4. ", "So it is.", "2 + 2 = 4."]
    assert [segment.start for segment in got] == [0, 11, 20]
    assert "".join(screen.shown) == "2 + 2 = 4. So it is.2 + 2 = 4."


def test_several_models_in_one_run_stay_apart() -> None:
    echo = scripted_aligner(lambda question, prefix, sentence: f"<{question}>")
    got: list[RunSegment] = []
    handler = StreamAlignerCallbackHandler(echo, sink=got.append)
    branches = {word: ask(words=word + " of {%s}?") | LocalModel() for word in ("What", "Why", "Who")}
    for form in ("invoke", "stream"):
        got.clear()
        parallel = RunnableParallel(branches)
        given, config = {"topic": "bears"}, RunnableConfig(callbacks=[handler])
        _ = parallel.invoke(given, config) if form == "invoke" else list(parallel.stream(given, config))
        runs: dict[Any, list[str]] = {}
        for segment in got:
            runs.setdefault(segment.run_id, []).append(segment.text.strip())
        assert sorted(runs.values()) == [[f"<{word} of bears?>"] * 3 for word in ("What", "Who", "Why")]


@pytest.mark.parametrize("threads", [True, False])
async def test_t13_concurrent_runs_on_one_handler_do_not_cross(threads: bool) -> None:
    echo = scripted_aligner(lambda question, prefix, sentence: question)
    got: list[RunSegment] = []
    model = LocalModel()
    questions: Any = [f"canary {number}" for number in range(200)]
    if threads:
        handler: Any = StreamAlignerCallbackHandler(echo, sink=got.append)
        model.batch(questions, {"callbacks": [handler], "max_concurrency": 50})
    else:
        handler = AsyncStreamAlignerCallbackHandler(echo, sink=got.append)
        await model.abatch(questions, {"callbacks": [handler]})
    runs: dict[Any, set[str]] = {}
    for segment in got:
        runs.setdefault(segment.run_id, set()).add(segment.text.strip())
    assert sorted(map(sorted, runs.values())) == sorted([question] for question in questions)
    assert not handler._answers and not handler._roots


class Breaking(LocalModel):
    """Fails in mid-answer, with one sentence whole and one begun."""

    failure: Any = None

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        for word in ("Two. ", "2 + 2 = 5. ", "So ", "it "):
            yield ChatGenerationChunk(message=AIMessageChunk(content=word))
        raise self.failure or ConnectionError("the line broke")


@V3
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on_error", ["raise", "pass_through", "withhold"])
def test_what_is_held_when_the_model_fails(form: str, on_error: Any) -> None:
    got: list[RunSegment] = []
    handler = StreamAlignerCallbackHandler(
        ALIGNER, sink=got.append, on_error=on_error, withheld_text="[cut off]"
    )
    with pytest.raises(ConnectionError):
        drive(form, Breaking(), {"callbacks": [handler]})
    if form == "invoke":
        assert got == []  # nothing was said
    else:
        rest = "[cut off]" if on_error == "withhold" else "So it "
        assert [segment.text for segment in got] == ["Two. ", "2 + 2 = 4. ", rest]
        assert "".join(segment.original for segment in got) == "Two. 2 + 2 = 5. So it "
    assert not handler._answers and not handler._roots


@pytest.mark.parametrize("on_error", ["raise", "pass_through", "withhold"])
def test_iteration_ends_when_the_model_fails(on_error: Any) -> None:
    handler = StreamAlignerCallbackHandler(ALIGNER, on_error=on_error)
    got: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: list(Breaking().stream("2 + 2?", {"callbacks": [handler]})))
        if on_error == "raise":
            with pytest.raises(ConnectionError):
                got += map(str, handler)
        else:
            got += map(str, handler)
        assert isinstance(running.exception(), ConnectionError)
    assert got[:2] == ["Two. ", "2 + 2 = 4. "]


async def test_cancelling_a_run_ends_the_iteration() -> None:
    handler = AsyncStreamAlignerCallbackHandler(ALIGNER)
    begun = asyncio.Event()

    class Endless(LocalModel):
        async def _astream(self, *args: Any, **kwargs: Any) -> Any:
            yield ChatGenerationChunk(message=AIMessageChunk(content="It goes on. And "))
            begun.set()
            await asyncio.sleep(3600)

    async def run() -> None:
        async for _ in Endless().astream("Go on.", {"callbacks": [handler]}):
            pass

    task = asyncio.create_task(run())
    await begun.wait()
    task.cancel()
    assert [str(segment) async for segment in handler] == ["It goes on. ", "And "]
    with pytest.raises(asyncio.CancelledError):
        await task


def test_closing_a_stream_ends_the_iteration() -> None:
    handler = StreamAlignerCallbackHandler(ALIGNER)
    stream: Any = LocalModel().stream("2 + 2?", {"callbacks": [handler]})
    next(stream)
    stream.close()
    assert "".join(map(str, handler)) == "Two "


@V3
@pytest.mark.parametrize("form", FORMS)
def test_a_failed_correction_ends_the_run(form: str) -> None:
    """LangChain swallows what handlers raise, unless they say otherwise: it must not fail open."""
    screen, got = Screen(), list[RunSegment]()
    for sink in (screen, got.append):
        handler = StreamAlignerCallbackHandler(scripted_aligner(broken), sink=sink)
        with pytest.raises(CorrectionFailedError):
            drive(form, LocalModel(), {"callbacks": [handler]})
        assert not handler._answers and not handler._roots
    assert RAW not in "".join(screen.heard) and RAW not in "".join(map(str, got))


@pytest.mark.parametrize(("on_error", "second"), [("pass_through", "2 + 2 = 5. "), ("withhold", "[held] ")])
def test_a_failed_correction_can_be_lived_with(on_error: Any, second: str) -> None:
    got: list[RunSegment] = []
    handler = StreamAlignerCallbackHandler(
        scripted_aligner(broken), sink=got.append, on_error=on_error, withheld_text="[held]"
    )
    list(LocalModel().stream("2 + 2?", {"callbacks": [handler]}))
    assert [segment.text for segment in got] == [SENTENCES[0], second, SENTENCES[2]]
    assert got[1].findings[0].check == "correction_failed"


def test_a_failing_sink_ends_the_run() -> None:
    def fail(segment: RunSegment) -> None:
        raise ValueError("the screen is gone")

    with pytest.raises(ValueError, match="gone"):
        list(LocalModel().stream("2 + 2?", {"callbacks": [StreamAlignerCallbackHandler(ALIGNER, sink=fail)]}))


def long_model(sentences: int) -> FakeListChatModel:
    return FakeListChatModel(responses=["So it is. " * sentences])


def test_t12_a_slow_reader_slows_the_run() -> None:
    handler = StreamAlignerCallbackHandler(ALIGNER, buffer_size=4)
    chain = long_model(50)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(chain.invoke, "Go on.", {"callbacks": [handler]})
        most = 0
        count = 0
        for _ in handler:
            count += 1
            most = max(most, handler._outlet._held)
        assert count == 50 and most <= 4
        running.result()


def test_a_reader_that_stops_frees_the_run() -> None:
    handler = StreamAlignerCallbackHandler(ALIGNER, buffer_size=2)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(long_model(50).invoke, "Go on.", {"callbacks": [handler]})
        for _ in handler:
            break
        running.result(timeout=20)
    list(LocalModel().stream("2 + 2?", {"callbacks": [StreamAlignerCallbackHandler(ALIGNER)]}))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(LocalModel().invoke, "2 + 2?", {"callbacks": [handler]})
        assert "".join(map(str, handler)) == MENDED  # the next round is whole


def test_nobody_reading_is_an_error_and_no_hang() -> None:
    handler = StreamAlignerCallbackHandler(ALIGNER, buffer_size=2, buffer_timeout=0.05)
    with pytest.raises(AlignerError, match="nobody reads"):
        long_model(50).invoke("Go on.", {"callbacks": [handler]})


async def test_nobody_reading_is_an_error_in_async_runs_too() -> None:
    handler = AsyncStreamAlignerCallbackHandler(ALIGNER, buffer_size=2, buffer_timeout=0.05)
    with pytest.raises(AlignerError, match="nobody reads"):
        await long_model(50).ainvoke("Go on.", {"callbacks": [handler]})


async def test_a_cancelled_reader_loses_nothing_of_the_next_run() -> None:
    handler = AsyncStreamAlignerCallbackHandler(ALIGNER)

    async def read() -> list[str]:
        return [str(segment) async for segment in handler]

    early = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    early.cancel()
    await asyncio.gather(early, return_exceptions=True)
    await LocalModel().ainvoke("2 + 2?", {"callbacks": [handler]})
    assert "".join(await read()) == MENDED


@V3
@pytest.mark.parametrize("form", FORMS)
def test_optimistic_text_comes_at_once_and_is_replaced(form: str) -> None:
    updates: list[TextUpdate] = []
    handler = StreamAlignerCallbackHandler(ALIGNER, sink=updates.append, mode="optimistic")
    drive(form, LocalModel(), {"callbacks": [handler]})
    provisional = [update for update in updates if not update.settled]
    assert "".join(update.text for update in provisional) == ANSWER
    if form != "invoke":
        assert updates[0].text.strip() == "Two" and len(provisional) > 10
    assert [update.text for update in updates if update.settled] == SENTENCES
    assert shown_of(updates) == MENDED
    wrong = next(at for at, update in enumerate(updates) if "4. " in update.text)
    assert "2 + 2 = 5." in shown_of(updates[:wrong]) and "= 5" not in shown_of(updates[: wrong + 1])


@settings(max_examples=200, deadline=None)
@given(
    sentences=st.lists(
        st.sampled_from(["One is one. ", "2 + 2 = 5. ", "Gone. ", "Grow. ", "No end"]), max_size=8
    ),
    cuts=st.lists(st.integers(1, 12), min_size=1, max_size=30),
)
def test_optimistic_updates_always_end_in_the_corrected_text(sentences: list[str], cuts: list[int]) -> None:
    def rule(question: str, prefix: str, sentence: str) -> str:
        return {"Gone.": "", "Grow.": "Grow and grow.", "2 + 2 = 5.": "2 + 2 = 4."}.get(sentence, sentence)

    answer, aligner = "".join(sentences), scripted_aligner(rule)
    pieces: list[Any] = []
    at = 0
    while at < len(answer):
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(answer[at : at + size])
        at += size

    class Replaying(LocalModel):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            for piece in [*pieces, ""]:
                yield ChatGenerationChunk(message=AIMessageChunk(content=piece))

    want = "".join(segment.text for segment in aligner.correct_stream("Go?", [answer]))
    updates: list[TextUpdate] = []
    segments: list[RunSegment] = []
    for mode, sink in (("optimistic", updates.append), ("hold", segments.append)):
        handler = StreamAlignerCallbackHandler(aligner, sink=sink, mode=mode)  # type: ignore[arg-type]
        list(Replaying().stream("Go?", {"callbacks": [handler]}))
    assert shown_of(updates) == want == "".join(map(str, segments))


def test_optimistic_text_that_cannot_be_corrected_is_taken_back() -> None:
    for on_error, rest in (("raise", ""), ("withhold", "[held] So it is, said Dr. Who.")):
        updates: list[TextUpdate] = []
        handler = StreamAlignerCallbackHandler(
            scripted_aligner(broken),
            sink=updates.append,
            mode="optimistic",
            on_error=on_error,  # type: ignore[arg-type]
            withheld_text="[held]",
        )
        run: Callable[[], Any] = lambda: list(LocalModel().stream("?", {"callbacks": [handler]}))  # noqa: B023, E731
        if on_error == "raise":
            with pytest.raises(CorrectionFailedError):
                run()
        else:
            run()
        assert shown_of(updates) == SENTENCES[0] + rest


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"sink": 3}, TypeError, "sink"),
        ({"mode": "bold"}, ValueError, "mode"),
        ({"mode": "optimistic", "sink": Screen()}, ValueError, "append"),
        ({"on_error": "ignore"}, ValueError, "on_error"),
        ({"question": 3}, TypeError, "question"),
        ({"buffer_size": 0}, ValueError, "buffer_size"),
        ({"edit_margin": -1}, ValueError, "edit_margin"),
        ({"feedback": None}, TypeError, "feedback"),
        ({"aligner": "tiny"}, TypeError, "aligner"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], says: str) -> None:
    for kind in (StreamAlignerCallbackHandler, AsyncStreamAlignerCallbackHandler):
        with pytest.raises(error, match=says):
            kind(**options)


def test_an_async_sink_needs_the_async_handler() -> None:
    async def note(segment: RunSegment) -> None: ...

    with pytest.raises(TypeError, match="AsyncStreamAligner"):
        StreamAlignerCallbackHandler(ALIGNER, sink=note)
    with pytest.raises(TypeError, match="sink"):
        iter(StreamAlignerCallbackHandler(ALIGNER, sink=print))


def test_the_question_can_be_given() -> None:
    echo = scripted_aligner(lambda question, prefix, sentence: f"[{question}]")
    got: list[RunSegment] = []
    handler = StreamAlignerCallbackHandler(echo, sink=got.append, question="Why?")
    FakeListChatModel(responses=["So."]).invoke("What?", {"callbacks": [handler]})
    assert [str(segment) for segment in got] == ["[Why?]"]


def test_threads_are_not_kept() -> None:
    before = threading.active_count()
    test_a_handler_is_its_own_iterator()
    assert threading.active_count() <= before


def test_messages_are_left_as_they_are() -> None:
    """What the model's own consumer gets is not touched: neither in place nor in the result."""
    handler = StreamAlignerCallbackHandler(ALIGNER, sink=Screen())
    chunks: list[BaseMessage] = list(LocalModel().stream("2 + 2?", {"callbacks": [handler]}))
    assert "".join(str(chunk.text) for chunk in chunks) == ANSWER
    assert LocalModel().invoke("2 + 2?", {"callbacks": [handler]}).text == ANSWER


# --- what a review found, each with a test


class CompletionModel(LLM):
    @property
    def _llm_type(self) -> str:
        return "completion"

    def _call(self, prompt: str, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> str:
        return ANSWER


class Hearing(AsyncCallbackHandler):
    def __init__(self) -> None:
        self.heard: list[str] = []

    async def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
        self.heard.append("start")

    async def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        self.heard.append("end")


async def test_async_completions_still_start_for_other_handlers() -> None:
    """langchain-core forgets them once a handler is there that runs in place, as the recorder does."""
    hearing, got = Hearing(), list[RunSegment]()
    ours = StreamAlignerCallbackHandler(ALIGNER, sink=got.append)
    await CompletionModel().ainvoke("2 + 2?", {"callbacks": [hearing, ours]})
    assert hearing.heard == ["start", "end"]
    assert "".join(map(str, got)) == MENDED
    hearing.heard.clear()
    theirs = AsyncStreamAlignerCallbackHandler(ALIGNER, sink=got.append)
    await CompletionModel().ainvoke("2 + 2?", {"callbacks": [hearing, theirs]})
    assert hearing.heard == ["start", "end"]


@V3
def test_a_model_that_says_its_tokens_itself_is_heard_once() -> None:
    got: list[RunSegment] = []
    handler = StreamAlignerCallbackHandler(ALIGNER, sink=got.append)
    model = GenericFakeChatModel(messages=itertools.repeat(ANSWER))
    drive("v3", model, {"callbacks": [handler]})
    assert "".join(map(str, got)) == MENDED


async def test_t11_a_cancel_in_mid_correction_shows_nothing_twice() -> None:
    called = threading.Event()

    def slow(question: str, prefix: str, sentence: str) -> str:
        called.set()
        time.sleep(0.1)
        return sentence.replace("2 + 2 = 5", "2 + 2 = 4")

    class Quick(LocalModel):
        async def _astream(self, *args: Any, **kwargs: Any) -> Any:
            yield ChatGenerationChunk(
                message=AIMessageChunk(content="One is one. 2 + 2 = 5. Three is three. And")
            )
            await asyncio.sleep(3600)

    for on_error, rest in (("raise", "And"), ("withhold", "[held]")):
        got: list[RunSegment] = []
        handler = AsyncStreamAlignerCallbackHandler(
            scripted_aligner(slow),
            sink=got.append,
            on_error=on_error,  # type: ignore[arg-type]
            withheld_text="[held]",
        )
        called.clear()
        task = asyncio.create_task(adrive("stream", Quick(), {"callbacks": [handler]}))
        await asyncio.to_thread(called.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [str(segment) for segment in got] == ["One is one. ", "2 + 2 = 4. ", "Three is three. ", rest]
        assert [segment.start for segment in got] == [0, 12, 23, 39]


@V3
@pytest.mark.parametrize("form", ["stream", "v3"])
def test_raw_text_does_not_stay_on_screen_after_a_failure_at_the_end(form: str) -> None:
    class Short(LocalModel):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            for word in ("2 + 2 ", "= 5."):
                yield ChatGenerationChunk(message=AIMessageChunk(content=word))

    for kind in (StreamAlignerCallbackHandler, AsyncStreamAlignerCallbackHandler):
        updates: list[TextUpdate] = []
        handler = kind(scripted_aligner(broken), sink=updates.append, mode="optimistic")
        # What an async handler raises in a sync run is swallowed by LangChain.
        failing = kind is StreamAlignerCallbackHandler
        with pytest.raises(CorrectionFailedError) if failing else nullcontext():
            drive(form, Short(), {"callbacks": [handler]})
        assert shown_of(updates) == ""


async def test_a_tool_that_is_cancelled_does_not_keep_the_reader_waiting() -> None:
    @tool
    async def wait_long(text: str) -> str:
        """Wait."""
        await asyncio.sleep(3600)
        return text

    async def step(text: str, config: RunnableConfig) -> str:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(wait_long.ainvoke({"text": text}, config), 0.05)
        return str((await LocalModel().ainvoke(text, config)).text)

    handler = AsyncStreamAlignerCallbackHandler(ALIGNER)
    running = asyncio.create_task(RunnableLambda(step).ainvoke("2 + 2?", {"callbacks": [handler]}))
    async with asyncio.timeout(20):
        assert "".join([str(segment) async for segment in handler]) == MENDED
    await running
    assert not handler._roots


@V3
def test_a_run_that_is_dropped_without_a_word_ends_the_round() -> None:
    handler = StreamAlignerCallbackHandler(ALIGNER)
    stream = LocalModel().stream_events("2 + 2?", {"callbacks": [handler]}, version="v3")
    next(iter(stream.text))
    del stream
    gc.collect()
    list(handler)
    assert not handler._roots and not handler._answers


def test_a_second_run_is_read_whole_after_a_reader_left_the_first() -> None:
    handler = StreamAlignerCallbackHandler(ALIGNER)
    first: Any = LocalModel().stream("2 + 2?", {"callbacks": [handler]})
    next(first)
    for _ in range(8):
        next(first)
    for _ in handler:
        break
    LocalModel().invoke("2 + 2?", {"callbacks": [handler]})
    list(first)
    assert MENDED in "".join(map(str, handler))


def test_two_readers_are_one_too_many() -> None:
    handler = StreamAlignerCallbackHandler(ALIGNER)
    LocalModel().invoke("2 + 2?", {"callbacks": [handler]})
    reader = iter(handler)
    next(reader)
    with pytest.raises(AlignerError, match="already"):
        next(iter(handler))


async def test_a_writer_cancelled_while_it_waits_loses_nothing() -> None:
    handler = AsyncStreamAlignerCallbackHandler(ALIGNER, buffer_size=2, mode="optimistic")
    text = "One. Two. 2 + 2 = 5. Four. Five. "

    class Whole(LocalModel):
        answer: Any = text

    task = asyncio.create_task(Whole().ainvoke("?", {"callbacks": [handler]}))
    while handler._outlet._held < 2:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    updates = [update async for update in handler]
    await asyncio.gather(task, return_exceptions=True)
    assert shown_of(updates) == text.replace("5", "4")  # type: ignore[arg-type]


def test_a_sink_that_failed_once_gets_no_more_of_that_answer() -> None:
    got: list[str] = []

    def once(segment: RunSegment) -> None:
        if segment.index == 1:
            raise ValueError("the screen is gone")
        got.append(segment.text)

    with pytest.raises(ValueError, match="gone"):
        LocalModel().invoke("2 + 2?", {"callbacks": [StreamAlignerCallbackHandler(ALIGNER, sink=once)]})
    assert got == [SENTENCES[0]]


def test_iteration_follows_the_outermost_run() -> None:
    """A model that failed and was replaced is no failure of the run."""
    handler = StreamAlignerCallbackHandler(ALIGNER)
    with_spare = (ask() | Breaking()).with_fallbacks([ask() | LocalModel()])
    with_spare.invoke({"topic": "bears"}, {"callbacks": [handler]})
    assert "".join(map(str, handler)).endswith(MENDED)


def test_tool_calls_and_usage_reach_a_handler_once() -> None:
    screen = Screen()

    class Calling(LocalModel):
        before_tools: str = ""

    handler = StreamAlignerCallbackHandler(ALIGNER, sink=screen)
    list(Calling().bind_tools([add]).stream("Add 2 and 2.", {"callbacks": [handler]}))
    assert "".join(screen.heard[:-1]).count("tool_call_chunks=[{'name': 'add'") == 1
    assert "".join(screen.heard[:-1]).count("'total_tokens': 18") == 1


@V3
def test_a_block_that_ends_beside_a_text_does_not_cut_it() -> None:
    class Native(LocalModel):
        def _stream_chat_model_events(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
            yield {"event": "message-start", "role": "ai", "id": "m"}
            for text in ("2 + 2 ", "= 5. So."):
                delta = {"type": "text-delta", "text": text}
                yield {"event": "content-block-delta", "index": 0, "delta": delta}
                thought = {"type": "reasoning", "reasoning": "hm"}
                yield {"event": "content-block-finish", "index": 1, "content": thought}
            whole = {"type": "text", "text": "2 + 2 = 5. So."}
            yield {"event": "content-block-finish", "index": 0, "content": whole}
            yield {"event": "message-finish"}

    got: list[RunSegment] = []
    drive("v3", Native(), {"callbacks": [StreamAlignerCallbackHandler(ALIGNER, sink=got.append)]})
    assert [segment.text for segment in got] == ["2 + 2 = 4. ", "So."]


def test_a_handler_that_fails_at_the_start_leaves_nothing() -> None:
    class Failing(BaseCallbackHandler):
        raise_error = True

        def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError("no screen")

    handler = StreamAlignerCallbackHandler(ALIGNER, sink=Failing())
    with pytest.raises(ValueError, match="no screen"):
        LocalModel().invoke("2 + 2?", {"callbacks": [handler]})
    assert not handler._roots and not handler._answers


def test_log_probabilities_do_not_reach_a_handler() -> None:
    class Likely(LocalModel):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            for chunk in super()._stream(*args, **kwargs):
                info = {"logprobs": [{"token": chunk.text}]}
                metadata = {**chunk.message.response_metadata, **info}
                message = chunk.message.model_copy(update={"response_metadata": metadata})
                yield ChatGenerationChunk(message=message, generation_info=info)

    screen = Screen()
    handler = StreamAlignerCallbackHandler(ALIGNER, sink=screen)
    list(Likely().stream("2 + 2?", {"callbacks": [handler]}))
    Likely().invoke("2 + 2?", {"callbacks": [handler]})
    assert "logprobs" not in "".join(screen.heard)
