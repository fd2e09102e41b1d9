"""Read a stream ahead while its reader is busy: what has come waits, up to a bound.

So an upstream model goes on writing while a sentence of it is corrected.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Generator, Iterable
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


def _each(source: Iterable[T]) -> Generator[T]:
    """Yield the items of `source`; closing the generator closes `source`, if it is one too."""
    yield from source
