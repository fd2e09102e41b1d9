"""Checkpoint to model folder: ONNX with cache, tokenizer, `aligner.json`, and a parity check.

Run by `aligner train` at its end. Needs the extra `export` (optimum, torch, transformers).
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from optimum.exporters.onnx import onnx_export_from_model
from transformers import AutoModelForCausalLM

from aligner_integrations.backends.onnx import OnnxBackend
from aligner_integrations.config import AlignerConfig
from aligner_integrations.errors import ModelLoadError
from aligner_integrations.llama_graph import ROTATIONS, build_llama_graph, is_plain_llama

logger = logging.getLogger(__name__)

# Matrices below this many weights stay in fp32: they weigh nothing.
_SMALLEST_MATRIX = 4096
_PARITY_PROMPTS = 20
# Below this share of equal next tokens the graph is not the checkpoint's; rounding costs far less.
_LEAST_AGREEMENT = 0.5
_EXPORTER_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (Warning, "Converting a tensor to a Python"),
    (Warning, "torch.tensor results are registered as constants"),
    (DeprecationWarning, "You are using the legacy TorchScript-based ONNX export"),
    (DeprecationWarning, "The feature will be removed"),
    (UserWarning, "Exporting aten::index operator of advanced indexing"),
)


def export_checkpoint(
    checkpoint: Path, out: Path, *, config: AlignerConfig, dtype: Literal["fp32", "int8"] = "fp32"
) -> float:
    """Export `checkpoint` to the model folder `out` and return the share of equal next tokens.

    The context (`max_length`) is the checkpoint's, whatever `config` says.
    `dtype="int8"` stores each matrix as int8 with one scale a row or column; the runtime unfolds it
    to fp32 once, while loading, so it computes in fp32 and block and single steps agree.

    Raises:
        ModelLoadError: the checkpoint is missing, or the exported graph does not follow it.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (checkpoint / name).exists():
            raise ModelLoadError(f"{checkpoint} is not a checkpoint: {name} is missing")
    out.mkdir(parents=True, exist_ok=True)
    # Eager attention: the fused kind is exported with a check for rows of NaN that grows dear with the cache.
    source = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model = build_llama_graph(source) if is_plain_llama(source) else _trace(source)
    if dtype == "int8":
        store_as_int8(model)
    onnx.save(model, out / "model.onnx")
    shutil.copyfile(checkpoint / "tokenizer.json", out / "tokenizer.json")
    said = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    write_config(replace(config, max_length=said["max_position_embeddings"]), out)
    agreement = parity(checkpoint, out)
    if agreement < _LEAST_AGREEMENT:
        raise ModelLoadError(
            f"{out}/model.onnx does not follow {checkpoint}: {agreement:.1%} of next tokens agree, "
            f"needed are {_LEAST_AGREEMENT:.0%}"
        )
    logger.info("exported %s as %s: %.4f of next tokens agree", checkpoint, dtype, agreement)
    return agreement


def _trace(source: Any) -> Any:
    """Return the graph, in fp32, of a model whose architecture we do not write ourselves."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        # What the exporter says of its own and transformers' code; that the graph is right, `parity` checks.
        for category, said in _EXPORTER_WARNINGS:
            warnings.filterwarnings("ignore", message=said, category=category)
        onnx_export_from_model(
            source,
            Path(scratch),
            task="text-generation-with-past",
            opset=18,
            do_validation=False,
            no_post_process=True,
        )
        return onnx.load(Path(scratch) / "model.onnx")


def write_config(config: AlignerConfig, folder: Path) -> None:
    """Write `aligner.json`."""
    text = json.dumps(asdict(config), indent=2, ensure_ascii=False)
    (folder / "aligner.json").write_text(text + "\n", encoding="utf-8")


def store_as_int8(model: Any) -> None:
    """Replace every large fp32 matrix of the graph by int8 x scale, in place.

    Plain Cast and Mul on constants: the runtime folds them to fp32 when it loads the graph, which
    a DequantizeLinear would not be.
    """
    graph = model.graph
    nodes: list[Any] = []
    for tensor in [t for t in graph.initializer if _is_large_matrix(t)]:
        weights = numpy_helper.to_array(tensor)
        codes, scale = quantize(weights)
        name = tensor.name
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(codes, f"{name}.int8"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
        nodes.append(helper.make_node("Cast", [f"{name}.int8"], [f"{name}.cast"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [f"{name}.cast", f"{name}.scale"], [name]))
    for node in reversed(nodes):
        graph.node.insert(0, node)


def quantize(weights: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Return int8 codes and fp32 scales with `codes * scales` near `weights`, of shape (rows, columns).

    One scale a row or a column, whichever errs less.
    """
    best: tuple[float, npt.NDArray[np.int8], npt.NDArray[np.float32]] | None = None
    for axis in (0, 1):
        scale = np.maximum(np.abs(weights).max(axis=axis, keepdims=True), 1e-8) / 127.0
        codes = np.rint(weights / scale).astype(np.int8)
        error = float(np.square(codes * scale - weights).mean())
        if best is None or error < best[0]:
            best = (error, codes, scale.astype(np.float32))
    assert best is not None
    return best[1], best[2]


def _is_large_matrix(tensor: Any) -> bool:
    is_matrix = tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2
    if tensor.name in ROTATIONS:
        return False  # angles of positions must be exact
    return is_matrix and int(np.prod(tensor.dims)) >= _SMALLEST_MATRIX


@torch.no_grad()
def parity(checkpoint: Path, folder: Path) -> float:
    """Share of positions, over random prompts, where graph and checkpoint choose the same token."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    backend = OnnxBackend.load(folder, provider="cpu")
    generator = torch.Generator().manual_seed(0)
    equal = total = 0
    for _ in range(_PARITY_PROMPTS):
        ids = torch.randint(0, model.config.vocab_size, (1, 64), generator=generator)
        wanted = model(ids).logits[0].argmax(-1).numpy()
        found = backend.forward(ids[0].tolist(), backend.make_cache(), last=64).argmax(-1)
        equal += int((wanted == found).sum())
        total += 64
    return equal / total
