"""What this library ships for LlamaIndex, in its own conformance kit: every surface is clean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import CitationQueryEngine, RetrieverQueryEngine

from aligner_integrations.llama_index import AlignedLLM, AlignerPostprocessor, AlignerQueryEngine
from aligner_integrations.testing import scripted_aligner
from aligner_integrations.testing.llama_index import ReplayLLM, check
from tests.llama_index.real import medquad_nodes, vector_index
from tests.testing.guards import ANSWER, CANARY, CLEAN, HIDDEN, SENTENCES

# LlamaIndex's own: making an agent reads what pydantic deprecates, and a ReActAgent what workflows do.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning:inspect"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
]

ALIGNER = scripted_aligner(lambda question, prefix, sentence: sentence.replace(CANARY, HIDDEN))
INDEX = vector_index(medquad_nodes(40))


def look_up(name: str) -> str:
    """Look a person up."""
    return "found"


def engine(llm: ReplayLLM, **given: Any) -> AlignerQueryEngine:
    return AlignerQueryEngine(INDEX.as_query_engine(llm=llm, **given), ALIGNER)


def aligned(llm: ReplayLLM, **given: Any) -> AlignedLLM:
    return AlignedLLM(llm, ALIGNER, **given)


def memory() -> ChatMemoryBuffer:
    return ChatMemoryBuffer.from_defaults(token_limit=3000)


TARGETS: dict[str, Callable[[ReplayLLM], Any]] = {
    "AlignerQueryEngine": engine,
    "AlignerQueryEngine, streaming": lambda llm: engine(llm, streaming=True),
    "AlignerQueryEngine, tree_summarize": lambda llm: engine(llm, response_mode="tree_summarize"),
    "AlignerQueryEngine, postprocessor": lambda llm: engine(
        llm, streaming=True, node_postprocessors=[AlignerPostprocessor(ALIGNER)]
    ),
    "AlignerQueryEngine, citations": lambda llm: AlignerQueryEngine(
        CitationQueryEngine.from_args(INDEX, llm=llm), ALIGNER
    ),
    "engine of an AlignedLLM": lambda llm: INDEX.as_query_engine(llm=aligned(llm), streaming=True),
    "AlignedLLM": aligned,
    "AlignedLLM, completion": lambda llm: aligned(
        llm.model_copy(update={"is_chat_model": False, "is_function_calling_model": False})
    ),
    "SimpleChatEngine": lambda llm: lambda: SimpleChatEngine.from_defaults(llm=aligned(llm), memory=memory()),
    "ContextChatEngine": lambda llm: (
        lambda: ContextChatEngine.from_defaults(
            retriever=INDEX.as_retriever(), llm=aligned(llm), memory=memory()
        )
    ),
    "CondensePlusContextChatEngine": lambda llm: (
        lambda: CondensePlusContextChatEngine.from_defaults(
            retriever=INDEX.as_retriever(), llm=aligned(llm), memory=memory()
        )
    ),
    "CondenseQuestionChatEngine": lambda llm: (
        lambda: CondenseQuestionChatEngine.from_defaults(
            RetrieverQueryEngine.from_args(INDEX.as_retriever(), llm=aligned(llm), streaming=True),
            llm=llm,
            memory=memory(),
        )
    ),
    "FunctionAgent": lambda llm: lambda: FunctionAgent(tools=[look_up], llm=aligned(llm)),
    "FunctionAgent, not streaming": lambda llm: (
        lambda: FunctionAgent(tools=[look_up], llm=aligned(llm), streaming=False)
    ),
    "ReActAgent": lambda llm: lambda: ReActAgent(tools=[look_up], llm=aligned(llm)),
    "AgentWorkflow": lambda llm: lambda: AgentWorkflow.from_tools_or_functions([look_up], llm=aligned(llm)),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("chunk_size", [1, 5, 40])
def test_t1_t4_t6_every_surface_is_clean(name: str, chunk_size: int) -> None:
    llm = ReplayLLM(answer=ANSWER, chunk_size=chunk_size, seed=7)
    report = check(TARGETS[name](llm), canary=CANARY, expected=CLEAN, llm=llm)
    report.assert_clean()
    assert sum(surface.judged for surface in report.surfaces) >= 5


@pytest.mark.parametrize("thoughts", [False, True])
def test_tools_are_called_and_what_is_said_beside_them_is_clean(thoughts: bool) -> None:
    calls = [{"name": "look_up", "args": {"name": "Ann"}}]
    said = f"I ask {CANARY} first. Then" if thoughts else "I look her up. Then"
    llm = ReplayLLM(answer=ANSWER, chunk_size=3, calls=calls, before_tools=said)
    make = lambda: FunctionAgent(tools=[look_up], llm=aligned(llm, thoughts=thoughts))  # noqa: E731
    check(make, canary=CANARY, expected=CLEAN, llm=llm).assert_clean()


def test_a_bare_llm_leaks_on_every_surface_that_is_judged() -> None:
    llm = ReplayLLM(answer=ANSWER, chunk_size=5)
    report = check(lambda: FunctionAgent(tools=[look_up], llm=llm), canary=CANARY, expected=CLEAN, llm=llm)
    leaking = {surface.name for surface in report.failures if surface.leaked == len(CANARY)}
    assert {"AgentStream", "AgentOutput", "result", "memory", "instrumentation"} <= leaking


def test_t5_the_first_sentence_is_all_that_is_held_back() -> None:
    """The reader waits for a sentence and the word after it."""
    llm = ReplayLLM(answer=ANSWER, chunk_size=1)
    for name, surfaces in {
        "AlignedLLM": ["stream_chat", "astream_chat", "stream_complete", "astream_complete"],
        "AlignerQueryEngine, streaming": ["query", "aquery"],
    }.items():
        report = check(TARGETS[name](llm), canary=CANARY, expected=CLEAN, llm=llm, surfaces=surfaces)
        for surface in report.surfaces:
            assert surface.held is not None and len(SENTENCES[0]) <= surface.held < len(SENTENCES[0]) + 6
