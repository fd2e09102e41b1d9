"""Corrections take a model's time; what comes between them does not. Here they are kept apart.

A stream is a generator: it yields each piece of work that may take long as a job, gets its result back,
and returns what can be sent. `run` does the jobs in place; `arun` does them in a thread, so that an event
loop goes on, and a chunk that completes no sentence costs no thread.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias, TypeVar

from langchain_core.runnables.config import var_child_runnable_config

T = TypeVar("T")
S = TypeVar("S")

# Generators whose steps are jobs, or what else the one who runs them knows to perform.
Steps: TypeAlias = Generator[Any, Any, T]


def run(steps: Steps[T], perform: Callable[[Any], Any] | None = None) -> T:
    """Do the steps in place and return what they return; what a step raises is raised in them."""
    go_on: Callable[[], Any] = partial(next, steps)
    while True:
        try:
            step = go_on()
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        try:
            go_on = partial(steps.send, (perform or apart)(step))
        except BaseException as error:
            go_on = partial(steps.throw, error)


async def arun(steps: Steps[T], perform: Callable[[Any], Awaitable[Any]] | None = None) -> T:
    """Do the steps as `run` does; without `perform` each is a job that goes to a thread."""
    go_on: Callable[[], Any] = partial(next, steps)
    while True:
        try:
            step = go_on()
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        try:
            result = await (perform(step) if perform else asyncio.to_thread(apart, step))
            go_on = partial(steps.send, result)
        except BaseException as error:
            go_on = partial(steps.throw, error)


async def settled(job: Callable[[], T]) -> T:
    """Do a job in a thread; when cancelled, see it to its end first: it must not go on beside its sequel."""
    task = asyncio.ensure_future(asyncio.to_thread(apart, job))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # looked at, so that nobody is told that it was not
        raise


def apart(job: Callable[[], T]) -> T:
    """Do a job outside the run around it.

    An aligner may itself be built of LangChain parts; as children of the run around it their tokens
    would come out among the answer's.
    """
    token = var_child_runnable_config.set(None)
    try:
        return job()
    finally:
        var_child_runnable_config.reset(token)


def inside(sink: Callable[[S], None] | None) -> Callable[[S], None] | None:
    """Return `sink` so that it is called as part of the run that is going on now.

    Then LangGraph's `get_stream_writer` and LangChain's custom events work in it.
    """
    if sink is None:
        return None
    config = var_child_runnable_config.get()

    def call(item: S) -> None:
        token = var_child_runnable_config.set(config)
        try:
            sink(item)
        finally:
            var_child_runnable_config.reset(token)

    return call


def _asked_inline(handler: object) -> bool:
    """Whether a handler runs in place: always, but where langchain-core asks at the start of a completion.

    There (1.7.2, `AsyncCallbackManager.on_llm_start`) one handler that runs in place makes it forget all
    that do not. Told no, it tells every handler; this one is run in place all the same.
    """
    asker = sys._getframe(1)
    if asker.f_code.co_name == "<listcomp>" and asker.f_back is not None:
        asker = asker.f_back
    return asker.f_code.co_name != "on_llm_start"


inline: Any = property(_asked_inline)
