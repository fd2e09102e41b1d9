"""Held-out figures during training: how well keeping and changing are told apart."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from aligner_integrations.training.curriculum import CORRECTION, KEEP, PREFIX, QUESTION, SENTENCE
from aligner_integrations.training.rows import Row

_ROWS_A_TASK = 120
_PAIRS = {"sum-wrong": "sum-right", "rude": "polite", "harmful": "good"}


@torch.no_grad()
def held_out_figures(
    model: LlamaForCausalLM, tokenizer: Tokenizer, rows: list[Row], *, device: str
) -> dict[str, float]:
    """Return the share kept per task at margin 0, and the area under the curve per pair of tasks."""
    model.eval()
    scores: dict[str, list[float]] = {}
    for task in ("sum-wrong", "sum-right", "rude", "polite", "harmful", "good", "ordinary"):
        chosen = [row for row in rows if row.dev and row.task == task]
        random.Random(task).shuffle(chosen)
        scores[task] = [_score(model, tokenizer, row, device) for row in chosen[:_ROWS_A_TASK]]
    model.train()
    figures = {f"keep {t}": round(sum(s <= 0 for s in v) / max(len(v), 1), 3) for t, v in scores.items()}
    for bad, good in _PAIRS.items():
        figures[f"auc {bad}"] = round(_area(scores[bad], scores[good]), 3)
    return figures


def _score(model: LlamaForCausalLM, tokenizer: Tokenizer, row: Row, device: str) -> float:
    """Best other logit minus the keep token's: above the margin the sentence is changed."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    ids = [QUESTION, *encode(row.question), PREFIX, *encode(row.prefix), SENTENCE, *encode(row.sentence)]
    logits = model(torch.tensor([[*ids, CORRECTION]], device=device)[:, -1000:]).logits[0, -1].clone()
    keep = float(logits[KEEP])
    logits[KEEP] = -torch.inf
    return float(logits.max()) - keep


def _area(positives: list[float], negatives: list[float]) -> float:
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    return wins / max(len(positives) * len(negatives), 1)
