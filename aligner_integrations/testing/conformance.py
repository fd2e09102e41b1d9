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

import asyncio
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig

from aligner_integrations.testing.heard import HEARD
from aligner_integrations.testing.replay import ReplayModel
from aligner_integrations.testing.shown import Shown, compare, longest_piece, messages_that_went_in, with_ids
from aligner_integrations.testing.surfaces import SURFACES, WITH_MODEL_RUNS, Drive, Kind, Target

_DRIVES = {**SURFACES, **HEARD}


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """What one surface showed. Counts are of characters; None is what cannot be told there.

    Attributes:
        name: Which surface.
        judged: Whether it counts; a chain's model runs come before its guard, and do not.
        leaked: The longest piece of the canary that could be read.
        lost: What of the expected text is missing.
        duplicated: Text too much that the expected text has: shown twice.
        foreign: Text too much that the expected text has not.
        held: What upstream had handed out when the first text was shown.
        chunks: How many pieces showed text.
        equal: Whether streamed text, final message and stored state are the same.
        error: What was raised while it was driven.
    """

    name: str
    judged: bool = True
    leaked: int = 0
    lost: int | None = None
    duplicated: int | None = None
    foreign: int | None = None
    held: int | None = None
    chunks: int = 0
    equal: bool | None = None
    error: str | None = None

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong, in words; empty where nothing is."""
        found = {
            "raises": self.error is not None,
            "leaks": self.leaked > 0,
            "loses": bool(self.lost),
            "duplicates": bool(self.duplicated),
            "adds": bool(self.foreign),
            "differs": self.equal is False,
        }
        return tuple(fault for fault, is_there in found.items() if is_there)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


@dataclass(frozen=True, slots=True)
class Report:
    """One row for each surface; `str(report)` is a Markdown table."""

    surfaces: tuple[Surface, ...]
    expected: str | None = None

    def __getitem__(self, name: str) -> Surface:
        return next(surface for surface in self.surfaces if surface.name == name)

    @property
    def failures(self) -> tuple[Surface, ...]:
        """The judged surfaces that are not clean."""
        return tuple(surface for surface in self.surfaces if surface.judged and not surface.clean)

    @property
    def clean(self) -> bool:
        """Whether every judged surface is clean."""
        return not self.failures

    def assert_clean(self) -> None:
        """Raise an AssertionError with the table unless every judged surface is clean."""
        if not self.clean:
            errors = "".join(f"\n{one.name}: {one.error}" for one in self.failures if one.error)
            names = ", ".join(surface.name for surface in self.failures)
            raise AssertionError(f"not clean: {names}\n\n{self}{errors}")

    def __str__(self) -> str:
        columns = ("leaked", "lost", "duplicated", "foreign", "held", "chunks", "equal")
        lines = [f"| surface | {' | '.join(columns)} | verdict |", "| --- |" + " --- |" * (len(columns) + 1)]
        for surface in self.surfaces:
            verdict = ", ".join(surface.faults) or "clean"
            cells = [_cell(getattr(surface, column)) for column in columns]
            lines.append(
                f"| {' | '.join([surface.name, *cells, verdict if surface.judged else 'not judged'])} |"
            )
        return "\n".join(lines)


def _cell(value: int | bool | None) -> str:
    if value is None:
        return "-"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


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
    _drive_all(aim, {name: drives[name] for name in shown}, shown)
    expected, allowed = _texts(canary, expected, [shown[name] for name in wholes if name in shown])
    rows = []
    for name in names:
        rows.append(_judge(name, shown[name], canary, expected, allowed))
        if (models := shown[name].models) is not None:
            rows.append(_judge(f"{name}, model runs", models, canary, None, allowed))
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
    if not isinstance(canary, str):
        raise TypeError(f"canary must be a str, got {type(canary).__name__}")
    if not canary:
        raise ValueError("canary is empty; give a text that the model writes and nobody may see")
    if expected is not None and canary in expected:
        raise ValueError("canary is part of expected; give a text that must not be shown")
    if upstream is not None and not isinstance(upstream, BaseChatModel):
        raise TypeError(f"upstream must be a chat model, got {type(upstream).__name__}; give a ReplayModel")
    if isinstance(upstream, ReplayModel) and canary not in upstream.answer:
        raise ValueError("canary is not in upstream's answer, so nothing could leak; put it there")


def _chosen(drives: dict[str, Drive], surfaces: Iterable[str] | None) -> list[str]:
    if isinstance(surfaces, str):
        raise TypeError(f"surfaces is a str; give a list: [{surfaces!r}]")
    chosen = list(drives) if surfaces is None else list(surfaces)
    for name in chosen:
        if name not in drives:
            raise ValueError(f"surfaces has {name!r}, which this target has not; choose from {list(drives)}")
    if surfaces is None and not importlib.util.find_spec("langgraph"):
        return [name for name in chosen if not name.startswith("graph")]
    return [name for name in drives if name in chosen]


def _texts(canary: str, expected: str | None, wholes: list[Shown]) -> tuple[str | None, str]:
    """Return the text to be shown, and the one whose pieces of the canary tell nothing."""
    if expected is not None:
        return expected, expected
    answers = ["".join(whole.answer[0]) for whole in wholes if whole.error is None]
    if not answers or canary in answers[0]:  # what invoke lets through is no excuse for the others
        return (answers[0] if answers else None), ""
    return answers[0], answers[0]


def _drive_all(target: Target, drives: dict[str, Drive], shown: dict[str, Shown]) -> None:
    """Drive the synchronous surfaces, then the others in one event loop: clients are often bound to one."""
    later: list[tuple[Shown, Drive]] = []
    for name, drive in drives.items():
        if inspect.iscoroutinefunction(drive):
            later.append((shown[name], drive))
            continue
        try:
            drive(target, shown[name])
        except Exception as error:  # whatever a target raises is a finding, and the next surface is due
            _note(error, shown[name])

    async def run() -> None:
        for place, drive in later:
            try:
                await drive(target, place)  # type: ignore[misc]
            except Exception as error:
                _note(error, place)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(run())
        return
    with ThreadPoolExecutor(1) as pool:  # in a notebook or an async test a loop is running here already
        pool.submit(asyncio.run, run()).result()


def _note(error: Exception, shown: Shown) -> None:
    shown.see(str(error))  # the reader of a log sees it too
    shown.error = f"{type(error).__name__}: {error}"


def _judge(name: str, shown: Shown, canary: str, expected: str | None, allowed: str) -> Surface:
    leaked = longest_piece(canary, shown.everything, allowed=allowed)
    if not shown.has_text:
        return Surface(name=name, judged=shown.judged, leaked=leaked, error=shown.error)
    pieces, held = shown.answer
    wholes = shown.whole_texts
    if not pieces and wholes:  # nothing was streamed: what a reader sees is the whole at the end
        pieces = wholes[-1:]
    text = "".join(pieces)
    lost = duplicated = foreign = None
    if expected is not None:
        lost, duplicated, foreign = compare(expected, text)
    return Surface(
        name=name,
        judged=shown.judged,
        leaked=leaked,
        lost=lost,
        duplicated=duplicated,
        foreign=foreign,
        held=held,
        chunks=sum(1 for piece in pieces if piece),
        equal=all(whole == text for whole in wholes) if wholes else None,
        error=shown.error,
    )


__all__ = ["ReplayModel", "Report", "Surface", "check"]
