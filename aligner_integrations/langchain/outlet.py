"""A bounded buffer between a run that writes and whoever reads along, in any thread or event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Generic, TypeVar

from aligner_integrations.errors import AlignerError

T = TypeVar("T")


@dataclass(slots=True)
class _End:
    """Where one round of runs is over, and how."""

    error: BaseException | None


class Outlet(Generic[T]):
    """What `put` takes, iteration gives, from `begin` to `end`; the next iteration is for the next round.

    A full buffer makes the writer wait, for `timeout` seconds at most. A reader that stops early frees the
    writer: what comes until `end` is then dropped.
    """

    def __init__(self, size: int, timeout: float | None) -> None:
        self._size = size
        self._timeout = timeout
        # Reentrant: an abandoned run that is collected while the lock is held ends its round.
        self._lock = threading.RLock()
        self._items: deque[T | _End] = deque()
        self._held = 0  # items, ends not counted
        self._going = False  # a round has begun and not ended
        self._dropping = False
        self._reading = False
        self._writers: list[Future[None]] = []
        self._readers: list[Future[None]] = []

    def begin(self) -> None:
        """Begin a round, or let one more run into it."""
        with self._lock:
            self._going, self._dropping = True, False

    def put(self, item: T) -> None:
        """Hand over an item; wait while the buffer is full.

        Raises:
            AlignerError: it stayed full for the whole timeout.
        """
        while (room := self._offer(item)) is not None:
            try:
                room.result(self._timeout)
            except TimeoutError as error:
                raise self._stuck() from error

    async def aput(self, item: T) -> None:
        """Hand over an item as `put` does, without blocking the event loop."""
        while (room := self._offer(item)) is not None:
            try:
                await asyncio.wait_for(asyncio.wrap_future(room), self._timeout)
            except TimeoutError as error:
                raise self._stuck() from error

    def end(self, error: BaseException | None = None) -> None:
        """End the round: iteration stops here, or raises `error`."""
        with self._lock:
            self._going = False
            if self._dropping:
                self._dropping = False
            else:
                self._items.append(_End(error))
            _wake(self._readers)

    def __iter__(self) -> Iterator[T]:
        ended = False
        self._start_reading()
        try:
            while True:
                got = self._take()
                if isinstance(got, Future):
                    got.result()
                elif isinstance(got, _End):
                    ended = True
                    if got.error is not None:
                        raise got.error
                    return
                else:
                    yield got
        finally:
            self._stop_reading(ended)

    async def __aiter__(self) -> AsyncIterator[T]:
        ended = False
        self._start_reading()
        try:
            while True:
                got = self._take()
                if isinstance(got, Future):
                    await asyncio.wrap_future(got)
                elif isinstance(got, _End):
                    ended = True
                    if got.error is not None:
                        raise got.error
                    return
                else:
                    yield got
        finally:
            self._stop_reading(ended)

    def _offer(self, item: T) -> Future[None] | None:
        """Take `item`, or return what to wait for first."""
        with self._lock:
            if self._dropping:
                return None
            if self._held >= self._size:
                return _waiting(self._writers)
            self._items.append(item)
            self._held += 1
            _wake(self._readers)
            return None

    def _take(self) -> T | _End | Future[None]:
        """Return what is next, or what to wait for."""
        with self._lock:
            if not self._items:
                return _waiting(self._readers)
            got = self._items.popleft()
            if not isinstance(got, _End):
                self._held -= 1
                _wake(self._writers)
            return got

    def _start_reading(self) -> None:
        with self._lock:
            if self._reading:
                raise AlignerError(
                    "somebody iterates over this handler already; use one handler for each reader"
                )
            self._reading, self._dropping = True, False

    def _stop_reading(self, ended: bool) -> None:
        """Let go; a reader that stopped early drops what is left of this round."""
        with self._lock:
            self._reading = False
            while not ended and self._items:
                ended = isinstance(self._items.popleft(), _End)
                self._held -= not ended
            self._dropping = not ended and self._going
            _wake(self._writers)

    def _stuck(self) -> AlignerError:
        return AlignerError(
            f"the buffer has been full ({self._size} segments) for {self._timeout} s and nobody reads it: "
            "iterate over the handler in another thread or task, or give it a sink="
        )


def _waiting(queue: list[Future[None]]) -> Future[None]:
    future: Future[None] = Future()
    queue.append(future)
    return future


def _wake(queue: list[Future[None]]) -> None:
    for future in queue:
        try:
            future.set_result(None)
        except InvalidStateError:  # whoever waited was cancelled
            continue
    queue.clear()
