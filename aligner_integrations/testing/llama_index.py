"""Does a guard keep its word on every surface of LlamaIndex? `check` drives them all and says.

The twin of `conformance`, which is about LangChain. Nothing here knows how a guard works.
"""

from __future__ import annotations

try:
    import llama_index.core  # noqa: F401
except ImportError as error:
    from aligner_integrations.errors import MissingDependencyError

    if error.name not in ("llama_index", "llama_index.core"):
        raise  # llama-index-core is there, but broken: its own message says more
    raise MissingDependencyError(
        "aligner_integrations.testing.llama_index needs llama-index-core, which is not installed; "
        'pip install "aligner-integrations[llama-index]"',
        name="llama_index",
    ) from error

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from llama_index.core.agent.workflow import AgentWorkflow, BaseWorkflowAgent
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.chat_engine.types import BaseChatEngine

from aligner_integrations.testing.llama_agents import AGENTS
from aligner_integrations.testing.llama_events import Listener, is_input
from aligner_integrations.testing.llama_surfaces import SURFACES, Kind, Target
from aligner_integrations.testing.replay_llm import ReplayLLM
from aligner_integrations.testing.report import (
    Report,
    Surface,
    chosen,
    drive_all,
    judge,
    look_at_texts,
    texts_of,
)
from aligner_integrations.testing.seen import Seen

_DRIVES = {**SURFACES, **AGENTS}
# The first of these that is driven gives the expected text, where none is given.
_WHOLE = ("query", "aquery", "chat", "achat", "result")
_HEARD = "instrumentation"


def check(
    target: BaseQueryEngine | BaseLLM | Callable[[], BaseChatEngine | BaseWorkflowAgent | AgentWorkflow],
    *,
    canary: str,
    question: str = "What do you know?",
    expected: str | None = None,
    llm: BaseLLM | None = None,
    surfaces: Iterable[str] | None = None,
) -> Report:
    """Drive every surface of a guarded query engine, chat engine, LLM or agent, and judge each.

    Args:
        target: A guarded query engine or LLM; or a function that makes a chat engine or an agent, which
            remember what was said: each run gets a new one.
        canary: A text that the LLM writes and that must never be seen.
        question: What is asked.
        expected: The text to be shown; without it, what `query`, `chat` or an agent's result gives.
        llm: The LLM that the guard stands behind. A `ReplayLLM` lets `held` be told, and whether an agent
            still runs the tools that it calls.
        surfaces: The names of those to drive; all of them, if left out.

    Raises:
        TypeError: the target, or another argument, is none of the kinds above.
        ValueError: the check could not fail as asked, or there is no surface of that name.
    """
    kind, make = _kind_of(target)
    look_at_texts(canary, expected)
    _look_at_llm(canary, llm)
    drives = _DRIVES[kind]
    names = chosen([*drives, _HEARD], surfaces)
    driven = [name for name in names if name != _HEARD] or list(drives)
    wholes = [name for name in _WHOLE if name in drives]
    baseline = wholes[:1] if expected is None else []
    count = (lambda: llm.handed_out) if isinstance(llm, ReplayLLM) else None
    new = partial(Seen, canary, is_input=is_input)
    seen = {name: new(handed_out=count) for name in dict.fromkeys([*driven, *baseline])}
    calls = tuple(call["name"] for call in llm.calls) if isinstance(llm, ReplayLLM) else ()
    listener = Listener(new, engine=target if kind == "query engine" else None)
    aim = Target(kind=kind, make=make, question=question, calls=calls, deltas=listener.deltas)
    with listener.listening():
        drive_all(aim, {name: drives[name] for name in seen}, seen)
    expected, allowed = texts_of(canary, expected, [seen[name] for name in wholes if name in seen])
    rows = [judge(name, seen[name], canary, expected, allowed) for name in names if name != _HEARD]
    if _HEARD in names:
        rows += [judge(name, place, canary, None, allowed) for name, place in listener.places(_HEARD)]
    return Report(tuple(row for row in rows if row.name not in seen or not seen[row.name].absent), expected)


def _kind_of(target: Any) -> tuple[Kind, Callable[[], Any]]:
    if isinstance(target, BaseQueryEngine):
        return "query engine", lambda: target
    if isinstance(target, BaseLLM):
        return "llm", lambda: target
    if not callable(target) or isinstance(target, BaseChatEngine | BaseWorkflowAgent | AgentWorkflow):
        raise TypeError(
            f"target is a {type(target).__name__}; give a query engine, an LLM, or for a chat engine or an "
            "agent, which remember, a function that makes one: lambda: FunctionAgent(llm=llm)"
        )
    made = target()
    if isinstance(made, BaseChatEngine):
        return "chat engine", target
    if isinstance(made, BaseWorkflowAgent | AgentWorkflow):
        return "agent", target
    raise TypeError(f"target() gives a {type(made).__name__}; it must make a chat engine or an agent")


def _look_at_llm(canary: str, llm: Any) -> None:
    if llm is not None and not isinstance(llm, BaseLLM):
        raise TypeError(f"llm must be an LLM, got {type(llm).__name__}; give a ReplayLLM")
    if isinstance(llm, ReplayLLM) and isinstance(llm.answer, str) and canary not in llm.answer:
        raise ValueError("canary is not in llm's answer, so nothing could leak; put it there")


__all__ = ["ReplayLLM", "Report", "Surface", "check"]
