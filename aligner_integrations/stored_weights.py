"""A checkpoint's weights, read one by one, and how they are stored with a graph: fp32, fp16 or int8."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, numpy_helper
from safetensors import SafetensorError, safe_open

from aligner_integrations.errors import ModelLoadError

Array: TypeAlias = npt.NDArray[Any]
Dtype: TypeAlias = Literal["fp32", "fp16", "int8", "int8-dynamic"]

# Matrices below this many weights stay in fp32: they weigh nothing.
_SMALLEST_MATRIX = 4096
# Above it, in bytes, weights go to a file of their own: a protobuf message is built in memory, up to 2 GB.
_INLINE = 256 * 2**20
_ALIGNMENT = 4096  # so that the runtime can map the file in place of reading it


class CheckpointWeights:
    """The tensors of a folder's safetensors files, in any number of shards."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}
        files = sorted(folder.glob("model*.safetensors"))
        kinds: set[str] = set()
        for path in files:
            with _opened(path) as file:
                names = list(file.keys())
                self._files |= dict.fromkeys(names, path)
                kinds |= {file.get_slice(name).get_dtype() for name in names}
        self.size = sum(path.stat().st_size for path in files)
        # The type that holds them all, as transformers names it.
        self.dtype = {"BF16": "bfloat16", "F16": "float16"}.get(min(kinds, default=""), "float32")
        if len(kinds) > 1:
            self.dtype = "float32"

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        with _opened(self._path(name)) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor in fp32."""
        with _opened(self._path(name)) as file:
            array: npt.NDArray[np.float32] = file.get_tensor(name).float().numpy()
        return array

    def _path(self, name: str) -> Path:
        if name not in self._files:
            raise ModelLoadError(
                f"{self._folder} lacks the weights {name}: a file is missing, or it is damaged"
            )
        return self._files[name]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ModelLoadError(f"cannot read {path}: {error}; download or save it again") from error


def take_weights(graph: Any, names: set[str]) -> dict[str, bool]:
    """Turn the weights from inputs of the graph into initializers to come; say which are wanted transposed.

    A matrix that is only ever used transposed is to be stored so.
    """
    weights = {value.name: False for value in graph.input if value.name in names}
    inputs = [value for value in graph.input if value.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)
    readers: dict[str, list[Any]] = {name: [] for name in weights}
    for node in graph.node:
        for name in set(node.input) & weights.keys():
            readers[name].append(node)
    turned: dict[str, str] = {}
    for name, nodes in readers.items():
        weights[name] = all(node.op_type == "Transpose" for node in nodes)
        if weights[name]:
            turned |= {node.output[0]: name for node in nodes}
    kept = [node for node in graph.node if node.output[0] not in turned]
    for node in kept:
        node.input[:] = [turned.get(name, name) for name in node.input]
    del graph.node[:]
    graph.node.extend(kept)
    return weights


def store_weights(
    model: ModelProto, wanted: dict[str, bool], weights: CheckpointWeights, folder: Path, *, dtype: Dtype
) -> None:
    """Write `folder/model.onnx`: the graph `model`, which is changed, with its weights.

    Those of a large model go to `model.onnx_data` beside it.

    Args:
        model: a graph that names the weights and does not hold them.
        wanted: the weights to add, and whether each is stored transposed.
        weights: where they are.
        folder: the folder to write to.
        dtype: `"int8"` unfolds matrices to fp32 with plain Cast and Mul, which the runtime folds once, while
            loading, as it would not a DequantizeLinear; `"int8-dynamic"` multiplies by them in int8.
    """
    matrices = [name for name in wanted if dtype.startswith("int8") and _is_large(weights.shape(name))]
    multiplied = _multiply_in_int8(model.graph, matrices) if dtype == "int8-dynamic" else set()
    unfolded = set(matrices) - multiplied
    _unfold_int8(model.graph, sorted(unfolded))
    with contextlib.ExitStack() as stack:
        beside = None
        if weights.size > _INLINE:
            beside = stack.enter_context((folder / "model.onnx_data").open("wb"))
        for name, transposed in wanted.items():
            array = weights.read(name)
            if transposed:
                array = array.T
            parts: dict[str, Array] = {name: array.astype(np.float16) if dtype == "fp16" else array}
            if name in multiplied or name in unfolded:
                # A product in int8 knows one scale a column.
                codes, scale = quantize(array, axes=(0,) if name in multiplied else (0, 1))
                parts = {f"{name}.int8": codes, f"{name}.scale": scale}
            model.graph.initializer.extend(_as_tensor(part, one, beside) for part, one in parts.items())
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def quantize(
    weights: npt.NDArray[np.float32], *, axes: tuple[int, ...] = (0, 1)
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Return int8 codes and fp32 scales with `codes * scales` near `weights`, of shape (rows, columns).

    One scale a column (axis 0) or a row (axis 1), whichever errs less.
    """
    best: tuple[float, npt.NDArray[np.int8], npt.NDArray[np.float32]] | None = None
    for axis in axes:
        scale = np.maximum(np.abs(weights).max(axis=axis, keepdims=True), 1e-8) / 127.0
        codes = np.rint(weights / scale).astype(np.int8)
        error = float(np.square(codes * scale - weights).mean()) if len(axes) > 1 else 0.0
        if best is None or error < best[0]:
            best = (error, codes, scale.astype(np.float32))
    assert best is not None
    return best[1], best[2]


