"""`AlignedChatModel`: what each consumer hears, what is kept, what ends when a stream is broken off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, CallbackManagerForLLMRun
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage
from langchain_core.outputs import ChatGenerationChunk, LLMResult
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.tools import tool
from langchain_core.tracers import BaseTracer
from langchain_core.tracers.schemas import Run
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import Field

from aligner_integrations.errors import CorrectionFailedError
from aligner_integrations.langchain import AlignedChatModel
from aligner_integrations.testing import scripted_aligner
from tests.langchain.local_model import ANSWER, MENDED, LocalModel

RAW = "2 + 2 = 5"
ALIGNER = scripted_aligner(lambda question, prefix, sentence: sentence.replace("2 + 2 = 5", "2 + 2 = 4"))


def aligned(model: LocalModel | None = None, **given: Any) -> AlignedChatModel:
    return AlignedChatModel(model=model or LocalModel(), aligner=ALIGNER, **given)


class Listener(BaseCallbackHandler):
    """Notes every text that any callback hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.starts = 0

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.starts += 1

    def on_llm_new_token(self, token: Any, *, chunk: Any = None, **kwargs: Any) -> None:
        self.heard += [str(token), repr(chunk)]

    def on_stream_event(self, event: Any, **kwargs: Any) -> None:
        self.heard.append(repr(event))

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.heard.append(repr(response))


class Tracer(BaseTracer):
    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        self.runs.append(run)


