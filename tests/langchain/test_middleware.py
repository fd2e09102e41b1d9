"""`AlignerMiddleware`: every stream of an agent, its state and its checkpoints; and what stands beside it."""

from __future__ import annotations

import copy
import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    HumanInTheLoopMiddleware,
    ModelFallbackMiddleware,
    ModelRequest,
    ModelResponse,
    ModelRetryMiddleware,
    PIIMiddleware,
)
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.types import Command
from pydantic import BaseModel

from aligner_integrations.correction import Segment
from aligner_integrations.errors import CorrectionFailedError
from aligner_integrations.langchain import AlignedChatModel, AlignerMiddleware
from aligner_integrations.testing import scripted_aligner
from tests.langchain.local_model import ANSWER, MENDED, LocalModel

RAW = "2 + 2 = 5"
ALIGNER = scripted_aligner(lambda question, prefix, sentence: sentence.replace("2 + 2 = 5", "2 + 2 = 4"))
ASKED: Any = {"messages": [HumanMessage("Add 2 and 2.")]}
pytestmark = pytest.mark.filterwarnings("ignore:.*v3.*:Warning")


@tool
def add(left: int, right: int) -> int:
    """Add two numbers."""
    return left + right


def agent(model: Any = None, *, tools: Any = (add,), around: Any = (), after: Any = (), **given: Any) -> Any:
    options = {name: given.pop(name) for name in ("checkpointer", "response_format") if name in given}
    middleware = [*around, AlignerMiddleware(ALIGNER, **given), *after]
    return create_agent(model or LocalModel(), list(tools), middleware=middleware, **options)


def texts_of(state: Any) -> list[str]:
    return [message.text for message in state["messages"] if message.type == "ai"]


def streamed(events: Any) -> list[str]:
    """The text of each AI message, joined from its deltas in `stream_mode="messages"`."""
    texts: dict[Any, str] = {}
    for message, _ in events:
        if isinstance(message, AIMessage):
            texts[message.id] = texts.get(message.id, "") + message.text
    return list(texts.values())


THOUGHT = "I look it up: 2 + 2 = 5. "


@pytest.mark.parametrize("thoughts", [False, True])
async def test_streams_results_and_state_are_the_same_corrected_text(thoughts: bool) -> None:
    want = [THOUGHT.replace("5", "4") if thoughts else THOUGHT, MENDED]
    aligned = agent(thoughts=thoughts, checkpointer=InMemorySaver())
    configs: list[Any] = [{"configurable": {"thread_id": str(number)}} for number in range(9)]
    assert texts_of(aligned.invoke(ASKED, configs[0])) == want
    assert texts_of(await aligned.ainvoke(ASKED, configs[1])) == want
    assert streamed(aligned.stream(ASKED, configs[2], stream_mode="messages")) == want
    parts = [part async for part in aligned.astream(ASKED, configs[3], stream_mode="messages")]
    assert streamed(parts) == want
    assert texts_of(list(aligned.stream(ASKED, configs[4], stream_mode="values"))[-1]) == want
    updates = list(aligned.stream(ASKED, configs[5], stream_mode="updates"))
    assert [text for each in updates if "model" in each for text in texts_of(each["model"])] == want
    run = aligned.stream_events(ASKED, configs[6], version="v3")
    assert [str(message.text) for message in run.messages] == want
    assert texts_of(run.output) == want
    arun = await aligned.astream_events(ASKED, configs[7], version="v3")
    assert [await message.text async for message in arun.messages] == want
    events = [event async for event in aligned.astream_events(ASKED, configs[8], version="v2")]
    deltas = [event["data"]["chunk"].text for event in events if event["event"] == "on_chat_model_stream"]
    assert "".join(deltas) == "".join(want)
    for config in configs:
        assert texts_of(aligned.get_state(config).values) == want
        assert len(list(aligned.get_state_history(config))) > 3


