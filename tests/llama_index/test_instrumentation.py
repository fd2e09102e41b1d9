"""What observability hears: one pair of events and one span for each correction, and whose words they are."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from dataclasses import field as dataclass_field
from typing import Any, TypeAlias

import pytest
from llama_index.core.agent.workflow import FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, TextBlock
from llama_index.core.base.response.schema import (
    AsyncStreamingResponse,
    PydanticResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.dispatcher import active_instrument_tags, instrument_tags
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.instrumentation.events.exception import ExceptionEvent
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatInProgressEvent,
    LLMChatStartEvent,
    LLMCompletionEndEvent,
    LLMCompletionInProgressEvent,
    LLMCompletionStartEvent,
)
from llama_index.core.instrumentation.span_handlers import NullSpanHandler, SimpleSpanHandler
from llama_index.core.llms.callbacks import llm_chat_callback
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import ImageNode, NodeWithScore, TextNode
from llama_index.core.tools import BaseTool
from pydantic import BaseModel, Field

from aligner_integrations import Aligner
from aligner_integrations.correction import Segment, apply_edits
from aligner_integrations.errors import CorrectionFailedError
from aligner_integrations.llama_index import (
    AlignedLLM,
    AlignerPostprocessor,
    AlignerQueryEngine,
    CorrectionEnd,
    CorrectionStart,
)
from aligner_integrations.testing import scripted_aligner
from aligner_integrations.testing.replay_llm import ReplayLLM
from tests.llama_index.engines import Telling, rag, telling

pytestmark = [
    # Making an agent, LlamaIndex looks at every attribute, deprecated ones of pydantic among them.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning:inspect"),
    # So does a ReAct agent at work, with its own.
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
]

QUESTION = "What is good for a cold ?"
BAD, GOOD = "Swallow forty pills.", "Ask a doctor."
SENTENCES = ("Rest is good. ", f"{BAD} ", "Tea helps.\r\n\r\n", f"{BAD} ", "All is well.")
ANSWER = "".join(SENTENCES)
CORRECTED = ANSWER.replace(BAD, GOOD)
ORIGINAL = {"aligner": "original"}
MESSAGES = [ChatMessage(role="user", content=QUESTION)]


def mending(**options: Any) -> Aligner:
    return scripted_aligner(lambda question, prefix, sentence: sentence.replace(BAD, GOOD), **options)


def failing(*, on: str = BAD) -> Aligner:
    def rule(question: str, prefix: str, sentence: str) -> str:
        if on in sentence:
            raise RuntimeError("no memory left")
        return sentence

    return scripted_aligner(rule)


# What is heard.


@dataclass
class Span:
    """What a handler was told of one span."""

    parent: str | None
    instance: Any
    tags: dict[str, Any]
    ended: list[str] = dataclass_field(default_factory=list)  # "exit" or "drop", once
    result: Any = None


class _Events(BaseEventHandler):
    heard: list[BaseEvent] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        if isinstance(event, ExceptionEvent):  # its traceback would keep closed streams alive
            event = event.model_copy(update={"exception": type(event.exception)()})
        self.heard.append(event)


class _Spans(NullSpanHandler):
    heard: dict[str, Span] = Field(default_factory=dict)

    def span_enter(
        self,
        id_: str,
        bound_args: Any,
        instance: Any = None,
        parent_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        assert id_ not in self.heard
        self.heard[id_] = Span(parent_id, instance, dict(tags or {}))

    def span_exit(
        self, id_: str, bound_args: Any, instance: Any = None, result: Any = None, **kwargs: Any
    ) -> None:
        self.heard[id_].ended.append("exit")
        if ".correct-" in id_:  # others give streams, which would be kept alive
            self.heard[id_].result = result

    def span_drop(
        self, id_: str, bound_args: Any, instance: Any = None, err: Any = None, **kwargs: Any
    ) -> None:
        self.heard[id_].ended.append("drop")
        self.heard[id_].result = err


class Heard:
    """All that the root dispatcher was told."""

    def __init__(self) -> None:
        self._events, self._spans, self.simple = _Events(), _Spans(), SimpleSpanHandler()

    @property
    def events(self) -> list[BaseEvent]:
        return self._events.heard

    @property
    def spans(self) -> dict[str, Span]:
        return self._spans.heard

    @property
    def starts(self) -> list[CorrectionStart]:
        return [event for event in self.events if isinstance(event, CorrectionStart)]

    @property
    def ends(self) -> list[CorrectionEnd]:
        return [event for event in self.events if isinstance(event, CorrectionEnd)]

    def of(self, prefix: str, *kinds: type[BaseEvent]) -> list[BaseEvent]:
        """The events that were sent in spans of a class."""
        chosen = [event for event in self.events if str(event.span_id).startswith(f"{prefix}.")]
        return [event for event in chosen if not kinds or isinstance(event, kinds)]

    def attach(self) -> None:
        root = get_dispatcher()
        root.add_event_handler(self._events)
        root.add_span_handler(self._spans)
        root.add_span_handler(self.simple)

    def detach(self) -> None:
        root = get_dispatcher()
        root.event_handlers[:] = [one for one in root.event_handlers if one is not self._events]
        ours = (self._spans, self.simple)
        root.span_handlers[:] = [one for one in root.span_handlers if all(one is not own for own in ours)]


@contextmanager
def hearing() -> Iterator[Heard]:
    heard = Heard()
    heard.attach()
    try:
        yield heard
    finally:
        heard.detach()


def check_pairs(heard: Heard, surface: str, *, complete: bool = True, ended: str = "exit") -> None:
    """Starts and ends come in pairs, each in a span of its own, each once, with no word of the raw text."""
    told = [event for event in heard.events if isinstance(event, CorrectionStart | CorrectionEnd)]
    assert len({event.id_ for event in told}) == len(told)
    assert len({id(event) for event in told}) == len(told)
    ids = [start.span_id for start in heard.starts]
    assert len(set(ids)) == len(ids)
    assert sorted(map(str, ids)) == sorted(str(end.span_id) for end in heard.ends)
    places = {id(event): at for at, event in enumerate(heard.events)}
    for end in heard.ends:
        start = next(each for each in heard.starts if each.span_id == end.span_id)
        assert places[id(start)] < places[id(end)]
        assert (start.question, start.surface, start.node_id) == (end.question, end.surface, end.node_id)
        assert end.surface == surface
        assert end.complete is complete
        span = heard.spans[str(end.span_id)]
        assert str(end.span_id).startswith(f"{surface}.correct-")
        assert type(span.instance).__name__ == surface
        assert span.ended == [ended]
        if ended == "exit":
            assert span.result == end.text
    for event in told:
        assert BAD not in event.model_dump_json()
    assert set(heard.spans) >= set(map(str, ids))


# Each surface, driven: what it shows, and in which span the correction lies.

Drive: TypeAlias = Callable[[Aligner], Awaitable[str]]


async def drained(result: Any) -> str:
    """All the text of whatever an LLM or an engine gives."""
    if inspect.isawaitable(result):
        result = await result
    if isinstance(result, StreamingResponse | AsyncStreamingResponse):
        result = result.response_gen
    if isinstance(result, AsyncIterator):
        parts = [part async for part in result]
    elif isinstance(result, Iterator):
        parts = list(result)
    else:
        return whole(result)
    return "".join(part if isinstance(part, str) else part.delta or "" for part in parts)


def whole(result: Any) -> str:
    if isinstance(result, ChatResponse):
        return result.message.content or ""
    return result.text if isinstance(result, CompletionResponse) else str(result)


def engine(method: str, *, streaming: bool) -> Drive:
    async def drive(aligner: Aligner) -> str:
        wrapped = rag(ReplayLLM(answer=ANSWER, seed=1), streaming=streaming)
        return await drained(getattr(AlignerQueryEngine(wrapped, aligner), method)(QUESTION))

    return drive


def ask(llm: Any, method: str) -> Any:
    if method.endswith("with_tools"):
        return getattr(llm, method)([], user_msg=QUESTION)
    if method.endswith("chat"):
        return getattr(llm, method)(MESSAGES)
    if method.endswith("complete"):
        return getattr(llm, method)(QUESTION)
    return getattr(llm, method)(PromptTemplate("{question}"), question=QUESTION)


def llm(method: str, **options: Any) -> Drive:
    async def drive(aligner: Aligner) -> str:
        return await drained(ask(AlignedLLM(ReplayLLM(answer=ANSWER, seed=1, **options), aligner), method))

    return drive


def chat_engine(method: str) -> Drive:
    async def drive(aligner: Aligner) -> str:
        memory = ChatMemoryBuffer.from_defaults(token_limit=10_000)
        aligned = AlignedLLM(ReplayLLM(answer=ANSWER, seed=1), aligner)
        engine = SimpleChatEngine.from_defaults(llm=aligned, memory=memory)
        if method == "stream_chat":
            return await drained(engine.stream_chat(QUESTION).response_gen)
        if method == "astream_chat":
            stream = await engine.astream_chat(QUESTION)
            return "".join([token async for token in stream.async_response_gen()])
        return await drained(getattr(engine, method)(QUESTION))

    return drive


def look_up(page: int) -> str:
    """Look a page up."""
    return f"Page {page} is empty."


def agent(*, streaming: bool = True) -> Drive:
    async def drive(aligner: Aligner) -> str:
        aligned = AlignedLLM(ReplayLLM(answer=ANSWER, seed=1), aligner)
        made = FunctionAgent(tools=[look_up], llm=aligned, streaming=streaming)
        return str(await made.run(user_msg=QUESTION))

    return drive


_LLM = ("chat", "stream_chat", "complete", "stream_complete", "predict", "stream")
LLM_METHODS = [prefix + method for method in _LLM for prefix in ("", "a")]
TOOL_METHODS = [f"{prefix}{method}_with_tools" for method in ("chat", "stream_chat") for prefix in ("", "a")]
# By name: the drive, the class that corrects, and the beginning of the parent span's id.
SURFACES: dict[str, tuple[Drive, str, str]] = {
    **{
        f"{method}, {'stream' if streaming else 'whole'}": (
            engine(method, streaming=streaming),
            "AlignerQueryEngine",
            f"AlignerQueryEngine._{method}-",
        )
        for method in ("query", "aquery")
        for streaming in (False, True)
    },
    **{
        f"LLM.{method}": (llm(method), "AlignedLLM", "AlignedLLM.")
        for method in (*LLM_METHODS, *TOOL_METHODS)
    },
    **{
        f"completion model, {method}": (llm(method, is_chat_model=False), "AlignedLLM", "AlignedLLM.")
        for method in ("predict", "apredict", "stream", "astream")
    },
    **{
        f"chat engine, {method}": (chat_engine(method), "AlignedLLM", "AlignedLLM.")
        for method in ("chat", "achat", "stream_chat", "astream_chat")
    },
    **{
        f"agent, {'stream' if streaming else 'whole'}": (
            agent(streaming=streaming),
            "AlignedLLM",
            "AlignedLLM.",
        )
        for streaming in (True, False)
    },
}
each_surface = pytest.mark.parametrize(("drive", "surface", "parent"), SURFACES.values(), ids=SURFACES.keys())


@each_surface
async def test_a_correction_is_told_as_it_was_shown(drive: Drive, surface: str, parent: str) -> None:
    with hearing() as heard:
        shown = await drive(mending())
    check_pairs(heard, surface)
    (end,) = heard.ends
    assert (end.question, end.node_id, end.findings) == (QUESTION, None, ())
    assert end.text == CORRECTED
    assert shown.split() == CORRECTED.split()  # engines and agents take outer white space away
    assert apply_edits(ANSWER, end.edits) == CORRECTED
    assert len(end.stats) == len(SENTENCES)
    # As one by one: each sentence has its own cost, in order.
    segments = list(mending().correct_stream(QUESTION, [ANSWER]))
    assert [each.prompt_tokens for each in end.stats] == [each.stats.prompt_tokens for each in segments]
    assert [each.new_tokens for each in end.stats] == [each.stats.new_tokens for each in segments]


@each_surface
async def test_its_span_lies_in_the_span_of_who_corrects(drive: Drive, surface: str, parent: str) -> None:
    with hearing() as heard:
        await drive(mending())
    (end,) = heard.ends
    spans = {span.id_: span for span in heard.simple.completed_spans}
    assert heard.simple.open_spans == {}
    assert heard.simple.dropped_spans == []
    span = spans[str(end.span_id)]
    assert span.end_time is not None
    assert str(span.parent_id).startswith(parent)
    assert str(span.parent_id) in spans


# A chat engine reads a stream in a thread, which dies of the error; the reader gets it, too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@each_surface
async def test_a_failure_drops_the_span(drive: Drive, surface: str, parent: str) -> None:
    with hearing() as heard:
        with pytest.raises(CorrectionFailedError, match="RuntimeError"):
            await drive(failing())
        await asyncio.sleep(0)
    check_pairs(heard, surface, complete=False, ended="drop")
    ends = heard.ends
    assert ends
    for end in ends:
        assert (end.text, end.edits, len(end.stats)) == (SENTENCES[0], (), 1)
        assert isinstance(heard.spans[str(end.span_id)].result, CorrectionFailedError)
    assert {span.id_ for span in heard.simple.dropped_spans} >= {str(end.span_id) for end in ends}
    assert not any(".correct-" in id_ for id_ in heard.simple.open_spans)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"on_error": "pass_through"}, None),
        ({"on_error": "withhold", "withheld_text": "[gone]"}, ANSWER.replace(BAD, "[gone]")),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
async def test_findings_are_told(options: dict[str, Any], text: str | None, streaming: bool) -> None:
    wrapped = rag(ReplayLLM(answer=ANSWER, seed=1), streaming=streaming)
    with hearing() as heard:
        await drained(AlignerQueryEngine(wrapped, failing(), **options).query(QUESTION))
    (end,) = heard.ends
    action = "kept_original" if text is None else "withheld"
    assert [(each.check, each.action) for each in end.findings] == [("correction_failed", action)] * 2
    assert end.text == (ANSWER if text is None else text)
    assert apply_edits(ANSWER, end.edits) == end.text
    assert end.complete


# A stream that does not come to its end.


def engine_stream(aligner: Aligner) -> Iterator[str]:
    response = AlignerQueryEngine(rag(ReplayLLM(answer=ANSWER, seed=1)), aligner).query(QUESTION)
    assert isinstance(response, StreamingResponse)
    return response.response_gen


def llm_stream(aligner: Aligner) -> Any:
    return AlignedLLM(ReplayLLM(answer=ANSWER, seed=1), aligner).stream_chat(MESSAGES)


async def engine_astream(aligner: Aligner) -> AsyncIterator[str]:
    response = await AlignerQueryEngine(rag(ReplayLLM(answer=ANSWER, seed=1)), aligner).aquery(QUESTION)
    assert isinstance(response, AsyncStreamingResponse)
    return response.response_gen


async def llm_astream(aligner: Aligner) -> Any:
    return await AlignedLLM(ReplayLLM(answer=ANSWER, seed=1), aligner).astream_chat(MESSAGES)


@pytest.mark.parametrize("surface", ["AlignerQueryEngine", "AlignedLLM"])
@pytest.mark.parametrize("form", ["sync", "async"])
async def test_an_early_close_is_told_as_one(surface: str, form: str) -> None:
    with hearing() as heard:
        stream: Any
        if form == "sync":
            stream = (engine_stream if surface == "AlignerQueryEngine" else llm_stream)(mending())
            next(stream), next(stream)
            stream.close()
        else:
            stream = await (engine_astream if surface == "AlignerQueryEngine" else llm_astream)(mending())
            await anext(stream), await anext(stream)
            await stream.aclose()
        # LlamaIndex drops the LLM's stream that it was reading, and leaves it to Python to close it.
        for _ in range(100):
            await asyncio.sleep(0)
    check_pairs(heard, surface, complete=False)  # its span ends well: the reader had enough
    (end,) = heard.ends
    assert end.text == f"{SENTENCES[0]}{GOOD} "
    assert apply_edits("".join(SENTENCES[:2]), end.edits) == end.text
    assert len(end.stats) == 2
    # The wrapped LLM's stream was closed, and says so in its own name.
    closed = heard.of("ReplayLLM", ExceptionEvent)
    assert [event.tags for event in closed] == [ORIGINAL]
    assert not any(".correct-" in id_ for id_ in heard.simple.open_spans)


@pytest.mark.parametrize("surface", ["AlignerQueryEngine", "AlignedLLM"])
async def test_a_stream_closed_before_it_was_read_says_nothing(surface: str) -> None:
    with hearing() as heard:
        stream: Any = (engine_stream if surface == "AlignerQueryEngine" else llm_stream)(mending())
        stream.close()
        astream: Any = await (engine_astream if surface == "AlignerQueryEngine" else llm_astream)(mending())
        await astream.aclose()
    assert (heard.starts, heard.ends) == ([], [])
    assert not any(".correct-" in id_ for id_ in heard.spans)


@pytest.mark.parametrize("surface", ["AlignerQueryEngine", "AlignedLLM"])
async def test_a_cancelled_reader_drops_the_span(surface: str) -> None:
    seen: list[Any] = []

    async def read() -> None:
        stream: Any = await (engine_astream if surface == "AlignerQueryEngine" else llm_astream)(mending())
        async for part in stream:
            seen.append(part)
            if len(seen) == 2:
                task.cancel()

    with hearing() as heard:
        task = asyncio.create_task(read())
        with pytest.raises(asyncio.CancelledError):
            await task
    check_pairs(heard, surface, complete=False, ended="drop")
    assert len(heard.ends) == 1


async def test_an_llm_that_fails_midway_drops_the_span() -> None:
    def say(question: str) -> str:
        return ANSWER

    class Broken(ReplayLLM):
        def _cut(self, text: str) -> Iterator[str]:
            yield from SENTENCES[:3]
            raise ConnectionError("the line is dead")

    with hearing() as heard, pytest.raises(ConnectionError):
        list(AlignedLLM(Broken(answer=say), mending()).stream_chat(MESSAGES))
    check_pairs(heard, "AlignedLLM", complete=False, ended="drop")
    (end,) = heard.ends
    assert end.text == f"{SENTENCES[0]}{GOOD} "  # of the third nobody knew that it was whole
    with hearing() as heard, pytest.raises(ConnectionError):
        await drained(AlignedLLM(Broken(answer=say), mending()).astream_chat(MESSAGES))
    check_pairs(heard, "AlignedLLM", complete=False, ended="drop")


# Answers of several parts, several turns, several tries.


class Blocks(ReplayLLM):
    """Answers in two blocks of text."""

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        blocks = [TextBlock(text=f"First. {BAD}"), TextBlock(text=f"Second. {BAD}")]
        return ChatResponse(message=ChatMessage(role="assistant", blocks=blocks))


REACT = [
    ChatMessage(role="system", content="Write Thought:, Action:, Action Input: and Answer:."),
    ChatMessage(role="user", content=QUESTION),
]
THINKING = f"Thought: I know it. {BAD}\nAnswer: So it is. {BAD} Be well."


@pytest.mark.parametrize("thoughts", [True, False])
@pytest.mark.parametrize("method", ["chat", "stream_chat", "achat", "astream_chat"])
async def test_edits_are_spans_of_the_whole_answer_whatever_lies_between(method: str, thoughts: bool) -> None:
    segments: list[Segment] = []
    aligned = AlignedLLM(
        ReplayLLM(answer=THINKING, seed=1), mending(), thoughts=thoughts, sink=segments.append
    )
    with hearing() as heard:
        shown = await drained(getattr(aligned, method)(REACT))
    (end,) = heard.ends
    thought, answer = THINKING.split("Answer:")
    expected = (thought.replace(BAD, GOOD) if thoughts else thought) + "Answer:" + answer.replace(BAD, GOOD)
    assert shown == end.text == expected
    assert apply_edits(THINKING, end.edits) == expected
    # The sink is told the same places.
    assert [segment.index for segment in segments] == list(range(len(segments)))
    for segment in segments:
        assert THINKING[segment.start :].startswith(segment.original)
    starts = [segment.start for segment in segments]
    assert starts == sorted(set(starts))
    assert end.stats == tuple(segment.stats for segment in segments)


def test_blocks_are_told_as_one_answer() -> None:
    with hearing() as heard:
        AlignedLLM(Blocks(answer=""), mending()).chat(MESSAGES)
    check_pairs(heard, "AlignedLLM")
    (end,) = heard.ends
    assert end.text == f"First. {GOOD}Second. {GOOD}"
    assert apply_edits(f"First. {BAD}Second. {BAD}", end.edits) == end.text


async def test_each_turn_of_an_agent_is_a_correction_of_its_own() -> None:
    before = f"I will look it up. {BAD}"
    calls = [{"name": "look_up", "args": {"page": 3}}]
    upstream = ReplayLLM(answer=ANSWER, seed=1, calls=calls, before_tools=before)
    with hearing() as heard:
        await FunctionAgent(tools=[look_up], llm=AlignedLLM(upstream, mending())).run(user_msg=QUESTION)
    check_pairs(heard, "AlignedLLM")
    assert [end.text for end in heard.ends] == [before.replace(BAD, GOOD), CORRECTED]
    assert [end.question for end in heard.ends] == [QUESTION, QUESTION]
    assert apply_edits(before, heard.ends[0].edits) == heard.ends[0].text
    parents = {heard.spans[str(end.span_id)].parent for end in heard.ends}
    assert len(parents) == 2
    assert all(str(parent).startswith("AlignedLLM.astream_chat_with_tools-") for parent in parents)
    # A turn without text corrects nothing.
    upstream = ReplayLLM(answer=ANSWER, seed=1, calls=calls)
    with hearing() as heard:
        await FunctionAgent(tools=[look_up], llm=AlignedLLM(upstream, mending())).run(user_msg=QUESTION)
    assert [end.text for end in heard.ends] == [CORRECTED]


async def test_each_turn_of_a_react_agent_is_a_correction_of_its_own() -> None:
    turns = iter(
        [f'Thought: I look it up. {BAD}\nAction: look_up\nAction Input: {{"page": 3}}', THINKING],
    )
    said: dict[str, str] = {}

    def say(prompt: str) -> str:
        return said.setdefault(prompt, next(turns))

    aligned = AlignedLLM(ReplayLLM(answer=say, is_function_calling_model=False), mending())
    with hearing() as heard:
        await ReActAgent(tools=[look_up], llm=aligned).run(user_msg=QUESTION)
    check_pairs(heard, "AlignedLLM")
    assert [end.text for end in heard.ends] == [text.replace(BAD, GOOD) for text in said.values()]
    for end, raw in zip(heard.ends, said.values(), strict=True):
        assert apply_edits(raw, end.edits) == end.text


async def test_a_closed_loop_is_one_correction() -> None:
    def go_on(prefix: str) -> str:
        return " Then rest." if GOOD in prefix else ANSWER

    upstream = ReplayLLM(answer=ANSWER, continue_from=go_on)
    for method in ("chat", "stream_chat", "achat", "astream_chat"):
        aligned = AlignedLLM(upstream, mending(), loop="closed", continuation="prefill")
        with hearing() as heard:
            shown = await drained(getattr(aligned, method)(MESSAGES))
        check_pairs(heard, "AlignedLLM")
        (end,) = heard.ends
        assert shown == end.text == f"{SENTENCES[0]}{GOOD} Then rest."
        assert len(end.stats) == 3
        assert apply_edits(f"{SENTENCES[0]}{BAD} Then rest.", end.edits) == shown
        assert len(heard.of("ReplayLLM", LLMChatStartEvent)) == 2
        assert all(event.tags == ORIGINAL for event in heard.of("ReplayLLM"))


async def test_an_aligner_within_an_aligner_tells_of_both() -> None:
    inner = AlignedLLM(ReplayLLM(answer=ANSWER, seed=1), mending())
    outer = AlignerQueryEngine(rag(inner), scripted_aligner(lambda question, prefix, text: text.upper()))
    with hearing() as heard:
        shown = await drained(outer.query(QUESTION))
    assert shown == CORRECTED.upper()
    assert {end.surface: end.text for end in heard.ends} == {
        "AlignedLLM": CORRECTED,
        "AlignerQueryEngine": CORRECTED.upper(),
    }
    assert len(heard.starts) == 2


# Nodes.


def nodes() -> list[NodeWithScore]:
    made = [
        TextNode(id_="bad", text=f"One. {BAD}"),
        TextNode(id_="clean", text="Two."),
        TextNode(id_="empty", text=""),
        TextNode(id_="blank", text=" \n"),
        ImageNode(id_="image", text=BAD, image="aW1hZ2U="),
        TextNode(id_="worse", text=f"{BAD} {BAD}"),
    ]
    return [NodeWithScore(node=node) for node in made]


@pytest.mark.parametrize("form", ["sync", "async"])
async def test_each_node_with_text_is_told_once(form: str) -> None:
    aligner = AlignerPostprocessor(mending())
    given = nodes()
    with hearing() as heard:
        if form == "sync":
            after = aligner.postprocess_nodes(given, query_str=QUESTION)
        else:
            after = await aligner.apostprocess_nodes(given, query_str=QUESTION)
    check_pairs(heard, "AlignerPostprocessor")
    corrected = [each for each in after if each.node_id in ("bad", "clean", "worse")]
    assert [start.node_id for start in heard.starts] == ["bad", "clean", "worse"]
    assert [end.node_id for end in heard.ends] == ["bad", "clean", "worse"]
    assert [end.text for end in heard.ends] == [each.text for each in corrected]
    originals = {each.node_id: each.text for each in given}
    for end in heard.ends:
        assert end.question == QUESTION
        assert apply_edits(originals[str(end.node_id)], end.edits) == end.text
        (stats,) = end.stats
        assert stats.forwards > 0
        parent = str(heard.spans[str(end.span_id)].parent)
        assert parent.startswith("AlignerPostprocessor._postprocess_nodes-")
    assert heard.simple.open_spans == {}


async def test_in_an_engine_nodes_and_answer_are_told_apart() -> None:
    wrapped = rag(
        ReplayLLM(answer=ANSWER, seed=1),
        node_postprocessors=[AlignerPostprocessor(mending())],
        streaming=False,
    )
    with hearing() as heard:
        AlignerQueryEngine(wrapped, mending()).query(QUESTION)
    assert [end.surface for end in heard.ends] == [*["AlignerPostprocessor"] * 2, "AlignerQueryEngine"]
    assert all((end.node_id is None) is (end.surface == "AlignerQueryEngine") for end in heard.ends)
    # Up from the nodes' correction to the query: one tree.
    span, ids = heard.spans[str(heard.ends[0].span_id)], list[str]()
    while span.parent is not None:
        ids.append(span.parent.split("-")[0])
        span = heard.spans[span.parent]
    assert ids[0] == "AlignerPostprocessor._postprocess_nodes"
    assert ids[-1] == "AlignerQueryEngine.query"


async def test_a_failing_node_drops_the_spans_of_its_batch() -> None:
    with hearing() as heard, pytest.raises(CorrectionFailedError):
        AlignerPostprocessor(failing()).postprocess_nodes(nodes(), query_str=QUESTION)
    check_pairs(heard, "AlignerPostprocessor", complete=False, ended="drop")
    assert [(end.node_id, end.text) for end in heard.ends] == [("bad", ""), ("clean", ""), ("worse", "")]


def test_a_node_whose_correction_failed_says_so_alone() -> None:
    aligner = AlignerPostprocessor(failing(), on_error="withhold", withheld_text="[gone]")
    with hearing() as heard:
        aligner.postprocess_nodes(nodes(), query_str=QUESTION)
    check_pairs(heard, "AlignerPostprocessor")
    assert [(end.node_id, end.text) for end in heard.ends] == [
        ("bad", "One. [gone]"),
        ("clean", "Two."),
        ("worse", "[gone] [gone]"),
    ]
    assert [[each.check for each in end.findings] for end in heard.ends] == [
        ["correction_failed"],
        [],
        ["correction_failed"],
    ]


# Whose words they are: tags.

_LLM_EVENTS = (
    *(LLMChatStartEvent, LLMChatInProgressEvent, LLMChatEndEvent),
    *(LLMCompletionStartEvent, LLMCompletionInProgressEvent, LLMCompletionEndEvent),
)


@pytest.mark.parametrize("method", [*LLM_METHODS, *TOOL_METHODS])
@pytest.mark.parametrize("tags", [{}, {"user": "ann", "turn": 3}])
async def test_the_wrapped_llms_own_words_are_tagged_and_no_others(method: str, tags: dict[str, Any]) -> None:
    aligned = AlignedLLM(ReplayLLM(answer=ANSWER, chunk_size=7), mending())
    with hearing() as heard, instrument_tags(tags):
        await drained(ask(aligned, method))
        assert active_instrument_tags.get() == tags
    inner, own = heard.of("ReplayLLM"), heard.of("AlignedLLM")
    assert heard.of("ReplayLLM", *_LLM_EVENTS)
    assert heard.of("AlignedLLM", *_LLM_EVENTS)
    if "stream" in method:
        assert len(heard.of("ReplayLLM", LLMChatInProgressEvent, LLMCompletionInProgressEvent)) > 5
    assert len(inner) + len(own) == len(heard.events)
    assert all(event.tags == {**tags, **ORIGINAL} for event in inner)
    assert all(event.tags == tags for event in own)
    assert {event.class_name() for event in own} >= {"CorrectionStart", "CorrectionEnd"}
    for id_, span in heard.spans.items():
        assert span.tags == ({**tags, **ORIGINAL} if id_.startswith("ReplayLLM.") else tags)
    # What is not tagged holds no word of the raw text (`model_dict` is what the wrapped LLM is made of).
    for event in own:
        said = {name: getattr(event, name) for name in type(event).model_fields if name != "model_dict"}
        assert BAD not in str(said)
    assert any(BAD in str(event) for event in inner)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["query", "aquery"])
async def test_what_is_said_inside_an_engine_is_tagged_and_the_users_tags_are_kept(
    form: str, streaming: bool
) -> None:
    made = AlignerQueryEngine(
        rag(ReplayLLM(answer=ANSWER, seed=1), streaming=streaming),
        mending(),
    )
    with hearing() as heard, instrument_tags({"user": "ann"}):
        await drained(getattr(made, form)(QUESTION))
    assert [event.tags for event in (*heard.starts, *heard.ends)] == [{"user": "ann"}] * 2
    assert heard.spans[str(heard.ends[0].span_id)].tags == {"user": "ann"}
    assert all(event.tags.get("user") == "ann" for event in heard.events)
    inner, own = heard.of("ReplayLLM"), heard.of("AlignerQueryEngine")
    assert inner and all(event.tags == {"user": "ann", **ORIGINAL} for event in inner)
    assert own and all(event.tags == {"user": "ann"} for event in own)
    assert not any(BAD in str(event) for event in heard.events if event.tags == {"user": "ann"})


def user_of(event: BaseEvent) -> str:
    """Who asked: every event of an LLM and of a correction says it in its own fields."""
    said = next(getattr(event, name) for name in ("question", "messages", "prompt") if hasattr(event, name))
    return said if isinstance(said, str) else str(said[-1].content)


async def test_concurrent_queries_do_not_mix_tags() -> None:
    aligned = AlignedLLM(ReplayLLM(answer=ANSWER, chunk_size=9, delay=0.001), mending())

    async def converse(name: str) -> None:
        with instrument_tags({"user": name}):
            stream = await aligned.astream_chat([ChatMessage(role="user", content=name)])
            async for _ in stream:
                assert active_instrument_tags.get() == {"user": name}
            await aligned.achat([ChatMessage(role="user", content=name)])
            await aligned.acomplete(name)

    names = [f"user {at}" for at in range(8)]
    with hearing() as heard:
        await asyncio.gather(*map(converse, names))
    spoken = [event for event in heard.events if event.class_name() != "ExceptionEvent"]
    assert len(spoken) > 8 * 20
    for event in spoken:
        tags = {"user": user_of(event)}
        assert event.tags == (tags | ORIGINAL if str(event.span_id).startswith("ReplayLLM.") else tags)
    # They did run at the same time: the first did not end before the last began.
    order = [user_of(event) for event in spoken]
    assert order.index(names[-1]) < len(order) - 1 - order[::-1].index(names[0])
    assert sorted(end.question for end in heard.ends) == sorted(names * 3)
    assert {end.text for end in heard.ends} == {CORRECTED}


def test_streams_read_in_turns_in_one_thread_do_not_mix_tags() -> None:
    aligned = AlignedLLM(ReplayLLM(answer=ANSWER, chunk_size=9), mending())
    names = ("ann", "bob")
    streams: dict[str, Any] = {}
    with hearing() as heard:
        for name in names:
            with instrument_tags({"user": name}):
                streams[name] = aligned.stream_chat([ChatMessage(role="user", content=name)])
        going = True
        while going:
            going = False
            for name in names:
                with instrument_tags({"user": name}):
                    going |= next(streams[name], None) is not None
                assert active_instrument_tags.get() == {}
    assert len(heard.events) > 20
    for event in heard.events:
        tags = {"user": user_of(event)}
        assert event.tags == (tags | ORIGINAL if str(event.span_id).startswith("ReplayLLM.") else tags)


# No correction, no event.


class Advice(BaseModel):
    """Advice as data."""

    text: str


async def test_data_is_no_correction() -> None:
    told = [{"name": "Advice", "args": {"text": BAD}}]
    aligned = AlignedLLM(ReplayLLM(answer="", calls=told), mending())
    parsing = AlignedLLM(ReplayLLM(answer=json.dumps({"text": BAD})), mending())
    prompt = PromptTemplate("{question}")
    parsed = PromptTemplate("{question}", output_parser=PydanticOutputParser(Advice))
    with hearing() as heard:
        structured = AlignerQueryEngine(rag(aligned, streaming=False, output_cls=Advice), mending())
        assert isinstance(structured.query(QUESTION), PydanticResponse)
        assert isinstance(await structured.aquery(QUESTION), PydanticResponse)
        assert aligned.structured_predict(Advice, prompt, question=QUESTION) == Advice(text=BAD)
        assert await aligned.astructured_predict(Advice, prompt, question=QUESTION) == Advice(text=BAD)
        assert Advice.model_validate_json(parsing.predict(parsed, question=QUESTION)) == Advice(text=BAD)
        assert json.loads(whole(parsing.chat(MESSAGES))) == {"text": BAD}
        assert json.loads(await drained(parsing.stream_chat(MESSAGES))) == {"text": BAD}
        assert json.loads(await drained(parsing.astream_complete(QUESTION))) == {"text": BAD}
    assert heard.events
    assert (heard.starts, heard.ends) == ([], [])
    assert not any(".correct-" in id_ for id_ in heard.spans)


async def test_nothing_to_correct_is_no_correction() -> None:
    silent = ReplayLLM(answer="")
    calling = ReplayLLM(answer="", calls=[{"name": "look_up", "args": {"page": 1}}])
    tools: list[BaseTool] = []
    blank = [NodeWithScore(node=TextNode(text=text)) for text in ("", " ", "\n", "---")]
    pictured = NodeWithScore(node=ImageNode(text=BAD, image="aW1hZ2U="))
    with hearing() as heard:
        for wrapped in (Telling(make=lambda: Response(None)), Telling(make=lambda: Response(""))):
            AlignerQueryEngine(wrapped, mending()).query(QUESTION)
            await AlignerQueryEngine(wrapped, mending()).aquery(QUESTION)
        await drained(AlignerQueryEngine(telling(), mending()).query(QUESTION))
        await drained(AlignerQueryEngine(telling("", ""), mending()).aquery(QUESTION))
        await drained(AlignedLLM(silent, mending()).stream_chat(MESSAGES))
        AlignedLLM(calling, mending()).chat_with_tools(tools, user_msg=QUESTION)
        AlignerPostprocessor(mending()).postprocess_nodes([*blank, pictured], query_str=QUESTION)
        AlignerPostprocessor(mending()).postprocess_nodes([], query_str=QUESTION)
    assert heard.events
    assert (heard.starts, heard.ends) == ([], [])


# As data.


async def test_events_are_data() -> None:
    with hearing() as heard:
        await engine("query", streaming=True)(mending())
    (start,), (end,) = heard.starts, heard.ends
    assert (start.class_name(), end.class_name()) == ("CorrectionStart", "CorrectionEnd")
    data = end.model_dump()
    assert data["class_name"] == "CorrectionEnd"
    assert end.edits
    assert list(data["edits"]) == [asdict(edit) for edit in end.edits]
    assert len(data["stats"]) == len(SENTENCES)
    assert data["stats"][0]["provider"] == "scripted"
    for event, kind in ((start, CorrectionStart), (end, CorrectionEnd)):
        assert json.loads(json.dumps(event.model_dump(mode="json")))["question"] == QUESTION
        assert kind.model_validate_json(event.model_dump_json()) == event
        assert event.dict()["span_id"] == event.span_id  # LlamaIndex's old way
    assert start.timestamp <= end.timestamp


def test_any_text_can_be_told() -> None:
    text = "A lone \ud800 one. Nul \x00. <|end|>"
    with hearing() as heard:
        AlignerPostprocessor(mending()).postprocess_nodes(
            [NodeWithScore(node=TextNode(text=text))], query_str="Why \udfff ?"
        )
    (end,) = heard.ends
    assert (end.question, end.text) == ("Why \udfff ?", text)


def test_a_handler_that_fails_fails_no_correction() -> None:
    class Failing(BaseEventHandler):
        def handle(self, event: BaseEvent, **kwargs: Any) -> None:
            raise RuntimeError("no disk left")

    root, handler = get_dispatcher(), Failing()
    root.add_event_handler(handler)
    try:
        response = AlignedLLM(ReplayLLM(answer=ANSWER), mending()).chat(MESSAGES)
    finally:
        root.event_handlers[:] = [one for one in root.event_handlers if one is not handler]
    assert response.message.content == CORRECTED
