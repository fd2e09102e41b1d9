"""The seam between decoding and whatever runs the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

Ids: TypeAlias = list[int]
Logits: TypeAlias = npt.NDArray[np.float32]


class KVCache(Protocol):
    """Keys and values of one sequence. Belongs to one stream; never shared between threads."""

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        ...

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...


class Backend(Protocol):
    """Runs the network. One instance serves any number of threads; all state is in the cache."""

    @property
    def name(self) -> str:
        """`"onnx"`, `"torch"`, ..."""
        ...

    @property
    def provider(self) -> str:
        """The execution provider that runs, as found after loading."""
        ...

    def make_cache(self) -> KVCache:
        """Return an empty cache."""
        ...

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        """Run `ids` after what the cache holds, append them to it, and return logits.

        Returns logits of shape (last, vocabulary), float32, for the last `last` of `ids`.
        """
        ...


class CacheLostError(Exception):
    """What held a cache is gone, and the backend goes on without it: begin anew, with a new cache."""


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence's part of a forward: `ids` go after what `cache` holds; the last `last` are scored.

    A backend that runs a row bit by bit calls `check` in between; it raises once nobody waits any more.
    """

    ids: Ids
    cache: KVCache
    last: int
    check: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """What decoding asks about the last `last` places of a row, in as few numbers as it can do with.

    `best` holds the id with the best logit at each place (the lowest id among equals), `best_logits` its
    logit, and `next_logits` the logit of the id that was run after the place; all three are of length
    `last`, the last of `next_logits` has no meaning. `row(place)` returns all logits of one place, shape
    (vocabulary,), float32, which on an accelerator have to be fetched first.
    """

    best: Ids
    best_logits: list[float]
    next_logits: list[float]
    row: Callable[[int], Logits]

    @classmethod
    def of(cls, logits: Logits, ids: Ids) -> Scores:
        """Return the scores of `logits`, of shape (last, vocabulary), for the end of `ids`."""
        last = len(logits)
        places = np.arange(last)
        best = logits.argmax(axis=1)
        following = np.array([*ids[len(ids) - last + 1 :], 0])
        return cls(
            best=best.tolist(),
            best_logits=logits[places, best].tolist(),
            next_logits=logits[places, following].tolist(),
            row=logits.__getitem__,
        )


@runtime_checkable
class Batching(Backend, Protocol):
    """A backend that runs many sequences in one forward, or sends back less than all logits."""

    @property
    def batches(self) -> bool:
        """Whether rows share a forward; otherwise `score` runs one after the other."""
        ...

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        """Run all rows, append each row's ids to its cache, and return the scores of each, in order.

        Rows may differ in the lengths of ids, cache and `last`. When it raises, what the caches hold is
        not to be relied on.
        """
        ...


@runtime_checkable
class SideBySide(Backend, Protocol):
    """A backend for which many texts side by side are faster than one after the other."""

    def for_batches(self) -> tuple[Backend, int]:
        """Return the backend to run a batch of texts on, and by how many threads at a time.

        It takes caches of this one, and this one takes its.
        """
        ...