async def test_no_surface_of_an_agent_holds_raw_text() -> None:
    aligned = agent(thoughts=True, checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "1"}}
    for mode in ("messages", "updates", "values", "custom", "tasks", "debug", "checkpoints"):
        events = list(aligned.stream(ASKED, config, stream_mode=mode))
        assert RAW not in repr(events)
        if mode == "messages":
            assert RAW not in "".join(message.text for message, _ in events)
    assert RAW not in repr([event async for event in aligned.astream_events(ASKED, config, version="v2")])
    assert RAW not in repr(list(aligned.stream_events(ASKED, config, version="v3")))
    assert RAW not in repr(list(aligned.get_state_history(config)))


def test_the_answer_still_streams() -> None:
    said: list[str] = []

    class Noting(LocalModel):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            for chunk in super()._stream(*args, **kwargs):
                said.append(chunk.text)
                yield chunk

    class Clock(BaseCallbackHandler):
        def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
            seen.append((token, "".join(said)))

    seen: list[tuple[Any, str]] = []
    list(agent(Noting(), tools=()).stream(ASKED, {"callbacks": [Clock()]}, stream_mode="messages"))
    assert seen[0] == ("Two and two make four. ", "Two and two make four. 2 ")


@pytest.mark.parametrize("thoughts", [False, True])
def test_t17_tool_calls_are_never_changed(thoughts: bool) -> None:
    class Sums(LocalModel):
        before_tools: str = "One. 2 + 2 = 5. So I ask: 2 + 2 = 5. "

    @tool
    def note(text: str) -> str:
        """Note a text."""
        return text

    state = agent(Sums(), tools=[note], thoughts=thoughts).invoke({"messages": [HumanMessage("2 + 2 = 5?")]})
    (call,) = state["messages"][1].tool_calls
    assert call["args"] == {"text": "2 + 2 = 5?"}
    assert state["messages"][2].text == "2 + 2 = 5?"
    last = "So I ask: 2 + 2 = 4. " if thoughts else "So I ask: 2 + 2 = 5. "
    # What came before the last sentence may have been an answer, as far as a stream can tell.
    assert state["messages"][1].text == "One. 2 + 2 = 4. " + last


@settings(max_examples=150)
@given(
    sentences=st.lists(
        st.sampled_from(["One. ", "2 + 2 = 5. ", "So it is.\n", "- 2 + 2 = 5\n", "Hm"]), max_size=5
    ),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    blocks=st.booleans(),
    later=st.sampled_from(["", "2 + 2 = 5. Then. "]),
)
def test_thoughts_come_out_the_same_however_they_come(
    sentences: list[str], cuts: list[int], blocks: bool, later: str
) -> None:
    """Streamed in any pieces, or not streamed: what is left alone before a tool call is the same."""
    thought = "".join(sentences)

    class Thinking(LocalModel):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            at, count = 0, 0
            while at < len(thought):
                size = cuts[count % len(cuts)]
                yield said(thought[at : at + size], 0)
                at, count = at + size, count + 1
            call: Any = {"type": "tool_call_chunk", "name": "add", "args": "{}", "id": "1", "index": 1}
            content: Any = [call] if blocks else ""
            yield ChatGenerationChunk(message=AIMessageChunk(content=content, tool_call_chunks=[call]))
            if later:
                yield said(later, 2)

    def said(text: str, index: int) -> ChatGenerationChunk:
        block = {"type": "text", "text": text, "index": index}
        return ChatGenerationChunk(message=AIMessageChunk(content=[block] if blocks else text))

    if not blocks:
        later = ""  # a message with one text has no text after its calls
    model = AlignedChatModel(model=Thinking(), aligner=ALIGNER, thoughts=False)
    whole: Any = None
    for chunk in model.stream("2 + 2?"):
        whole = chunk if whole is None else whole + chunk
    streamed_text = str(whole.text)
    assert streamed_text.endswith(later)
    assert model.invoke("2 + 2?").text == streamed_text
    assert len(whole.tool_calls) == 1


