from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from aligner_integrations import Aligner
from aligner_integrations.aligner import BUNDLED_MODEL
from aligner_integrations.evaluation.batches import forced_answers, run_batch_bench
from aligner_integrations.evaluation.bench_models import Size, write_random_model
from tests.miniature import make_folder

SIZE = Size(hidden=64, inner=96, layers=2, heads=4, key_heads=2, vocabulary=300, context=1024)


def test_the_report_holds_both_ways_and_their_ratio() -> None:
    report = run_batch_bench(BUNDLED_MODEL, rounds=2, texts=6, provider="cpu")
    names = ["one by one", "batch", "one by one, 8 ragged answers", "batch, 8 ragged answers"]
    assert [timing.name for timing in report.timings] == names
    for one, other in pairwise(report.timings):
        if other.name.startswith("batch"):
            assert one.forwards == other.forwards >= 6  # the same work, done side by side
            assert one.new_tokens == other.new_tokens
        assert len(one.samples) == len(other.samples) == 2
    for ratio in report.ratios:
        assert (ratio.goal, ratio.at_least) == (1.5, True)
        assert 0 < ratio.low <= ratio.value <= ratio.high
    assert [ratio.name for ratio in report.ratios] == [
        "one by one : batch",
        "one by one : batch, 8 ragged answers",
    ]
    assert report.setting["texts"] == 6
    ragged = report.timings[2]
    assert ragged.new_tokens > ragged.forwards  # some sentences are rewritten, not only kept


@pytest.mark.parametrize("attention", ["plain", "fused"])
def test_answers_of_a_random_model_are_forced(attention: str) -> None:
    folder = make_folder("random") / "random"
    write_random_model(folder, SIZE, attention="plain" if attention == "plain" else "fused")
    aligner = Aligner.from_pretrained(folder, provider="cpu")
    pairs, forced = forced_answers(aligner, [12, 30, 7], np.random.default_rng(0))
    for corrections in (forced.correct_batch(pairs), [forced.correct(*pair) for pair in pairs]):
        words = [zip(each.answer.split(), each.text.split(), strict=True) for each in corrections]
        assert [sum(old != new for old, new in each) for each in words] == [0, 1, 2]
        assert {each.stats.finish_reason for each in corrections} == {"eos"}
    report = run_batch_bench(folder, rounds=1, provider="cpu")
    assert [ratio.name for ratio in report.ratios] == ["one by one : batch, 8 ragged answers"]
    one, batch = report.timings
    assert one.new_tokens == batch.new_tokens
    assert one.forwards == batch.forwards  # as each row counts them


def test_too_few_texts_are_named() -> None:
    with pytest.raises(ValueError, match="texts"):
        run_batch_bench(BUNDLED_MODEL, texts=1)
