"""The figures that a run logs."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from aligner_integrations.training.held_out import _area, held_out_figures
from aligner_integrations.training.rows import load_rows
from tests.miniature import data_folder, trained


@pytest.mark.parametrize(
    ("positives", "negatives", "area"),
    [([2.0, 3.0], [0.0, 1.0], 1.0), ([0.0], [1.0], 0.0), ([1.0], [1.0], 0.5), ([0.0, 2.0], [1.0], 0.5)],
)
def test_area_under_the_curve(positives: list[float], negatives: list[float], area: float) -> None:
    assert _area(positives, negatives) == area


def test_figures_repeat_and_leave_the_model_training() -> None:
    model = LlamaForCausalLM.from_pretrained(trained() / "checkpoint").train()
    tokenizer = Tokenizer.from_file(str(trained() / "tokenizer.json"))
    rows = load_rows(data_folder())
    once, again = (held_out_figures(model, tokenizer, rows, device="cpu") for _ in range(2))
    assert once == again
    assert model.training
    assert all(0.0 <= share <= 1.0 for share in once.values())
