from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from aligner_integrations.backends import BACKENDS, load_backend
from aligner_integrations.backends.base import Backend, KVCache, Logits, SideBySide
from aligner_integrations.backends.onnx import OnnxBackend, available_cores
from aligner_integrations.errors import ModelLoadError
from tests.models_for_tests import fused_model, onnx_model

IDS = [7, 40, 290, 3, 3, 12, 99, 140, 55, 201]


@pytest.fixture(scope="module")
def traced() -> OnnxBackend:
    """As the general exporter writes it: every forward returns a new cache."""
    return OnnxBackend.load(onnx_model(0), provider="cpu", threads=1)


@pytest.fixture(scope="module", params=[onnx_model, fused_model], ids=["traced", "fused"])
def backend(request: pytest.FixtureRequest) -> OnnxBackend:
    return OnnxBackend.load(request.param(0), provider="cpu", threads=1)


def run(backend: Backend, ids: list[int], *, last: int | None = None) -> Logits:
    return backend.forward(ids, backend.make_cache(), last=last or len(ids))


def test_it_is_the_protocol(backend: OnnxBackend) -> None:
    checked: Backend = backend
    cache: KVCache = checked.make_cache()
    assert (checked.name, checked.provider, cache.length) == ("onnx", "CPUExecutionProvider", 0)


def test_logits_have_one_row_for_each_of_the_last_tokens(backend: OnnxBackend) -> None:
    whole = run(backend, IDS)
    assert whole.shape == (10, 300)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(run(backend, IDS, last=3), whole[-3:])
    for last in (0, 11):
        with pytest.raises(ValueError, match="last"):
            backend.forward(IDS, backend.make_cache(), last=last)


@pytest.mark.parametrize("cuts", [[1, 2], [5], [9], list(range(1, 10))])
def test_in_pieces_it_gives_what_it_gives_at_once(backend: OnnxBackend, cuts: list[int]) -> None:
    cache = backend.make_cache()
    rows = [
        backend.forward(IDS[start:stop], cache, last=stop - start)
        for start, stop in zip([0, *cuts], [*cuts, 10], strict=True)
    ]
    np.testing.assert_allclose(np.concatenate(rows), run(backend, IDS), atol=1e-4)
    assert cache.length == 10


def test_after_a_trim_nothing_is_left_of_what_was_cut_off(backend: OnnxBackend) -> None:
    cache = backend.make_cache()
    backend.forward([*IDS[:6], 250, 251, 252], cache, last=1)
    cache.trim(8)
    cache.trim(6)
    assert cache.length == 6
    np.testing.assert_allclose(backend.forward(IDS[6:], cache, last=4), run(backend, IDS)[-4:], atol=1e-4)
    cache.trim(0)
    np.testing.assert_array_equal(backend.forward(IDS, cache, last=10), run(backend, IDS))
    for length in (-1, 11):
        with pytest.raises(ValueError, match="length"):
            cache.trim(length)


def test_logits_stay_as_they_were_when_the_cache_goes_on(backend: OnnxBackend) -> None:
    cache = backend.make_cache()
    first = backend.forward(IDS, cache, last=10)
    before = first.copy()
    for _ in range(20):
        backend.forward([5], cache, last=1)
        cache.trim(10)
    np.testing.assert_array_equal(first, before)


def test_one_backend_serves_many_threads(backend: OnnxBackend) -> None:
    def work(seed: int) -> Logits:
        cache = backend.make_cache()
        ids = np.random.default_rng(seed).integers(0, 300, 30).tolist()
        for id in ids[:-1]:
            backend.forward([id], cache, last=1)
        return backend.forward(ids[-1:], cache, last=1)

    alone = [work(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, range(8)))
    np.testing.assert_array_equal(alone, together)


def test_the_fused_graph_gives_what_the_traced_one_gives(traced: OnnxBackend) -> None:
    fused = OnnxBackend.load(fused_model(0), threads=1)
    np.testing.assert_allclose(run(fused, IDS), run(traced, IDS), atol=1e-4)