def test_the_receipt_says_what_was_done() -> None:
    run = agent().stream_events(ASKED, version="v3")
    corrections = list(run.extensions["corrections"])
    answers = [message for message in run.output["messages"] if message.type == "ai"]
    assert [each["message_id"] for each in corrections] == [message.id for message in answers]
    assert [(each["sentences"], each["changed"]) for each in corrections] == [(1, 0), (3, 1)]
    assert answers[-1].response_metadata["aligner"]["changed"] == 1


def test_t18_usage_is_the_models_once() -> None:
    for state in (agent().invoke(ASKED), list(agent().stream(ASKED, stream_mode="values"))[-1]):
        usage = [message.usage_metadata for message in state["messages"] if message.type == "ai"]
        assert usage == [{"input_tokens": 11, "output_tokens": 7, "total_tokens": 18}] * 2


class Failing(LocalModel):
    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        yield ChatGenerationChunk(message=AIMessageChunk(content="2 + 2 = 5. And "))
        raise ConnectionError("the line broke")


@pytest.mark.parametrize("place", ["around", "after"])
def test_a_fallback_is_corrected_wherever_it_stands(place: str) -> None:
    given: Any = {place: [ModelFallbackMiddleware(LocalModel())]}
    for mode in ("messages", "values"):
        events = list(agent(Failing(), tools=(), **given).stream(ASKED, stream_mode=mode))
        assert RAW not in repr(events)
    assert texts_of(agent(Failing(), tools=(), **given).invoke(ASKED)) == [MENDED]


