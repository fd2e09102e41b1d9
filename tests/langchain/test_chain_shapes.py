"""Twelve shapes of chain: each run is corrected against its own question, also with all of them at once."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from langchain.agents import create_agent
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel, GenericFakeChatModel
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import (
    Runnable,
    RunnableBranch,
    RunnableConfig,
    RunnableLambda,
    RunnablePassthrough,
)
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from pydantic import Field

from aligner_integrations.langchain import AlignedChatModel, AlignerRunnable
from tests.langchain.forms import FORMS, ask, collect, model, tell, text_of
from tests.langchain.local_model import LocalModel

pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning")

WHOLE = ("invoke", "ainvoke", "batch", "abatch")


class Kit(NamedTuple):
    """How a chain is aligned: each of its models is wrapped, or a step at its end corrects."""

    wrap: Callable[[BaseChatModel], BaseChatModel]
    end: Callable[[Runnable[Any, Any]], Runnable[Any, Any]]


KITS = {
    "runnable": Kit(wrap=lambda inner: inner, end=lambda chain: chain | AlignerRunnable(tell())),
    "model": Kit(wrap=lambda inner: AlignedChatModel(model=inner, aligner=tell()), end=lambda chain: chain),
}


@dataclass(frozen=True)
class Shape:
    """A chain, what it is given for a topic, and what its model is then asked."""

    build: Callable[[Kit], Runnable[Any, Any]]
    given: Callable[[str], Any] = lambda topic: {"topic": topic}
    question: Callable[[str], str] = "What of {}?".format
    config: Callable[[str], RunnableConfig] = lambda topic: {}
    forms: tuple[str, ...] = FORMS
    turns: int = 1
    is_graph: bool = False


def last_message(state: dict[str, Any]) -> Any:
    """Return the last message of a graph's state, or of the update that a streaming graph sends."""
    state = state if "messages" in state else next(iter(state.values()))
    return state["messages"][-1]


class Shelf(BaseRetriever):
    """Finds a document for every query."""

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return [Document(f"All of {query}"), Document("What of no bears?")]


def retrieving(kit: Kit) -> Runnable[Any, Any]:
    prompt = ChatPromptTemplate.from_messages([("system", "From {context}"), ("human", "{question}")])
    found = Shelf() | (lambda documents: "\n\n".join(document.page_content for document in documents))
    return kit.end({"context": found, "question": RunnablePassthrough()} | prompt | kit.wrap(model()))


def nested(kit: Kit) -> Runnable[Any, Any]:
    first: Runnable[Any, Any] = RunnableLambda(itemgetter("topic")) | {"topic": RunnablePassthrough()}
    inner = (ask() | kit.wrap(model())).with_config(run_name="inner")
    return (first | kit.end(inner).with_config(run_name="middle")) | RunnablePassthrough()


def with_history(kit: Kit) -> Runnable[Any, Any]:
    prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "What of {topic}?")])
    sessions: defaultdict[str, InMemoryChatMessageHistory] = defaultdict(InMemoryChatMessageHistory)
    return RunnableWithMessageHistory(
        kit.end(prompt | kit.wrap(model())),
        lambda session_id: sessions[session_id],
        input_messages_key="topic",
        history_messages_key="history",
    )


def branching(kit: Kit) -> Runnable[Any, Any]:
    return kit.end(
        RunnableBranch(
            (lambda given: "never" in given["topic"], ask(words="Never {%s}!") | kit.wrap(model())),
            (lambda given: "canary" in given["topic"], ask() | kit.wrap(model())),
            ask(words="Else {%s}!") | kit.wrap(model()),
        )
    )


class Failing(GenericFakeChatModel):
    """Fails the first `times` that it is asked a question."""

    times: int = 1
    asked: dict[str, int] = Field(default_factory=lambda: defaultdict(int))
    lock: Any = Field(default_factory=threading.Lock)

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            self.asked[messages[-1].text] += 1
            fails = self.asked[messages[-1].text] <= self.times
        if fails:
            raise ConnectionError("no answer")
        return super()._generate(messages, *args, **kwargs)


def failing(times: int) -> Failing:
    return Failing(messages=itertools.repeat("It is so."), times=times)


def falling_back(kit: Kit) -> Runnable[Any, Any]:
    first = ask(words="First {%s}!") | kit.wrap(failing(1_000_000))
    return kit.end(first.with_fallbacks([ask() | kit.wrap(model())]))


