"""The runs that a callback handler listens to; what counts is what it hands to its sink."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig, RunnableLambda

from aligner_integrations.testing.shown import Shown
from aligner_integrations.testing.surfaces import Drive, Kind, Target, without_beta_warning


def _heard_invoke(target: Target, shown: Shown) -> None:
    target.runnable.invoke(target.given, target.listening(shown))


async def _heard_ainvoke(target: Target, shown: Shown) -> None:
    await target.runnable.ainvoke(target.given, target.listening(shown))


def _heard_stream(target: Target, shown: Shown) -> None:
    for _ in target.runnable.stream(target.given, target.listening(shown)):
        pass


async def _heard_astream(target: Target, shown: Shown) -> None:
    async for _ in target.runnable.astream(target.given, target.listening(shown)):
        pass


def _heard_v3(target: Target, shown: Shown) -> None:
    with without_beta_warning():
        for _ in target.runnable.stream_events(target.given, target.listening(shown), version="v3"):
            pass


async def _heard_av3(target: Target, shown: Shown) -> None:
    with without_beta_warning():
        run = await target.runnable.astream_events(target.given, target.listening(shown), version="v3")
        async for _ in run:
            pass


def _chain_of(target: Target) -> Target:
    """Return the handler's model inside a chain."""
    prompt = ChatPromptTemplate.from_messages([("human", "{question}")])
    given = {"question": target.question}
    return replace(target, runnable=prompt | target.runnable | StrOutputParser(), given=given)


def _graph_of(target: Target) -> Target:
    """Return the handler's model inside a node of a graph."""
    from langgraph.graph import START, MessagesState, StateGraph

    async def aanswer(state: MessagesState, config: RunnableConfig) -> Any:
        return {"messages": [await target.runnable.ainvoke(state["messages"], config)]}

    def answer(state: MessagesState, config: RunnableConfig) -> Any:
        return {"messages": [target.runnable.invoke(state["messages"], config)]}

    graph = StateGraph(MessagesState)
    graph.add_node("answer", RunnableLambda(answer, aanswer))
    graph.add_edge(START, "answer")
    return replace(target, runnable=graph.compile(), given={"messages": [("human", target.question)]})


def _heard_chain(target: Target, shown: Shown) -> None:
    _heard_stream(_chain_of(target), shown)


async def _heard_achain(target: Target, shown: Shown) -> None:
    await _heard_astream(_chain_of(target), shown)


def _heard_graph(target: Target, shown: Shown) -> None:
    graph = _graph_of(target)
    for _ in graph.runnable.stream(graph.given, target.listening(shown), stream_mode="messages"):
        pass


async def _heard_agraph(target: Target, shown: Shown) -> None:
    graph = _graph_of(target)
    async for _ in graph.runnable.astream(graph.given, target.listening(shown), stream_mode="messages"):
        pass


# By kind of handler: the name of each run, in the order of the report.
HEARD: dict[Kind, dict[str, Drive]] = {
    "handler": {
        "invoke": _heard_invoke,
        "ainvoke": _heard_ainvoke,
        "stream": _heard_stream,
        "astream": _heard_astream,
        "events v3": _heard_v3,
        "events v3 async": _heard_av3,
        "chain": _heard_chain,
        "chain async": _heard_achain,
        "graph": _heard_graph,
        "graph async": _heard_agraph,
    },
}
HEARD["async handler"] = {
    name: HEARD["handler"][name]
    for name in ("ainvoke", "astream", "events v3 async", "chain async", "graph async")
}
