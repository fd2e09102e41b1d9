from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from matplotlib.lines import Line2D

from aligner_integrations.evaluation.bench import run_bench
from aligner_integrations.evaluation.plots import draw, write_plots
from aligner_integrations.evaluation.timing import BenchReport, fit_cost
from tests.models_for_tests import onnx_model


@cache
def report() -> BenchReport:
    """Of a model whose rows share a forward."""
    return run_bench(onnx_model(0), rounds=1, answer_tokens=24, provider="cpu", threads=1, curves=True)


def lines_of(name: str, measured: BenchReport) -> dict[str, Line2D]:
    (axes,) = draw(measured)[name].axes
    return {str(line.get_label()): line for line in axes.get_lines()}


def points(line: Line2D) -> list[tuple[float, float]]:
    pairs: list[list[float]] = np.asarray(line.get_xydata(), dtype=float).tolist()
    return [(x, y) for x, y in pairs]


def test_the_lines_are_the_report() -> None:
    timings = {timing.name: timing for timing in report().timings}
    cost = fit_cost(report().timings)
    greedy = timings["plain greedy"]

    lines = lines_of("edits", report())
    names = {0: "unchanged", 1: "1 edit", 3: "3 edits", 10: "10 edits"}
    wanted = [(edits, greedy.median / timings[f"guided, {name}"].median) for edits, name in names.items()]
    assert points(lines["guided"]) == wanted
    theory = cost.of(greedy.blocks) / cost.of(timings["guided, 10 edits"].blocks)
    assert points(lines["guided, theory"])[-1] == pytest.approx((10, theory))

    lines = lines_of("length", report())
    assert [x for x, _ in points(lines["plain greedy"])] == [16, 24, 32, 64, 256]
    assert (24.0, greedy.median * 1000) in points(lines["plain greedy"])
    assert (256.0, timings["prefill, 256 tokens"].median * 1000) in points(lines["prefill"])
    assert points(lines["guided, theory"])[1][1] == pytest.approx(
        (cost.fixed + cost.token * (44 + 2 * 24) + cost.place * 25) * 1000
    )

    lines = lines_of("batch", report())
    each = [timings[f"plain greedy batch, {size} rows"] for size in (1, 2, 4, 8, 16, 32)]
    assert {timing.forwards for timing in each} == {1}
    wanted = [(timing.at, timing.at / timing.median) for timing in each]
    assert points(lines["plain greedy, 1 token a row"]) == wanted
    assert points(lines["guided, theory"])[0] == pytest.approx((1, 33 / cost.of([(33, 33)])))
    if 1 <= cost.knee <= 32:
        (knee,) = (line for label, line in lines.items() if label.startswith("knee"))
        np.testing.assert_allclose(np.asarray(knee.get_xdata(), dtype=float), cost.knee)


def test_plots_and_report_are_written(tmp_path: Path) -> None:
    paths = write_plots(report(), tmp_path / "plots")
    kinds = sorted(path.name.removeprefix(f"{onnx_model(0).name}-cpu") for path in paths)
    assert kinds == ["-batch.png", "-edits.png", "-length.png", ".json"]
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert json.loads(path.read_text()) == json.loads(json.dumps(report().to_dict()))


def test_what_was_not_measured_is_not_drawn() -> None:
    plain = run_bench(onnx_model(0), rounds=1, answer_tokens=16, provider="cpu", threads=1)
    with pytest.raises(ValueError, match="curves=True"):
        draw(plain)
