from __future__ import annotations

import json
from pathlib import Path

import pytest

from aligner_integrations.backends.onnx import OnnxBackend
from aligner_integrations.config import DecodeConfig
from aligner_integrations.decode import greedy_decode
from aligner_integrations.evaluation.bench import ForcedOutput, Ratio, bootstrap_ratio, run_bench
from tests.models_for_tests import onnx_model


def test_the_report_holds_every_way_with_its_forwards(tmp_path: Path) -> None:
    # The test model's context ends at 512; positions beyond it still run, and cost the same.
    report = run_bench(onnx_model(0), rounds=3, answer_tokens=40, provider="cpu", threads=1)
    timings = {timing.name: timing for timing in report.timings}
    assert timings["plain greedy"].forwards == timings["plain greedy"].new_tokens == 41
    assert timings["guided, unchanged"].forwards == 1
    assert timings["guided, unchanged"].new_tokens == 41
    assert timings["prefill"].forwards == 1
    forwards = [timings[name].forwards for name in ("guided, 1 edit", "guided, 3 edits", "guided, 10 edits")]
    assert 2 <= forwards[0] <= 3  # after an early edit the draft has to grow again
    assert forwards == sorted(forwards)
    assert timings["sentence 2"].forwards == timings["sentence 30"].forwards == 1
    for timing in report.timings:
        assert 0 < timing.p5 <= timing.median <= timing.p95
        assert len(timing.samples) == 3
    for ratio in report.ratios:
        assert 0 < ratio.low <= ratio.high
    assert [ratio.goal for ratio in report.ratios if ratio.goal] == [8.0, 2.0, 1.5]
    assert report.setting["provider"] == "CPUExecutionProvider"
    report.write(tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["ratios"][0]["value"] == report.ratios[0].value


def test_the_forced_text_is_what_comes_out_of_a_real_session() -> None:
    backend = OnnxBackend.load(onnx_model(0), provider="cpu", threads=1)
    prompt, text = [9, 10, 11], [50, 60, 70, 80]
    forced = ForcedOutput(backend, [*prompt, *text, 1])
    decoded = greedy_decode(forced, prompt, [], config=DecodeConfig(), eos_id=1, max_new_tokens=20)
    assert decoded.ids == text
    assert decoded.stats.forwards == 5


def test_the_interval_of_a_ratio_holds_it() -> None:
    under = [1.0, 1.1, 0.9, 1.05, 0.95, 30.0]
    value, low, high = bootstrap_ratio([2 * seconds for seconds in under], under)
    assert low == value == high == pytest.approx(2.0)
    value, low, high = bootstrap_ratio([2.0, 2.2, 1.8, 2.1, 9.0], [1.0, 1.0, 1.1, 0.9, 1.0])
    assert low < value < high
    assert Ratio("r", 8.5, 8, 9, goal=8.0, at_least=True).met
    assert not Ratio("r", 2.1, 2, 3, goal=2.0).met
    assert Ratio("r", 1, 1, 1).met is None


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="rounds"):
        run_bench(onnx_model(0), rounds=0)
    with pytest.raises(ValueError, match="answer_tokens"):
        run_bench(onnx_model(0), answer_tokens=3)
