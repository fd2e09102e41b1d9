"""Run a model folder's `model.onnx` with ONNX Runtime."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from aligner_integrations.backends.base import CacheLostError, Ids, KVCache, Logits, Row, Scores
from aligner_integrations.backends.providers import FULL_NAMES, bucket
from aligner_integrations.errors import (
    AlignerError,
    MissingDependencyError,
    ModelLoadError,
    ProviderUnavailableError,
)

try:
    import onnxruntime as ort
    from onnxruntime.capi import _pybind_state as native
except ModuleNotFoundError as error:
    # A broken install fails on a module of its own: that error must reach the user unchanged.
    if error.name != "onnxruntime":
        raise
    raise MissingDependencyError(
        "backend 'onnx' needs onnxruntime, which is not installed; run "
        '`pip install "aligner-integrations[onnx]"` (CPU) or '
        '`pip install "aligner-integrations[onnx-gpu]"` (CUDA, TensorRT), never both',
        name="onnxruntime",
    ) from error

# These load onnxruntime, so they come after the word about a missing one.
from aligner_integrations.backends.onnx_graph import (
    SHARED_CACHE,
    DecoderGraph,
    GrowingCache,
    OnnxCache,
    Output,
    SharedCache,
)
from aligner_integrations.backends.session import available_cores, open_session, rungs_below

logger = logging.getLogger(__name__)

# Up to here, in bytes, a forward leaves cores idle and the weights may be held twice; above, neither holds.
_SMALL_MODEL = 256 * 2**20
# Tokens that go through the graph at a time. Attention written out takes heads x block x all places, and a
# block of this length keeps both cores and an accelerator busy.
_BLOCK = 512
# What another provider could not do either.
_ABOUT_THE_INPUT = (ValueError, TypeError, native.InvalidArgument)
# On the CPU a row of more ids than this keeps it busy alone, and padding it to the longest costs time.
_FEW = 16


class OnnxBackend:
    """One ONNX Runtime session; shared by threads, because all state is in the caches."""

    name = "onnx"

    def __init__(
        self,
        session: ort.InferenceSession,
        *,
        provider: str,
        file: Path | None = None,
        threads: int | None = None,
        provider_options: dict[str, Any] | None = None,
        rungs: Sequence[str] = (),
    ) -> None:
        """Take a session; `rungs` are the providers to fall to, in order, when this one fails in mid-run."""
        self._file = file
        self._stamp = _stamp(file)
        self._threads = threads
        self._provider_options = provider_options
        self._rungs = list(rungs)
        self._is_sliding = _slides(file)
        self._one_thread: OnnxBackend | None = None
        self._loading = threading.Lock()
        self._session = session
        self._graph = self._graph_of(session, provider)
        self.provider = provider
        self.vocab_size = self._graph.vocab_size

    def _graph_of(self, session: ort.InferenceSession, provider: str) -> DecoderGraph:
        device = "cpu" if provider == FULL_NAMES["cpu"] else "cuda"
        return DecoderGraph(session, device=device, head_size=_said_head_size(self._file))

    @property
    def _gaps(self) -> bool:
        # A sliding window counts places, so those of a model that has one must all be alive.
        return self._graph.device != "cpu" and not self._is_sliding

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        provider: str = "auto",
        threads: int | None = None,
        provider_options: dict[str, Any] | None = None,
    ) -> OnnxBackend:
        """Load `folder/model.onnx` (weights beside it are found by themselves).

        Args:
            folder: the model folder.
            provider: `"auto"`, `"tensorrt"`, `"cuda"` or `"cpu"`. `"auto"` takes the first that
                really loads, and the next one when that fails in mid-run; a name asks for that one
                and no other.
            threads: threads inside one forward; `None` takes the physical cores of this process.
            provider_options: handed verbatim to ONNX Runtime for an accelerator.

        Raises:
            ModelLoadError: the file is missing, damaged, or not a decoder with a cache.
            ProviderUnavailableError: the provider asked for did not load.
            ValueError: `provider` is unknown.
        """
        path = Path(folder) / "model.onnx"
        session, found = open_session(
            path, provider=provider, threads=threads, provider_options=provider_options
        )
        return cls(
            session,
            provider=found,
            file=path,
            threads=threads,
            provider_options=provider_options,
            rungs=rungs_below(found) if provider == "auto" else (),
        )

    def for_batches(self) -> tuple[OnnxBackend, int]:
        """Return the backend to run a batch of texts on, and by how many threads at a time.

        A second core makes a small model's forward little faster, a second text fills it: on the CPU
        that is a session of one thread for each forward, made at the first call, and a text for each core.
        """
        workers = self._threads or available_cores()
        size = sum(size for size, _ in self._stamp)
        if workers == 1 or self.provider != FULL_NAMES["cpu"] or not 0 < size <= _SMALL_MODEL:
            return self, 1
        with self._loading:
            if self._one_thread is None:
                if _stamp(self._file) != self._stamp:  # it would be another model
                    return self, 1
                assert self._file is not None
                self._one_thread = OnnxBackend.load(self._file.parent, provider="cpu", threads=1)
        return self._one_thread, workers

    def make_cache(self) -> OnnxCache:
        """Return an empty cache."""
        return SharedCache(self._graph) if self._graph.shared else GrowingCache(self._graph, gaps=self._gaps)

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        """Run `ids` after what `cache` holds; logits of shape (last, vocabulary) for the end of `ids`."""
        row = Row(ids, cache, last)
        _check_last(row)
        parts = self._advance(row)
        return np.concatenate([part.output.rows(0, part.start, part.stop) for part in parts])

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        """Run all rows and return the scores of each.

        Rows go through the graph together where that is faster, and where it can mask what pads them: ONNX
        Runtime's fused attention cannot, behind a cache.
        """
        for row in rows:
            _check_last(row)
        joined = [at for at, row in enumerate(rows) if self._gains_by_company(row)]
        found: dict[int, Scores] = {}
        if len(joined) > 1:
            found = dict(zip(joined, self._advance_together([rows[at] for at in joined]), strict=True))
        return [
            found[at] if at in found else _joined(self._advance(row), row.ids) for at, row in enumerate(rows)
        ]

    def _gains_by_company(self, row: Row) -> bool:
        return self.batches and (self.provider != FULL_NAMES["cpu"] or len(row.ids) <= _FEW)

    @property
    def batches(self) -> bool:
        """Whether rows can share a forward."""
        return self._graph.masked and not self._graph.shared

    def _advance(self, row: Row) -> list[_Part]:
        """Run one row block by block; return the parts that hold its wanted places.

        Raises:
            CacheLostError: the provider has failed, and the next one runs from now on.
        """
        graph = self._graph
        _check_found(row)
        try:
            return self._advance_on(graph, row)
        except (*_ABOUT_THE_INPUT, AlignerError):
            raise
        except Exception as error:  # ORT's own classes share no public base
            if self._fall_from(graph, error):
                raise CacheLostError from error
            raise

    def _fall_from(self, graph: DecoderGraph, error: Exception) -> bool:
        """Go on with the next provider that loads, unless a thread has done so; False if there is none."""
        with self._loading:
            while self._graph is graph and self._rungs and _stamp(self._file) == self._stamp:
                assert self._file is not None
                try:
                    session, found = open_session(
                        self._file,
                        provider=self._rungs.pop(0),
                        threads=self._threads,
                        provider_options=self._provider_options,
                    )
                except ProviderUnavailableError:
                    continue
                logger.warning(
                    "provider %s failed while it ran with %s; %s runs from now on",
                    *(self.provider, type(error).__name__, found),
                )
                logger.debug("what it said", exc_info=error)  # it may quote what it ran on
                succeeding = self._graph_of(session, found)
                graph.lost = True  # first, or a cache of the one could meet the other
                self._session, self._graph, self.provider = session, succeeding, found
            return self._graph is not graph

    def _advance_on(self, graph: DecoderGraph, row: Row) -> list[_Part]:
        ids, cache, last = row.ids, cast(OnnxCache, row.cache), row.last
        parts = []
        for start in range(0, len(ids), _BLOCK):
            if start and row.check is not None:
                row.check()
            block = ids[start : start + _BLOCK]
            wanted = min(len(block), last - (len(ids) - start - len(block)))
            output, first = cache.run(graph, block, last=max(wanted, 1), width=self._width(len(block)))
            if wanted > 0:
                parts.append(_Part(output, first, first + wanted, start + len(block)))
        return parts

    def _width(self, length: int) -> int:
        """Return how many places to run for `length` ids: an accelerator plans for few different ones."""
        return bucket(length) if self._gaps else length

    def _advance_together(self, rows: Sequence[Row]) -> list[Scores]:
        """Run many rows in one forward: what they hold is padded in front, their ids at the end."""
        for row in rows:
            _check_found(row)
        caches = [cast(GrowingCache, row.cache) for row in rows]
        lengths = [cache.length for cache in caches]
        held, width = max(lengths), self._width(max(len(row.ids) for row in rows))
        ids = np.zeros((len(rows), width), dtype=np.int64)
        mask = np.zeros((len(rows), held + width), dtype=np.int64)
        for at, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids[at, : len(row.ids)] = row.ids
            mask[at, held - length : held + len(row.ids)] = 1
        first = min(len(row.ids) - row.last for row in rows)
        present = self._graph.make_buffers(len(rows), held + width)
        output = self._graph.run(
            ids,
            [self._graph.put(array) for array in _stacked([cache.take() for cache in caches], held)],
            present,
            total=held + width,
            first=first,
            mask=mask,
            positions=np.array(lengths, dtype=np.int64)[:, None] + np.arange(width, dtype=np.int64),
        )
        arrays = [value.numpy() for value in present]
        scores = []
        for at, (row, cache, length) in enumerate(zip(rows, caches, lengths, strict=True)):
            own = slice(held - length, held + len(row.ids))
            cache.hold([array[at : at + 1, :, own] for array in arrays])
            start = output.kept - width + len(row.ids) - row.last
            scores.append(output.of(at, start, start + row.last, row.ids))
        return scores


def _check_found(row: Row) -> None:
    if cast(OnnxCache, row.cache).lost:
        raise CacheLostError


def _check_last(row: Row) -> None:
    if not 1 <= row.last <= len(row.ids):
        raise ValueError(f"last must be from 1 to {len(row.ids)}, got {row.last}")


@dataclass(frozen=True, slots=True)
class _Part:
    """The kept places of an output from `start` to `stop`; the last of them is the `end`-th id of its row."""

    output: Output
    start: int
    stop: int
    end: int


def _joined(parts: list[_Part], ids: Ids) -> Scores:
    """Return the scores of one row's parts as those of one forward."""
    scores = [part.output.of(0, part.start, part.stop, ids[: part.end]) for part in parts]
    if len(scores) == 1:
        return scores[0]
    for part, score in zip(parts[:-1], scores[:-1], strict=True):
        # The id after this place is in the next part, so the graph could not know it.
        score.next_logits[-1] = float(score.row(len(score.best) - 1)[ids[part.end]])
    places = [(score, at) for score in scores for at in range(len(score.best))]

    def row(place: int) -> Logits:
        score, at = places[place]
        return score.row(at)

    return Scores(
        best=[token for score in scores for token in score.best],
        best_logits=[logit for score in scores for logit in score.best_logits],
        next_logits=[logit for score in scores for logit in score.next_logits],
        row=row,
    )