@pytest.mark.parametrize("place", ["around", "after"])
def test_stacked_middlewares_work_together(place: str) -> None:
    class Shout(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
            return handler(request.override(system_message=None, tool_choice=None))

    retry = ModelRetryMiddleware(max_retries=1, initial_delay=0.0, jitter=False)
    given: Any = {place: [Shout(), PIIMiddleware("email", apply_to_output=True), retry]}
    state = agent(**given).invoke(ASKED)
    assert texts_of(state)[-1] == MENDED
    assert RAW not in repr(list(agent(thoughts=True, **given).stream(ASKED, stream_mode="messages")))


class Replacing(AgentMiddleware[Any, Any, Any]):
    """Builds a request of its own, as no middleware should: the wrapped model is lost."""

    def wrap_model_call(self, request: ModelRequest[Any], handler: Callable[[Any], Any]) -> Any:
        return handler(ModelRequest(model=LocalModel(), messages=request.messages, state=request.state))


class Answering(AgentMiddleware[Any, Any, Any]):
    def wrap_model_call(self, request: ModelRequest[Any], handler: Callable[[Any], Any]) -> Any:
        return ModelResponse(result=[AIMessage(ANSWER, id="mine")])


@pytest.mark.parametrize("middleware", [Replacing(), Answering()])
def test_an_answer_from_elsewhere_is_corrected_and_said(
    middleware: Any, caplog: pytest.LogCaptureFixture
) -> None:
    aligned = agent(tools=(), after=[middleware])
    with caplog.at_level(logging.WARNING):
        assert texts_of(aligned.invoke(ASKED)) == [MENDED]
        assert texts_of(aligned.invoke(ASKED)) == [MENDED]
    assert sum("Put AlignerMiddleware last" in record.message for record in caplog.records) == 1


def test_a_person_in_the_loop_sees_and_resumes() -> None:
    person = HumanInTheLoopMiddleware(interrupt_on={"add": True})
    aligned = agent(around=[person], checkpointer=InMemorySaver(), thoughts=True)
    config: Any = {"configurable": {"thread_id": "1"}}
    events = list(aligned.stream(ASKED, config, stream_mode=["messages", "updates"]))
    assert "__interrupt__" in repr(events) and RAW not in repr(events)
    resumed = list(
        aligned.stream(Command(resume={"decisions": [{"type": "approve"}]}), config, stream_mode="messages")
    )
    assert streamed(resumed)[-1] == MENDED and RAW not in repr(resumed)
    assert texts_of(aligned.get_state(config).values) == [THOUGHT.replace("5", "4"), MENDED]


def test_a_conversation_goes_on_from_corrected_text() -> None:
    asked: list[str] = []

    class Remembering(LocalModel):
        def _stream(self, messages: Any, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            asked.append(" | ".join(message.text for message in messages))
            yield from super()._stream(messages, *args, **kwargs)

    aligned = agent(Remembering(), tools=(), checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "1"}}
    aligned.invoke({"messages": [HumanMessage("First?")]}, config)
    aligned.invoke({"messages": [HumanMessage("Second?")]}, config)
    assert asked[-1] == f"First? | {MENDED} | Second?"


def test_sub_agents_are_corrected_by_their_own_middleware() -> None:
    inner = agent(tools=())

    @tool
    def ask_expert(question: str) -> str:
        """Ask the expert."""
        return str(inner.invoke({"messages": [HumanMessage(question)]})["messages"][-1].text)

    outer = agent(tools=[ask_expert], thoughts=True)
    for subgraphs in (False, True):
        assert RAW not in repr(list(outer.stream(ASKED, stream_mode="messages", subgraphs=subgraphs)))
    run = outer.stream_events(ASKED, version="v3")
    assert RAW not in repr(list(run))


class Sum(BaseModel):
    text: str


@pytest.mark.parametrize("strategy", [ProviderStrategy(Sum), ToolStrategy(Sum), Sum])
def test_structured_output_is_left_alone(strategy: Any) -> None:
    class Json(LocalModel):
        answer: Any = '{"text": "2 + 2 = 5. So it is."}'
        before_tools: str = ""

    profile: Any = {"structured_output": True}
    model = Json(profile=profile) if isinstance(strategy, (ProviderStrategy, type)) else Json()
    aligned = agent(model, tools=(), response_format=strategy)
    state = aligned.invoke({"messages": [HumanMessage("Say '2 + 2 = 5. So it is.'")]})
    assert state["structured_response"] == Sum(text="2 + 2 = 5. So it is.")


def test_an_aligner_made_of_langchain_shows_no_tokens() -> None:
    """The aligner's own model calls are no part of the run around it."""
    judge = LocalModel(answer="SECRET THOUGHTS OF THE JUDGE")

    def rule(question: str, prefix: str, sentence: str) -> str:
        judge.invoke(sentence)
        list(judge.stream(sentence))
        return sentence

    aligned = create_agent(LocalModel(), [add], middleware=[AlignerMiddleware(scripted_aligner(rule))])
    for mode in ("messages", "updates", "values"):
        assert "SECRET" not in repr(list(aligned.stream(ASKED, stream_mode=mode)))
    assert "SECRET" not in repr(list(aligned.stream_events(ASKED, version="v3")))


async def test_the_aligners_own_calls_stay_out_of_async_runs_too() -> None:
    judge = LocalModel(answer="SECRET THOUGHTS OF THE JUDGE")

    def rule(question: str, prefix: str, sentence: str) -> str:
        return sentence if judge.invoke(sentence) else ""

    aligned = create_agent(LocalModel(), [add], middleware=[AlignerMiddleware(scripted_aligner(rule))])
    assert "SECRET" not in repr([part async for part in aligned.astream(ASKED, stream_mode="messages")])
    assert "SECRET" not in repr([event async for event in aligned.astream_events(ASKED, version="v2")])


async def test_a_sink_belongs_to_the_run() -> None:
    def show(segment: Segment) -> None:
        get_stream_writer()({"changed": segment.changed})

    aligned = agent(tools=(), sink=show)
    want = [{"changed": False}, {"changed": True}, {"changed": False}]
    assert list(aligned.stream(ASKED, stream_mode="custom")) == want
    assert [part async for part in aligned.astream(ASKED, stream_mode="custom")] == want


def test_trace_original_is_the_one_way_to_raw_text() -> None:
    events = list(agent(tools=(), trace_original=True).stream(ASKED, stream_mode="messages"))
    assert "Two " in [message.text for message, _ in events]  # a token of the wrapped model


def test_models_that_are_aligned_or_bound_already() -> None:
    once = scripted_aligner(lambda question, prefix, sentence: sentence + "!")
    model = AlignedChatModel(model=LocalModel(answer="So."), aligner=once)
    assert texts_of(create_agent(model, middleware=[AlignerMiddleware(once)]).invoke(ASKED)) == ["So.!"]

    class Binding(AgentMiddleware[Any, Any, Any]):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
            return handler(request.override(model=self.model))

    bound = Binding(LocalModel().bind(stop=["!"]))
    assert texts_of(agent(tools=(), around=[bound]).invoke(ASKED)) == [MENDED]
    with pytest.raises(TypeError, match="chat model"):
        agent(tools=(), around=[Binding(LocalModel() | (lambda message: message))]).invoke(ASKED)


def broken(question: str, prefix: str, sentence: str) -> str:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("on_error", ["raise", "withhold"])
def test_a_failed_correction_never_fails_open(on_error: Any) -> None:
    failing = AlignerMiddleware(scripted_aligner(broken), on_error=on_error)
    aligned = create_agent(LocalModel(), [], middleware=[failing])
    events: list[Any] = []
    with nullcontext() if on_error == "withhold" else pytest.raises(CorrectionFailedError):
        events += aligned.stream(ASKED, stream_mode=["messages", "values"])
    assert events and RAW not in repr(events)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"on_error": "ignore"}, ValueError),
        ({"edit_margin": -1.0}, ValueError),
        ({"aligner": "tiny"}, TypeError),
        ({"withheld_text": 3}, TypeError),
    ],
)
def test_bad_options_are_refused_before_a_run(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        AlignerMiddleware(**options)


WITHOUT = """
import sys
sys.modules["langchain"] = None
import aligner_integrations.langchain as adapters
try:
    adapters.AlignerMiddleware
except ImportError as error:
    print(type(error).__name__, error)
"""


def test_without_langchain_the_others_work_and_the_extra_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("MissingDependencyError") and "[agents]" in done.stdout, done.stderr


def test_the_wrapped_model_keeps_its_name_and_profile() -> None:
    class Named(LocalModel):
        model_name: str = "local-large"

    profile: Any = {"max_input_tokens": 1000}
    aligned: BaseChatModel = AlignedChatModel(model=Named(profile=profile), aligner=ALIGNER)
    assert aligned.model_name == "local-large" and aligned.profile == profile  # type: ignore[attr-defined]


@dataclass(init=False)
class Extended(ModelRequest[Any]):
    """A request with a field more, as somebody's own middleware may hand on."""

    extra: str = ""


class Extending(AgentMiddleware[Any, Any, Any]):
    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        extended = copy.copy(request)
        object.__setattr__(extended, "__class__", Extended)
        object.__setattr__(extended, "extra", "more")
        return handler(extended)


class Swapping(AgentMiddleware[Any, Any, Any]):
    """Sets the model by `dataclasses.replace`, or as an attribute."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        if self.how == "replace":
            return handler(dataclasses.replace(request, model=LocalModel()))
        with pytest.warns(DeprecationWarning):
            request.model = LocalModel()
        return handler(request)


@pytest.mark.parametrize("how", ["replace", "attribute"])
def test_a_model_is_wrapped_however_it_is_set(how: str) -> None:
    tokens: list[str] = []

    class Noting(BaseCallbackHandler):
        def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
            tokens.append(str(token))

    aligned = agent(tools=(), after=[Swapping(how)])
    list(aligned.stream(ASKED, {"callbacks": [Noting()]}, stream_mode="messages"))
    assert "".join(tokens) == MENDED


def test_requests_of_another_kind_pass() -> None:
    kinds: list[Any] = []

    class Looking(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
            kinds.append((isinstance(request, Extended), request.extra))
            return handler(request)

    aligned = agent(tools=(), around=[Extending()], after=[Looking()])
    assert texts_of(aligned.invoke(ASKED)) == [MENDED] and kinds == [(True, "more")]
