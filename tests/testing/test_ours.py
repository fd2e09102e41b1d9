"""What this library ships, in its own conformance kit: every surface of every adapter is clean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRetryMiddleware, PIIMiddleware
from langchain_core.output_parsers import StrOutputParser
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from aligner_integrations.langchain import (
    AlignedChatModel,
    AlignerMiddleware,
    AlignerRunnable,
    AsyncStreamAlignerCallbackHandler,
    StreamAlignerCallbackHandler,
)
from aligner_integrations.testing import scripted_aligner
from aligner_integrations.testing.conformance import ReplayModel, check
from tests.testing.guards import ANSWER, CANARY, CLEAN, HIDDEN, PROMPT, SENTENCES

ALIGNER = scripted_aligner(lambda question, prefix, sentence: sentence.replace(CANARY, HIDDEN))
AGENT_SURFACES = 18


@tool
def look_up(name: str) -> str:
    """Look a person up."""
    return "found"


def agent(model: ReplayModel, *around: Any, **given: Any) -> Any:
    saver = InMemorySaver() if given.pop("saved", False) else None
    middleware = [*around, AlignerMiddleware(ALIGNER, **given)]
    return create_agent(model, [look_up], middleware=middleware, checkpointer=saver)


TARGETS: dict[str, Callable[[ReplayModel], Any]] = {
    "prompt | model | AlignerRunnable": lambda model: PROMPT | model | AlignerRunnable(ALIGNER),
    "AlignerRunnable, text": lambda model: PROMPT | model | StrOutputParser() | AlignerRunnable(ALIGNER),
    "AlignedChatModel": lambda model: AlignedChatModel(model=model, aligner=ALIGNER),
    "prompt | AlignedChatModel": lambda model: PROMPT | AlignedChatModel(model=model, aligner=ALIGNER),
    "AlignerMiddleware": lambda model: agent(model),
    "AlignerMiddleware, checkpointer": lambda model: agent(model, saved=True),
    "AlignerMiddleware, stacked": lambda model: agent(
        model, PIIMiddleware("credit_card", apply_to_output=True), ModelRetryMiddleware(), saved=True
    ),
    "StreamAlignerCallbackHandler": lambda model: (
        lambda sink: StreamAlignerCallbackHandler(ALIGNER, sink=sink)
    ),
    "AsyncStreamAlignerCallbackHandler": lambda model: (
        lambda sink: AsyncStreamAlignerCallbackHandler(ALIGNER, sink=sink)
    ),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("chunk_size", [1, 5, 40])
def test_t1_t4_t6_every_surface_is_clean(name: str, chunk_size: int) -> None:
    model = ReplayModel(answer=ANSWER, chunk_size=chunk_size, seed=7)
    report = check(TARGETS[name](model), canary=CANARY, expected=CLEAN, upstream=model)
    report.assert_clean()
    assert sum(surface.judged for surface in report.surfaces) >= 5
    if "Middleware" in name:
        assert len(report.surfaces) >= AGENT_SURFACES


@pytest.mark.parametrize("saved", [False, True])
def test_thoughts_beside_tool_calls_are_clean_too(saved: bool) -> None:
    calls = [{"name": "look_up", "args": {"name": "Ann"}}]
    model = ReplayModel(answer=ANSWER, chunk_size=3, calls=calls, before_tools=f"I ask {CANARY} first. ")
    report = check(agent(model, thoughts=True, saved=saved), canary=CANARY, expected=CLEAN, upstream=model)
    report.assert_clean()


def test_t5_the_first_sentence_is_all_that_is_held_back() -> None:
    """The reader waits for a sentence and the word after it. (Of agents `test_middleware.py` tells.)"""
    model = ReplayModel(answer=ANSWER, chunk_size=1, delay=0.0)
    for name in ("prompt | model | AlignerRunnable", "AlignedChatModel"):
        target = TARGETS[name](model)
        streams = ["stream", "astream"]
        report = check(target, canary=CANARY, expected=CLEAN, upstream=model, surfaces=streams)
        for surface in report.surfaces:
            assert surface.held is not None and len(SENTENCES[0]) <= surface.held < len(SENTENCES[0]) + 6