def graph_of(model: AlignedChatModel) -> Any:
    def answer(state: MessagesState) -> dict[str, list[BaseMessage]]:
        return {"messages": [model.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    return graph.compile()


def test_invoke_and_stream_give_the_corrected_text() -> None:
    assert aligned().invoke("2 + 2?").text == MENDED
    chunks = list(aligned().stream("2 + 2?"))
    assert "".join(chunk.text for chunk in chunks) == MENDED
    assert len([chunk for chunk in chunks if chunk.text]) == 3  # sentence by sentence


async def test_the_async_twins_do_too() -> None:
    assert (await aligned().ainvoke("2 + 2?")).text == MENDED
    assert "".join([chunk.text async for chunk in aligned().astream("2 + 2?")]) == MENDED
    assert [m.text for m in await aligned().abatch(["a", "b"])] == [MENDED, MENDED]


def test_the_first_sentence_leaves_before_the_model_is_done() -> None:
    said: list[str] = []

    class Noting(LocalModel):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            for chunk in super()._stream(*args, **kwargs):
                said.append(chunk.text)
                yield chunk

    stream = aligned(Noting()).stream("2 + 2?")
    assert next(stream).text == "Two and two make four. "
    assert "".join(said) == "Two and two make four. 2 "


def test_no_callback_and_no_tracer_hears_the_raw_text() -> None:
    for call in ("invoke", "stream"):
        listener, tracer = Listener(), Tracer()
        result = getattr(aligned(), call)("2 + 2?", {"callbacks": [listener, tracer]})
        _ = list(result) if call == "stream" else result
        assert listener.starts == 1 and listener.heard
        assert RAW not in "".join(listener.heard)
        (run,) = tracer.runs
        assert not run.child_runs and RAW not in repr(run.outputs)


def outputs_of(tracer: Tracer) -> list[str]:
    """What each traced run gave, children included."""
    return [repr(run.outputs) for root in tracer.runs for run in (root, *root.child_runs)]


@pytest.mark.parametrize("call", ["invoke", "stream"])
def test_trace_original_shows_the_inner_run_too(call: str) -> None:
    tracer = Tracer()
    result = getattr(aligned(trace_original=True), call)("2 + 2?", {"callbacks": [tracer]})
    assert ("".join(chunk.text for chunk in result) if call == "stream" else result.text) == MENDED
    raw = [RAW in output for output in outputs_of(tracer)]
    assert sorted(raw) == [False, True]


@pytest.mark.parametrize("call", ["ainvoke", "astream"])
async def test_trace_original_works_in_async_runs(call: str) -> None:
    tracer = Tracer()
    result = getattr(aligned(trace_original=True), call)("2 + 2?", {"callbacks": [tracer]})
    text = "".join([chunk.text async for chunk in result]) if call == "astream" else (await result).text
    assert text == MENDED
    assert sorted(RAW in output for output in outputs_of(tracer)) == [False, True]


async def test_event_streams_hear_corrected_text_only() -> None:
    events = [event async for event in aligned().astream_events("2 + 2?", version="v2")]
    assert RAW not in repr(events)
    parts = [event["data"]["chunk"].text for event in events if event["event"] == "on_chat_model_stream"]
    assert "".join(parts) == MENDED
    stream = aligned().stream_events("2 + 2?", version="v3")
    assert RAW not in repr(list(stream)) and stream.output.text == MENDED


@pytest.mark.parametrize("mode", ["messages", "updates", "values", "custom"])
def test_every_stream_mode_of_a_graph_is_corrected(mode: str) -> None:
    question = {"messages": [HumanMessage("2 + 2?")]}
    events = list(graph_of(aligned()).stream(question, stream_mode=mode))
    assert RAW not in repr(events)
    if mode == "messages":
        # The state's copy of the message comes as no second one: it has the stream's id.
        assert "".join(message.text for message, _ in events) == MENDED
    elif mode != "custom":
        assert MENDED in repr(events)


async def test_events_of_a_graph_are_corrected() -> None:
    question = {"messages": [HumanMessage("2 + 2?")]}
    events = [event async for event in graph_of(aligned()).astream_events(question, version="v2")]
    assert RAW not in repr(events) and MENDED in repr(events)


def test_usage_ids_and_metadata_are_the_models_once() -> None:
    usage = {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18}
    whole: Any = None
    for chunk in aligned().stream("2 + 2?"):
        whole = chunk if whole is None else whole + chunk
    for message in (whole, aligned().invoke("2 + 2?")):
        assert message.usage_metadata == usage
        assert message.response_metadata["model_name"] == "local"
        assert message.response_metadata["finish_reason"] == "stop"
        assert str(message.id).startswith("lc_run--")
        cost = message.response_metadata["aligner"]
        assert (cost["sentences"], cost["changed"], cost["failed"]) == (3, 1, 0)
        assert cost["forwards"] >= 3 and cost["provider"] == "scripted" and cost["on_error"] == "raise"


class WithLogprobs(LocalModel):
    """Says, as some providers do, how likely each of its tokens was."""

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        for number, chunk in enumerate(super()._stream(*args, **kwargs)):
            info = {"logprobs": {"content": [{"token": chunk.text, "logprob": -0.1}]}}
            metadata = {**chunk.message.response_metadata, **(info if number % 2 else {})}
            message = chunk.message.model_copy(update={"response_metadata": metadata})
            yield ChatGenerationChunk(message=message, generation_info=None if number % 2 else info)


def test_log_probabilities_do_not_spell_the_raw_text() -> None:
    model = aligned(WithLogprobs())
    for message in (model.invoke("2 + 2?"), *model.stream("2 + 2?")):
        assert "logprob" not in repr(message)
    assert model.invoke("2 + 2?").response_metadata["finish_reason"] == "stop"
    schema = {"title": "Sum", "type": "object", "properties": {}}
    left = model.invoke("2 + 2?", response_format=schema)
    assert "logprob" in repr(left) and left.text == ANSWER  # what is left alone is left alone


@tool
def add(left: int, right: int) -> int:
    """Add two numbers."""
    return left + right


def test_tool_calls_are_kept_and_the_text_beside_them_is_corrected() -> None:
    bound = aligned().bind_tools([add])
    whole: Any = None
    for chunk in bound.stream("Add 2 and 2."):
        whole = chunk if whole is None else whole + chunk
    for message in (bound.invoke("Add 2 and 2."), whole):
        assert isinstance(message, AIMessage)
        (call,) = message.tool_calls
        assert (call["name"], call["args"]) == ("add", {"left": 2, "right": 2})
        assert message.text == "I look it up: 2 + 2 = 4. "


def test_blocks_that_are_not_text_pass_in_order() -> None:
    blocks = [
        {"type": "reasoning", "reasoning": "2 + 2 = 5?", "index": 0},
        {"type": "text", "text": "2 + 2 = 5.", "index": 1},
        {"type": "image", "url": "https://example.org/5.png", "index": 2},
    ]
    whole: Any = None
    for chunk in aligned(LocalModel(answer=blocks)).stream("2 + 2?"):
        whole = chunk if whole is None else whole + chunk
    mended = [blocks[0], {**blocks[1], "text": "2 + 2 = 4."}, blocks[2]]
    assert whole.content == mended
    assert aligned(LocalModel(answer=blocks)).invoke("2 + 2?").content == mended


def test_the_question_is_the_last_human_message() -> None:
    echo = scripted_aligner(lambda question, prefix, sentence: f"[{question}]")
    model = AlignedChatModel(model=FakeListChatModel(responses=["One sentence."]), aligner=echo)
    messages = [
        SystemMessage("Be short."),
        HumanMessage("First?"),
        AIMessage("Yes."),
        HumanMessage("Second?"),
    ]
    assert model.invoke(messages).text == "[Second?]"


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_output_version_is_the_models(version: str) -> None:
    model = aligned(LocalModel(output_version=version))
    assert model.output_version == version
    message = model.invoke("2 + 2?")
    assert isinstance(message.content, list if version == "v1" else str) and message.text == MENDED


def test_a_model_that_may_not_stream_does_not() -> None:
    model = aligned(LocalModel(disable_streaming=True))
    (chunk,) = [part for part in model.stream("2 + 2?") if part.text]
    assert chunk.text == MENDED


def test_a_cache_holds_corrected_answers_of_one_aligner() -> None:
    cache = InMemoryCache()
    one = aligned(cache=cache)
    other = AlignedChatModel(
        model=LocalModel(), aligner=scripted_aligner(lambda q, p, s: s.upper()), cache=cache, edit_margin=1.0
    )
    assert [one.invoke("2 + 2?").text for _ in range(2)] == [MENDED, MENDED]
    assert RAW not in repr(cache._cache)
    assert other.invoke("2 + 2?").text == ANSWER.upper()


def test_the_models_rate_limiter_is_asked() -> None:
    class Counting(InMemoryRateLimiter):
        asked = 0

        def acquire(self, *, blocking: bool = True) -> bool:
            Counting.asked += 1
            return True

    model = aligned(LocalModel(rate_limiter=Counting()))
    model.invoke("2 + 2?")
    list(model.stream("2 + 2?"))
    assert Counting.asked == 2


def test_structured_output_is_left_alone() -> None:
    schema = {"title": "Sum", "type": "object", "properties": {"text": {"type": "string"}}}
    result = aligned().with_structured_output(schema).invoke("2 + 2 = 5")
    assert result == {"text": "2 + 2 = 5"}


def broken(question: str, prefix: str, sentence: str) -> str:
    raise RuntimeError("out of memory")


def test_what_a_failed_correction_does_is_chosen() -> None:
    failing = scripted_aligner(broken)
    with pytest.raises(CorrectionFailedError):
        AlignedChatModel(model=LocalModel(), aligner=failing).invoke("2 + 2?")
    shown = AlignedChatModel(model=LocalModel(), aligner=failing, on_error="pass_through").invoke("2 + 2?")
    assert shown.text == ANSWER and shown.response_metadata["aligner"]["failed"] == 3
    withheld = AlignedChatModel(
        model=LocalModel(), aligner=failing, on_error="withhold", withheld_text="[withheld]"
    )
    assert RAW not in withheld.invoke("2 + 2?").text


class Watched(LocalModel):
    """Says whether its stream was closed."""

    closed: list[str] = Field(default_factory=list)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        try:
            while True:
                yield ChatGenerationChunk(message=AIMessageChunk(content="And on it goes. "))
        finally:
            self.closed.append("sync")

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        try:
            while True:
                await asyncio.sleep(0)
                yield ChatGenerationChunk(message=AIMessageChunk(content="And on it goes. "))
        finally:
            self.closed.append("async")


async def test_breaking_off_closes_the_model() -> None:
    model = Watched()
    stream = aligned(model).stream("Go on.")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    stream_async = aligned(model).astream("Go on.")
    await anext(stream_async)
    await stream_async.aclose()  # type: ignore[attr-defined]
    assert model.closed == ["sync", "async"]


def test_many_runs_at_once_do_not_cross() -> None:
    echo = scripted_aligner(lambda question, prefix, sentence: question)
    model = AlignedChatModel(model=FakeListChatModel(responses=["A sentence."]), aligner=echo)
    questions: list[Any] = [f"canary {number}" for number in range(40)]
    assert [message.text for message in model.batch(questions, {"max_concurrency": 16})] == questions


def test_ids_of_runs_are_uuids() -> None:
    message = aligned().invoke("2 + 2?")
    assert message.id is not None
    UUID(message.id.removeprefix("lc_run--").rsplit("-", 1)[0])
