"""Forwards of many threads: gathered into one, or side by side on a core each.

Each correction decodes in its own thread, as it always does, with its own cache. Where its forwards meet
those of others, they go through the model together: rows of a batch that have finished leave it, others
join, and no decoding knows of any other.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic

from aligner_integrations.backends.base import (
    Backend,
    Batching,
    Ids,
    KVCache,
    Logits,
    Row,
    Scores,
    SideBySide,
)

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Request:
    """The rows that one thread wants run, and what came of them."""

    rows: Sequence[Row]
    until: float  # when it no longer waits for company
    scores: list[Scores] | None = None
    error: BaseException | None = None
    taken: bool = False
    left: bool = False  # its thread waits no longer

    @property
    def done(self) -> bool:
        return self.scores is not None or self.error is not None

    @property
    def longest(self) -> int:
        return max(row.cache.length + len(row.ids) for row in self.rows)


@dataclass(slots=True)
class _Round:
    """What is waiting, and who may still come; guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[_Request] = field(default_factory=deque)
    members: int = 0
    running: bool = False


class Gathering:
    """A backend around another: forwards that are due at the same time run as one.

    A forward waits for company until every member waits too, and at most `wait` seconds. So a single
    member never waits.

    Args:
        inner: runs the rows.
        wait: seconds; the most that a forward waits for others.
        max_tokens: places of one forward, padding and what the caches hold included; more rows than fit
            run in several. A row that is longer runs alone.
    """

    batches = True

    def __init__(self, inner: Batching, *, wait: float, max_tokens: int) -> None:
        self.inner = inner
        self._wait = wait
        self._max_tokens = max_tokens
        self._round = _Round()

    @property
    def name(self) -> str:
        """The inner backend's name."""
        return self.inner.name

    @property
    def provider(self) -> str:
        """The inner backend's provider."""
        return self.inner.provider

    def make_cache(self) -> KVCache:
        """Return an empty cache of the inner backend."""
        return self.inner.make_cache()

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        """Run `ids` at once, without company; logits of shape (last, vocabulary)."""
        return self.inner.forward(ids, cache, last=last)

    @contextmanager
    def taking_part(self) -> Iterator[None]:
        """Be a member: one whose next forward the others may wait for."""
        with self._round.changed:
            self._round.members += 1
        try:
            yield
        finally:
            with self._round.changed:
                self._round.members -= 1
                self._round.changed.notify_all()

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        """Run the rows with those of other threads; see `Batching.score`."""
        request = _Request(rows, monotonic() + self._wait)
        round_ = self._round
        try:
            while not request.done:
                with round_.changed:
                    if not request.taken and request not in round_.waiting:
                        round_.waiting.append(request)
                        round_.changed.notify_all()
                    batch = self._next_batch(request)
                if batch:
                    self._run(batch)
        finally:
            with round_.changed:
                request.left = True
                if request in round_.waiting:  # interrupted
                    round_.waiting.remove(request)
        if request.error is not None:
            raise request.error
        assert request.scores is not None
        return request.scores

    def _next_batch(self, request: _Request) -> list[_Request]:
        """Wait until `request` is done, or until its thread is the one to run; return what to run."""
        round_ = self._round
        while not request.done:
            now = monotonic()
            first = round_.waiting[0].until if round_.waiting else now
            due = len(round_.waiting) >= round_.members or now >= first
            if not round_.running and round_.waiting and due:
                round_.running = True
                return self._take()
            round_.changed.wait(None if round_.running else max(first - now, 0.0))
        return []

    def _take(self) -> list[_Request]:
        """Take as many of the waiting as fit one forward, the oldest first."""
        batch = [self._round.waiting.popleft()]
        while self._round.waiting:
            wider = [*batch, self._round.waiting[0]]
            places = sum(len(each.rows) for each in wider) * max(each.longest for each in wider)
            if places > self._max_tokens:
                break
            batch.append(self._round.waiting.popleft())
        for each in batch:
            each.taken = True
        return batch

    def _run(self, batch: list[_Request]) -> None:
        error = RuntimeError("a forward that was shared with another thread was interrupted")
        found: list[list[Scores] | Exception] = []
        try:
            self._score_all(batch, found)
        finally:
            with self._round.changed:
                self._round.running = False
                for each, given in itertools.zip_longest(batch, found, fillvalue=error):
                    assert isinstance(each, _Request)
                    if isinstance(given, list):
                        each.scores = given
                    else:
                        each.error = given
                self._round.changed.notify_all()

    def _score_all(self, batch: list[_Request], found: list[list[Scores] | Exception]) -> None:
        """Append to `found` what comes of each request: run together, or alone where together fails."""
        lengths = [[row.cache.length for row in each.rows] for each in batch]
        try:
            scores = iter(self.inner.score([row for each in batch for row in each.rows]))
        except Exception as error:
            if len(batch) == 1:
                found.append(error)
                return
            logger.debug("a forward of %d rows failed with %s", len(batch), type(error).__name__)
        else:
            found += [[next(scores) for _ in each.rows] for each in batch]
            return
        # Together they may be too much for the memory, or one of them may be what fails.
        for each, held in zip(batch, lengths, strict=True):
            try:
                for row, length in zip(each.rows, held, strict=True):
                    row.cache.trim(length)
                found.append(self.inner.score(each.rows))
            except Exception as error:
                found.append(error)


