"""Starting weights that can already copy a little.

Copying needs two attention heads in line (an induction circuit: one that looks at the token before,
one that looks for where the current token stood before and reads what came next). From random
weights it appears only after a long plateau; set up by hand it is there at step 0 and is then
trained like everything else.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

_SHARPNESS = 4.0  # of the look at the token before
_MATCH = 1.5  # of the look for the same token
_FAST_PAIRS = 4  # rotary pairs that tell neighbours apart
_SLOW_PAIR = 12  # from this pair on a rotation over a sentence is small


@torch.no_grad()
def set_up_copying(model: LlamaForCausalLM) -> None:
    """Make head 0 of layer 0 and heads 0 and 1 of layer 1 an induction circuit, in place.

    The model needs biases on its attention projections (`attention_bias`) and at least two heads.
    """
    size = model.config.hidden_size
    head = size // model.config.num_attention_heads
    spread = float(cast(nn.Embedding, model.get_input_embeddings()).weight.std())
    identity = _orthonormal(head, size)
    moved = _orthonormal(head, size)
    _look_back(model, head)
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    first.v_proj.weight[:head] = identity
    first.o_proj.weight[:, :head] = spread * moved.T
    pairs = head // 2
    slow = torch.zeros(head, 1)
    slow[_SLOW_PAIR:pairs] = slow[pairs + _SLOW_PAIR :] = _MATCH
    for number in range(2):
        rows = slice(number * head, (number + 1) * head)
        values = _orthonormal(head, size)
        second.q_proj.weight[rows] = slow * identity
        second.k_proj.weight[rows] = slow * moved
        second.v_proj.weight[rows] = values
        second.o_proj.weight[:, rows] = 2.0 * spread * values.T


def _look_back(model: LlamaForCausalLM, head: int) -> None:
    """Let head 0 of layer 0 look at the token before, whatever it is, by its biases alone."""
    attention = model.model.layers[0].self_attn
    frequencies = model.model.rotary_emb.inv_freq[:_FAST_PAIRS]
    half = head // 2
    attention.q_proj.weight[:head] *= 0.1
    attention.k_proj.weight[:head] *= 0.1
    attention.k_proj.bias[:_FAST_PAIRS] = _SHARPNESS
    attention.q_proj.bias[:_FAST_PAIRS] = _SHARPNESS * frequencies.cos()
    attention.q_proj.bias[half : half + _FAST_PAIRS] = -_SHARPNESS * frequencies.sin()


def _orthonormal(rows: int, columns: int) -> Tensor:
    columns_of_unit: Tensor = torch.linalg.qr(torch.randn(columns, rows))[0]
    return columns_of_unit.T
