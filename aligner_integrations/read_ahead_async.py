"""The same as `read_ahead` on an event loop; a file of its own, because asyncio is slow to import."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TypeVar

from aligner_integrations.read_ahead import READ_AHEAD

T = TypeVar("T")


class AsyncReadAhead(AsyncIterator[T]):
    """The items of `source`, as `read_ahead` yields them; a task reads it.

    To be closed with `aclose`, which cancels the task where it waits for its next item. It is no generator:
    an event loop that shuts down would close it, and who reads it, both at once.
    """

    def __init__(self, source: AsyncGenerator[T], size: int = READ_AHEAD) -> None:
        self._source = source
        self._size = size
        self._come: asyncio.Queue[tuple[T] | BaseException | None] = asyncio.Queue()
        self._slots = asyncio.Semaphore(size)
        self._task: asyncio.Task[None] | None = None

    async def __anext__(self) -> T:
        if self._size == 0:
            return await anext(self._source)
        self._task = self._task or asyncio.create_task(self._read())
        item = await self._come.get()
        if isinstance(item, tuple):
            self._slots.release()
            return item[0]
        self._come.put_nowait(None)
        raise item or StopAsyncIteration

    async def aclose(self) -> None:
        """Close the source; what was read and not wanted yet is forgotten."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        elif self._size == 0:
            await self._source.aclose()

    async def _read(self) -> None:
        end: BaseException | None = None
        try:
            async with aclosing(self._source):
                while await self._slots.acquire():
                    try:
                        self._come.put_nowait((await anext(self._source),))
                    except StopAsyncIteration:
                        break
        except BaseException as error:  # it is the reader's
            end = error
        self._come.put_nowait(end)
