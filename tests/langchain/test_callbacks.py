"""The streaming handlers: both ways to stream, every sink, several runs, and runs that break off."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler, StreamingStdOutCallbackHandler
from langchain_core.language_models import FakeListChatModel, FakeStreamingListLLM
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGenerationChunk, LLMResult
from langchain_core.runnables import RunnableConfig, RunnableParallel
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
async def test_concurrent_runs_on_one_handler_do_not_cross(threads: bool) -> None:
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


def test_a_slow_reader_slows_the_run() -> None:
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
