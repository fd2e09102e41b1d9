"""A decoder's graph in an ONNX Runtime session, and the caches of sequences that run through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import _pybind_state as native

from aligner_integrations.backends.base import Ids, Logits, Scores
from aligner_integrations.errors import ModelLoadError

Array: TypeAlias = npt.NDArray[Any]
Value: TypeAlias = Any  # ort.OrtValue; onnxruntime ships no types

# In a graph's metadata: it may write its keys and values into the buffers that it is given.
SHARED_CACHE = "aligner.shared_cache"
LOGITS_FROM = "logits_from"  # an optional input: the first place whose logits are made
SCORES = ("best_ids", "best_logits", "next_logits")  # optional outputs, of shape (batch, kept places)
_LEAST_ROOM = 256  # tokens; a buffer that is too small is doubled
_DEAD_PLACES = 1024  # on an accelerator, so many masked places are worth less than copying them away
_FLOAT_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


@dataclass(frozen=True, slots=True)
class Output:
    """What one forward gave for its kept places; `logits` is fetched only when it is looked at."""

    logits: Value  # (batch, kept, vocabulary)
    kept: int
    scores: tuple[Array, Array, Array] | None  # best ids, best logits, next logits: (batch, kept) each

    def rows(self, row: int, start: int, stop: int) -> Logits:
        """Return the logits of one row's kept places from `start` to `stop`."""
        # A copy: what `numpy` gives lives no longer than the value.
        return cast(Logits, self.logits.numpy()[row, start:stop].astype(np.float32))

    def of(self, row: int, start: int, stop: int, ids: Ids) -> Scores:
        """Return the scores of one row's kept places from `start` to `stop`, the end of `ids`."""
        if self.scores is None:
            return Scores.of(self.rows(row, start, stop), ids)
        best, best_logits, next_logits = (part[row, start:stop].tolist() for part in self.scores)
        return Scores(
            best, best_logits, next_logits, lambda at: self.rows(row, start + at, start + at + 1)[0]
        )


