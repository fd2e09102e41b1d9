"""Does a streaming guard keep its word on every surface? `check` drives them all and says.

A guard is whatever corrects, redacts or blocks what a model writes: a step of a chain, a wrapped chat
model, middleware of an agent, a callback handler. Nothing here knows how it works.
"""

from __future__ import annotations

try:
    import langchain_core  # noqa: F401
except ImportError as error:
    from aligner_integrations.errors import MissingDependencyError

    if error.name != "langchain_core":
        raise  # langchain-core is there, but broken: its own message says more
    raise MissingDependencyError(
        "aligner_integrations.testing.conformance needs langchain-core, which is not installed; "
        'pip install "aligner-integrations[langchain]"',
        name="langchain_core",
    ) from error

import importlib.util
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig

from aligner_integrations.testing.heard import HEARD
from aligner_integrations.testing.replay import ReplayModel
from aligner_integrations.testing.report import (
    Report,
    Surface,
    chosen,
    drive_all,
    judge,
    look_at_texts,
    texts_of,
)
from aligner_integrations.testing.shown import Shown, messages_that_went_in, with_ids
from aligner_integrations.testing.surfaces import SURFACES, WITH_MODEL_RUNS, Drive, Kind, Target

_DRIVES = {**SURFACES, **HEARD}


def check(
    target: Runnable[Any, Any] | Callable[[Callable[[Any], None]], BaseCallbackHandler],
    *,
    canary: str,
    question: str = "What do you know?",
    input: Any = None,
    expected: str | None = None,
    upstream: BaseChatModel | None = None,
    surfaces: Iterable[str] | None = None,
    config: RunnableConfig | None = None,
) -> Report:
    """Drive every surface of a guarded chain, model, graph or callback handler, and judge each.

    Args:
        target: A chain that ends in a guard, a guarded chat model, a compiled LangGraph graph or agent; or
            a function that is given a sink and returns a callback handler that calls it with what it shows.
        canary: A text that the model writes and that must never be seen.
        question: What is asked: `{"question": ...}` of a chain, a human message of a model or graph.
        input: What is given instead of the question.
        expected: The text to be shown; without it, what `invoke` gives.
        upstream: The model that the guard stands behind. A `ReplayModel` lets `held` be told; a handler
            needs one to listen to.
        surfaces: The names of those to drive; all of them, if left out.
        config: A config for every run. Graphs that remember get a `thread_id` of their own each time.

    Raises:
        TypeError: the target, or another argument, is none of the kinds above.
        ValueError: the check could not fail as asked, or there is no surface of that name.
    """
    kind = _kind_of(target)
    _look_at_texts(canary, expected, upstream)
    makes_handler = kind in HEARD
    if makes_handler and not isinstance(upstream, BaseChatModel):
        raise ValueError("upstream is needed for a callback handler to listen to; give a ReplayModel")
    given = with_ids(input if input is not None else _given(kind, question))
    aim = Target(
        kind=kind,
        runnable=upstream if makes_handler else target,
        given=given,
        question=question,
        config=config,
        make_handler=target if makes_handler else None,  # type: ignore[arg-type]
    )
    drives = _DRIVES[kind]
    names = _chosen(drives, surfaces)
    count = (lambda: upstream.handed_out) if isinstance(upstream, ReplayModel) else None
    wholes = [name for name in ("invoke", "ainvoke") if name in drives]
    baseline = wholes[:1] if expected is None else []
    make = partial(Shown, canary, went_in=messages_that_went_in(given))
    shown = {name: make(handed_out=count) for name in dict.fromkeys([*names, *baseline])}
    for name in shown.keys() & WITH_MODEL_RUNS if kind == "chain" else ():
        shown[name].models = make(judged=False)
    drive_all(aim, {name: drives[name] for name in shown}, shown)
    expected, allowed = texts_of(canary, expected, [shown[name] for name in wholes if name in shown])
    rows = []
    for name in names:
        rows.append(judge(name, shown[name], canary, expected, allowed))
        if (models := shown[name].models) is not None:
            rows.append(judge(f"{name}, model runs", models, canary, None, allowed))
    return Report(tuple(rows), expected)


def _kind_of(target: Any) -> Kind:
    inner = target.bound if isinstance(target, RunnableBinding) else target
    if isinstance(inner, BaseChatModel):
        return "model"
    if importlib.util.find_spec("langgraph"):
        from langgraph.pregel import Pregel

        if isinstance(inner, Pregel):
            return "graph"
    if isinstance(target, Runnable):
        return "chain"
    if isinstance(target, BaseCallbackHandler) or not callable(target):
        raise TypeError(
            f"target is a {type(target).__name__}; give a chain, a chat model, a compiled graph, or for a "
            "callback handler a function that makes one: lambda sink: MyHandler(sink)"
        )
    handler = target(lambda shown: None)
    if not isinstance(handler, BaseCallbackHandler):
        raise TypeError(
            f"target(sink) gives a {type(handler).__name__}; it must return a callback handler that calls "
            "sink with what it shows"
        )
    return "async handler" if isinstance(handler, AsyncCallbackHandler) else "handler"


def _given(kind: Kind, question: str) -> Any:
    return {"chain": {"question": question}, "graph": {"messages": [("human", question)]}}.get(kind, question)


def _look_at_texts(canary: Any, expected: str | None, upstream: Any) -> None:
    look_at_texts(canary, expected)
    if upstream is not None and not isinstance(upstream, BaseChatModel):
        raise TypeError(f"upstream must be a chat model, got {type(upstream).__name__}; give a ReplayModel")
    if isinstance(upstream, ReplayModel) and canary not in upstream.answer:
        raise ValueError("canary is not in upstream's answer, so nothing could leak; put it there")


def _chosen(drives: dict[str, Drive], surfaces: Iterable[str] | None) -> list[str]:
    names = chosen(drives, surfaces)
    if surfaces is None and not importlib.util.find_spec("langgraph"):
        return [name for name in names if not name.startswith("graph")]
    return names


__all__ = ["ReplayModel", "Report", "Surface", "check"]
