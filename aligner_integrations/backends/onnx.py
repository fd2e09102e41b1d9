"""Run a model folder's `model.onnx` with ONNX Runtime."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from aligner_integrations.backends.base import Ids, KVCache, Logits
from aligner_integrations.backends.providers import FULL_NAMES, choose_providers, report_fallback
from aligner_integrations.errors import MissingDependencyError, ModelLoadError, ProviderUnavailableError

try:
    import onnxruntime as ort
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

FloatArray = npt.NDArray[np.generic]

_FLOAT_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


# Up to here, in bytes, a forward leaves cores idle and the weights may be held twice; above, neither holds.
_SMALL_MODEL = 256 * 2**20
# In a graph's metadata: it may write its keys and values into the buffers that it is given.
SHARED_CACHE = "aligner.shared_cache"
_LEAST_ROOM = 256  # tokens; a buffer that is too small is doubled


@dataclass(frozen=True, slots=True)
class CacheNames:
    """The graph's names of keys and values, and the shape and type of an empty one."""

    past: list[str]
    present: list[str]
    empty: list[FloatArray]


class OnnxCache:
    """Keys and values of one sequence, as arrays of shape (1, heads, length, head size)."""

    def __init__(self, names: CacheNames) -> None:
        self._names = names
        self._arrays = list(names.empty)
        self._length = 0

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return self._length

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens; costs nothing until the next forward."""
        _check_trim(length, self._length)
        if length < self._length:
            self._arrays = [array[:, :, :length] for array in self._arrays]
            self._length = length

    def run(self, session: ort.InferenceSession, feeds: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Run the graph after what is held and hold what it returns; logits of all of the input."""
        # The session wants contiguous arrays; they are copied only after a trim.
        past = (np.ascontiguousarray(array) for array in self._arrays)
        feeds = feeds | dict(zip(self._names.past, past, strict=True))
        logits, *present = session.run(["logits", *self._names.present], feeds)
        self._arrays = cast(list[FloatArray], present)
        self._length = int(self._arrays[0].shape[2])
        return cast(npt.NDArray[Any], logits)


