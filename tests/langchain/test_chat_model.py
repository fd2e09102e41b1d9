"""`AlignedChatModel`: what each consumer hears, what is kept, what ends when a stream is broken off."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import operator
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import (
    BaseCallbackHandler,
    CallbackManagerForLLMRun,
    UsageMetadataCallbackHandler,
)
from langchain_core.language_models import BaseChatModel, FakeListChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.tools import tool
from langchain_core.tracers import BaseTracer
from langchain_core.tracers.schemas import Run
from pydantic import Field

from aligner_integrations import Aligner
from aligner_integrations.errors import CorrectionFailedError
from aligner_integrations.langchain import AlignedChatModel, AlignerRunnable
from aligner_integrations.safeguards.policy import Safeguards
from aligner_integrations.testing import scripted_aligner
from tests.langchain.forms import graph_of
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


def test_t4_t19_no_callback_and_no_tracer_hears_the_raw_text() -> None:
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


def test_t18_usage_ids_and_metadata_are_the_models_once() -> None:
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


def test_t17_tool_calls_are_kept_and_the_text_beside_them_is_corrected() -> None:
    bound = aligned().bind_tools([add])
    whole: Any = None
    for chunk in bound.stream("Add 2 and 2."):
        whole = chunk if whole is None else whole + chunk
    for message in (bound.invoke("Add 2 and 2."), whole):
        assert isinstance(message, AIMessage)
        (call,) = message.tool_calls
        assert (call["name"], call["args"]) == ("add", {"left": 2, "right": 2})
        assert message.text == "I look it up: 2 + 2 = 4. "


def test_t17_blocks_that_are_not_text_pass_in_order() -> None:
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


# --- what a review found, each with a test


class Whole(BaseChatModel):
    """A model that does not stream."""

    message: AIMessage

    @property
    def _llm_type(self) -> str:
        return "whole"

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self.message)])


def total(chunks: Any) -> Any:
    return functools.reduce(operator.add, chunks)


def test_a_truncated_tool_call_stays_invalid() -> None:
    """Joined with another chunk it would be completed, and an agent would run it."""
    broken_call: Any = {
        "name": "delete",
        "args": '{"path": "/home',
        "id": "1",
        "error": "cut",
        "type": "invalid_tool_call",
    }
    model = Whole(message=AIMessage("2 + 2 = 5. ", invalid_tool_calls=[broken_call]))
    wrapped = AlignedChatModel(model=model, aligner=ALIGNER)
    for message in (wrapped.invoke("?"), total(wrapped.stream("?"))):
        assert message.tool_calls == [] and message.invalid_tool_calls == [broken_call]
        assert message.text == "2 + 2 = 4. "


def test_ids_of_text_blocks_are_kept_in_streams() -> None:
    class Late(LocalModel):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            for block in ({"text": "2 + 2 = 5."}, {"id": "msg_1"}):
                content: Any = [{"type": "text", "index": 0, **block}]
                yield ChatGenerationChunk(message=AIMessageChunk(content=content))

    want = [{"type": "text", "index": 0, "text": "2 + 2 = 4.", "id": "msg_1"}]
    wrapped = AlignedChatModel(model=Late(), aligner=ALIGNER)
    assert total(wrapped.stream("?")).content == want == wrapped.invoke("?").content


def test_the_wrapped_models_tags_and_callbacks_hold() -> None:
    usage = UsageMetadataCallbackHandler()
    model = LocalModel(callbacks=[usage], tags=["nostream"], metadata={"team": "blue"})
    aligned(model).invoke("2 + 2?")
    assert usage.usage_metadata["local"]["total_tokens"] == 18
    events = list(graph_of(aligned(model)).stream({"messages": [HumanMessage("?")]}, stream_mode="messages"))
    assert len(events) == 1  # the node's result, and no tokens
    assert aligned(model).metadata == model.metadata
    again = UsageMetadataCallbackHandler()
    aligned(LocalModel(callbacks=[again]), trace_original=True).invoke("2 + 2?")
    assert again.usage_metadata["local"]["total_tokens"] == 18  # once


def test_a_binding_keeps_its_config() -> None:
    class Tagging(LocalModel):
        def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
            return super().bind_tools(tools, **kwargs).with_config(tags=["tools"])

    bound: Any = aligned(Tagging()).bind_tools([add])
    assert "tools" in bound.config["tags"] and isinstance(bound.bound, AlignedChatModel)


def test_two_aligners_of_one_configuration_do_not_share_a_cache() -> None:
    cache = InMemoryCache()
    shout, whisper = (
        scripted_aligner(rule) for rule in (lambda q, p, s: s.upper(), lambda q, p, s: s.lower())
    )
    for _ in range(2):
        for aligner, want in ((shout, ANSWER.upper()), (whisper, ANSWER.lower())):
            wrapped = AlignedChatModel(model=LocalModel(), aligner=aligner, cache=cache)
            assert wrapped.invoke("2 + 2?").text == want
    bundled = [AlignedChatModel(model=LocalModel(), aligner=Aligner.from_pretrained()) for _ in range(2)]
    keys = {str(wrapped._identifying_params) for wrapped in bundled}
    assert len(keys) == 1  # loaded twice, it is the same model
    assert not aligned(LocalModel(cache=False)).cache


def test_raw_text_in_metadata_is_left_out() -> None:
    support = {"segment": {"text": "2 + 2 = 5."}}
    metadata = {
        "logprobs_result": [{"token": "2 + 2 = 5"}],
        "grounding_metadata": {"grounding_supports": [support], "web_search_queries": ["sums"]},
        "model_name": "whole",
    }
    model = Whole(message=AIMessage("2 + 2 = 5.", response_metadata=metadata))
    asked: Any = {"configurable": {"question": "?"}}
    for message in (
        AlignedChatModel(model=model, aligner=ALIGNER).invoke("?"),
        (model | AlignerRunnable(ALIGNER)).invoke("?", asked),
        total((model | AlignerRunnable(ALIGNER)).stream("?", asked)),
    ):
        assert RAW not in repr(message)
        assert message.response_metadata["grounding_metadata"] == {"web_search_queries": ["sums"]}
        assert message.response_metadata["model_name"] == "whole"


def test_text_that_runs_through_blocks_is_corrected_as_one() -> None:
    content: Any = [{"type": "text", "text": "2 + 2 "}, {"type": "text", "text": "= 5. So"}, "2 + ", "2 = 5."]
    wrapped = AlignedChatModel(model=Whole(message=AIMessage(content)), aligner=ALIGNER)
    corrected = wrapped.invoke("?")
    assert corrected.text == "2 + 2 = 4. So2 + 2 = 4."
    assert len(corrected.content) == 4

    class Pieces(LocalModel):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            for block in content:
                yield ChatGenerationChunk(message=AIMessageChunk(content=[block]))

    assert total(AlignedChatModel(model=Pieces(), aligner=ALIGNER).stream("?")).text == corrected.text


@pytest.mark.parametrize("thoughts", [True, False])
def test_an_empty_block_before_a_call_changes_nothing(thoughts: bool) -> None:
    call: Any = {"type": "tool_use", "name": "add", "id": "1", "input": {}, "index": 2}
    texts: Any = [
        {"type": "text", "text": "2 + 2 = 5.", "index": 0},
        {"type": "text", "text": "", "index": 1},
    ]
    made: Any = [{"name": "add", "args": {}, "id": "1"}]
    whole = Whole(message=AIMessage([*texts, call], tool_calls=made))

    class Pieces(LocalModel):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            for block in (*texts, call):
                yield ChatGenerationChunk(message=AIMessageChunk(content=[block]))

    given: Any = {"aligner": ALIGNER, "thoughts": thoughts}
    invoked = AlignedChatModel(model=whole, **given).invoke("?").text
    assert total(AlignedChatModel(model=Pieces(), **given).stream("?")).text == invoked
    assert (invoked == "2 + 2 = 4.") is thoughts


@pytest.mark.parametrize(
    ("given", "structured"),
    [
        ({"response_format": {"type": "json_object"}}, True),
        ({"response_mime_type": "application/json"}, True),
        ({"text": {"format": {"type": "json_schema"}}}, True),
        ({"output_config": {"format": {"type": "json_schema"}}}, True),
        ({"format": "json"}, True),
        ({"format": ""}, False),
        ({"response_format": "text"}, False),
        ({"response_format": {"type": "text"}}, False),
        ({"response_mime_type": "text/plain"}, False),
        ({"text": {"format": {"type": "text"}}}, False),
    ],
)
def test_structured_output_is_known_however_it_is_asked_for(given: dict[str, Any], structured: bool) -> None:
    assert (aligned().invoke("2 + 2?", **given).text == ANSWER) is structured
    (call,) = aligned().bind_tools([add], **given).invoke("Add 2 and 2.").tool_calls
    assert call["args"] == {"left": 2, "right": 2}


@pytest.mark.parametrize("name", ["model_kwargs", "format"])
def test_a_model_that_always_gives_data_is_left_alone(name: str) -> None:
    class Json(LocalModel):
        model_kwargs: dict[str, Any] = Field(default_factory=dict)
        format: str = ""

    value: Any = "json" if name == "format" else {"response_format": {"type": "json_object"}}
    assert aligned(Json(**{name: value})).invoke("2 + 2?").text == ANSWER
    assert aligned(Json()).invoke("2 + 2?").text == MENDED


def test_tokens_are_counted_by_the_wrapped_model() -> None:
    class Counting(LocalModel):
        def get_num_tokens(self, text: str) -> int:
            return len(text.split())

        def get_num_tokens_from_messages(self, messages: Any, tools: Any = None) -> int:
            return sum(self.get_num_tokens(message.text) for message in messages)

    assert aligned(Counting()).get_num_tokens("one two") == 2
    assert aligned(Counting()).get_num_tokens_from_messages([HumanMessage("a b c")]) == 3


def test_the_question_is_a_human_message_with_words() -> None:
    echo = scripted_aligner(lambda question, prefix, sentence: f"[{question}]")
    model = AlignedChatModel(model=FakeListChatModel(responses=["One."]), aligner=echo)
    image: Any = [{"type": "image", "url": "https://example.org/a.png"}]
    summary = HumanMessage("Here is a summary.", additional_kwargs={"lc_source": "summarization"})
    assert model.invoke([HumanMessage("What is it?"), HumanMessage(image)]).text == "[What is it?]"
    assert model.invoke([HumanMessage("Why?"), AIMessage("So."), summary]).text == "[Why?]"
    assert model.invoke([summary, AIMessage("So.")]).text == "[Here is a summary.]"


def test_a_deep_copy_shares_the_loaded_model() -> None:
    bundled = Aligner.from_pretrained()
    assert copy.deepcopy(AlignedChatModel(model=LocalModel(), aligner=bundled)).aligner is bundled


def test_safeguards_tell_cached_answers_apart() -> None:
    model = FakeListChatModel(responses=["one"])
    chosen: tuple[Safeguards, ...] = ("keep_original", "off", {"length": "off"}, {"numbers": "accept"})
    keys = set()
    for safeguards in chosen:
        aligner = scripted_aligner(lambda *fields: "", safeguards=safeguards)
        aligned = AlignedChatModel(model=model, aligner=aligner)
        keys.add(json.dumps(aligned._identifying_params["aligner"]["safeguards"], sort_keys=True))
    assert len(keys) == len(chosen)
