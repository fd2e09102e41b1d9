"""ONNX Runtime and PyTorch, both on the CPU in fp32, write the same ids."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
import torch

from aligner_integrations.backends.base import Backend
from aligner_integrations.backends.onnx import OnnxBackend
from aligner_integrations.backends.torch import TorchBackend
from aligner_integrations.config import DecodeConfig
from aligner_integrations.decode import draft_decode, greedy_decode
from tests.checkpoints import ARCHITECTURES, WINDOW, checkpoint, plain_onnx

PROMPTS = 100  # each decoded twice: plainly, and guided by an edit of what was written
NEW_TOKENS = 8
EOS = 1
# The seeds are such that every best token is ahead of the next by this much, ten times what the two runtimes
# differ by: the cases are of arithmetic, not of the last bit, and so hold on other machines.
LEAST_LEAD = 2e-4
SEEDS = {"llama": 0, "gemma": 0, "gemma2": 0, "qwen2": 1, "mistral": 0}


def edited(ids: list[int], random: Random, *, below: int) -> list[int]:
    """Leave `ids` as they are, or replace, put in or take away a few."""
    ids = list(ids)
    for _ in range(random.choice([0, 1, 1, 2])):
        at = random.randrange(len(ids) + 1)
        ids[at : at + random.randrange(3)] = [random.randrange(3, below) for _ in range(random.randrange(3))]
    return ids


def decode(backend: Backend, prompt: list[int], reference: list[int] | None) -> list[int]:
    run = greedy_decode if reference is None else draft_decode
    config = DecodeConfig(max_draft_tokens=4)
    return run(backend, prompt, reference or [], config=config, eos_id=EOS, max_new_tokens=NEW_TOKENS).ids


def least_lead(backend: Backend, prompt: list[int], written: list[int]) -> float:
    """How far the best token is ahead at the place where it is least."""
    count = min(len(written) + 1, NEW_TOKENS)  # an end-of-text that was written is not among the ids
    ids = (prompt + written)[: len(prompt) + count - 1]
    logits = np.sort(backend.forward(ids, backend.make_cache(), last=count), axis=1)
    return float((logits[:, -1] - logits[:, -2]).min())


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing by a second thread, and on a busy machine the first waits for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_t21_the_same_ids_in_200_cases(architecture: str) -> None:
    in_onnx = OnnxBackend.load(plain_onnx(architecture), provider="cpu", threads=1)
    in_torch = TorchBackend.load(checkpoint(architecture), device="cpu")
    random = Random(SEEDS[architecture])
    cases, lead, seen = 0, np.inf, set()
    for _ in range(PROMPTS):
        length = random.randrange(1, 2 * WINDOW)
        prompt = [random.randrange(3, in_torch.vocab_size) for _ in range(length)]
        written = decode(in_onnx, prompt, None)
        assert decode(in_torch, prompt, None) == written
        reference = edited(written, random, below=in_torch.vocab_size)
        assert decode(in_torch, prompt, reference) == decode(in_onnx, prompt, reference) == written
        lead = min(lead, least_lead(in_onnx, prompt, written))
        cases += 2
        seen.update(written)
    assert cases == 200
    assert len(seen) > 100
    assert lead > LEAST_LEAD