def _stacked(caches: list[list[npt.NDArray[Any]]], held: int) -> list[npt.NDArray[Any]]:
    """Return the rows' keys and values as (rows, heads, held, head size) each, padded in front with zeros."""
    stacked = []
    for arrays in zip(*caches, strict=True):
        _, heads, _, size = arrays[0].shape
        whole = np.zeros((len(arrays), heads, held, size), dtype=arrays[0].dtype)
        for at, array in enumerate(arrays):
            whole[at, :, held - array.shape[2] :] = array[0]
        stacked.append(whole)
    return stacked


def _stamp(file: Path | None) -> list[tuple[int, int]]:
    """Return size and time of a model's file and of its weights beside it, as far as there are any."""
    if file is None:
        return []
    names = (file.name, "model.onnx_data", "model.onnx.data")  # optimum's, and onnxruntime-genai's
    found = [path.stat() for path in map(file.with_name, names) if path.is_file()]
    return [(stat.st_size, stat.st_mtime_ns) for stat in found]


def _slides(file: Path | None) -> bool:
    """Whether the checkpoint's own config, where there is one, names a sliding window."""
    path = None if file is None else file.with_name("config.json")
    if path is None or not path.is_file():
        return False
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return bool(said.get("sliding_window")) and said.get("use_sliding_window", True)
    except (OSError, ValueError, AttributeError) as error:
        raise ModelLoadError(f"{path} is not a valid config.json: {error}") from error


def _said_head_size(file: Path | None) -> int | None:
    """Return the head size that onnxruntime-genai's builder says beside a graph which leaves it open."""
    path = None if file is None else file.with_name("genai_config.json")
    if path is None or not path.is_file():
        return None
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["model"]["decoder"]["head_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{path} is not a valid genai_config.json: {error}") from error


__all__ = ["SHARED_CACHE", "OnnxBackend", "available_cores"]
