"""Execution providers: which to try, with which options, and what to say about the one that loaded."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import mmap
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from aligner_integrations.errors import ProviderUnavailableError

logger = logging.getLogger(__name__)

# Short names in the order in which `auto` tries them, with ONNX Runtime's own names.
FULL_NAMES: dict[str, str] = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
_NAMES = ("auto", *FULL_NAMES)

DRIVER = "libcuda.so.1"
INSTALL_CUDA = '`pip install "onnxruntime-gpu[cuda,cudnn]"`'
INSTALL_OVER = (
    "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; run "
    "`pip uninstall -y onnxruntime onnxruntime-gpu`, then " + INSTALL_CUDA
)

# Lengths of input that an accelerator plans for; other lengths are padded to the next.
BUCKETS = (1, 16, 64, 256, 1024)

# Operators that a forward spends its time in: all others are small beside them, and ONNX Runtime puts the
# arithmetic of shapes on the CPU on purpose.
_ATTENTION = frozenset(("Attention", "GroupQueryAttention", "MultiHeadAttention"))
_HEAVY = _ATTENTION | {"DynamicQuantizeMatMul", "FusedMatMul", "Gemm", "MatMul", "MatMulInteger"}
_HEAVY |= {"MatMulIntegerToFloat", "MatMulNBits", "QLinearMatMul", "TransposeMatMul"}


@dataclass(frozen=True, slots=True)
class GraphInput:
    """An input of a graph: each of its sizes, `None` where it is free, and its type as ONNX spells it."""

    name: str
    sizes: tuple[int | None, ...]
    kind: str


@dataclass(frozen=True, slots=True)
class ProfileShapes:
    """The largest input that a TensorRT engine is built for: rows, tokens of one block, tokens held."""

    batch: int = 16
    block: int = BUCKETS[-1]
    past: int = 4096 + 1024  # a context, and places that were rejected but still lie in the cache


def engine_cache_folder() -> Path:
    """Return the folder of TensorRT's engines and timings, beside the Hugging Face cache."""
    return Path(constants.HF_HOME) / "aligner-integrations" / "tensorrt"


def bucket(length: int) -> int:
    """Return the least of `BUCKETS` that holds `length` tokens, or `length` when none does."""
    return next((size for size in BUCKETS if size >= length), length)


def choose_providers(asked: str, listed: Sequence[str], *, installed: Sequence[str] = ()) -> list[str]:
    """Return the short names to try, in order.

    `listed` is what ONNX Runtime says it was built with. That a provider is listed does not mean
    that it loads: whoever makes the session must compare `session.get_providers()[0]`. `installed` are
    the packages of ONNX Runtime that pip knows of.

    Raises:
        ValueError: `asked` is not one of the names.
        ProviderUnavailableError: `asked` names a provider that this onnxruntime lacks.
    """
    if asked not in _NAMES:
        raise ValueError(f"provider must be one of {', '.join(_NAMES)}; got {asked!r}")
    if asked == "auto":
        return [name for name, full in FULL_NAMES.items() if full in listed]
    if FULL_NAMES[asked] not in listed:
        cure = f"run `pip uninstall -y onnxruntime` and {INSTALL_CUDA}"
        raise ProviderUnavailableError(
            f"provider {asked!r} was asked for, but this onnxruntime has only {', '.join(listed)}; "
            f'{INSTALL_OVER if overwritten(installed) else cure}, or use provider="cpu"'
        )
    return [asked]


def installed_packages() -> list[str]:
    """Return which packages of ONNX Runtime pip knows of; they share one folder."""
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            found.append(name)
    return found


def overwritten(installed: Sequence[str]) -> bool:
    """Whether both packages of ONNX Runtime are there, which share one folder."""
    return {"onnxruntime", "onnxruntime-gpu"} <= set(installed)


def report_fallback(*, asked: str, used: str, why: Mapping[str, str]) -> None:
    """Warn, once for this load, when better providers were tried in vain."""
    if why:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in why.items())
        logger.warning("provider %r was asked for, %r is used, because %s", asked, used, reasons)


