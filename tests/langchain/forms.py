"""What the tests of the LangChain adapter share: a chain run in each of its forms."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from langchain_core.language_models import BaseChatModel, GenericFakeChatModel
from langchain_core.messages import BaseMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.graph import START, MessagesState, StateGraph

from aligner_integrations import Aligner
from aligner_integrations.testing import scripted_aligner

FORMS = ("invoke", "ainvoke", "stream", "astream", "batch", "abatch")


def model(answer: str = "It is so.") -> GenericFakeChatModel:
    """A chat model that always gives `answer`, word by word when it streams."""
    return GenericFakeChatModel(messages=itertools.repeat(answer))


def ask(key: str = "topic", words: str = "What of {%s}?") -> ChatPromptTemplate:
    """A prompt whose human message holds one key of the chain's input."""
    return ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", words % key)])


def tell() -> Aligner:
    """An aligner that shows the question it was given in place of the sentence."""
    return scripted_aligner(lambda question, prefix, sentence: f"<{question}>")


def shout(**options: Any) -> Aligner:
    """An aligner that writes every sentence in capitals."""
    return scripted_aligner(lambda question, prefix, sentence: sentence.upper(), **options)


def graph_of(model: BaseChatModel) -> Any:
    """A graph of one node, which asks the model."""

    def answer(state: MessagesState) -> dict[str, list[BaseMessage]]:
        return {"messages": [model.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    return graph.compile()


def text_of(output: Any) -> str:
    return str(output.text) if isinstance(output, BaseMessage) else str(output)


async def collect(
    runnable: Runnable[Any, Any], given: Any, config: RunnableConfig | None = None
) -> list[Any]:
    return [part async for part in runnable.astream(given, config)]


def run(form: str, runnable: Runnable[Any, Any], given: Any, config: RunnableConfig | None = None) -> Any:
    """Run in one of `FORMS`; streamed parts are joined, and the twins of a batch must be the same."""
    if form == "invoke":
        return runnable.invoke(given, config)
    if form == "ainvoke":
        return asyncio.run(runnable.ainvoke(given, config))
    if form in ("stream", "astream"):
        parts = (
            list(runnable.stream(given, config))
            if form == "stream"
            else asyncio.run(collect(runnable, given, config))
        )
        joined = parts[0]
        for part in parts[1:]:
            joined = joined + part
        return joined
    if form == "batch":
        one, other = runnable.batch([given, given], config)
    else:
        one, other = asyncio.run(runnable.abatch([given, given], config))
    assert text_of(one) == text_of(other)
    return one
