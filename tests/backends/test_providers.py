from __future__ import annotations

import logging
from pathlib import Path

import onnxruntime
import pytest

from aligner_integrations.backends.onnx import OnnxBackend
from aligner_integrations.backends.providers import (
    BUCKETS,
    FULL_NAMES,
    GraphInput,
    ProfileShapes,
    bucket,
    choose_providers,
    cuda_options,
    explain_failure,
    explain_missing,
    explain_placement,
    libraries_in,
    needed_libraries,
    report_fallback,
    tensorrt_options,
)
from aligner_integrations.errors import ProviderUnavailableError
from tests.models_for_tests import onnx_model

EVERYTHING = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
CPU_ONLY = ["AzureExecutionProvider", "CPUExecutionProvider"]
INPUTS = (
    GraphInput("input_ids", (None, None), "other"),
    GraphInput("attention_mask", (None, None), "other"),
    GraphInput("logits_from", (1,), "other"),
    GraphInput("past_key_values.0.key", (None, 4, None, 64), "float16"),
    GraphInput("past_key_values.0.value", (None, 4, None, 64), "float16"),
)
# As the libraries of onnxruntime-gpu 1.31.1 spell them, and as they spell a yes.
CUDA_KNOWS = {"device_id", "gpu_mem_limit", "arena_extend_strategy", "use_tf32", "enable_cuda_graph"}
TENSORRT_KNOWS = {
    *("trt_fp16_enable", "trt_bf16_enable", "trt_layer_norm_fp32_fallback", "trt_engine_cache_enable"),
    *("trt_engine_cache_path", "trt_timing_cache_enable", "trt_timing_cache_path"),
    *("trt_context_memory_sharing_enable", "trt_profile_min_shapes", "trt_profile_opt_shapes"),
    *("trt_profile_max_shapes", "device_id"),
}
# What onnxruntime-gpu 1.31.1 said on machines without TensorRT, without a GPU, and to a misspelt option.
NO_LIBRARY = (
    "[ONNXRuntimeError] : 1 : FAIL : Failed to load library libonnxruntime_providers_cuda.so with error: "
    "libcublasLt.so.13: cannot open shared object file: No such file or directory"
)
NO_TENSORRT = (
    "/onnxruntime_src/onnxruntime/python/onnxruntime_pybind_state.cc:729 void onnxruntime::python::"
    "RegisterTensorRTPluginsAsCustomOps(PySessionOptions&, const onnxruntime::ProviderOptions&) Please "
    "install TensorRT libraries as mentioned in the GPU requirements page, make sure they're in the PATH or "
    "LD_LIBRARY_PATH, and that your GPU is supported.\n"
)
NO_DEVICE = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:146 std::conditional_t<THRW, void, "
    "common::Status> onnxruntime::CudaCall(ERRTYPE, const char*, const char*, SUCCTYPE, const char*, const "
    "char*, int) CUDA failure 100: no CUDA-capable device is detected ; GPU=-1 ; hostname=vm ; "
    "file=/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_execution_provider.cc ; line=355 ; "
    "expr=cudaSetDevice(info_.device_id); "
)
NO_OPTION = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_execution_provider_info.cc:63 static onnxruntime::"
    "CUDAExecutionProviderInfo onnxruntime::CUDAExecutionProviderInfo::FromProviderOptions(const onnxruntime"
    "::ProviderOptions&) [ONNXRuntimeError] : 1 : FAIL : provider_options_utils.h:182 Parse Unknown provider "
    'option: "nonsense".\n'
)


def test_t20_auto_tries_the_best_first_and_only_what_is_listed() -> None:
    assert choose_providers("auto", EVERYTHING) == ["tensorrt", "cuda", "cpu"]
    assert choose_providers("auto", CPU_ONLY) == ["cpu"]


def test_a_name_is_tried_alone() -> None:
    for name in FULL_NAMES:
        assert choose_providers(name, EVERYTHING) == [name]


