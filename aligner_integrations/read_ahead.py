"""Read a stream ahead while its reader is busy: what has come waits, up to a bound.

So an upstream model goes on writing while a sentence of it is corrected.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable
from contextlib import aclosing
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")

# Chunks that may wait. A sentence has about twenty tokens, and a restart throws away what waits.
READ_AHEAD = 32


def read_ahead(source: Iterable[T], size: int = READ_AHEAD) -> Generator[T]:
    """Yield the items of `source`; a thread reads up to `size` of them before they are wanted.

    What `source` raises comes after what it gave before. Closing the generator closes `source`, in the thread
    that reads it, and waits for that: nothing goes on behind it. When `source` is waiting for its next item,
    so does the closing. With 0 there is no thread.
    """
    if size == 0:
        yield from source
        return
    # An item in a tuple; None or an error at the end.
    come: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()
    slots, stopped = threading.Semaphore(size), threading.Event()

    def read() -> None:
        end: BaseException | None = None
        items = _each(source)
        try:
            while slots.acquire() and not stopped.is_set():
                try:
                    come.put((next(items),))
                except StopIteration:
                    break
        except BaseException as error:  # it is the reader's
            end = error
        finally:
            items.close()
            come.put(end)

    # In a copy of the context of whoever reads, as `asyncio.to_thread` does it.
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(read,), name="aligner-read-ahead", daemon=True)
    thread.start()
    try:
        while isinstance(item := come.get(), tuple):
            slots.release()
            yield item[0]
        if item is not None:
            raise item
    finally:
        stopped.set()
        slots.release()
        thread.join()


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


def _each(source: Iterable[T]) -> Generator[T]:
    """Yield the items of `source`; closing the generator closes `source`, if it is one too."""
    yield from source
