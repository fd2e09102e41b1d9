"""The LlamaIndex kit finds each fault on the surface where it is, and none where there is none."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.llms.generic_utils import (
    achat_to_completion_decorator,
    astream_chat_to_completion_decorator,
    chat_to_completion_decorator,
    stream_chat_to_completion_decorator,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    TextBlock,
    ToolCallBlock,
)
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine, SimpleChatEngine
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.dispatcher import instrument_tags
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.llms.callbacks import llm_chat_callback
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from aligner_integrations.testing.llama_index import Report, check
from aligner_integrations.testing.replay_llm import ReplayLLM
from tests.testing import guards
from tests.testing.guards import ANSWER, CANARY, CLEAN, HIDDEN, SENTENCES

pytestmark = [
    # Making an agent, LlamaIndex looks at every attribute, deprecated ones of pydantic among them;
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning:inspect"),
    # and its ReActAgent asks its context what the context no longer wants to be asked.
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
]

Pieces = Callable[[Iterator[str]], Iterator[str]]
ORIGINAL = {"aligner": "original"}
STREAMED = {"query", "aquery"}
ROOT = Path(__file__).resolve().parents[2]
FAULTS: list[tuple[Pieces, set[str]]] = [
    (guards.raw, {"leaks", "loses", "adds"}),
    (guards.cut_in_two, {"leaks", "loses", "adds"}),
    (guards.without_last_piece, {"loses"}),
    (guards.one_sentence_twice, {"duplicates"}),
    (guards.one_word_more, {"adds"}),
]
each_fault = pytest.mark.parametrize(
    ("pieces", "found"), FAULTS, ids=lambda one: getattr(one, "__name__", "")
)


def replay(**given: Any) -> ReplayLLM:
    return ReplayLLM(**{"answer": ANSWER, "seed": 1, **given})


def hidden(text: str) -> str:
    return text.replace(CANARY, HIDDEN)


class GuardedLLM(ReplayLLM):
    """Hides the address in a finished answer; on a stream it shows what `pieces` makes of the deltas."""

    llm: ReplayLLM
    pieces: Pieces
    tags: dict[str, str] = ORIGINAL
    keeps_raw: bool = False
    drops_calls: bool = False
    cumulative: Callable[[str], str] = str

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        with instrument_tags(self.tags):
            response = self.llm.chat(messages)
        return self._response(hidden(response.message.content or ""), response)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        with instrument_tags(self.tags):
            response = await self.llm.achat(messages)
        return self._response(hidden(response.message.content or ""), response)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return self._shown(self._responses_of(self.llm.stream_chat(messages)))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        async def said() -> ChatResponseAsyncGen:
            with instrument_tags(self.tags):
                responses = [response async for response in await self.llm.astream_chat(messages)]
            for response in self._shown(iter(responses)):
                yield response

        return said()

    def _responses_of(self, stream: ChatResponseGen) -> Iterator[ChatResponse]:
        while True:
            with instrument_tags(self.tags):
                response = next(stream, None)
            if response is None:
                return
            yield response

    def _shown(self, responses: Iterator[ChatResponse]) -> ChatResponseGen:
        last: list[ChatResponse] = []

        def deltas() -> Iterator[str]:
            for response in responses:
                last[:] = [response]
                yield response.delta or ""

        text = ""
        for piece in self.pieces(deltas()):
            text += piece
            yield self._response(self.cumulative(text), None, piece)
        yield self._response(self.cumulative(text), last[-1], "")

    def _response(self, text: str, of: ChatResponse | None, delta: str | None = None) -> ChatResponse:
        blocks = of.message.blocks if of and not self.drops_calls else []
        calls = [block for block in blocks if isinstance(block, ToolCallBlock)]
        message = ChatMessage(role="assistant", blocks=[TextBlock(text=text), *calls])
        return ChatResponse(message=message, delta=delta, raw=of.raw if of and self.keeps_raw else None)

    # Completions of a chat model: as LlamaIndex's own integrations have them.
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return chat_to_completion_decorator(self.chat)(prompt)

    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return await achat_to_completion_decorator(self.achat)(prompt)

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return stream_chat_to_completion_decorator(self.stream_chat)(prompt)

    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return await astream_chat_to_completion_decorator(self.astream_chat)(prompt)


class GuardedEngine(BaseQueryEngine):
    """The same for a query engine that streams, or does not."""

    def __init__(self, engine: BaseQueryEngine, pieces: Pieces, **given: Any) -> None:
        super().__init__(None)
        self.engine, self.pieces, self.given = engine, pieces, given

    def _get_prompt_modules(self) -> Any:
        return {}

    def _query(self, query_bundle: QueryBundle) -> Any:
        response = self.engine.query(query_bundle)
        if isinstance(response, Response):
            return Response(hidden(str(response)), response.source_nodes, **self.given)
        assert isinstance(response, StreamingResponse)
        shown = self.pieces(response.response_gen)
        return StreamingResponse((piece for piece in shown), response.source_nodes, **self.given)

    async def _aquery(self, query_bundle: QueryBundle) -> Any:
        response = await self.engine.aquery(query_bundle)
        if isinstance(response, Response):
            return Response(hidden(str(response)), response.source_nodes, **self.given)
        assert isinstance(response, AsyncStreamingResponse)

        async def shown() -> Any:
            texts = [text async for text in response.response_gen]
            for piece in self.pieces(iter(texts)):
                yield piece

        return AsyncStreamingResponse(shown(), response.source_nodes, **self.given)


class Book(BaseRetriever):
    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=TextNode(text=f"Ann: {CANARY}"), score=1.0)]


class OtherMemory(ChatMemoryBuffer):
    """Stores another text than the one that was shown."""

    def put(self, message: ChatMessage) -> None:
        is_answer = message.role == "assistant"
        super().put(ChatMessage(role=message.role, content="Something else.") if is_answer else message)

    async def aput(self, message: ChatMessage) -> None:
        self.put(message)


def engine(llm: Any, *, streaming: bool = True) -> BaseQueryEngine:
    return RetrieverQueryEngine.from_args(Book(), llm=llm, streaming=streaming)


def guarded(pieces: Pieces = guards.by_sentence, llm: ReplayLLM | None = None, **given: Any) -> GuardedLLM:
    return GuardedLLM(answer="", llm=llm or replay(), pieces=pieces, **given)


# LlamaIndex's default memory leaves a database connection open, which is a warning of its own.
def chats(
    llm: Any, memory: type[ChatMemoryBuffer] = ChatMemoryBuffer
) -> dict[str, Callable[[], BaseChatEngine]]:
    given: Any = {"llm": llm}
    return {
        "simple": lambda: SimpleChatEngine.from_defaults(memory=memory.from_defaults(), **given),
        "context": lambda: ContextChatEngine.from_defaults(Book(), memory=memory.from_defaults(), **given),
        "condense": lambda: CondensePlusContextChatEngine.from_defaults(
            Book(), memory=memory.from_defaults(), **given
        ),
    }


def look_up(name: str) -> str:
    """Look a name up."""
    return f"{name} is in the book."


CALLS = {"calls": [{"name": "look_up", "args": {"name": "Ann"}}], "before_tools": f"I ask {CANARY} first. "}


def faults(report: Report) -> dict[str, set[str]]:
    return {surface.name: set(surface.faults) for surface in report.failures}


def all_of(report: Report, *, but: Sequence[str] = ()) -> set[str]:
    return {surface.name for surface in report.surfaces if surface.judged} - set(but)


def with_cut(report: Report) -> set[str]:
    return {surface.name for surface in report.surfaces if surface.chunks > 1}


def test_a_bare_llm_leaks_everywhere() -> None:
    llm = replay()
    report = check(llm, canary=CANARY, llm=llm)
    assert len(report.surfaces) == 17
    assert set(faults(report)) == all_of(report)
    assert all(surface.leaked == len(CANARY) for surface in report.surfaces)
    assert (report["stream_chat"].held, report["stream_chat"].equal) == (2, True)


def test_a_bare_query_engine_leaks_everywhere() -> None:
    llm = replay()
    report = check(engine(llm), canary=CANARY, llm=llm)
    assert len(report.surfaces) == 13
    # A stream has not been read when the end of its query is told.
    assert set(faults(report)) == all_of(report, but=["instrumentation"])
    report = check(engine(llm, streaming=False), canary=CANARY, llm=llm)
    assert set(faults(report)) == all_of(report)
    assert all_of(report) == {"query", "aquery", "synthesize", "asynthesize", "instrumentation"}


@pytest.mark.parametrize("kind", chats(None))
def test_a_bare_chat_engine_leaks_everywhere(kind: str) -> None:
    llm = replay()
    report = check(chats(llm)[kind], canary=CANARY, llm=llm)
    assert set(faults(report)) == all_of(report)
    assert all_of(report) == {"chat", "achat", "stream_chat", "astream_chat", "instrumentation"}


AGENTS: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "function": lambda llm: lambda: FunctionAgent(llm=llm, tools=[look_up]),
    "react": lambda llm: lambda: ReActAgent(llm=llm, tools=[look_up]),
    "workflow": lambda llm: lambda: AgentWorkflow([FunctionAgent(llm=llm, tools=[look_up])]),
    "not streaming": lambda llm: lambda: FunctionAgent(llm=llm, tools=[look_up], streaming=False),
}


@pytest.mark.parametrize("kind", AGENTS)
@pytest.mark.parametrize("given", [{}, CALLS], ids=["plain", "calls"])
def test_a_bare_agent_leaks_everywhere(kind: str, given: dict[str, Any]) -> None:
    llm = replay(**(given if kind != "react" else {}))
    report = check(AGENTS[kind](llm), canary=CANARY, llm=llm)
    assert set(faults(report)) == all_of(report)
    assert ("AgentStream" in all_of(report)) is (kind != "not streaming")


@pytest.mark.parametrize("given", [{}, {"is_chat_model": False, "is_function_calling_model": False}])
def test_a_clean_llm_is_clean_and_holds_one_sentence(given: dict[str, Any]) -> None:
    llm = replay()
    report = check(guarded(llm=llm, **given), canary=CANARY, expected=CLEAN, llm=llm)
    report.assert_clean()
    stream = report["stream_chat"]
    assert (stream.chunks, stream.leaked, stream.lost, stream.equal) == (3, 0, 0, True)
    assert stream.held is not None and len(SENTENCES[0]) <= stream.held < len(SENTENCES[0]) + 8
    assert report["chat"].held == len(ANSWER)
    apart = [surface for surface in report.surfaces if not surface.judged]
    assert [(one.name, one.leaked) for one in apart] == [("instrumentation, wrapped LLM", len(CANARY))]
    assert ("chat_with_tools" in all_of(report)) is (not given)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_clean_query_engine_is_clean_whatever_is_retrieved(streaming: bool) -> None:
    llm = replay()
    target = GuardedEngine(engine(llm, streaming=streaming), guards.by_sentence)
    report = check(target, canary=CANARY, expected=CLEAN, llm=llm)
    report.assert_clean()
    assert report["instrumentation, inner runs"].leaked == len(CANARY)
    assert not any(surface.name.endswith("synthesize") for surface in report.surfaces)
    if streaming:
        assert report["query"].held is not None and report["query"].held < len(ANSWER) / 2
        assert report["aquery"].equal is True and report["query, str"].equal is True


@pytest.mark.parametrize("kind", chats(None))
def test_a_clean_chat_engine_is_clean(kind: str) -> None:
    llm = replay()
    report = check(chats(guarded(llm=llm))[kind], canary=CANARY, expected=CLEAN, llm=llm)
    report.assert_clean()
    assert all(surface.equal for surface in report.surfaces if "chat" in surface.name)


@pytest.mark.parametrize("kind", AGENTS)
@pytest.mark.parametrize("given", [{}, CALLS], ids=["plain", "calls"])
def test_a_clean_agent_is_clean(kind: str, given: dict[str, Any]) -> None:
    llm = replay(**(given if kind != "react" else {}))
    report = check(AGENTS[kind](guarded(llm=llm)), canary=CANARY, expected=CLEAN, llm=llm)
    report.assert_clean()
    assert kind == "not streaming" or report["AgentStream"].equal is True


def test_of_a_react_agent_the_answer_counts_and_not_the_thought() -> None:
    thought = "Thought: I can answer. Really.\nAnswer: "
    llm = replay(answer=thought + ANSWER)
    target = AGENTS["react"](guarded(llm=llm))
    report = check(target, canary=CANARY, expected=CLEAN, llm=llm)
    report.assert_clean()
    assert report["AgentStream"].chunks == 3
    bare = check(AGENTS["react"](llm), canary=CANARY, expected=CLEAN)
    assert all(surface.leaked == len(CANARY) for surface in bare.surfaces)


@each_fault
def test_a_fault_of_an_llm_is_found_on_its_streams_alone(pieces: Pieces, found: set[str]) -> None:
    report = check(guarded(pieces), canary=CANARY)
    streams = {name for name in all_of(report) if "stream" in name}
    heard = {"instrumentation": {"leaks"}} if "leaks" in found else {}
    assert len(streams) == 8
    assert faults(report) == {**dict.fromkeys(streams, found), **heard}


@each_fault
def test_a_fault_of_a_query_engine_is_found(pieces: Pieces, found: set[str]) -> None:
    target = GuardedEngine(engine(replay()), pieces)
    report = check(target, canary=CANARY, expected=CLEAN)
    assert faults(report) == dict.fromkeys(all_of(report, but=["instrumentation"]), found)


@each_fault
def test_a_fault_behind_a_chat_engine_is_found(pieces: Pieces, found: set[str]) -> None:
    report = check(chats(guarded(pieces))["simple"], canary=CANARY)
    heard = {"instrumentation": {"leaks"}} if "leaks" in found else {}
    assert faults(report) == {**dict.fromkeys(("stream_chat", "astream_chat"), found), **heard}


@each_fault
def test_a_fault_behind_an_agent_is_found(pieces: Pieces, found: set[str]) -> None:
    report = check(AGENTS["function"](guarded(pieces)), canary=CANARY, expected=CLEAN)
    silent = {"other events": {"leaks"}, "instrumentation": {"leaks"}} if "leaks" in found else {}
    assert faults(report) == {
        **dict.fromkeys(("AgentStream", "AgentOutput", "result", "memory"), found),
        **silent,
    }


def test_faults_are_counted_in_characters() -> None:
    def column(pieces: Pieces, name: str) -> Any:
        report = check(guarded(pieces), canary=CANARY, expected=CLEAN, surfaces=["stream_chat"])
        return getattr(report["stream_chat"], name)

    assert column(guards.cut_in_two, "leaked") == len(CANARY)
    assert column(guards.without_last_piece, "lost") == len(SENTENCES[-1])
    assert column(guards.one_sentence_twice, "duplicated") == len(SENTENCES[0])
    assert column(guards.all_again_at_the_end, "duplicated") == len(CLEAN)
    assert column(guards.one_word_more, "foreign") == len(" Ζωή!")


def test_a_guard_that_holds_all_is_clean_and_its_column_says_so() -> None:
    llm = replay()
    held = guarded(guards.all_at_once, llm)
    for target, name in (
        (held, "stream_chat"),
        (GuardedEngine(engine(llm), guards.all_at_once), "query"),
        (chats(held)["simple"], "stream_chat"),
        (AGENTS["function"](held), "AgentStream"),
    ):
        report = check(target, canary=CANARY, expected=CLEAN, llm=llm, surfaces=[name])
        assert report.clean and report[name].held == len(ANSWER), str(report)


def test_a_cumulative_text_that_is_not_what_was_streamed_differs() -> None:
    """Ahead of its deltas, behind them, or another text: some read deltas, and others the message."""
    for cumulative in (lambda text: CLEAN, lambda text: text[:-1], lambda text: text.upper()):
        target = guarded(cumulative=cumulative)
        report = check(target, canary=CANARY, expected=CLEAN)
        streams = {"stream_chat", "stream_complete", "stream_chat_with_tools"}
        assert faults(report) == {name: {"differs"} for name in (*streams, *map("a{}".format, streams))}
    agent = check(
        AGENTS["function"](guarded(cumulative=lambda text: text[:-1])), canary=CANARY, expected=CLEAN
    )
    assert faults(agent)["AgentStream"] == {"differs"}
    assert faults(agent)["memory"] == faults(agent)["result"] == {"loses"}


def test_a_memory_that_is_not_what_was_shown_differs() -> None:
    report = check(chats(guarded(), OtherMemory)["simple"], canary=CANARY, expected=CLEAN)
    names = {"chat", "achat", "stream_chat", "astream_chat"}
    assert faults(report) == {name: {"differs"} for name in names}


def test_what_the_provider_sent_is_searched() -> None:
    target = guarded(keeps_raw=True)
    report = check(target, canary=CANARY, expected=CLEAN)
    silent = ["predict", "apredict", "stream", "astream"]  # these give no more than the text
    assert faults(report) == {name: {"leaks"} for name in all_of(report, but=silent)}
    agent = check(AGENTS["function"](target), canary=CANARY, expected=CLEAN)
    assert set(faults(agent)) == all_of(agent, but=["memory"])  # it keeps the message, which has no `raw`


def test_a_response_that_keeps_the_raw_text_beside_it_leaks() -> None:
    target = GuardedEngine(engine(replay()), guards.by_sentence, metadata={"original": ANSWER})
    report = check(target, canary=CANARY, expected=CLEAN)
    assert faults(report) == {name: {"leaks"} for name in all_of(report)}


def test_a_response_that_is_another_text_when_it_is_read_again_differs() -> None:
    class Forgetful(StreamingResponse):
        def __str__(self) -> str:
            return "None"

    class Twice(StreamingResponse):
        def __str__(self) -> str:
            return f"{super().__str__()} Again."

    class Engine(GuardedEngine):
        kind: type[StreamingResponse]

        def _query(self, query_bundle: QueryBundle) -> Any:
            return self.kind(super()._query(query_bundle).response_gen)

    names = ("query", "query, str", "query, get_response", "query, print_response_stream")
    for kind, differing in ((Forgetful, {*names[2:]}), (Twice, {*names} - {"query, str"})):
        target = Engine(engine(replay()), guards.by_sentence)
        target.kind = kind
        report = check(target, canary=CANARY, expected=CLEAN, surfaces=names)
        assert {name for name, found in faults(report).items() if found == {"differs"}} == differing


def test_a_wrapped_llm_that_is_not_tagged_is_heard() -> None:
    target = guarded(tags={})
    llm, chat = check(target, canary=CANARY), check(chats(target)["simple"], canary=CANARY)
    agent = check(AGENTS["function"](target), canary=CANARY, surfaces=["instrumentation"])
    assert faults(llm) == faults(chat) == faults(agent) == {"instrumentation": {"leaks"}}


def test_an_event_that_cannot_be_read_is_no_silence() -> None:
    class Unreadable:
        def __repr__(self) -> str:
            raise RuntimeError("no words")

    class Odd(BaseEvent):
        value: Any

    def tell(chunks: Iterator[str]) -> Iterator[str]:
        get_dispatcher().event(Odd(value=Unreadable()))
        yield from guards.by_sentence(chunks)

    report = check(guarded(tell), canary=CANARY, expected=CLEAN)
    assert report["instrumentation"].error == "RuntimeError: no words"


def test_an_agent_that_no_longer_calls_its_tools_is_found() -> None:
    llm = replay(**CALLS)
    report = check(AGENTS["function"](guarded(llm=llm, drops_calls=True)), canary=CANARY, llm=llm)
    assert report["other events"].error == (
        "RuntimeError: the LLM called tools that the agent did not run: ['look_up']"
    )


# The thread of a chat engine raises what its reader is told already.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_that_tells_the_canary_leaks() -> None:
    def tell(chunks: Iterator[str]) -> Iterator[str]:
        raise ValueError(f"refused: {''.join(chunks)}")
        yield

    for target in (guarded(tell), GuardedEngine(engine(replay()), tell), chats(guarded(tell))["simple"]):
        report = check(target, canary=CANARY, expected=CLEAN)
        names = {name for name in faults(report) if "raises" in faults(report)[name]}
        assert names and all(report[name].leaked == len(CANARY) for name in names)
    agent = check(AGENTS["function"](guarded(tell)), canary=CANARY, expected=CLEAN)
    assert "raises" in faults(agent)["AgentStream"] and agent["AgentStream"].leaked == len(CANARY)


def test_what_is_asked_is_no_leak() -> None:
    question = f"Is {CANARY} right?"
    for target in (
        guarded(),
        GuardedEngine(engine(replay()), guards.by_sentence),
        chats(guarded())["condense"],
        AGENTS["function"](guarded()),
    ):
        check(target, canary=CANARY, question=question, expected=CLEAN).assert_clean()


def test_a_leak_of_the_whole_answer_does_not_excuse_the_others() -> None:
    report = check(replay(), canary=CANARY, surfaces=["stream_chat"])
    assert report["stream_chat"].faults == ("leaks",) and report.expected == ANSWER


def test_only_what_is_asked_for_is_reported() -> None:
    report = check(guarded(), canary=CANARY, expected=CLEAN, surfaces=["instrumentation", "chat"])
    assert [surface.name for surface in report.surfaces][:2] == ["chat", "instrumentation"]


def test_the_dispatcher_is_left_as_it_was() -> None:
    root = get_dispatcher()
    before = [*root.event_handlers], [*root.span_handlers]
    check(guarded(), canary=CANARY, surfaces=["chat"])
    with pytest.raises(KeyboardInterrupt):
        check(replay(answer=_interrupt), canary=CANARY)
    after = [*root.event_handlers], [*root.span_handlers]
    assert [list(map(id, one)) for one in after] == [list(map(id, one)) for one in before]


def _interrupt(question: str) -> str:
    raise KeyboardInterrupt


async def test_it_works_inside_a_running_loop() -> None:
    llm = replay()
    for target in (
        guarded(llm=llm),
        GuardedEngine(engine(llm), guards.by_sentence),
        chats(guarded(llm=llm))["simple"],
        AGENTS["function"](guarded(llm=llm)),
    ):
        check(target, canary=CANARY, expected=CLEAN).assert_clean()
    assert asyncio.get_running_loop().is_running()


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"canary": ""}, ValueError, "canary is empty"),
        ({"canary": "unsaid"}, ValueError, "not in llm's answer"),
        ({"expected": ANSWER}, ValueError, "canary is part of expected"),
        ({"llm": "llm"}, TypeError, "llm must be an LLM"),
        ({"surfaces": ["streams"]}, ValueError, "surfaces has 'streams'.*'stream_chat'"),
        ({"surfaces": "stream"}, TypeError, "surfaces is a str"),
        ({"target": 3}, TypeError, "target is a int"),
        ({"target": chats(replay())["simple"]()}, TypeError, "target is a SimpleChatEngine.*makes one"),
        ({"target": lambda: 3}, TypeError, "must make a chat engine or an agent"),
    ],
)
def test_what_cannot_be_checked_is_refused(given: dict[str, Any], error: type[Exception], says: str) -> None:
    arguments: dict[str, Any] = {"target": guarded(), "canary": CANARY, "llm": replay(), **given}
    with pytest.raises(error, match=says):
        check(arguments.pop("target"), **arguments)


ALONE = """
import sys
import aligner_integrations.testing.{kit}
print(*sorted(name for name in ("langchain_core", "langgraph", "llama_index") if name in sys.modules))
"""
WITHOUT = """
import sys
sys.modules["llama_index"] = None
import aligner_integrations.testing
from aligner_integrations.errors import MissingDependencyError
try:
    import aligner_integrations.testing.llama_index
except MissingDependencyError as error:
    print(error)
"""


def said_by(code: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return ran.stdout


def test_neither_kit_loads_the_others_framework() -> None:
    assert said_by(ALONE.format(kit="llama_index")).split() == ["llama_index"]
    assert "llama_index" not in said_by(ALONE.format(kit="conformance")).split()
    assert said_by(ALONE.format(kit="report")).split() == []


def test_only_this_kit_needs_llama_index() -> None:
    assert 'pip install "aligner-integrations[llama-index]"' in said_by(WITHOUT)