def falling_back_to_a_model(kit: Kit) -> Runnable[Any, Any]:
    return kit.end(ask() | kit.wrap(failing(1_000_000)).with_fallbacks([kit.wrap(model())]))


def retrying(kit: Kit) -> Runnable[Any, Any]:
    return kit.end(ask() | kit.wrap(failing(1)).with_retry(wait_exponential_jitter=False))


def retrying_as_a_whole(kit: Kit) -> Runnable[Any, Any]:
    return kit.end(ask() | kit.wrap(failing(1))).with_retry(wait_exponential_jitter=False)


def node(kit: Kit) -> Runnable[Any, Any]:
    chained = kit.end(kit.wrap(model()))
    graph = StateGraph(MessagesState)
    graph.add_node("answer", lambda state: {"messages": [chained.invoke(state["messages"])]})
    graph.add_edge(START, "answer")
    return graph.compile()


def streaming_node(kit: Kit) -> Runnable[Any, Any]:
    """The node streams its chain, and sends on what comes."""
    chained = kit.end(ask() | kit.wrap(model()))

    async def answer(state: MessagesState) -> dict[str, list[BaseMessage]]:
        parts = await collect(chained, {"topic": state["messages"][-1].text[8:-1]})
        return {"messages": ["".join(map(text_of, parts))]}  # type: ignore[list-item]

    graph = StateGraph(MessagesState)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    return graph.compile()


@tool
def add(left: int, right: int) -> int:
    """Add two numbers."""
    return left + right


