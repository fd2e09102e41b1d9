"""What needs an NVIDIA GPU; `tests/conftest.py` says which of it a machine cannot run, and why."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from aligner_integrations import Aligner, DecodeConfig
from aligner_integrations.aligner import BUNDLED_MODEL
from aligner_integrations.backends import load_backend
from aligner_integrations.backends.base import Backend
from aligner_integrations.backends.providers import FULL_NAMES
from aligner_integrations.decode import Decoded, draft_decode, greedy_decode
from aligner_integrations.errors import ProviderUnavailableError
from tests.checkpoints import SENTENCES, checkpoint, plain_onnx
from tests.miniature import make_folder

PROVIDER = "cuda"
CASES = 40
EOS = 1
NEW_TOKENS = 24
PAIRS = [(SENTENCES[(at + 2) % 5], " ".join(SENTENCES[at : at + 2])) for at in range(4)]


@cache
def exported(**options: Any) -> Path:
    """The small Llama as `aligner export` writes it."""
    from aligner_integrations.export import export_checkpoint

    folder = make_folder("gpu-export") / "out"
    export_checkpoint(checkpoint("llama"), folder, template="aligner-v1", **options)
    return folder


def decode(backend: Backend, prompt: list[int], reference: list[int] | None) -> Decoded:
    run = greedy_decode if reference is None else draft_decode
    return run(backend, prompt, reference or [], config=DecodeConfig(), eos_id=EOS, max_new_tokens=NEW_TOKENS)


def identical(backend: Backend) -> tuple[int, int, int]:
    """Cases in which guided and greedy decoding write the same ids, and the forwards of each."""
    random, same, guided_forwards, greedy_forwards = Random(0), 0, 0, 0
    for case in range(CASES):
        prompt = [random.randrange(3, 300) for _ in range(random.randrange(1, 48))]
        greedy = decode(backend, prompt, None)
        reference = list(greedy.ids)
        if case % 2 and reference:
            reference[random.randrange(len(reference))] = random.randrange(3, 300)
        guided = decode(backend, prompt, reference)
        same += guided.ids == greedy.ids
        guided_forwards += guided.stats.forwards
        greedy_forwards += greedy.stats.forwards
    return same, guided_forwards, greedy_forwards


@pytest.fixture(scope="module")
def aligner() -> Aligner:
    return Aligner.from_pretrained(plain_onnx("llama"), provider=PROVIDER, template="aligner-v1")


@pytest.mark.gpu
def test_cuda_loads_and_is_what_runs(aligner: Aligner) -> None:
    assert aligner.backend.provider == FULL_NAMES[PROVIDER]
    stats = aligner.correct(*PAIRS[0]).stats
    assert stats.provider == FULL_NAMES[PROVIDER]


@pytest.mark.gpu
def test_cuda_gives_the_logits_of_the_cpu(aligner: Aligner) -> None:
    cpu = load_backend("onnx", plain_onnx("llama"), provider="cpu")
    ids = list(range(3, 103))
    for backend in (cpu, aligner.backend):
        cache = backend.make_cache()
        first = backend.forward(ids, cache, last=100)
        cache.trim(40)
        again = backend.forward(ids[40:], cache, last=60)
        np.testing.assert_allclose(again, first[40:], atol=1e-3, rtol=1e-3)
    expected = cpu.forward(ids, cpu.make_cache(), last=100)
    np.testing.assert_allclose(first, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
def test_guided_is_greedy_in_fp32(aligner: Aligner) -> None:
    same, guided, greedy = identical(aligner.backend)
    assert same == CASES
    assert 2 * guided < greedy


@pytest.mark.gpu
def test_in_half_precision_the_rate_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    backend = load_backend("onnx", exported(dtype="fp16"), provider=PROVIDER)
    assert backend.provider == FULL_NAMES[PROVIDER]
    same, guided, greedy = identical(backend)
    with capsys.disabled():
        print(
            f"\nfp16 on {backend.provider}: guided == greedy in {same} of {CASES}, {guided}:{greedy} forwards"
        )
    assert 2 * same > CASES


@pytest.mark.gpu
def test_a_batch_equals_one_by_one(aligner: Aligner) -> None:
    batch = aligner.correct_batch(PAIRS)
    assert [each.proposed for each in batch] == [aligner.correct(*pair).proposed for pair in PAIRS]


@pytest.mark.gpu
def test_a_stream_does_not_depend_on_its_draft(aligner: Aligner) -> None:
    question, answer = PAIRS[0]
    chunks = [answer[at : at + 7] for at in range(0, len(answer), 7)]
    plain = aligner.with_options(decode=DecodeConfig(draft=False))
    texts = [[part.text for part in each.correct_stream(question, chunks)] for each in (aligner, plain)]
    assert texts[0] == texts[1] and texts[0]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "model"), [("tensorrt", "plain"), ("cuda", "plain"), ("cuda", "bundled")])
def test_a_provider_runs_or_says_what_it_lacks(name: str, model: str) -> None:
    folder = exported(attention="plain") if model == "plain" else BUNDLED_MODEL
    try:
        backend = load_backend("onnx", folder, provider=name)
    except ProviderUnavailableError as error:
        # The bundled model's attention is fused, in fp32: ONNX Runtime has that for the CPU alone.
        assert ("GroupQueryAttention" if model == "bundled" else "pip install") in str(error)
        assert (name, model) != ("cuda", "plain")
        return
    assert backend.provider == FULL_NAMES[name]
    cpu = load_backend("onnx", folder, provider="cpu")
    ids = list(range(3, 67))
    for last in (64, 5):
        ours, theirs = (each.forward(ids, each.make_cache(), last=last) for each in (backend, cpu))
        np.testing.assert_allclose(ours, theirs, atol=5e-3, rtol=5e-3)


@pytest.mark.gpu
def test_auto_takes_the_first_that_really_loads() -> None:
    best = next(name for name in FULL_NAMES if loads(name))
    assert load_backend("onnx", plain_onnx("llama")).provider == FULL_NAMES[best]


def loads(name: str) -> bool:
    try:
        load_backend("onnx", plain_onnx("llama"), provider=name)
    except ProviderUnavailableError:
        return False
    return True


@pytest.mark.gpu("torch")
def test_pytorch_on_the_gpu_is_greedy_in_fp32() -> None:
    backend = load_backend("torch", checkpoint("llama"), device="cuda", dtype="float32")
    assert backend.provider.startswith("cuda")
    same, guided, greedy = identical(backend)
    assert same == CASES
    assert 2 * guided < greedy