def test_a_provider_that_is_not_listed_is_an_error_with_its_cure() -> None:
    with pytest.raises(ProviderUnavailableError, match=r"'cuda'.*AzureExecutionProvider.*onnxruntime-gpu"):
        choose_providers("cuda", CPU_ONLY)
    with pytest.raises(
        ProviderUnavailableError, match=r"overwrite each other.*uninstall -y onnxruntime onnx"
    ):
        choose_providers("cuda", CPU_ONLY, installed=["onnxruntime", "onnxruntime-gpu"])


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "CUDAExecutionProvider"])
def test_an_unknown_name_is_a_value_error_that_names_the_argument(name: str) -> None:
    with pytest.raises(ValueError, match=r"provider must be one of auto, tensorrt, cuda, cpu"):
        choose_providers(name, EVERYTHING)


def test_a_fallback_is_told_once_with_what_was_asked_used_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report_fallback(asked="auto", used="cpu", why={})
        assert not caplog.records
        report_fallback(asked="auto", used="cpu", why={"cuda": "libcudart.so.13 is missing"})
    (record,) = caplog.records
    for word in ("auto", "cpu", "cuda", "libcudart.so.13 is missing"):
        assert word in record.getMessage()


@pytest.mark.parametrize(
    ("length", "planned"), [(1, 1), (2, 16), (16, 16), (17, 64), (1024, 1024), (2000, 2000)]
)
def test_lengths_are_planned_in_buckets(length: int, planned: int) -> None:
    assert bucket(length) == planned
    assert ProfileShapes().block == BUCKETS[-1]


def test_every_free_input_has_its_range_and_no_other() -> None:
    options = tensorrt_options({}, INPUTS, shapes=ProfileShapes(batch=8, block=256, past=2048), cache=None)
    profiles = {
        key: dict(part.split(":") for part in options[f"trt_profile_{key}_shapes"].split(","))
        for key in ("min", "opt", "max")
    }
    assert {name for profile in profiles.values() for name in profile} == {
        node.name for node in INPUTS if None in node.sizes
    }
    assert profiles["min"]["past_key_values.0.key"] == "1x4x0x64"
    assert profiles["opt"]["input_ids"] == "1x64"
    assert profiles["max"] == {
        "input_ids": "8x256",
        "attention_mask": "8x2304",
        "past_key_values.0.key": "8x4x2048x64",
        "past_key_values.0.value": "8x4x2048x64",
    }


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("float", None), ("float16", "trt_fp16_enable"), ("bfloat16", "trt_bf16_enable")],
)
def test_the_precision_is_that_of_the_graph(kind: str, precision: str | None, tmp_path: Path) -> None:
    inputs = [GraphInput("past_key_values.0.key", (None, 4, None, 64), kind)]
    options = tensorrt_options({}, inputs, shapes=ProfileShapes(), cache=tmp_path / "model")
    lowered = {"trt_fp16_enable", "trt_bf16_enable"} & options.keys()
    assert lowered == ({precision} if precision else set())
    assert ("trt_layer_norm_fp32_fallback" in options) == bool(precision)
    assert options["trt_engine_cache_path"] == str(tmp_path / "model")
    assert options["trt_timing_cache_path"] == str(tmp_path)
    assert options.keys() <= TENSORRT_KNOWS
    assert {options[key] for key in options if key.endswith("_enable")} == {"True"}


def test_what_the_user_asks_for_wins_and_reaches_the_provider_it_is_for() -> None:
    user = {"device_id": 1, "use_tf32": True, "trt_fp16_enable": False, "trt_profile_min_shapes": "x:1"}
    cuda = cuda_options(user)
    assert cuda == {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "True", "device_id": "1"}
    assert cuda.keys() <= CUDA_KNOWS
    tensorrt = tensorrt_options(user, INPUTS, shapes=ProfileShapes(), cache=None)
    assert (tensorrt["trt_fp16_enable"], tensorrt["trt_profile_min_shapes"]) == ("False", "x:1")
    assert tensorrt["device_id"] == "1" and "use_tf32" not in tensorrt
    assert cuda_options({})["use_tf32"] == "0"


