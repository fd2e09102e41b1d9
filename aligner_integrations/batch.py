"""Many finished answers at a time: the same as one by one, in the same order, but faster."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy

from aligner_integrations.aligner import Aligner, check_texts
from aligner_integrations.backends.base import Backend, Batching, Ids, Scores, SideBySide
from aligner_integrations.backends.gathering import Gathering, Lanes, together
from aligner_integrations.correction import Correction
from aligner_integrations.decode import PromptCache
from aligner_integrations.finished import correct_finished
from aligner_integrations.resilience import ErrorPolicy

_ROWS = 16  # texts under way at a time where they share forwards; each is a thread
# A row's forward waits for the others so long at most. They come as soon as they have read their scores, so
# it is not reached unless a thread hangs.
_WAIT_MS = 50.0


def correct_batch(
    aligner: Aligner,
    pairs: Sequence[tuple[str, str]],
    *,
    feedback: str,
    errors: ErrorPolicy,
) -> list[Correction]:
    """Correct (question, answer) pairs; see `Aligner.correct_batch`."""
    _check_pairs(pairs)
    check_texts(feedback=feedback)
    batch = _Batch(aligner, pairs, feedback, errors)
    backend, workers = _arrange(aligner) if len(pairs) > 1 else (aligner.backend, 1)
    workers = min(workers, len(pairs))
    if workers > 1:
        batch.run(backend, workers)
    else:
        batch.work(backend)
    if batch.failure is not None:
        raise batch.failure
    return [batch.done[index] for index in range(len(pairs))]


def shared(aligner: Aligner) -> Aligner:
    """Return the aligner for corrections in many threads: they share forwards, or else have a core each."""
    same = copy(aligner)
    same.backend = together(aligner.backend, wait_ms=_WAIT_MS, max_tokens=aligner.max_batch_tokens)
    return same


def _arrange(aligner: Aligner) -> tuple[Backend, int]:
    """Return the backend to run a batch on, and by how many threads at a time."""
    backend = aligner.backend
    if isinstance(backend, Lanes):
        backend = backend.inner
    if isinstance(backend, SideBySide) and not (isinstance(backend, Batching) and backend.batches):
        return backend.for_batches()
    backend = together(backend, wait_ms=_WAIT_MS, max_tokens=aligner.max_batch_tokens)
    return backend, _ROWS if isinstance(backend, Gathering) else 1


class _Batch:
    """The pairs of one batch and how far they are; shared by its workers."""

    def __init__(
        self, aligner: Aligner, pairs: Sequence[tuple[str, str]], feedback: str, errors: ErrorPolicy
    ) -> None:
        self._aligner = aligner
        self._pairs = list(pairs)
        self._feedback = feedback
        self._errors = errors
        first: dict[str, int] = {}
        for index, (question, _) in enumerate(pairs):
            first.setdefault(question, index)
        # The texts of a question follow each other, so that a worker's cache holds the question already;
        # the longest come first, so that no worker is left with one when the others are done.
        order = sorted(range(len(pairs)), key=lambda index: (first[pairs[index][0]], -len(pairs[index][1])))
        self._waiting = iter(order)
        self._lock = threading.Lock()
        self.end = len(pairs)  # pairs from here on are not wanted, or not any more
        self.done: dict[int, Correction] = {}
        self.failure: Exception | None = None

    def run(self, backend: Backend, workers: int) -> None:
        """Have so many threads work; when this returns or raises, none of them is left."""
        pool = ThreadPoolExecutor(workers, thread_name_prefix="aligner-batch")
        try:
            for worker in [pool.submit(self.work, backend) for _ in range(workers)]:
                worker.result()
        finally:
            self.end = 0  # of use when the wait was interrupted
            pool.shutdown()

    def work(self, backend: Backend) -> None:
        """Correct pairs until none is left."""
        cache = _WorkerCache(backend, self)
        while (index := self._next()) is not None:
            cache.index = index
            question, answer = self._pairs[index]
            try:
                self.done[index] = correct_finished(
                    self._aligner,
                    question,
                    answer,
                    feedback=self._feedback,
                    errors=self._errors,
                    cache=cache,
                )
            except _NotWantedError:
                continue
            except Exception as error:  # raised by who asked for the batch, if no earlier pair fails
                self._fail(index, error)

    def _next(self) -> int | None:
        with self._lock:
            return next((index for index in self._waiting if index < self.end), None)

    def _fail(self, index: int, error: Exception) -> None:
        with self._lock:
            if index < self.end:
                self.end, self.failure = index, error


class _NotWantedError(BaseException):
    """Ends the correction of a pair that is not wanted any more; no error of the model's."""


class _WorkerCache(PromptCache):
    """The cache of one worker, kept from text to text; it runs nothing for a pair that is not wanted."""

    def __init__(self, backend: Backend, batch: _Batch) -> None:
        super().__init__(backend)
        self._batch = batch
        self.index = 0  # the pair under way

    def forward(self, ids: Ids, *, last: int) -> Scores:
        if self.index >= self._batch.end:
            raise _NotWantedError
        return super().forward(ids, last=last)


def _check_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    if not isinstance(pairs, Sequence):
        raise TypeError(f"pairs must be a sequence of (question, answer), got {type(pairs).__name__}")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"pairs[{index}] must be a (question, answer) pair, got {type(pair).__name__}")
        check_texts(**{f"pairs[{index}][0]": pair[0], f"pairs[{index}][1]": pair[1]})
