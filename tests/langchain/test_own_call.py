"""T19: an aligner that asks a model of LangChain itself says nothing of that in any stream."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable

from aligner_integrations import Aligner
from aligner_integrations.langchain import AlignedChatModel, AlignerMiddleware, AlignerRunnable
from aligner_integrations.testing import scripted_aligner
from aligner_integrations.testing.replay import ReplayModel
from tests.langchain.forms import ask

SECRET = "judged by the aligner's own model"
ANSWER = "All is well. This one is wrong. All is well again."
CORRECTED = ANSWER.replace("wrong", "right")


def asking_aligner() -> Aligner:
    """Its model is a chat model of LangChain, asked in the way in which a user would ask one."""

    def rule(question: str, prefix: str, sentence: str) -> str:
        judge = GenericFakeChatModel(messages=iter([AIMessage(SECRET)]))
        assert "".join(str(chunk.content) for chunk in judge.stream("Is it right?")) == SECRET
        return sentence.replace("wrong", "right")

    return scripted_aligner(rule)


def chain() -> Runnable[Any, Any]:
    return ask("question") | ReplayModel(answer=ANSWER) | AlignerRunnable(asking_aligner())


def wrapped() -> Runnable[Any, Any]:
    return ask("question") | AlignedChatModel(model=ReplayModel(answer=ANSWER), aligner=asking_aligner())


def agent_of_the_wrapped() -> Runnable[Any, Any]:
    return create_agent(AlignedChatModel(model=ReplayModel(answer=ANSWER), aligner=asking_aligner()))


def agent_with_the_middleware() -> Runnable[Any, Any]:
    return create_agent(ReplayModel(answer=ANSWER), middleware=[AlignerMiddleware(asking_aligner())])


class Ear(BaseCallbackHandler):
    """Hears of every token and end, of whichever model."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.heard.append(repr(token))

    def on_stream_event(self, event: Any, **kwargs: Any) -> None:
        self.heard.append(repr(event))

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.heard.append(repr(response))


async def everything(target: Runnable[Any, Any], given: Any, ear: Ear) -> list[str]:
    """Return what all streams of `target` say, each of which is run once."""
    said = [repr(part) for part in target.stream(given, {"callbacks": [ear]})]
    said += [repr(part) async for part in target.astream(given, {"callbacks": [ear]})]
    said += [repr(event) async for event in target.astream_events(given, {"callbacks": [ear]}, version="v2")]
    if hasattr(target, "get_graph") and "messages" in given:
        said += [repr(part) for part in target.stream(given, {"callbacks": [ear]}, stream_mode="messages")]
        said += [repr(part) for part in target.stream(given, {"callbacks": [ear]}, stream_mode="updates")]
    return said


@pytest.mark.parametrize("build", [chain, wrapped, agent_of_the_wrapped, agent_with_the_middleware])
def test_t19_the_aligners_own_call_is_in_no_stream(build: Any) -> None:
    question = "Is all well?"
    is_agent = build in (agent_of_the_wrapped, agent_with_the_middleware)
    given: Any = {"messages": [("human", question)]} if is_agent else {"question": question}
    ear = Ear()
    said = asyncio.run(everything(build(), given, ear))
    together = "\n".join([*said, *ear.heard])
    assert SECRET not in together
    assert not any(word in together for word in ("judged", "aligner's own"))
    assert "right" in together