def test_missing_libraries_come_with_the_command_that_brings_them() -> None:
    driver = explain_missing(["libcuda.so.1"])
    assert "no NVIDIA driver" in driver and "pip install" not in driver
    cuda = explain_missing(["libcublas.so.13", "libnvrtc.so.13"])
    assert "libcublas.so.13, libnvrtc.so.13 missing" in cuda and "onnxruntime-gpu[cuda,cudnn]" in cuda
    assert "tensorrt" not in cuda
    tensorrt = explain_missing(["libnvinfer.so.10", "libnvonnxparser.so.10", "libnvinfer.so.10"])
    assert tensorrt.count("libnvinfer.so.10") == 1
    assert "tensorrt-cu13>=10.14,<11" in tensorrt and "onnxruntime-gpu" not in tensorrt


def test_what_onnx_runtime_says_becomes_one_line() -> None:
    assert libraries_in(NO_LIBRARY) == ["libcublasLt.so.13"]
    assert "libcublasLt.so.13 missing" in explain_failure(NO_LIBRARY)
    assert explain_failure(NO_TENSORRT) == "ONNX Runtime could not load TensorRT's libraries"
    assert explain_failure(NO_DEVICE) == "CUDA says: no CUDA-capable device is detected (error 100)"
    assert explain_failure(NO_OPTION) == "provider_options holds 'nonsense', which it does not know"
    assert explain_failure("something\n  else") == "something else"


def test_a_library_says_what_it_needs() -> None:
    shared = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_shared.so"
    assert "libc.so.6" in needed_libraries(shared)


def test_a_provider_runs_only_when_it_has_the_work() -> None:
    cuda, cpu = FULL_NAMES["cuda"], FULL_NAMES["cpu"]
    shapes = [(cpu, "Shape"), (cpu, "Gather"), (cpu, "Concat")] * 50
    assert explain_placement("cuda", [*shapes, (cuda, "MatMul"), (cuda, "GroupQueryAttention")]) is None
    assert explain_placement("cuda", [*shapes, (cuda, "MatMul"), (cuda, "MatMul"), (cpu, "MatMul")]) is None
    most = explain_placement("cuda", [(cuda, "MatMul"), *[(cpu, "DynamicQuantizeMatMul")] * 3])
    assert most is not None and "1 of 4" in most and "DynamicQuantizeMatMul" in most
    # Attention away from the cache would carry all of it to and fro, however many products run here.
    assert explain_placement("cuda", [(cuda, "MatMul")] * 40 + [(cpu, "GroupQueryAttention")]) is not None
    assert explain_placement("tensorrt", [(cuda, "MatMul")] * 4) is not None


def pretend_to_have(monkeypatch: pytest.MonkeyPatch, providers: list[str]) -> None:
    """What ONNX Runtime lists is what it was built with, whether or not it loads on this machine."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)


def test_honest_provider_whether_or_not_what_is_listed_loads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_to_have(monkeypatch, EVERYTHING)
    folder = onnx_model(0)
    with caplog.at_level(logging.WARNING):
        used = OnnxBackend.load(folder, provider="auto").provider
    told = [
        record.getMessage() for record in caplog.records if record.name.startswith("aligner_integrations")
    ]
    assert len(told) == (used != FULL_NAMES["tensorrt"])
    for name, full in FULL_NAMES.items():
        if full == used:
            break
        # It was tried in vain: the warning says so, and asking for it by name is an error.
        assert name in told[0]
        with pytest.raises(ProviderUnavailableError, match=f"'{name}'"):
            OnnxBackend.load(folder, provider=name)
    assert OnnxBackend.load(folder, provider="cpu").provider == "CPUExecutionProvider"


def test_t20_what_is_reported_is_what_the_session_runs_on() -> None:
    for asked in ("auto", "cpu"):
        backend = OnnxBackend.load(onnx_model(0), provider=asked)
        session = onnxruntime.InferenceSession(onnx_model(0) / "model.onnx", providers=[backend.provider])
        assert session.get_providers()[0] == backend.provider
