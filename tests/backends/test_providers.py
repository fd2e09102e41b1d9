from __future__ import annotations

import logging

import onnxruntime
import pytest

from aligner_integrations.backends.onnx import OnnxBackend
from aligner_integrations.backends.providers import FULL_NAMES, choose_providers, report_fallback
from aligner_integrations.errors import ProviderUnavailableError
from tests.models_for_tests import onnx_model

EVERYTHING = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
CPU_ONLY = ["AzureExecutionProvider", "CPUExecutionProvider"]


def test_auto_tries_the_best_first_and_only_what_is_listed() -> None:
    assert choose_providers("auto", EVERYTHING) == ["tensorrt", "cuda", "cpu"]
    assert choose_providers("auto", CPU_ONLY) == ["cpu"]


def test_a_name_is_tried_alone() -> None:
    for name in FULL_NAMES:
        assert choose_providers(name, EVERYTHING) == [name]


def test_a_provider_that_is_not_listed_is_an_error_with_its_cure() -> None:
    with pytest.raises(ProviderUnavailableError, match=r"'cuda'.*AzureExecutionProvider.*onnx-gpu"):
        choose_providers("cuda", CPU_ONLY)


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


def test_what_is_reported_is_what_the_session_runs_on() -> None:
    for asked in ("auto", "cpu"):
        backend = OnnxBackend.load(onnx_model(0), provider=asked)
        session = onnxruntime.InferenceSession(onnx_model(0) / "model.onnx", providers=[backend.provider])
        assert session.get_providers()[0] == backend.provider