def tool_loop(kit: Kit) -> Runnable[Any, Any]:
    chained = kit.end(kit.wrap(LocalModel(answer="It is so.", before_tools="Let me see.")).bind_tools([add]))

    def answer(state: MessagesState) -> dict[str, list[BaseMessage]]:
        return {"messages": [chained.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("answer", answer)
    graph.add_node("tools", ToolNode([add]))
    graph.add_edge(START, "answer")
    graph.add_conditional_edges("answer", tools_condition)
    graph.add_edge("tools", "answer")
    return graph.compile()


def agent(kit: Kit) -> Runnable[Any, Any]:
    """Only a model fits in here; at the end of its own chain, the step corrects the agent's last message."""
    inner = create_agent(kit.wrap(LocalModel(answer="It is so.", before_tools="Let me see.")), [add])
    return kit.end(inner | last_message)


def configured(kit: Kit) -> Runnable[Any, Any]:
    chained = ask() | kit.wrap(model()).with_config(run_name="model", tags=["inner", "7"])
    step: Runnable[Any, Any] = (
        AlignerRunnable(tell()) if kit is KITS["runnable"] else RunnablePassthrough()
    )  # RunnablePassthrough: the same place in the chain
    named = chained | step.with_config(run_name="aligner", tags=["last"], metadata={"team": "bears"})
    return named.with_config(run_name="chain", tags=["outer"], metadata={"a": 1}, max_concurrency=3)


def human(topic: str) -> dict[str, Any]:
    return {"messages": [HumanMessage("Never!"), ("ai", "So?"), HumanMessage(f"What of {topic}?")]}


def session(topic: str) -> RunnableConfig:
    return {"configurable": {"session_id": topic}}


SHAPES = {
    "prompt and model": Shape(lambda kit: kit.end(ask() | kit.wrap(model()))),
    "retriever beside the question": Shape(retrieving, given="What of {}?".format),
    "sequences in sequences": Shape(nested),
    "message history, second turn": Shape(with_history, config=session, turns=2),
    "branch": Shape(branching),
    "fallback of a chain": Shape(falling_back),
    "fallback of a model": Shape(falling_back_to_a_model),
    "retried model": Shape(retrying, forms=WHOLE),  # langchain-core retries no streams
    "retried chain": Shape(retrying_as_a_whole, forms=WHOLE),
    "node of a graph": Shape(node, given=human, is_graph=True),
    "node that streams": Shape(
        streaming_node, given=human, is_graph=True, forms=("ainvoke", "astream", "abatch")
    ),
    "tool loop": Shape(tool_loop, given=human, is_graph=True),
    "agent": Shape(agent, given=human),
    "bound model": Shape(lambda kit: kit.end(ask() | kit.wrap(model()).bind(stop=["no"]))),
    "names and tags": Shape(configured),
}
CASES = [
    pytest.param(kit, name, form, id=f"{kit}-{name}-{form}")
    for kit in KITS
    for name, shape in SHAPES.items()
    for form in shape.forms
]


def shown(shape: Shape, parts: Sequence[Any]) -> str:
    """Return the text that was sent, or for a graph the one of its last message."""
    if not shape.is_graph:
        return "".join(map(text_of, parts))
    return text_of(last_message(parts[-1]))


def answers(shape: Shape, form: str, chained: Runnable[Any, Any], topics: Sequence[str]) -> list[str]:
    """Run for each topic, one after the other or as a batch."""
    givens = [shape.given(topic) for topic in topics]
    configs = [shape.config(topic) for topic in topics]
    both = list(zip(givens, configs, strict=True))
    if form == "invoke":
        parts = [[chained.invoke(given, config)] for given, config in both]
    elif form == "ainvoke":
        parts = [[asyncio.run(chained.ainvoke(given, config))] for given, config in both]
    elif form == "stream":
        parts = [list(chained.stream(given, config)) for given, config in both]
    elif form == "astream":
        parts = [asyncio.run(collect(chained, given, config)) for given, config in both]
    elif form == "batch":
        parts = [[output] for output in chained.batch(givens, configs)]
    else:
        parts = [[output] for output in asyncio.run(chained.abatch(givens, configs))]
    return [shown(shape, each) for each in parts]


def canaries(count: int) -> list[str]:
    return [f"canary {uuid4().hex[:8]}" for _ in range(count)]


def turn_to(shape: Shape, form: str, chained: Runnable[Any, Any], topics: Sequence[str]) -> list[str]:
    """Let earlier turns pass, each about something else, and return what the last one shows."""
    for turn in range(1, shape.turns):
        earlier = Shape(shape.build, lambda topic: {"topic": f"turn {turn} of {topic}"}, config=shape.config)  # noqa: B023
        told = answers(earlier, form, chained, topics)
        assert told == [f"<What of turn {turn} of {topic}?>" for topic in topics]
    return answers(shape, form, chained, topics)


@pytest.mark.parametrize(("kit", "name", "form"), CASES)
def test_the_question_is_found_in_every_shape_and_form(kit: str, name: str, form: str) -> None:
    shape, topics = SHAPES[name], canaries(3)
    told = turn_to(shape, form, shape.build(KITS[kit]), topics)
    assert told == [f"<{shape.question(topic)}>" for topic in topics]


@pytest.mark.parametrize("kit", KITS)
def test_all_shapes_at_once_find_their_own_question(kit: str) -> None:
    chains = {name: shape.build(KITS[kit]) for name, shape in SHAPES.items()}
    jobs = [(name, form) for form in FORMS for name, shape in SHAPES.items() if form in shape.forms]
    together = threading.Barrier(len(jobs))

    def one(job: tuple[str, str]) -> list[tuple[str, str]]:
        name, form = job
        shape, topics = SHAPES[name], canaries(3)
        together.wait(30)
        told = turn_to(shape, form, chains[name], topics)
        return [
            (f"{job}: <{shape.question(topic)}>", f"{job}: {text}")
            for topic, text in zip(topics, told, strict=True)
        ]

    with ThreadPoolExecutor(len(jobs)) as pool:
        pairs = [pair for found in pool.map(one, jobs) for pair in found]
    assert [text for _, text in pairs] == [question for question, _ in pairs]


@pytest.mark.parametrize("form", ["batch", "abatch"])
@pytest.mark.parametrize("kit", KITS)
def test_a_batch_of_many_distinct_questions(kit: str, form: str) -> None:
    shape, topics = SHAPES["prompt and model"], canaries(40)
    told = answers(shape, form, shape.build(KITS[kit]), topics)
    assert told == [f"<{shape.question(topic)}>" for topic in topics]


def texts_of_the_model(state: dict[str, Any]) -> list[str]:
    return [text_of(message) for message in state["messages"] if message.type in ("ai", "AIMessageChunk")]


@pytest.mark.parametrize("kit", KITS)
def test_every_round_of_a_tool_loop_has_the_last_human_message(kit: str) -> None:
    shape = SHAPES["tool loop"]
    state = shape.build(KITS[kit]).invoke(shape.given("2 bears"))
    assert texts_of_the_model(state) == ["So?", "<What of 2 bears?>", "<What of 2 bears?>"]
    assert [message.text for message in state["messages"] if message.type == "tool"] == ["4"]
