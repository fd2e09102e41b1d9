"""Export: a checkpoint becomes a folder that loads and corrects, in fp32 and as int8."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto

from aligner_integrations import Aligner, AlignerConfig, DecodeConfig
from aligner_integrations import export as exporting
from aligner_integrations.backends.onnx import OnnxBackend
from aligner_integrations.correction import apply_edits
from aligner_integrations.decode import draft_decode, greedy_decode
from aligner_integrations.errors import ModelLoadError
from aligner_integrations.export import export_checkpoint, parity, quantize, write_config
from tests.miniature import exported, trained

QUESTION = "Ann has 2 red pens and finds 5 more. How many pens has she?"
ANSWER = "Ann begins with 2 pens. She has 2 + 5 = 8 pens."
END, KEEP = 1, 2
CONFIG = AlignerConfig("tiny", "sentence", keep_token="<|keep|>", max_length=192)


@cache
def backend(dtype: str) -> OnnxBackend:
    return OnnxBackend.load(exported(dtype), provider="cpu")


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_the_folder_loads_and_corrects(dtype: str) -> None:
    aligner = Aligner.from_pretrained(exported(dtype), safeguards="off")
    correction = aligner.correct(QUESTION, ANSWER)
    assert apply_edits(ANSWER, correction.edits) == correction.text
    assert correction.stats.forwards >= 2
    assert (correction.stats.backend, aligner.granularity) == ("onnx", "sentence")
    assert aligner.config == CONFIG


@pytest.mark.parametrize(("dtype", "least"), [("fp32", 1.0), ("int8", 0.95)])
def test_the_graph_follows_the_checkpoint(dtype: str, least: float) -> None:
    assert parity(trained() / "checkpoint", exported(dtype)) >= least


def test_int8_chooses_as_fp32_does() -> None:
    equal = []
    for seed in range(10):
        ids = np.random.default_rng(seed).integers(0, 320, 60).tolist()
        whole, small = (
            one.forward(ids, one.make_cache(), last=60).argmax(-1)
            for one in (backend("fp32"), backend("int8"))
        )
        equal += (whole == small).tolist()
    assert sum(equal) >= 0.95 * len(equal)


def test_int8_is_small() -> None:
    whole, small = ((exported(dtype) / "model.onnx").stat().st_size for dtype in ("fp32", "int8"))
    assert small < 0.4 * whole


def graph_as_run(folder: Path, out: Path) -> Any:
    """The graph after the runtime's own optimizations, as it computes."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 4  # it warns that the file is made for this machine
    ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return onnx.load(out).graph


def test_the_runtime_unfolds_int8_to_fp32_while_loading(tmp_path: Path) -> None:
    stored = onnx.load(exported("int8") / "model.onnx").graph
    assert any(tensor.data_type == TensorProto.INT8 for tensor in stored.initializer)
    run = graph_as_run(exported("int8"), tmp_path / "optimized.onnx")
    assert not [tensor.name for tensor in run.initializer if tensor.data_type == TensorProto.INT8]
    constants = {tensor.name for tensor in run.initializer}
    assert not [node.name for node in run.node if node.op_type == "Cast" and set(node.input) <= constants]
    assert not [node.name for node in run.node if "Dequantize" in node.op_type]


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(0, 30), st.booleans())
def test_guided_equals_greedy_on_int8(seed: int, changes: int, kept: bool) -> None:
    """Also with a reference that is near to what is written, so that drafts are taken and refused."""
    rng = np.random.default_rng(seed)
    prompt: list[int] = rng.integers(8, 320, 40).tolist()
    keep_id = KEEP if kept else None
    config = DecodeConfig(max_draft_tokens=8)
    plain = greedy_decode(
        backend("int8"), prompt, [], config=config, eos_id=END, max_new_tokens=40, keep_id=keep_id
    )
    reference = list(plain.ids)
    for place in rng.integers(0, max(len(reference), 1), changes % 5):
        reference[place : place + 1] = rng.integers(8, 320, rng.integers(0, 3)).tolist()
    guided = draft_decode(
        backend("int8"), prompt, reference, config=config, eos_id=END, max_new_tokens=40, keep_id=keep_id
    )
    assert (guided.ids, guided.kept) == (plain.ids, plain.kept)
    assert guided.stats.forwards <= plain.stats.forwards


def test_block_and_single_steps_agree_on_int8() -> None:
    ids = np.random.default_rng(3).integers(0, 320, 32).tolist()
    block = backend("int8").forward(ids, backend("int8").make_cache(), last=32)
    memory = backend("int8").make_cache()
    single = np.concatenate([backend("int8").forward([id], memory, last=1) for id in ids])
    assert np.abs(block - single).max() < 1e-4
    assert (block.argmax(-1) == single.argmax(-1)).all()


MATRICES = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(-8, 8, width=32)
)


@given(MATRICES)
def test_quantizing_errs_by_half_a_step_at_most(weights: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    codes, scales = quantize(weights)
    assert codes.dtype == np.int8 and scales.dtype == np.float32
    assert codes.shape == weights.shape and int(np.abs(codes.astype(int)).max()) <= 127
    assert scales.shape in ((1, weights.shape[1]), (weights.shape[0], 1))
    assert (np.abs(codes * scales - weights) <= 0.5001 * scales + 1e-9).all()


def test_quantizing_takes_the_better_axis() -> None:
    weights = np.random.default_rng(0).normal(size=(4, 40)).astype(np.float32)
    weights[:, 0] *= 20.0  # a column of its own size wants a scale of its own
    assert quantize(weights)[1].shape == (1, 40)
    assert quantize(weights.T.copy())[1].shape == (40, 1)


def test_zeros_stay_zeros() -> None:
    codes, scales = quantize(np.zeros((3, 4), dtype=np.float32))
    assert not (codes * scales).any()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_what_a_checkpoint_lacks_is_named(name: str, tmp_path: Path) -> None:
    shutil.copytree(trained() / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / name).unlink()
    with pytest.raises(ModelLoadError, match=rf"is not a checkpoint: {name} is missing"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "model", config=CONFIG)
    assert not (tmp_path / "model").exists()


def test_a_graph_that_does_not_follow_its_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scramble(model: Any) -> None:
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2:
                noise = np.random.default_rng(0).normal(size=tuple(tensor.dims)).astype(np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(noise, tensor.name))

    monkeypatch.setattr(exporting, "store_as_int8", scramble)
    with pytest.raises(ModelLoadError, match="does not follow"):
        export_checkpoint(trained() / "checkpoint", tmp_path / "model", config=CONFIG, dtype="int8")


def test_the_written_config_is_read_back(tmp_path: Path) -> None:
    config = AlignerConfig("tiny", "sentence", 1.5, "<|keep|>", 64, ("en", "de"), "MIT", "größer", "own")
    write_config(config, tmp_path)
    assert AlignerConfig.load(tmp_path) == config