class Lanes:
    """A backend around another: forwards that are due at the same time run side by side, a core each.

    For models whose rows cannot share a forward. While one thread alone is at work, its forwards have all
    cores.
    """

    batches = False

    def __init__(self, inner: SideBySide) -> None:
        self.inner = inner
        self._one_core, lanes = inner.for_batches()
        self._free = threading.Semaphore(lanes)
        self._members = 0
        self._count = threading.Lock()

    @property
    def name(self) -> str:
        """The inner backend's name."""
        return self.inner.name

    @property
    def provider(self) -> str:
        """The inner backend's provider."""
        return self.inner.provider

    def make_cache(self) -> KVCache:
        """Return an empty cache of the inner backend."""
        return self.inner.make_cache()

    @contextmanager
    def taking_part(self) -> Iterator[None]:
        """Be one of those at work."""
        with self._count:
            self._members += 1
        try:
            yield
        finally:
            with self._count:
                self._members -= 1

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        """Run `ids` as soon as a core is free; logits of shape (last, vocabulary)."""
        with self._free:
            return self._chosen().forward(ids, cache, last=last)

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        """Run the rows, one after the other, as soon as a core is free."""
        with self._free:
            backend = self._chosen()
            if isinstance(backend, Batching):
                return backend.score(rows)
            return [Scores.of(backend.forward(row.ids, row.cache, last=row.last), row.ids) for row in rows]

    def _chosen(self) -> Backend:
        return self._one_core if self._members > 1 else self.inner


def together(backend: Backend, *, wait_ms: float, max_tokens: int) -> Backend:
    """Return `backend` so that threads share it best: one forward for all, or else one core for each.

    A forward waits up to `wait_ms` milliseconds for company. What cannot be shared is returned as it is.
    """
    if isinstance(backend, Gathering | Lanes):
        return backend
    if isinstance(backend, Batching) and backend.batches:
        return Gathering(backend, wait=wait_ms / 1000, max_tokens=max_tokens)
    if isinstance(backend, SideBySide) and backend.for_batches()[1] > 1:
        return Lanes(backend)
    return backend


def micro_batched(backend: Backend, *, wait_ms: float, max_tokens: int) -> Backend:
    """Return `backend` for streams in many threads, see `together`; with a `wait_ms` of 0 as it is."""
    if wait_ms <= 0:
        return backend
    shared = together(backend, wait_ms=wait_ms, max_tokens=max_tokens)
    if not isinstance(shared, Gathering | Lanes):
        logger.warning(
            "micro_batch_ms=%g was asked for, but this model's rows cannot share a forward on backend %r and "
            "it is too large to run side by side; export it with --attention plain, or use the torch backend",
            wait_ms,
            backend.name,
        )
    return shared


__all__ = ["Gathering", "Lanes", "micro_batched", "together"]
