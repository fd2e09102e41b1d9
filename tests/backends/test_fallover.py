"""T20: a provider that fails in mid-run. The next one goes on, and the text is what it would have been."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import onnxruntime as ort
import pytest
from onnxruntime.capi import _pybind_state as native

from aligner_integrations import Aligner
from aligner_integrations.aligner import BUNDLED_MODEL
from aligner_integrations.backends.base import CacheLostError
from aligner_integrations.backends.onnx import OnnxBackend
from aligner_integrations.backends.session import open_session, rungs_below
from aligner_integrations.errors import CorrectionFailedError, ProviderUnavailableError

QUESTION = "What is 12 + 13?"
ANSWER = "The sum of 12 and 13 is 26. That is so. It is 26 and no more. So 12 + 13 = 26. "
CPU = "CPUExecutionProvider"
LOST = native.RuntimeException("CUDA failure 700: an illegal memory access was encountered")


class Dying:
    """A real session whose provider fails at one of its runs, and at all that come after it."""

    def __init__(self, session: ort.InferenceSession, at: int, error: Exception = LOST) -> None:
        self._session = session
        self._left = at
        self._error = error
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_ortvaluevector(self, *args: Any) -> Any:
        with self._lock:
            self._left -= 1
            dead = self._left < 0
        if dead:
            raise self._error
        return self._session.run_with_ortvaluevector(*args)


@cache
def bundled() -> Aligner:
    return Aligner.from_pretrained(threads=1)


def dying(at: int, *, error: Exception = LOST, rungs: tuple[str, ...] = ("cpu",)) -> Aligner:
    """The bundled aligner on a provider that dies, with real ones below it."""
    path = BUNDLED_MODEL / "model.onnx"
    session, found = open_session(path, provider="cpu", threads=1)
    backend = OnnxBackend(Dying(session, at, error), provider=found, file=path, threads=1, rungs=rungs)
    return Aligner(backend, bundled().tokenizer, bundled().config)


@pytest.mark.parametrize("at", range(6))
def test_t20_whenever_it_fails_the_text_is_the_same(at: int, caplog: pytest.LogCaptureFixture) -> None:
    wanted = bundled().correct(QUESTION, ANSWER)
    assert at < wanted.stats.forwards
    aligner = dying(at)
    found = aligner.correct(QUESTION, ANSWER)
    assert (found.text, found.proposed, found.findings) == (wanted.text, wanted.proposed, wanted.findings)
    assert found.stats.new_tokens == wanted.stats.new_tokens
    assert found.stats.provider == aligner.backend.provider == CPU
    warnings = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert all("RuntimeException" in each and "illegal" not in each for each in warnings)
    # It is gone for good, and nothing is left of it.
    assert aligner.correct(QUESTION, ANSWER).text == wanted.text
    assert len([each for each in caplog.records if each.levelno >= logging.WARNING]) == 1


def test_t20_a_stream_goes_on_though_its_cache_is_lost() -> None:
    """Another stream finds the failure; this one held a cache on the lost provider."""
    wanted = [each.text for each in bundled().correct_stream(QUESTION, [ANSWER])]
    aligner = dying(3)
    first, rest = ANSWER[:30], ANSWER[30:]
    stream = aligner.stream(QUESTION)
    shown = stream.push(first)
    assert aligner.correct(QUESTION, ANSWER).text == "".join(wanted)  # here it dies
    shown += [*stream.push(rest), *stream.close()]
    assert [each.text for each in shown] == wanted
    assert [each.index for each in shown] == list(range(len(wanted)))


def test_t20_many_threads_meet_it_at_once(caplog: pytest.LogCaptureFixture) -> None:
    wanted = bundled().correct(QUESTION, ANSWER).text
    aligner = dying(20)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: aligner.correct(QUESTION, ANSWER).text, range(48)))
    assert set(found) == {wanted}
    assert len([each for each in caplog.records if each.levelno >= logging.WARNING]) == 1


def test_t20_a_rung_that_does_not_load_is_passed_over() -> None:
    assert (
        dying(1, rungs=("cuda", "cpu")).correct(QUESTION, ANSWER).text
        == bundled().correct(QUESTION, ANSWER).text
    )


def test_t20_it_falls_within_a_deadline_too() -> None:
    """The correction is in a thread of its own then; when it is late, its load is not in vain."""
    wanted = bundled().correct(QUESTION, ANSWER)
    assert dying(2).correct(QUESTION, ANSWER, sentence_seconds=60.0).text == wanted.text
    before = set(threading.enumerate())
    aligner = dying(0)
    late = aligner.correct(QUESTION, ANSWER, sentence_seconds=1e-4, on_error="pass_through")
    assert late.text == ANSWER
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
    assert aligner.correct(QUESTION, ANSWER).text == wanted.text


def test_t20_without_a_rung_the_correction_fails_as_it_did() -> None:
    aligner = dying(0, rungs=())
    with pytest.raises(CorrectionFailedError, match="RuntimeException"):
        aligner.correct(QUESTION, ANSWER)
    assert aligner.correct(QUESTION, ANSWER, on_error="pass_through").text == ANSWER


@pytest.mark.parametrize("error", [native.InvalidArgument("bad shape"), ValueError("bad ids")])
def test_t20_what_the_input_is_to_blame_for_is_no_reason_to_fall(error: Exception) -> None:
    aligner = dying(0, error=error)
    with pytest.raises(CorrectionFailedError) as failed:
        aligner.correct(QUESTION, ANSWER)
    assert failed.value.__cause__ is error


def test_t20_a_cache_of_the_lost_rung_is_refused_and_a_new_one_taken() -> None:
    backend = dying(1).backend
    ids = [5, 6, 7]
    old = backend.make_cache()
    backend.forward(ids, old, last=1)
    with pytest.raises(CacheLostError):
        backend.forward(ids, old, last=1)
    with pytest.raises(CacheLostError):
        backend.forward(ids, old, last=1)
    assert backend.forward(ids, backend.make_cache(), last=1).shape[0] == 1


def test_t20_the_rungs_are_those_below_what_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ["TensorrtExecutionProvider", "CUDAExecutionProvider", CPU]
    monkeypatch.setattr(ort, "get_available_providers", lambda: listed)
    assert rungs_below("TensorrtExecutionProvider") == ["cuda", "cpu"]
    assert rungs_below("CUDAExecutionProvider") == ["cpu"]
    assert rungs_below(CPU) == []
    with pytest.raises(ProviderUnavailableError):  # a name asks for that provider and no other
        OnnxBackend.load(BUNDLED_MODEL, provider="cuda")