class DecoderGraph:
    """A session's graph: what it takes, what it gives, and one forward through it."""

    def __init__(
        self, session: ort.InferenceSession, *, device: str = "cpu", head_size: int | None = None
    ) -> None:
        self._session = session
        self.device = device
        self.lost = False  # whether its provider has failed; then nothing on its device is to be used
        inputs = {node.name: node for node in session.get_inputs()}
        outputs = {node.name: node for node in session.get_outputs()}
        self.past = [name for name in inputs if name.startswith("past_key_values.")]
        self.present = [name.replace("past_key_values.", "present.") for name in self.past]
        missing = ({"input_ids", "logits", *self.present} - inputs.keys()) - outputs.keys()
        if missing or not self.past:
            raise ModelLoadError(
                f"model.onnx is no decoder with a cache: it lacks {sorted(missing) or 'past_key_values.*'}; "
                "export it with the task text-generation-with-past"
            )
        self._shapes = [_cache_shape(inputs[name], head_size) for name in self.past]
        self._floats = _FLOAT_TYPES.get(outputs["logits"].type, np.float32)
        self.masked = {"attention_mask", "position_ids"} <= inputs.keys()
        self._takes = inputs.keys()
        self._narrow = LOGITS_FROM in {node.name for node in session.get_overridable_initializers()}
        self._scored = self._narrow and set(SCORES) <= outputs.keys()
        self.shared = SHARED_CACHE in session.get_modelmeta().custom_metadata_map
        self.vocab_size = self._find_vocab_size(outputs["logits"].shape[-1])

    def _find_vocab_size(self, said: Any) -> int:
        if isinstance(said, int):
            return said
        one = {"input_ids": 0, "attention_mask": 1, "position_ids": 0}
        feeds = {name: np.full((1, 1), value) for name, value in one.items() if name in self._takes}
        empty = (np.zeros((1, heads, 0, size), dtype=kind) for heads, size, kind in self._shapes)
        logits = self._session.run(["logits"], feeds | dict(zip(self.past, empty, strict=True)))[0]
        return int(logits.shape[-1])

    def make_buffers(self, batch: int, room: int) -> list[Value]:
        """Return keys and values to be written, of shape (batch, heads, room, head size), on the device."""
        return [
            ort.OrtValue.ortvalue_from_shape_and_type((batch, heads, room, size), kind, self.device, 0)
            for heads, size, kind in self._shapes
        ]

    def widen(self, values: Sequence[Value], length: int, room: int) -> list[Value]:
        """Return buffers with `room` places; the first `length` are those of `values`, the rest zeros."""
        wide = [np.zeros((1, heads, room, size), dtype=kind) for heads, size, kind in self._shapes]
        for array, value in zip(wide, values, strict=bool(values)):
            array[:, :, :length] = value.numpy()[:, :, :length]
        return [self.put(array) for array in wide]

    def put(self, array: Array) -> Value:
        """Return the array where the graph runs; on the CPU it is not copied."""
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def run(
        self,
        ids: Array,
        past: Sequence[Value],
        present: Sequence[Value],
        *,
        total: int,
        first: int = 0,
        mask: Array | None = None,
        positions: Array | None = None,
    ) -> Output:
        """Run `ids`, of shape (batch, length), after `past`; write keys and values into `present`.

        Args:
            ids: the ids of each row.
            past: keys and values of what was run before.
            present: buffers for all keys and values; `past` itself where the graph shares buffers.
            total: how many places there are with this input, dead ones included.
            first: the place of `ids` from which on scores are wanted.
            mask: 1 for a living place and 0 for a dead one, of shape (batch, total); all live without it.
            positions: of shape (batch, length); the places from `total - length` on without it.
        """
        batch, length = ids.shape
        arrays: dict[str, Array] = {"input_ids": ids}
        if "attention_mask" in self._takes:
            arrays["attention_mask"] = np.ones((batch, total), dtype=np.int64) if mask is None else mask
        if "position_ids" in self._takes:
            plain = np.arange(total - length, total, dtype=np.int64)[None]
            arrays["position_ids"] = plain if positions is None else positions
        if self._narrow:
            arrays[LOGITS_FROM] = np.array([first], dtype=np.int64)
        kept = length - first if self._narrow else length
        feeds = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        fetches = dict(zip(self.present, present, strict=True))
        return self._run(feeds | dict(zip(self.past, past, strict=True)), fetches, batch, kept)

    def _run(self, feeds: dict[str, Value], fetches: dict[str, Value], batch: int, kept: int) -> Output:
        scores: tuple[Array, ...] = ()
        if self._scored:
            scores = tuple(np.empty((batch, kept), dtype=kind) for kind in (np.int64, np.float32, np.float32))
            fetches |= zip(SCORES, map(ort.OrtValue.ortvalue_from_numpy, scores), strict=True)
        shape = (batch, kept, self.vocab_size)
        # Many rows of logits stay on the device until somebody looks at them, and mostly nobody does.
        logits = ort.OrtValue.ortvalue_from_shape_and_type(shape, self._floats, self.device, 0)
        fetches["logits"] = logits
        given, taken = native.OrtValueVector(), native.OrtValueVector()
        for value in feeds.values():
            given.push_back(value._get_c_value())
        for value in fetches.values():
            taken.push_back(value._get_c_value())
        where = [native.OrtDevice(*_place(value)) for value in fetches.values()]
        # Not an IOBinding: that does not know inputs with a default.
        self._session.run_with_ortvaluevector(
            ort.RunOptions(), list(feeds), given, list(fetches), taken, where
        )
        return Output(logits, kept, cast(tuple[Array, Array, Array], scores) if scores else None)


def _place(value: Value) -> tuple[Any, Any, int]:
    kinds = {"cpu": native.OrtDevice.cpu, "cuda": native.OrtDevice.cuda}
    return kinds[value.device_name().lower()](), native.OrtDevice.default_memory(), 0


def _cache_shape(node: Any, head_size: int | None) -> tuple[int, int, type[np.generic]]:
    _, heads, _, size = node.shape if len(node.shape) == 4 else (None,) * 4
    size = head_size if isinstance(size, str) and head_size else size
    if not (isinstance(heads, int) and isinstance(size, int)) or node.type not in _FLOAT_TYPES:
        raise ModelLoadError(
            f"model.onnx: {node.name} has shape {node.shape} and type {node.type}; "
            "needed is (batch, heads, length, head size) with fixed heads and head size, float or float16"
        )
    return heads, size, _FLOAT_TYPES[node.type]


