"""Starting weights that can already copy.

Copying needs attention heads in line (an induction circuit: heads that bring along the tokens before,
and heads that look for where the same tokens stood earlier and read what came next). From random
weights it appears only after a long plateau; set up by hand it is there at step 0 and is then
trained like everything else.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

_SHARPNESS = 6.0  # of the look at a token before
_FAST_PAIRS = 4  # rotary pairs that tell neighbours apart
_MOVED = 3.0  # how loud a neighbour's token is beside a position's own
_MATCH = 4.0  # of the look for the same tokens
# Slow rotary pairs hardly turn over a sentence: the first share matches the current token, the second the
# one before it. The shares are of a head's pairs and suit a `rope_theta` of 100,000.
_SLOW_SHARES = (11 / 32, 21 / 32, 1.0)
_COPY = 12.0  # how loud the copied token is in the output
_GAIN = 5.0  # of the final norm: from likeness to logits


@torch.no_grad()
def set_up_copying(model: LlamaForCausalLM) -> None:
    """Make heads 0 and 1 of layer 0 and all heads of layer 1 an induction circuit of two tokens, in place.

    The model needs biases on its attention projections (`attention_bias`), one key head a query head,
    and at least two heads.
    """
    size = model.config.hidden_size
    head = size // model.config.num_attention_heads
    spread = float(cast(nn.Embedding, model.get_input_embeddings()).weight.std())
    own, one_back, two_back = (_rotation(size)[:head] for _ in range(3))
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    for number, moved in enumerate((one_back, two_back)):
        rows = slice(number * head, (number + 1) * head)
        _look_back(model, rows, distance=number + 1)
        first.v_proj.weight[rows] = own
        first.o_proj.weight[:, rows] = _MOVED * spread * moved.T
    current, before = _slow_pairs(head)
    values = _rotation(size)
    for start in range(0, size, head):
        rows = slice(start, start + head)
        # Where did my token, and the one before it, stand just before some position? Read that position.
        second.q_proj.weight[rows] = _MATCH * (current * own + before * one_back)
        second.k_proj.weight[rows] = _MATCH * (current * one_back + before * two_back)
        second.v_proj.weight[rows] = values[rows]
        second.o_proj.weight[:, rows] = _COPY * spread * values[rows].T
    model.model.norm.weight.fill_(_GAIN)


def _look_back(model: LlamaForCausalLM, rows: slice, *, distance: int) -> None:
    """Let a head of layer 0 look `distance` tokens back, whatever is there, by its biases alone."""
    attention = model.model.layers[0].self_attn
    turns = distance * model.model.rotary_emb.inv_freq[:_FAST_PAIRS]
    start, half = rows.start, (rows.stop - rows.start) // 2
    attention.q_proj.weight[rows] *= 0.1
    attention.k_proj.weight[rows] *= 0.1
    attention.k_proj.bias[start : start + _FAST_PAIRS] = _SHARPNESS
    attention.q_proj.bias[start : start + _FAST_PAIRS] = _SHARPNESS * turns.cos()
    attention.q_proj.bias[start + half : start + half + _FAST_PAIRS] = -_SHARPNESS * turns.sin()


def _slow_pairs(head: int) -> tuple[Tensor, Tensor]:
    """Return two masks over a head's dimensions, (head, 1): for the current token and the one before."""
    pairs = head // 2
    borders = [round(share * pairs) for share in _SLOW_SHARES]
    masks = torch.zeros(2, head, 1)
    for mask, (low, high) in zip(masks, pairwise(borders), strict=True):
        mask[low:high] = mask[pairs + low : pairs + high] = 1.0
    return masks[0], masks[1]


def _rotation(size: int) -> Tensor:
    matrix: Tensor = torch.linalg.qr(torch.randn(size, size))[0]
    return matrix
