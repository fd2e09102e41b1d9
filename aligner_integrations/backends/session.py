"""Make ONNX Runtime sessions: load the libraries, try the providers, and look at what really runs."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import onnxruntime as ort
from onnxruntime.capi import _pybind_state as native

from aligner_integrations.backends import providers
from aligner_integrations.backends.providers import DRIVER, FULL_NAMES, GraphInput, ProfileShapes
from aligner_integrations.errors import ModelLoadError, ProviderUnavailableError

T = TypeVar("T")

logger = logging.getLogger(__name__)

# What no provider could make better.
_DAMAGED = (native.InvalidProtobuf, native.InvalidGraph, native.NoSuchFile)
_FLOATS = {1: "float", 10: "float16", 16: "bfloat16"}  # ONNX's numbers of the types


def open_session(
    path: Path,
    *,
    provider: str = "auto",
    threads: int | None = None,
    provider_options: Mapping[str, Any] | None = None,
    shapes: ProfileShapes | None = None,
) -> tuple[ort.InferenceSession, str]:
    """Return a session of the model at `path`, and the full name of the provider that runs it.

    Args:
        path: the `.onnx` file; weights beside it are found by themselves.
        provider: `"auto"`, `"tensorrt"`, `"cuda"` or `"cpu"`. `"auto"` takes the first that really
            loads; a name asks for that one and no other.
        threads: threads inside one forward; `None` takes the physical cores of this process.
        provider_options: options of the CUDA and TensorRT providers; they win over ours.
        shapes: the largest input that a TensorRT engine is built for.

    Raises:
        ModelLoadError: the file is missing or damaged.
        ProviderUnavailableError: the provider asked for did not load, or leaves the work to another.
        ValueError: `provider` is unknown.
    """
    listed, installed = ort.get_available_providers(), providers.installed_packages()
    candidates = providers.choose_providers(provider, listed, installed=installed)
    if not path.is_file():
        raise ModelLoadError(
            f"{path} does not exist; give the folder that holds it, "
            "or make it from a checkpoint with `aligner export`"
        )
    # The official packages can report usage to Microsoft; a safety tool must not do so unasked.
    ort.disable_telemetry_events()
    why: dict[str, str] = {}
    if provider == "auto" and providers.overwritten(installed) and FULL_NAMES["cuda"] not in listed:
        why["cuda"] = providers.INSTALL_OVER
    user, wanted = dict(provider_options or {}), shapes or ProfileShapes()
    for name in candidates:
        try:
            session = _open_on(name, path, _plain_options(threads), user, wanted)
        except ProviderUnavailableError as error:
            why[name] = str(error)
            continue
        providers.report_fallback(asked=provider, used=name, why=why)
        return session, str(session.get_providers()[0])
    raise ProviderUnavailableError(
        f"provider {provider!r} was asked for, but {why.get(provider, 'nothing loaded')}; "
        'use provider="auto" or "cpu", or see `aligner doctor`'
    )


def rungs_below(found: str) -> list[str]:
    """Return the providers, by their short names, that come after the one with this full name."""
    names = providers.choose_providers("auto", ort.get_available_providers())
    below = [name for name in names if FULL_NAMES[name] == found]
    return names[names.index(below[0]) + 1 :] if below else []


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


def _plain_options(threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # what fails is raised; nothing is written to the user's terminal
    # Spinning made forwards up to 1.5 times faster on an idle machine and twice as slow on a busy one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Asked for on accelerators alone, but it costs nothing and older versions ignore it.
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _open_on(
    name: str, path: Path, options: ort.SessionOptions, user: dict[str, Any], shapes: ProfileShapes
) -> ort.InferenceSession:
    """Return a session on the provider called `name`, or say why not with `ProviderUnavailableError`."""
    wanted: list[Any] = [FULL_NAMES["cpu"]]
    engines: Path | None = None
    if name != "cpu":
        _load_libraries(name)
        graph = read_graph(path)
        if reason := _unknown_to(name, graph):
            raise ProviderUnavailableError(reason)
        # What it cannot run goes to the CPU, and what went there is looked at below. ONNX Runtime's own
        # refusal (session.disable_cpu_ep_fallback) would refuse every decoder: it puts shapes on the CPU.
        wanted = [(FULL_NAMES["cuda"], providers.cuda_options(user)), *wanted]
        if name == "tensorrt":
            tensorrt = _tensorrt_options(path, graph, user, shapes)
            wanted = [(FULL_NAMES["tensorrt"], tensorrt), *wanted]
            engines = Path(tensorrt.get("trt_engine_cache_path", ""))
    try:
        # Without enable_fallback=0 a provider that fails later is swapped for the CPU, with a print.
        session = without_bad_engines(
            engines,
            lambda: ort.InferenceSession(
                os.fspath(path), sess_options=options, providers=wanted, enable_fallback=0
            ),
        )
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # ORT's own classes share no public base
        if name == "cpu" or isinstance(error, _DAMAGED):
            raise ModelLoadError(f"ONNX Runtime cannot load {path}: {error}") from error
        raise ProviderUnavailableError(providers.explain_failure(str(error))) from error
    found = session.get_providers()[0]
    if found != FULL_NAMES[name]:
        raise ProviderUnavailableError(f"the session runs on {found}")
    if name != "cpu" and hasattr(session, "get_provider_graph_assignment_info"):
        parts = session.get_provider_graph_assignment_info()
        placed = [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]
        if reason := providers.explain_placement(name, placed):
            raise ProviderUnavailableError(reason)
    return session


def without_bad_engines(folder: Path | None, make: Callable[[], T]) -> T:
    """Return what `make` gives; if it fails with engines that we kept in `folder`, once more without them."""
    try:
        return make()
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        ours = folder is not None and folder.is_relative_to(providers.engine_cache_folder())
        kept = [file for file in folder.iterdir() if file.is_file()] if folder and ours else []
        if not any(file.suffix == ".engine" for file in kept):
            raise
        logger.warning("engines kept in %s do not load (%s); they are built anew", folder, error)
        for file in kept:
            file.unlink(missing_ok=True)
        return make()


def _unknown_to(name: str, graph: Graph) -> str | None:
    """Return which operators of the graph a provider lacks, as far as it is known beforehand."""
    own, kinds = graph.own_operators, {node.kind for node in graph.inputs}
    if name == "tensorrt" and own:
        return (
            f"the graph has ONNX Runtime's own operators ({', '.join(own)}), which TensorRT does not know; "
            "export the model with attention written out (attention='plain')"
        )
    if name == "cuda" and "GroupQueryAttention" in own and "float" in kinds:
        return (
            "the graph has GroupQueryAttention in fp32, which ONNX Runtime has for the CPU alone; "
            "export the model in fp16 (dtype='fp16') or with attention written out (attention='plain')"
        )
    return None


def _tensorrt_options(
    path: Path, graph: Graph, user: dict[str, Any], shapes: ProfileShapes
) -> dict[str, str]:
    folder = providers.engine_cache_folder() / _key(path, user, graph, shapes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("engines are not kept, each load builds them anew: %s", error)
        return providers.tensorrt_options(user, graph.inputs, shapes=shapes, cache=None)
    if not any(folder.glob("*.engine")):
        logger.info("TensorRT builds an engine for %s, once; it is kept in %s", path, folder)
    return providers.tensorrt_options(user, graph.inputs, shapes=shapes, cache=folder)


def _key(path: Path, user: dict[str, Any], graph: Graph, shapes: ProfileShapes) -> str:
    """Return a folder name that changes with all that an engine depends on, but for the GPU.

    TensorRT puts that into the names of its files.
    """
    files = [(file.name, file.stat()) for file in sorted(path.parent.glob(f"{path.name}*"))]
    stamp = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    said = [stamp, ort.__version__, repr(graph), repr(shapes), sorted((key, str(user[key])) for key in user)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:24]


def _load_libraries(name: str) -> None:
    """Load what the provider's library needs, from pip's packages or the system.

    ONNX Runtime would look in the system alone, say what it lacks on the terminal, and take the CPU.

    Raises:
        ProviderUnavailableError: something is missing; the message says what brings it.
    """
    # TensorRT's provider leaves some nodes to CUDA's.
    files = [f"libonnxruntime_providers_{each}.so" for each in dict.fromkeys(("cuda", name))]
    libraries = [Path(ort.__file__).parent / "capi" / file for file in files]
    if not sys.platform.startswith("linux") or not all(library.is_file() for library in libraries):
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        return
    packages = Path(ort.__file__).parents[1]
    folders = [*packages.glob("nvidia/*/lib"), packages / "tensorrt_libs"]
    packaged = {file.name: file for folder in folders for file in folder.glob("*.so*")}
    missing: list[str] = []
    for needed in (DRIVER, *(name for library in libraries for name in providers.needed_libraries(library))):
        try:
            ctypes.CDLL(os.fspath(packaged.get(needed, needed)))
        except OSError as error:
            missing += providers.libraries_in(str(error)) or [needed]
    if missing:
        raise ProviderUnavailableError(providers.explain_missing(missing))


@dataclass(frozen=True, slots=True)
class Graph:
    """What a file says of its graph: the inputs, and the operators that only ONNX Runtime knows."""

    inputs: tuple[GraphInput, ...]
    own_operators: tuple[str, ...]


def read_graph(path: Path) -> Graph:
    """Read the inputs and operators out of an `.onnx` file; its weights are not touched.

    Raises:
        ModelLoadError: the file is no ONNX model.
    """
    inputs: list[GraphInput] = []
    own: set[str] = set()
    try:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for graph in _parts(data, (0, len(data)), 7):
                for node in _parts(data, graph, 1):
                    if _texts(data, node, 7) == ["com.microsoft"]:
                        own.update(_texts(data, node, 4))
                inputs += [_read_input(data, value) for value in _parts(data, graph, 11)]
    except (IndexError, ValueError) as error:
        raise ModelLoadError(f"{path} is no ONNX model: {error}") from error
    return Graph(tuple(inputs), tuple(sorted(own)))


def _read_input(data: mmap.mmap, value: tuple[int, int]) -> GraphInput:
    (name,) = _texts(data, value, 1)
    (kind,) = _parts(data, value, 2)
    (tensor,) = _parts(data, kind, 1)
    spans = [span for shape in _parts(data, tensor, 2) for span in _parts(data, shape, 1)]
    sizes = tuple(_number(data, span, 1) for span in spans)
    return GraphInput(name, sizes, _FLOATS.get(_number(data, tensor, 1) or 0, "other"))


def _number(data: mmap.mmap, span: tuple[int, int], wanted: int) -> int | None:
    return next(
        (value for key, value in _fields(data, *span) if key == wanted and isinstance(value, int)), None
    )


def _parts(data: mmap.mmap, span: tuple[int, int], wanted: int) -> Iterator[tuple[int, int]]:
    """Yield the spans of the messages and texts with the field number `wanted`."""
    for key, value in _fields(data, *span):
        if key == wanted and isinstance(value, tuple):
            yield value


def _texts(data: mmap.mmap, span: tuple[int, int], wanted: int) -> list[str]:
    return [data[start:stop].decode() for start, stop in _parts(data, span, wanted)]


def _fields(data: mmap.mmap, at: int, stop: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """Yield number and value of each field of a protobuf message: a number, or where its bytes lie."""
    while at < stop:
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"byte {at} begins no field")
        if at + length > stop:
            raise ValueError(f"the field at byte {at} is longer than what holds it")
        yield tag >> 3, (at, at + length)
        at += length


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
