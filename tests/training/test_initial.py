"""The induction circuit set up by hand: it copies at once and learns to copy soon."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from aligner_integrations.training.initial import set_up_copying

VOCABULARY = 300
STEPS = 30


def small_model(*, copying: bool) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_theta=1e5,
        attention_bias=True,
        bos_token_id=None,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    if copying:
        set_up_copying(model)
    return model


def repeated(seed: int) -> Tensor:
    """Random sequences, each twice in a row: (16, 40)."""
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(8, VOCABULARY, (16, 20), generator=generator)
    return torch.cat([once, once], dim=1)


def loss_on_repetition(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean loss of predicting the second half, which the first half gives away."""
    half = ids.shape[1] // 2
    logits = model(input_ids=ids).logits[:, half:-1]
    return nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, half + 1 :].reshape(-1))


@cache
def losses(copying: bool) -> tuple[float, float]:
    """Held-out loss before and after a few steps."""
    model = small_model(copying=copying)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98))
    unseen = repeated(10_000)
    with torch.no_grad():
        before = float(loss_on_repetition(model, unseen))
    for step in range(STEPS):
        loss_on_repetition(model, repeated(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return before, float(loss_on_repetition(model, unseen))


def test_it_copies_before_any_training() -> None:
    model, ids = small_model(copying=True), repeated(10_000)
    half = ids.shape[1] // 2
    with torch.no_grad():
        chosen = model(input_ids=ids).logits[:, half + 1 : -1].argmax(-1)
    assert float((chosen == ids[:, half + 2 :]).float().mean()) > 0.6


def test_it_learns_to_copy_where_plain_weights_stand_still() -> None:
    assert losses(True)[1] < 0.75 * losses(True)[0]
    assert losses(True)[1] < 0.5 * losses(False)[1]


@pytest.mark.parametrize("head", [0, 1])
def test_the_first_heads_of_layer_0_look_one_and_two_tokens_back(head: int) -> None:
    model, ids = small_model(copying=True), repeated(1)
    with torch.no_grad():
        attention = model(input_ids=ids, output_attentions=True).attentions[0][:, head]
    back, length = head + 1, ids.shape[1]
    assert bool((attention[:, back:].argmax(-1) == torch.arange(length - back)).all())
    assert float(attention[:, range(back, length), range(length - back)].mean()) > 0.6


def test_setting_up_repeats_itself() -> None:
    once, again = (small_model(copying=True).state_dict() for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)