def test_a_cache_outgrows_its_buffers_and_loses_nothing() -> None:
    fused = OnnxBackend.load(fused_model(0), threads=1)
    ids = np.random.default_rng(0).integers(0, 300, 500).tolist()
    cache = fused.make_cache()
    rows = [fused.forward(ids[start : start + 100], cache, last=100) for start in range(0, 500, 100)]
    np.testing.assert_allclose(np.concatenate(rows), run(fused, ids), atol=1e-3)


def test_the_fused_graph_runs_as_any_other_when_no_buffers_are_shared(traced: OnnxBackend) -> None:
    """Names and shapes are those of the general exporter, for programs that know only those."""
    session = ort.InferenceSession(fused_model(0) / "model.onnx", providers=["CPUExecutionProvider"])
    known = ort.InferenceSession(onnx_model(0) / "model.onnx", providers=["CPUExecutionProvider"])
    for ours, theirs in zip(
        (session.get_inputs(), session.get_outputs()), (known.get_inputs(), known.get_outputs()), strict=True
    ):
        assert {(node.name, node.type) for node in ours} == {(node.name, node.type) for node in theirs}
    names = [node.name for node in session.get_inputs() if node.name.startswith("past_key_values")]
    past = dict.fromkeys(names, np.zeros((1, 2, 0, 16), dtype=np.float32))
    rows = []
    for start, end in ((0, 4), (4, 10)):
        feeds = {
            "input_ids": np.array([IDS[start:end]]),
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(start, end)[None],
        }
        logits, *present = session.run(
            ["logits", *(name.replace("past_key_values", "present") for name in names)], feeds | past
        )
        past = dict(zip(names, present, strict=True))
        rows.append(logits[0])
    np.testing.assert_allclose(np.concatenate(rows), run(traced, IDS), atol=1e-4)


def rewrite(folder: Path, change: object) -> Path:
    assert callable(change)
    model = onnx.load(onnx_model(0) / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx")
    return folder


def test_weights_may_lie_beside_the_model(traced: OnnxBackend, tmp_path: Path) -> None:
    model = onnx.load(onnx_model(0) / "model.onnx")
    onnx.save_model(
        model,
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=64,
    )
    assert (tmp_path / "model.onnx_data").stat().st_size > 10_000
    np.testing.assert_array_equal(run(OnnxBackend.load(tmp_path, threads=1), IDS), run(traced, IDS))
    (tmp_path / "model.onnx_data").unlink()
    with pytest.raises(ModelLoadError, match=r"model\.onnx"):
        OnnxBackend.load(tmp_path)


def test_positions_are_given_only_to_a_graph_that_takes_them(traced: OnnxBackend, tmp_path: Path) -> None:
    def fix_positions(model: onnx.ModelProto) -> None:
        (node,) = [node for node in model.graph.input if node.name == "position_ids"]
        model.graph.input.remove(node)
        constant = onnx.numpy_helper.from_array(np.arange(10, dtype=np.int64)[None], "position_ids")
        model.graph.initializer.append(constant)

    without = OnnxBackend.load(rewrite(tmp_path, fix_positions), threads=1)
    np.testing.assert_array_equal(run(without, IDS), run(traced, IDS))


def test_a_missing_folder_and_a_missing_file_are_told_with_the_cure(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelLoadError, match=r"model\.onnx does not exist.*aligner export"):
            load_backend("onnx", folder)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07" * 400])
def test_a_corrupt_file_is_a_load_error_with_its_cause(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model\.onnx") as caught:
        load_backend("onnx", tmp_path)
    assert caught.value.__cause__ is not None


def test_a_truncated_file_is_a_load_error(tmp_path: Path) -> None:
    content = (onnx_model(0) / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelLoadError, match=r"model\.onnx"):
        load_backend("onnx", tmp_path)


def test_a_graph_without_a_cache_is_refused(tmp_path: Path) -> None:
    def drop_outputs(model: onnx.ModelProto) -> None:
        for node in [node for node in model.graph.output if node.name.startswith("present.1.")]:
            model.graph.output.remove(node)

    with pytest.raises(ModelLoadError, match=r"present\.1\.key"):
        OnnxBackend.load(rewrite(tmp_path, drop_outputs))

    def rename_inputs(model: onnx.ModelProto) -> None:
        value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
        out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
        model.graph.CopyFrom(
            onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "neg", [value], [out])
        )

    with pytest.raises(ModelLoadError, match="input_ids"):
        OnnxBackend.load(rewrite(tmp_path, rename_inputs))


def test_unknown_backends_and_providers_are_value_errors() -> None:
    assert BACKENDS == ("onnx", "torch")
    with pytest.raises(ValueError, match="backend must be one of onnx, torch; got 'tensorflow'"):
        load_backend("tensorflow", onnx_model(0))
    with pytest.raises(ValueError, match="provider must be one of"):
        load_backend("onnx", onnx_model(0), provider="gpu")


SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:]
from aligner_integrations.backends import load_backend
from aligner_integrations.errors import MissingDependencyError
{hide}
try:
    load_backend("onnx", "nowhere")