def cuda_options(user: Mapping[str, Any]) -> dict[str, str]:
    """Return the CUDA provider's options; the user's win over ours, those of TensorRT are left out.

    TF32 rounds the factors of fp32 products to ten bits: with it, drafted and plain decoding would part
    in fp32 too.
    """
    ours = {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
    return ours | {key: str(value) for key, value in user.items() if not key.startswith("trt_")}


def tensorrt_options(
    user: Mapping[str, Any],
    inputs: Sequence[GraphInput],
    *,
    shapes: ProfileShapes,
    cache: Path | None,
) -> dict[str, str]:
    """Return the TensorRT provider's options; the user's win over ours, those of CUDA are left out.

    Args:
        user: what the user asked for.
        inputs: the graph's; each with a free size needs its range, or ONNX Runtime refuses them all.
        shapes: how large they may become.
        cache: the folder for this model's engines; `None` keeps none.
    """
    ours = {"trt_context_memory_sharing_enable": "True"}
    kinds = {node.kind for node in inputs if node.name.startswith("past_key_values.")}
    for kind, key in (("float16", "trt_fp16_enable"), ("bfloat16", "trt_bf16_enable")):
        if kind in kinds:
            ours |= {key: "True", "trt_layer_norm_fp32_fallback": "True"}
    least = ProfileShapes(batch=1, block=1, past=0)
    usual = ProfileShapes(batch=1, block=min(64, shapes.block), past=min(256, shapes.past))
    for key, sizes in (("min", least), ("opt", usual), ("max", shapes)):
        profile = ",".join(_sized(node, sizes) for node in inputs if None in node.sizes)
        if profile:
            ours[f"trt_profile_{key}_shapes"] = profile
    if cache is not None:
        ours |= {"trt_engine_cache_enable": "True", "trt_engine_cache_path": str(cache)}
        # Timings of kernels hold for all models on one GPU.
        ours |= {"trt_timing_cache_enable": "True", "trt_timing_cache_path": str(cache.parent)}
    both = ("device_id", "has_user_compute_stream", "user_compute_stream")
    return ours | {key: str(value) for key, value in user.items() if key.startswith("trt_") or key in both}


def _sized(node: GraphInput, shapes: ProfileShapes) -> str:
    """Return `name:1x64`: the first free size is the batch, another one a length."""
    if node.name.startswith("past_key_values."):
        length = shapes.past
    elif node.name == "attention_mask":
        length = shapes.past + shapes.block
    else:
        length = shapes.block
    sizes = [
        (shapes.batch if at == 0 else length) if size is None else size for at, size in enumerate(node.sizes)
    ]
    return f"{node.name}:{'x'.join(map(str, sizes))}"


def needed_libraries(file: Path) -> list[str]:
    """Return the names of the shared libraries that an ELF file of 64 bits asks the loader for."""
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        (table,) = struct.unpack_from("<Q", data, 32)
        size, count = struct.unpack_from("<HH", data, 54)
        # Kind, flags, offset in the file, address, physical address, size.
        segments = [struct.unpack_from("<IIQQQQ", data, table + at * size) for at in range(count)]
        start, length = next((part[2], part[5]) for part in segments if part[0] == 2)  # PT_DYNAMIC
        entries = list(struct.iter_unpack("<QQ", data[start : start + length]))
        address = dict(entries)[5]  # DT_STRTAB
        names = next(
            part[2] + address - part[3]
            for part in segments
            if part[0] == 1 and part[3] <= address < part[3] + part[5]  # PT_LOAD
        )
        found = [names + value for kind, value in entries if kind == 1]  # DT_NEEDED
        return [data[at : data.find(b"\0", at)].decode() for at in found]


def libraries_in(text: str) -> list[str]:
    """Return the shared libraries that an error of the dynamic loader names as missing."""
    return re.findall(r"(lib[\w+-]+\.so[.\d]*): cannot open shared object file", text)


def explain_missing(libraries: Iterable[str]) -> str:
    """Say which libraries are missing, and the command that brings them."""
    missing = list(dict.fromkeys(libraries))
    said = []
    if DRIVER in missing:
        said.append(f"{DRIVER} is missing, that is, this machine has no NVIDIA driver")
    of_tensorrt = [name for name in missing if name.startswith("libnv") and "rtc" not in name]
    others = [name for name in missing if name != DRIVER and name not in of_tensorrt]
    if others:
        said.append(f"{', '.join(others)} missing; {INSTALL_CUDA} brings them")
    if of_tensorrt:
        said.append(
            f"{', '.join(of_tensorrt)} missing; "
            '`pip install "tensorrt-cu13>=10.14,<11"` brings them (11, which a plain `pip install tensorrt` '
            "brings, cannot be loaded)"
        )
    return "; ".join(said)


def explain_failure(text: str) -> str:
    """Return in one line why a session could not be made, out of what ONNX Runtime said."""
    if libraries := libraries_in(text):
        return explain_missing(libraries)
    if "Please install TensorRT libraries" in text:
        return "ONNX Runtime could not load TensorRT's libraries"
    if failure := re.search(r"CUDA failure (\d+): ([^;\n]+)", text):
        return f"CUDA says: {failure[2].strip()} (error {failure[1]})"
    if option := re.search(r'Unknown provider option: "(.*?)"', text):
        return f"provider_options holds {option[1]!r}, which it does not know"
    return " ".join(text.split())


def explain_placement(name: str, placed: Iterable[tuple[str, str]]) -> str | None:
    """Return why a session does not really run on the provider called `name`, or `None` if it does.

    `placed` holds a provider's full name and an operator for each node. A provider counts as running when
    it has all attention, which touches the cache, and most other heavy operators. To be registered is
    nothing.
    """
    heavy = [(provider, operator) for provider, operator in placed if operator in _HEAVY]
    elsewhere = [operator for provider, operator in heavy if provider != FULL_NAMES[name]]
    if 2 * len(elsewhere) <= len(heavy) and _ATTENTION.isdisjoint(elsewhere):
        if elsewhere:
            logger.info("%d of %d heavy operators do not run on %s", len(elsewhere), len(heavy), name)
        return None
    kinds = ", ".join(sorted(set(elsewhere)))
    return f"it takes only {len(heavy) - len(elsewhere)} of {len(heavy)} heavy operators, not all {kinds}"