class OnnxCache(Protocol):
    """Keys and values of one sequence, and how a forward goes on from them."""

    @property
    def lost(self) -> bool:
        """Whether what it holds is on a device that has failed."""
        ...

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        ...

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...

    def run(self, graph: DecoderGraph, ids: Ids, *, last: int, width: int) -> tuple[Output, int]:
        """Run `ids`, padded to `width` places, and hold them; also return where the scores of the end begin.

        `graph` is the one that the cache was made for, or the same in another session. The scores of the
        last `last` of `ids` begin at that one of the output's kept places.
        """
        ...


class SharedCache:
    """Buffers with room to spare, into which the graph writes.

    A forward copies nothing that was there before it, and a trim only notes the length.
    """

    def __init__(self, graph: DecoderGraph) -> None:
        self._graph = graph
        self._buffers: list[Value] = []  # (1, heads, room, head size) each
        self._room = 0
        self._length = 0

    @property
    def lost(self) -> bool:
        """Whether what it holds is on a device that has failed."""
        return self._graph.lost

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return self._length

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        check_trim(length, self._length)
        self._length = length

    def run(self, graph: DecoderGraph, ids: Ids, *, last: int, width: int) -> tuple[Output, int]:
        """Run `ids` in place; padding gains nothing here, so `width` is not read."""
        end = self._length + len(ids)
        self._make_room(end)
        first = len(ids) - last
        output = graph.run(
            np.array([ids], dtype=np.int64), self._buffers, self._buffers, total=end, first=first
        )
        self._length = end
        return output, output.kept - last

    def _make_room(self, end: int) -> None:
        if end <= self._room:
            return
        self._room = max(end, 2 * self._room, _LEAST_ROOM)
        self._buffers = self._graph.widen(self._buffers, self._length, self._room)


class GrowingCache:
    """Keys and values as the graph returns them, longer with each forward.

    With `gaps` tokens that were trimmed away stay as dead places, masked for good: on an accelerator a copy
    would cost more. Without, they are cut off, which keeps attention short.
    """

    def __init__(self, graph: DecoderGraph, *, gaps: bool = False) -> None:
        self._graph = graph
        self._values = graph.make_buffers(1, 0)
        self._alive = np.zeros(0, dtype=np.int64)  # 1 for each place that holds a token of the sequence
        self._dead_places = _DEAD_PLACES if gaps and graph.masked else 0

    @property
    def lost(self) -> bool:
        """Whether what it holds is on a device that has failed."""
        return self._graph.lost

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return int(self._alive.sum())

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        check_trim(length, self.length)
        self._alive[np.flatnonzero(self._alive)[length:]] = 0

    def run(self, graph: DecoderGraph, ids: Ids, *, last: int, width: int) -> tuple[Output, int]:
        """Run `ids` and hold them; up to `width` the input is filled with places that are dead at once."""
        if len(self._alive) - self.length > self._dead_places:
            self.hold(self.take())
        width = width if self._graph.masked else len(ids)
        input_ids = np.zeros((1, width), dtype=np.int64)
        input_ids[0, : len(ids)] = ids
        alive = np.concatenate((self._alive, np.arange(width, dtype=np.int64) < len(ids))).astype(np.int64)
        present = self._graph.make_buffers(1, len(alive))
        first = len(ids) - last
        output = graph.run(
            input_ids,
            self._values,
            present,
            total=len(alive),
            first=first,
            mask=alive[None],
            positions=np.arange(self.length, self.length + width, dtype=np.int64)[None],
        )
        self._values, self._alive = present, alive
        return output, output.kept - (width - first)

    def take(self) -> list[Array]:
        """Return keys and values of the living places, each (1, heads, length, head size)."""
        places = np.flatnonzero(self._alive)
        if len(places) and places[-1] == len(places) - 1:  # nothing dead in between: a view will do
            return [value.numpy()[:, :, : len(places)] for value in self._values]
        return [value.numpy()[:, :, places] for value in self._values]

    def hold(self, arrays: Sequence[Array]) -> None:
        """Hold these keys and values, each (1, heads, length, head size), in place of all others."""
        # Copies: what `take` gives lives no longer than the values it was taken from.
        self._values = [self._graph.put(array.copy()) for array in arrays]
        self._alive = np.ones(arrays[0].shape[2], dtype=np.int64)


def check_trim(length: int, held: int) -> None:
    """Raise a `ValueError` unless a cache of `held` tokens can be trimmed to `length`."""
    if not 0 <= length <= held:
        raise ValueError(f"length must be from 0 to {held}, got {length}")