except ImportError as error:
    print(isinstance(error, MissingDependencyError), error.name, error)
"""


def load_in_a_fresh_python(hide: str, *path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(hide=hide), *map(str, path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["."])},
    )
    return done.stdout


def test_without_onnxruntime_the_extras_are_named(tmp_path: Path) -> None:
    hide = """
import importlib.abc
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "onnxruntime":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""
    told = load_in_a_fresh_python(hide)
    assert told.startswith("True onnxruntime")
    assert "aligner-integrations[onnx]" in told
    assert "aligner-integrations[onnx-gpu]" in told


def test_a_broken_onnxruntime_is_not_called_missing(tmp_path: Path) -> None:
    package = tmp_path / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text("import a_part_that_is_not_there\n")
    assert load_in_a_fresh_python("", tmp_path).startswith("False a_part_that_is_not_there")


def test_the_core_does_not_load_onnxruntime() -> None:
    code = """
import sys, aligner_integrations.backends, aligner_integrations.decode
print("onnxruntime" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert done.stdout.strip() == "False"


# --- many texts side by side


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aligner_integrations.backends.onnx.available_cores", lambda: 4)


@pytest.mark.parametrize("model", [onnx_model, fused_model])
def test_a_batch_runs_on_one_thread_a_text_with_the_same_logits(cores: None, model: Any) -> None:
    whole = OnnxBackend.load(model(0), provider="cpu")
    assert isinstance(whole, SideBySide)
    side, workers = whole.for_batches()
    assert workers == 4
    assert (side.name, side.provider) == (whole.name, whole.provider)
    assert side._session.get_session_options().intra_op_num_threads == 1
    np.testing.assert_allclose(run(side, IDS), run(whole, IDS), atol=1e-4)
    with ThreadPoolExecutor(8) as pool:  # made once, whoever asks
        assert {id(pool.submit(whole.for_batches).result()[0]) for _ in range(8)} == {id(side)}


def test_threads_that_were_asked_for_are_the_share_of_a_batch(cores: None) -> None:
    assert OnnxBackend.load(onnx_model(0), provider="cpu", threads=2).for_batches()[1] == 2
    alone = OnnxBackend.load(onnx_model(0), provider="cpu", threads=1)
    assert alone.for_batches() == (alone, 1)


def test_on_one_core_nothing_runs_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aligner_integrations.backends.onnx.available_cores", lambda: 1)
    backend = OnnxBackend.load(onnx_model(0), provider="cpu")
    assert backend.for_batches() == (backend, 1)


def test_a_large_model_is_not_held_twice(cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = OnnxBackend.load(onnx_model(0), provider="cpu")
    size = (onnx_model(0) / "model.onnx").stat().st_size
    monkeypatch.setattr("aligner_integrations.backends.onnx._SMALL_MODEL", size - 1)
    assert backend.for_batches() == (backend, 1)
    monkeypatch.setattr("aligner_integrations.backends.onnx._SMALL_MODEL", size)
    assert backend.for_batches()[1] == 4


def test_another_model_in_the_folder_is_not_taken_for_this_one(cores: None, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((onnx_model(0) / "model.onnx").read_bytes())
    backend = OnnxBackend.load(tmp_path, provider="cpu")
    os.utime(path, (1, 1))
    assert backend.for_batches() == (backend, 1)
    path.unlink()
    assert backend.for_batches() == (backend, 1)
    bare = OnnxBackend(ort.InferenceSession(onnx_model(0) / "model.onnx"), provider="CPUExecutionProvider")
    assert bare.for_batches() == (bare, 1)


def test_cores_are_those_of_this_process() -> None:
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))
