"""The induction circuit set up by hand: it copies at once and learns to copy soon."""

from __future__ import annotations

from functools import cache

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
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
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


def test_it_copies_a_little_before_any_training() -> None:
    assert losses(True)[0] < 0.95 * losses(False)[0]


def test_it_learns_to_copy_where_plain_weights_stand_still() -> None:
    assert losses(True)[1] < 0.5 * losses(True)[0]
    assert losses(True)[1] < 0.5 * losses(False)[1]


def test_head_0_of_layer_0_looks_at_the_token_before() -> None:
    model, ids = small_model(copying=True), repeated(1)
    with torch.no_grad():
        attention = model(input_ids=ids, output_attentions=True).attentions[0][:, 0]
    length = ids.shape[1]
    assert bool((attention[:, 1:].argmax(-1) == torch.arange(length - 1)).all())
    assert float(attention[:, range(1, length), range(length - 1)].mean()) > 0.6


def test_setting_up_repeats_itself() -> None:
    once, again = (small_model(copying=True).state_dict() for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)