def _is_large(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] * shape[1] >= _SMALLEST_MATRIX


def _as_tensor(name: str, array: Array, beside: IO[bytes] | None) -> TensorProto:
    """Return the array as an initializer; a large one is written to `beside`, if there is such a file."""
    array = np.ascontiguousarray(array)
    if beside is None or array.nbytes < _ALIGNMENT:
        return numpy_helper.from_array(array, name)
    beside.write(bytes(-beside.tell() % _ALIGNMENT))
    place = {"location": Path(beside.name).name, "offset": str(beside.tell()), "length": str(array.nbytes)}
    beside.write(array.data)
    tensor = TensorProto(
        name=name,
        dims=array.shape,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _unfold_int8(graph: Any, names: list[str]) -> None:
    """Make each of these weights, wherever it is used, from int8 codes and scales."""
    nodes = []
    for name in names:
        nodes.append(helper.make_node("Cast", [f"{name}.int8"], [f"{name}.cast"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [f"{name}.cast", f"{name}.scale"], [name]))
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)


def _multiply_in_int8(graph: Any, names: list[str]) -> set[str]:
    """Let products with these weights round their other side to int8 too; return those that it was done for.

    Left out are weights that are used for more than products, as tied embeddings are.
    """
    products = {name: [node for node in graph.node if name in node.input] for name in names}
    done = {
        name
        for name, nodes in products.items()
        if all(node.op_type == "MatMul" and node.input[1] == name for node in nodes)
    }
    nodes: list[Any] = []
    rounded: dict[str, tuple[str, str, str]] = {}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in done:
            nodes.append(node)
            continue
        (value, weight), output = node.input, node.output[0]
        if value not in rounded:
            codes, scale, zero = rounded[value] = (f"{value}.int8", f"{value}.scale", f"{value}.zero")
            nodes.append(helper.make_node("DynamicQuantizeLinear", [value], [codes, scale, zero]))
        codes, scale, zero = rounded[value]
        exact, floats, scales = f"{output}.exact", f"{output}.floats", f"{output}.scales"
        nodes.append(helper.make_node("MatMulInteger", [codes, f"{weight}.int8", zero], [exact]))
        nodes.append(helper.make_node("Cast", [exact], [floats], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [scale, f"{weight}.scale"], [scales]))
        nodes.append(helper.make_node("Mul", [floats, scales], [output]))
    del graph.node[:]
    graph.node.extend(nodes)
    return done
