"""The graph step: logits only where they are wanted, and what decoding asks about them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from aligner_integrations.errors import ModelLoadError
from aligner_integrations.logit_graph import narrow_logits
from tests.checkpoints import ARCHITECTURES, plain_onnx
from tests.models_for_tests import fused_model

Feeds = dict[str, np.ndarray[Any, Any]]
SCORES = ("best_ids", "best_logits", "next_logits")


def session_of(source: Any) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # it warns that `logits_from` is no constant, as it is meant to be
    model = source if isinstance(source, str) else source.SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def feeds_for(session: Any, ids: np.ndarray[Any, Any]) -> Feeds:
    """What a prefill of `ids`, of shape (batch, length), takes."""
    batch, length = ids.shape
    given: Feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(length), (batch, 1)),
    }
    inputs = {each.name: each for each in session.get_inputs()}
    given = {name: array for name, array in given.items() if name in inputs}
    return given | {
        name: np.zeros((batch, each.shape[1], 0, each.shape[3]), dtype=np.float32)
        for name, each in inputs.items()
        if name.startswith("past_key_values.")
    }


def check_narrow(session: Any, given: Feeds, full: np.ndarray[Any, Any], start: int) -> None:
    """What is fed `logits_from` gives the end of all logits, and the scores of the same places."""
    ids = given["input_ids"]
    names = ["logits", *SCORES]
    fed = given if start == 0 else given | {"logits_from": np.array([start])}
    logits, best_ids, best_logits, next_logits = session.run(names, fed)
    np.testing.assert_allclose(logits, full[:, start:], atol=2e-5, rtol=1e-5)
    assert best_ids.dtype == np.int64 and best_logits.dtype == next_logits.dtype == np.float32
    np.testing.assert_array_equal(best_ids, logits.argmax(-1))
    np.testing.assert_array_equal(best_logits, logits.max(-1).astype(np.float32))
    following = np.concatenate([ids[:, start + 1 :], ids[:, :1]], axis=1)[..., None]
    wanted = np.take_along_axis(logits, following, 2)[..., 0]
    np.testing.assert_array_equal(next_logits, wanted.astype(np.float32))


@cache
def pair(name: str) -> tuple[Any, Any]:
    """Sessions of a graph before and after the step."""
    folder = fused_model(0) if name == "fused" else plain_onnx(name)
    model = onnx.load(folder / "model.onnx")
    return session_of(model), session_of(narrow_logits(model))


@pytest.mark.parametrize("name", ["fused", *ARCHITECTURES])
def test_logits_are_those_of_the_graph_as_it_was(name: str) -> None:
    before, after = pair(name)
    ids = np.random.default_rng(0).integers(0, 290, (2, 30))
    given = feeds_for(before, ids)
    (full,) = before.run(["logits"], given)
    for start in (0, 1, 17, 29):
        check_narrow(after, given, full, start)


@pytest.mark.parametrize("name", ["fused", "gemma2"])
def test_a_program_that_does_not_know_the_step_sees_the_same_graph(name: str) -> None:
    before, after = pair(name)
    assert [each.name for each in after.get_inputs()] == [each.name for each in before.get_inputs()]
    outputs = [(each.name, each.type, each.shape) for each in after.get_outputs()]
    assert outputs[: -len(SCORES)] == [(each.name, each.type, each.shape) for each in before.get_outputs()]
    assert [name for name, _, _ in outputs[-len(SCORES) :]] == list(SCORES)
    given = feeds_for(before, np.arange(10)[None])
    for old, new in zip(before.run(None, given), after.run(None, given), strict=False):
        np.testing.assert_array_equal(old, new)


def test_the_step_is_taken_once() -> None:
    model = narrow_logits(onnx.load(fused_model(0) / "model.onnx"))
    once = model.SerializeToString()
    assert narrow_logits(model).SerializeToString() == once


VOCABULARY, HIDDEN = 11, 8


def decoder(project: Callable[[list[Any]], list[Any]], **constants: np.ndarray[Any, Any]) -> Any:
    """A "decoder" that embeds each id and projects it: `project` adds nodes from `hidden` to `logits`."""
    rng = np.random.default_rng(1)
    arrays = {"embed": rng.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32), **constants}
    arrays["head"] = rng.normal(size=(HIDDEN, VOCABULARY)).astype(np.float32)
    nodes = project([helper.make_node("Gather", ["embed", "input_ids"], ["hidden"])])
    kind = nodes[-1].attribute[0].i if nodes[-1].op_type == "Cast" else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", kind, ["batch", "length", VOCABULARY])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def tied(nodes: list[Any]) -> list[Any]:
    turned = helper.make_node("Transpose", ["embed"], ["turned"], perm=[1, 0])
    return [turned, *nodes, helper.make_node("MatMul", ["hidden", "turned"], ["logits"])]


def capped_and_cast(nodes: list[Any]) -> list[Any]:
    return [
        *nodes,
        helper.make_node("MatMul", ["hidden", "head"], ["raw"]),
        helper.make_node("Div", ["raw", "cap"], ["small"]),
        helper.make_node("Tanh", ["small"], ["bent"]),
        helper.make_node("Mul", ["cap", "bent"], ["wide"]),
        helper.make_node("Cast", ["wide"], ["logits"], to=TensorProto.FLOAT16),
    ]


def flattened(nodes: list[Any]) -> list[Any]:
    """As an exporter writes a linear layer with a bias: rows of all places, and back."""
    return [
        *nodes,
        helper.make_node("Reshape", ["hidden", "rows"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head", "bias"], ["product"]),
        helper.make_node("Shape", ["input_ids"], ["places"]),
        helper.make_node("Concat", ["places", "last"], ["shape"], axis=0),
        helper.make_node("Reshape", ["product", "shape"], ["logits"]),
    ]


def rounded(nodes: list[Any]) -> list[Any]:
    """As dynamic quantization writes it; what is rounded stays rounded by all places."""
    return [
        *nodes,
        helper.make_node("DynamicQuantizeLinear", ["hidden"], ["codes", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["codes", "head8", "zero"], ["exact"]),
        helper.make_node("Cast", ["exact"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["scale", "scale8"], ["scales"]),
        helper.make_node("Mul", ["floats", "scales"], ["logits"]),
    ]


def one(value: float) -> np.ndarray[Any, Any]:
    return np.array(value, dtype=np.float32)


FORMS: dict[str, Any] = {
    "tied": lambda: decoder(tied),
    "capped and cast": lambda: decoder(capped_and_cast, cap=one(3.0)),
    "flattened": lambda: decoder(
        flattened,
        rows=np.array([-1, HIDDEN]),
        last=np.array([VOCABULARY]),
        bias=np.arange(VOCABULARY, dtype=np.float32),
    ),
    "rounded": lambda: decoder(
        rounded,
        head8=np.random.default_rng(2).integers(-127, 127, (HIDDEN, VOCABULARY)).astype(np.int8),
        scale8=one(0.01),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_projections_of_every_form_are_found(form: str) -> None:
    model = FORMS[form]()
    given = {"input_ids": np.random.default_rng(0).integers(0, VOCABULARY, (3, 7))}
    (full,) = session_of(model).run(["logits"], given)
    narrowed = narrow_logits(model)
    onnx.checker.check_model(narrowed, full_check=True)
    for start in (0, 3, 6):
        check_narrow(session_of(narrowed), given, full, start)


def test_of_equal_logits_the_lowest_id_is_best() -> None:
    model = decoder(tied)
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.ones((VOCABULARY, HIDDEN), dtype=np.float32), "embed")
    )
    best_ids, *_ = session_of(narrow_logits(model)).run(["best_ids"], {"input_ids": np.array([[3, 4]])})
    assert best_ids.tolist() == [[0, 0]]


def test_weights_in_a_file_of_their_own_need_not_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(FORMS["tied"](), path, save_as_external_data=True, location="weights", size_threshold=0)
    given = {"input_ids": np.array([[5, 6, 7]])}
    (full,) = session_of(str(path)).run(["logits"], given)
    model = narrow_logits(onnx.load(path, load_external_data=False))
    path.write_bytes(model.SerializeToString())
    check_narrow(session_of(str(path)), given, full, 1)


def test_a_graph_that_cannot_be_narrowed_says_why() -> None:
    bare = decoder(lambda nodes: [*nodes, helper.make_node("Softmax", ["hidden"], ["logits"])])
    with pytest.raises(ModelLoadError, match="no output projection"):
        narrow_logits(bare)
    nameless = FORMS["tied"]()
    nameless.graph.output[0].name = "scores"
    with pytest.raises(ModelLoadError, match="lacks the input input_ids or the output logits"):
        narrow_logits(nameless)
    old = FORMS["tied"]()
    old.opset_import[0].version = 12
    with pytest.raises(ModelLoadError, match="opset 12"):
        narrow_logits(old)
