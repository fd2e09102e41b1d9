"""Run a model folder's `model.onnx` with ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
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


class OnnxCache:
    """Keys and values of one sequence, as arrays of shape (1, heads, length, head size)."""

    def __init__(self, empty: Sequence[FloatArray]) -> None:
        self._arrays = list(empty)
        self._length = 0

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return self._length

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens; costs nothing until the next forward."""
        if not 0 <= length <= self._length:
            raise ValueError(f"length must be from 0 to {self._length}, got {length}")
        if length < self._length:
            self._arrays = [array[:, :, :length] for array in self._arrays]
            self._length = length

    def feed(self) -> list[FloatArray]:
        """Return the arrays as the session wants them: contiguous, copied only after a trim."""
        self._arrays = [np.ascontiguousarray(array) for array in self._arrays]
        return self._arrays

    def hold(self, arrays: Sequence[FloatArray]) -> None:
        """Take over what a forward returned."""
        self._arrays = list(arrays)
        self._length = int(arrays[0].shape[2])


class OnnxBackend:
    """One ONNX Runtime session; shared by threads, because all state is in the caches."""

    name = "onnx"

    def __init__(self, session: ort.InferenceSession, *, provider: str) -> None:
        self.provider = provider
        self._session = session
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
        self._past = past
        self._outputs = ["logits", *present]
        self._has_mask = "attention_mask" in inputs
        self._has_positions = "position_ids" in inputs
        self._empty = [_empty_past(inputs[name]) for name in past]

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
                return cls(session, provider=found)
            why[name] = f"the session runs on {found}"
        raise ProviderUnavailableError(
            f"provider {provider!r} was asked for, but {why.get(provider, 'nothing loaded')}; "
            'use provider="auto" or "cpu", or see `aligner doctor`'
        )

    def make_cache(self) -> OnnxCache:
        """Return an empty cache."""
        return OnnxCache(self._empty)

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        """Run `ids` after what `cache` holds; logits of shape (last, vocabulary) for the end of `ids`."""
        if not 1 <= last <= len(ids):
            raise ValueError(f"last must be from 1 to {len(ids)}, got {last}")
        own = cast(OnnxCache, cache)
        end = own.length + len(ids)
        feeds: dict[str, npt.NDArray[Any]] = {"input_ids": np.array([ids], dtype=np.int64)}
        if self._has_mask:
            feeds["attention_mask"] = np.ones((1, end), dtype=np.int64)
        if self._has_positions:
            feeds["position_ids"] = np.arange(own.length, end, dtype=np.int64)[None]
        feeds.update(zip(self._past, own.feed(), strict=True))
        logits, *present = self._session.run(self._outputs, feeds)
        own.hold(cast(list[FloatArray], present))
        return cast(npt.NDArray[Any], logits)[0, -last:].astype(np.float32, copy=False)


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
