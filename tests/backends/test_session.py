from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from huggingface_hub import constants

from aligner_integrations.backends.providers import (
    FULL_NAMES,
    ProfileShapes,
    engine_cache_folder,
    explain_placement,
)
from aligner_integrations.backends.session import (
    _tensorrt_options,
    _unknown_to,
    available_cores,
    open_session,
    read_graph,
    without_bad_engines,
)
from aligner_integrations.errors import ModelLoadError, ProviderUnavailableError
from tests.models_for_tests import fused_model, onnx_model

LISTED = list(FULL_NAMES.values())
NOWHERE = b"libq.so.6"  # as long as libc.so.6, and no library has that name


def test_a_session_and_what_runs_it() -> None:
    session, provider = open_session(onnx_model(0) / "model.onnx", threads=1)
    assert provider == session.get_providers()[0]
    options = session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    assert options.execution_mode == ort.ExecutionMode.ORT_SEQUENTIAL
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    session, provider = open_session(onnx_model(0) / "model.onnx", provider="cpu")
    assert provider == "CPUExecutionProvider"
    assert session.get_session_options().intra_op_num_threads == available_cores()
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("content", [None, b"", b"no model", bytes(range(256)) * 9])
@pytest.mark.parametrize("provider", ["auto", "cpu"])
def test_a_file_that_is_no_model_is_named(content: bytes | None, provider: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model\.onnx"):
        open_session(path, provider=provider)


@pytest.mark.parametrize("model", [onnx_model, fused_model], ids=["traced", "fused"])
def test_a_graph_is_read_as_onnx_reads_it(model: Callable[[int], Path]) -> None:
    path = model(0) / "model.onnx"
    graph, expected = read_graph(path), onnx.load(path).graph
    assert [node.name for node in graph.inputs] == [node.name for node in expected.input]
    for node, other in zip(graph.inputs, expected.input, strict=True):
        sizes = [size.dim_value or None for size in other.type.tensor_type.shape.dim]
        assert list(node.sizes) == sizes
        assert (node.kind == "float") == (other.type.tensor_type.elem_type == onnx.TensorProto.FLOAT)
    own = {node.op_type for node in expected.node if node.domain == "com.microsoft"}
    assert set(graph.own_operators) == own


def test_weights_in_a_file_of_their_own_are_not_touched(tmp_path: Path) -> None:
    model = onnx.load(onnx_model(0) / "model.onnx")
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    whole = read_graph(onnx_model(0) / "model.onnx")
    (tmp_path / "model.onnx_data").unlink()
    assert read_graph(tmp_path / "model.onnx") == whole


@pytest.mark.parametrize("stop", [1, 100, -1])
def test_a_torn_file_is_an_error_and_not_a_guess(stop: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((onnx_model(0) / "model.onnx").read_bytes()[:stop])
    with pytest.raises(ModelLoadError, match="is no ONNX model"):
        read_graph(path)


def test_fused_attention_is_for_providers_that_have_it() -> None:
    fused, traced = (read_graph(make(0) / "model.onnx") for make in (fused_model, onnx_model))
    assert "GroupQueryAttention" in (_unknown_to("tensorrt", fused) or "")
    assert "fp16" in (_unknown_to("cuda", fused) or "")
    assert _unknown_to("tensorrt", traced) is _unknown_to("cuda", traced) is None


def test_engines_are_kept_apart_by_all_they_depend_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    path = tmp_path / "model.onnx"
    shutil.copy(onnx_model(0) / "model.onnx", path)

    def folder(user: dict[str, object], shapes: ProfileShapes) -> Path:
        options = _tensorrt_options(path, read_graph(path), user, shapes)
        return Path(options["trt_engine_cache_path"])

    with caplog.at_level(logging.INFO):
        plain = folder({}, ProfileShapes())
    assert plain.is_dir() and plain.is_relative_to(tmp_path / "home")
    assert "builds an engine" in caplog.text
    assert folder({}, ProfileShapes()) == plain
    others = {folder({"trt_fp16_enable": True}, ProfileShapes()), folder({}, ProfileShapes(past=64))}
    os.utime(path, ns=(1, 1))
    others.add(folder({}, ProfileShapes()))
    assert len(others | {plain}) == 4
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    options = _tensorrt_options(path, read_graph(path), {}, ProfileShapes())
    assert "trt_engine_cache_enable" not in options and "trt_profile_max_shapes" in options


def test_t20_bad_engines_are_deleted_and_built_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    ours, users = engine_cache_folder() / "key", tmp_path / "users"
    path = onnx_model(0) / "model.onnx"

    def make() -> ort.InferenceSession:
        """What TensorRT does with an engine that it cannot read; everything after that is real."""
        for folder in (ours, users):
            for engine in folder.glob("*.engine"):
                raise RuntimeError(f"cannot read {engine.name}")
        return ort.InferenceSession(path)

    for folder in (ours, users):
        folder.mkdir(parents=True)
        (folder / "one.engine").write_bytes(b"torn")
        (folder / "one.profile").write_bytes(b"")
        if folder == users:  # that is not ours to delete
            with pytest.raises(RuntimeError, match="cannot read"):
                without_bad_engines(folder, make)
            assert len(list(folder.iterdir())) == 2
        else:
            assert without_bad_engines(folder, make).get_inputs()
            assert list(folder.iterdir()) == []
            assert "are built anew" in caplog.text
    for nothing in (None, ours):  # no engine is to blame
        with pytest.raises(RuntimeError, match="cannot read"):
            without_bad_engines(nothing, make)


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An ONNX Runtime for GPUs whose CUDA provider needs a library that is nowhere; its site-packages."""
    site = tmp_path / "site-packages"
    capi = site / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    shared = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_shared.so"
    needy = shared.read_bytes().replace(b"libc.so.6", NOWHERE)
    for name in ("cuda", "tensorrt"):
        (capi / f"libonnxruntime_providers_{name}.so").write_bytes(needy)
    monkeypatch.setattr(ort, "__file__", str(site / "onnxruntime" / "__init__.py"))
    monkeypatch.setattr(ort, "get_available_providers", lambda: LISTED)
    return site


def test_a_missing_library_is_named_and_nothing_is_printed(
    gpu_build: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = onnx_model(0) / "model.onnx"
    for name in ("cuda", "tensorrt"):
        with pytest.raises(ProviderUnavailableError, match=rf"'{name}'.*libq\.so\.6 missing.*pip install"):
            open_session(path, provider=name)
    with caplog.at_level(logging.WARNING):
        _, provider = open_session(path)
    assert provider == "CPUExecutionProvider"
    (record,) = caplog.records
    assert record.getMessage().count("libq.so.6") == 2
    assert capfd.readouterr() == ("", "")


def test_a_library_in_a_package_of_pip_is_found(gpu_build: Path) -> None:
    packaged = gpu_build / "nvidia" / "cu13" / "lib" / NOWHERE.decode()
    packaged.parent.mkdir(parents=True)
    real = Path(np.__file__).parents[1] / "onnxruntime" / "capi" / "libonnxruntime_providers_shared.so"
    shutil.copy(real, packaged)
    with pytest.raises(ProviderUnavailableError) as raised:
        open_session(onnx_model(0) / "model.onnx", provider="cuda")
    assert "libq.so.6" not in str(raised.value)


def test_where_the_operators_run_is_asked_of_the_session() -> None:
    session, _ = open_session(fused_model(0) / "model.onnx", provider="cpu")
    parts = session.get_provider_graph_assignment_info()
    placed = [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]
    assert explain_placement("cpu", placed) is None
    assert "GroupQueryAttention" in (explain_placement("cuda", placed) or "")