class SharedCache:
    """Keys and values of one sequence in buffers with room to spare: the graph writes into them.

    A forward copies nothing that was there before it, and a trim only notes the length.
    """

    def __init__(self, names: CacheNames) -> None:
        self._names = names
        self._buffers: list[ort.OrtValue] = []  # (1, heads, room, head size) each
        self._room = 0
        self._length = 0

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return self._length

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        _check_trim(length, self._length)
        self._length = length

    def run(self, session: ort.InferenceSession, feeds: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Run the graph after what is held, in place; logits of all of the input."""
        end = self._length + feeds["input_ids"].shape[1]
        self._make_room(end)
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for past, present, buffer in zip(self._names.past, self._names.present, self._buffers, strict=True):
            binding.bind_ortvalue_input(past, buffer)
            binding.bind_ortvalue_output(present, buffer)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        self._length = end
        return cast(npt.NDArray[Any], binding.get_outputs()[-1].numpy())

    def _make_room(self, end: int) -> None:
        if end <= self._room:
            return
        self._room = max(end, 2 * self._room, _LEAST_ROOM)
        arrays = []
        for empty in self._names.empty:
            arrays.append(np.zeros((1, empty.shape[1], self._room, empty.shape[3]), dtype=empty.dtype))
        for array, old in zip(arrays, self._buffers, strict=bool(self._buffers)):
            array[:, :, : self._length] = old.numpy()[:, :, : self._length]
        self._buffers = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]


def _check_trim(length: int, held: int) -> None:
    if not 0 <= length <= held:
        raise ValueError(f"length must be from 0 to {held}, got {length}")


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
    ) -> None:
        self.provider = provider
        self._session = session
        self._file = file
        self._stamp = _stamp(file)
        self._threads = threads
        self._one_thread: OnnxBackend | None = None
        self._loading = threading.Lock()
        inputs = {node.name: node for node in session.get_inputs()}
        outputs = {node.name for node in session.get_outputs()}
        past = [name for name in inputs if name.startswith("past_key_values.")]
        present = [name.replace("past_key_values.", "present.") for name in past]
        missing = ({"input_ids", "logits", *present} - inputs.keys()) - outputs
        if missing or not past:
            raise ModelLoadError(
                f"model.onnx is no decoder with a cache: it lacks {sorted(missing) or 'past_key_values.*'}; "
                "export it with the task text-generation-with-past"
            )
        self._names = CacheNames(past, present, [_empty_past(inputs[name]) for name in past])
        shared = SHARED_CACHE in session.get_modelmeta().custom_metadata_map
        # The buffers are in the machine's memory; on an accelerator they would travel both ways.
        self._cache = SharedCache if shared and provider == FULL_NAMES["cpu"] else OnnxCache
        self._has_mask = "attention_mask" in inputs
        self._has_positions = "position_ids" in inputs

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        provider: str = "auto",
        threads: int | None = None,
        provider_options: dict[str, Any] | None = None,
    ) -> OnnxBackend:
        """Load `folder/model.onnx` (weights beside it in `model.onnx_data` are found by themselves).

        Args:
            folder: the model folder.
            provider: `"auto"`, `"tensorrt"`, `"cuda"` or `"cpu"`. `"auto"` takes the first that
                really loads; a name asks for that one and no other.
            threads: threads inside one forward; `None` takes the physical cores of this process.
            provider_options: handed verbatim to ONNX Runtime for an accelerator.

        Raises:
            ModelLoadError: the file is missing, damaged, or not a decoder with a cache.
            ProviderUnavailableError: the provider asked for did not load.
            ValueError: `provider` is unknown.
        """
        candidates = choose_providers(provider, ort.get_available_providers())
        path = Path(folder) / "model.onnx"
        if not path.is_file():
            raise ModelLoadError(
                f"{path} does not exist; give the folder that holds it, "
                "or make it from a checkpoint with `aligner export`"
            )
        # The official packages can report usage to Microsoft; a safety tool must not do so unasked.
        ort.disable_telemetry_events()
        why: dict[str, str] = {}
        for name in candidates:
            try:
                session = _make_session(path, name, threads, provider_options)
            except (MemoryError, KeyboardInterrupt):
                raise
            except Exception as error:  # ORT's own classes share no public base
                if name == "cpu":
                    raise ModelLoadError(f"ONNX Runtime cannot load {path}: {error}") from error
                why[name] = str(error)
                continue
            found = session.get_providers()[0]
            if found == FULL_NAMES[name]:
                report_fallback(asked=provider, used=name, why=why)
                return cls(session, provider=found, file=path, threads=threads)
            why[name] = f"the session runs on {found}"
        raise ProviderUnavailableError(
            f"provider {provider!r} was asked for, but {why.get(provider, 'nothing loaded')}; "
            'use provider="auto" or "cpu", or see `aligner doctor`'
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

    def make_cache(self) -> OnnxCache | SharedCache:
        """Return an empty cache."""
        return self._cache(self._names)

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        """Run `ids` after what `cache` holds; logits of shape (last, vocabulary) for the end of `ids`."""
        if not 1 <= last <= len(ids):
            raise ValueError(f"last must be from 1 to {len(ids)}, got {last}")
        own = cast(OnnxCache | SharedCache, cache)
        end = own.length + len(ids)
        feeds: dict[str, npt.NDArray[Any]] = {"input_ids": np.array([ids], dtype=np.int64)}
        if self._has_mask:
            feeds["attention_mask"] = np.ones((1, end), dtype=np.int64)
        if self._has_positions:
            feeds["position_ids"] = np.arange(own.length, end, dtype=np.int64)[None]
        return own.run(self._session, feeds)[0, -last:].astype(np.float32, copy=False)


def _make_session(
    path: Path, name: str, threads: int | None, provider_options: dict[str, Any] | None
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # what fails is raised; nothing is written to the user's terminal
    # Spinning made forwards up to 1.5 times faster on an idle machine and twice as slow on a busy one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted: list[Any] = [FULL_NAMES[name]]
    if name != "cpu":
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        wanted = [(FULL_NAMES[name], provider_options or {}), FULL_NAMES["cpu"]]
    # Without enable_fallback=0 a provider that fails later is swapped for the CPU, with a print.
    return ort.InferenceSession(os.fspath(path), sess_options=options, providers=wanted, enable_fallback=0)


def _stamp(file: Path | None) -> list[tuple[int, int]]:
    """Return size and time of a model's file and of its weights beside it, as far as there are any."""
    if file is None:
        return []
    found = [path.stat() for path in (file, file.with_name("model.onnx_data")) if path.is_file()]
    return [(stat.st_size, stat.st_mtime_ns) for stat in found]


def _empty_past(node: Any) -> FloatArray:  # a NodeArg; onnxruntime gives no type for it
    _, heads, _, size = node.shape if len(node.shape) == 4 else (None,) * 4
    if not (isinstance(heads, int) and isinstance(size, int)) or node.type not in _FLOAT_TYPES:
        raise ModelLoadError(
            f"model.onnx: {node.name} has shape {node.shape} and type {node.type}; "
            "needed is (batch, heads, length, head size) with fixed heads and head size, float or float16"
        )
    return np.zeros((1, heads, 0, size), dtype=_FLOAT_TYPES[node.type])


def available_cores() -> int:
    """Count the physical cores that this process may use (its affinity, hyper-threads once)."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, (os.cpu_count() or 2) // 2)
    cores: set[str] = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text(encoding="ascii"))
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))
