from __future__ import annotations

from itertools import pairwise

import pytest

from aligner_integrations.aligner import BUNDLED_MODEL
from aligner_integrations.evaluation.batches import run_batch_bench


def test_the_report_holds_both_ways_and_their_ratio() -> None:
    report = run_batch_bench(BUNDLED_MODEL, rounds=2, texts=6, provider="cpu")
    assert [timing.name for timing in report.timings] == ["one by one", "batch"]
    for one, other in pairwise(report.timings):
        assert one.forwards == other.forwards >= 6  # the same work, done side by side
        assert len(one.samples) == len(other.samples) == 2
    (ratio,) = report.ratios
    assert (ratio.name, ratio.goal, ratio.at_least) == ("one by one : batch", 1.5, True)
    assert 0 < ratio.low <= ratio.value <= ratio.high
    assert report.setting["texts"] == 6


def test_too_few_texts_are_named() -> None:
    with pytest.raises(ValueError, match="texts"):
        run_batch_bench(BUNDLED_MODEL, texts=1)
