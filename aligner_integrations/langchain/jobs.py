"""Corrections take a model's time; what comes between them does not. Here they are kept apart.

A stream is a generator: it yields each piece of work that may take long as a job, gets its result back,
and returns what can be sent. `run` does the jobs in place; `arun` does them in a thread, so that an event
loop goes on, and a chunk that completes no sentence costs no thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any, TypeAlias, TypeVar

from langchain_core.runnables.config import var_child_runnable_config

T = TypeVar("T")
S = TypeVar("S")

Job: TypeAlias = Callable[[], Any]
Steps: TypeAlias = Generator[Job, Any, T]


def run(steps: Steps[T]) -> T:
    """Do the jobs in place and return what the steps return."""
    result: Any = None
    while True:
        try:
            job = steps.send(result)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        result = apart(job)


async def arun(steps: Steps[T]) -> T:
    """Do the jobs in a thread, one after the other, and return what the steps return."""
    result: Any = None
    while True:
        try:
            job = steps.send(result)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        result = await asyncio.to_thread(apart, job)


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
