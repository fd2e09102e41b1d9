from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from aligner_integrations import DecodeConfig
from aligner_integrations.aligner import BUNDLED_MODEL
from aligner_integrations.backends.base import Row, Scores
from aligner_integrations.backends.onnx import OnnxBackend
from aligner_integrations.decode import draft_decode, greedy_decode
from aligner_integrations.evaluation.bench import run_bench
from aligner_integrations.evaluation.forced import EOS, ForcedOutput, make_patterns
from aligner_integrations.evaluation.memory import run_memory
from aligner_integrations.evaluation.suite import run_suite
from aligner_integrations.evaluation.timing import (
    FORWARD,
    Cost,
    Ratio,
    Run,
    Timing,
    Way,
    bootstrap_ratio,
    fit_cost,
    measure,
)
from tests.models_for_tests import TableBackend, fused_model, onnx_model


def test_the_report_holds_every_way_with_its_forwards(tmp_path: Path) -> None:
    # The test model's context ends at 512; positions beyond it still run, and cost the same.
    report = run_bench(onnx_model(0), rounds=3, answer_tokens=40, provider="cpu", threads=1)
    timings = {timing.name: timing for timing in report.timings}
    assert timings["plain greedy"].forwards == timings["plain greedy"].new_tokens == 41
    assert timings["plain greedy"].blocks == ((84, 1), *[(1, 1)] * 40)
    assert timings["guided, unchanged"].forwards == 1
    assert timings["guided, unchanged"].new_tokens == 41
    assert timings["guided, unchanged"].blocks == ((124, 41),)
    assert timings["prefill"].blocks == ((84, 1),)
    assert timings["prefill, all logits"].blocks == ((84, 84),)
    forwards = [timings[name].forwards for name in ("guided, 1 edit", "guided, 3 edits", "guided, 10 edits")]
    assert 2 <= forwards[0] <= 3  # after an early edit the draft has to grow again
    assert forwards == sorted(forwards)
    assert timings["guided, nothing to copy"].new_tokens == 41
    assert timings["sentence 2"].forwards == timings["sentence 30"].forwards == 1
    for timing in report.timings:
        assert 0 < timing.p5 <= timing.median <= timing.p95
        assert len(timing.samples) == 3
    for ratio in report.ratios:
        assert 0 < ratio.low <= ratio.high
    assert [ratio.goal for ratio in report.ratios if ratio.goal] == [9.0, 1.9, 6.0, 1.05, 1.5]
    assert report.setting["provider"] == "CPUExecutionProvider"
    assert report.setting["threads"] == 1
    assert {"onnxruntime", "numpy", "seed", "load_seconds"} <= report.setting.keys()
    report.write(tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["ratios"][0]["value"] == report.ratios[0].value


@pytest.mark.parametrize("backend", ["table", "plain", "fused"])
def test_the_forced_text_is_what_comes_out(backend: str) -> None:
    """Of one that gives all logits, and of those that score: rows in one forward, and one by one."""
    inner = (
        TableBackend(0, vocabulary=300)
        if backend == "table"
        else OnnxBackend.load(
            (onnx_model if backend == "plain" else fused_model)(0), provider="cpu", threads=1
        )
    )
    for pattern in make_patterns(np.random.default_rng(0), 300, 40):
        forced = ForcedOutput(inner, pattern.text)
        for decode in (greedy_decode, draft_decode):
            forced.blocks.clear()
            decoded = decode(
                forced, pattern.prompt, pattern.answer, config=DecodeConfig(), eos_id=EOS, max_new_tokens=60
            )
            assert decoded.ids == pattern.target
            assert decoded.stats.forwards == len(forced.blocks)
            if decode is greedy_decode or pattern.edits == 0:
                assert decoded.stats.forwards == (41 if decode is greedy_decode else 1)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_forced_scores_are_those_of_forced_logits(fused: bool) -> None:
    """Several texts in one call: each row gets its own, and what is not forced stays as it was."""
    backend = OnnxBackend.load((fused_model if fused else onnx_model)(0), provider="cpu", threads=1)
    prompts, target = ([9, 10, 11], [12, 13, 14, 15, 16]), [50, 60]
    texts = [[*prompt, *target, EOS] for prompt in prompts]
    forced = ForcedOutput(backend, *texts)
    rows = [Row([*prompt, 50, 70], forced.make_cache(), 3) for prompt in prompts]
    for row, found in zip(rows, forced.score(rows), strict=True):
        cache = forced.make_cache()
        logits = forced.forward(row.ids, cache, last=3)
        wanted = Scores.of(logits, row.ids)
        assert found.best == wanted.best == [50, 60, EOS]
        assert found.next_logits[0] == np.inf  # it was drafted, and wins
        assert found.next_logits[1] == pytest.approx(wanted.next_logits[1], abs=1e-4)
        for place in range(3):
            np.testing.assert_allclose(found.row(place), logits[place], atol=1e-4)
    assert forced.blocks[:2] == [(5, 3), (7, 3)]
    assert forced.batches != fused


def test_a_way_that_writes_something_else_is_found_out() -> None:
    ways = [Way("wrong", lambda: Run([1, 2], 1, 2), wanted=[1, 3])]
    with pytest.raises(RuntimeError, match="'wrong' wrote something else"):
        measure(ways, rounds=1, rng=np.random.default_rng(0))


def test_the_cost_of_a_forward_is_found_again() -> None:
    true = Cost(fixed=2e-3, token=1e-4, place=3e-5)
    blocks = [(count, places) for count in (1, 4, 16, 64, 256) for places in (1, count)]
    timings = [Timing("", true.of([block]), 0, 0, 1, 0, (), (block,), FORWARD) for block in blocks]
    found = fit_cost(timings)
    assert (found.fixed, found.token, found.place) == pytest.approx((2e-3, 1e-4, 3e-5))
    assert found.knee == pytest.approx(2e-3 / 1.3e-4)
    slower_alone = [Timing("", 1.0 - 1e-3 * block[1], 0, 0, 1, 0, (), (block,), FORWARD) for block in blocks]
    assert fit_cost(slower_alone).place == 0.0  # nothing is below zero


def test_the_interval_of_a_ratio_holds_it() -> None:
    under = [1.0, 1.1, 0.9, 1.05, 0.95, 30.0]
    value, low, high = bootstrap_ratio([2 * seconds for seconds in under], under)
    assert low == value == high == pytest.approx(2.0)
    value, low, high = bootstrap_ratio([2.0, 2.2, 1.8, 2.1, 9.0], [1.0, 1.0, 1.1, 0.9, 1.0])
    assert low < value < high
    assert Ratio("r", 8.5, 8, 9, goal=8.0, at_least=True).met
    assert not Ratio("r", 2.1, 2, 3, goal=2.0).met
    assert Ratio("r", 1, 1, 1).met is None


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    report = run_memory(BUNDLED_MODEL, answer_tokens=60, provider="cpu")
    assert report.answer_tokens >= 60
    assert report.model_bytes < report.loaded_bytes <= report.peak_bytes
    assert report.to_dict()["grown_bytes"] == report.peak_bytes - report.loaded_bytes


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rounds"):
        run_bench(onnx_model(0), rounds=0)
    with pytest.raises(ValueError, match="answer_tokens"):
        run_bench(onnx_model(0), answer_tokens=3)
    with pytest.raises(ValueError, match="size"):
        run_suite("answer", size="100m", model="elsewhere")
    with pytest.raises(ValueError, match="data"):
        run_suite("replay")
    with pytest.raises(ValueError, match="'memory'"):
        run_suite("memory", peers=True)
    with pytest.raises(ValueError, match="100m"):
        run_suite("answer", size="100t")
