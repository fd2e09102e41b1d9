"""The seam between decoding and whatever runs the network."""

from __future__ import annotations

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


@runtime_checkable
class SideBySide(Backend, Protocol):
    """A backend for which many texts side by side are faster than one after the other."""

    def for_batches(self) -> tuple[Backend, int]:
        """Return the backend to run a batch of texts on, and by how many threads at a time."""
        ...
