"""Plots of what `aligner bench` measured, each with the line of theory.

The theory of a way of decoding is the sum over its forwards of what a forward takes; that is fitted to
single forwards of the same run, as something fixed and more for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aligner_integrations.evaluation.timing import FORWARD, BenchReport, Cost, Timing, fit_cost

_DOTS = 140  # a inch


def write_plots(report: BenchReport, folder: Path) -> list[Path]:
    """Write the report as JSON and its plots as PNG; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    setting = report.setting
    stem = f"{setting['model']}-{str(setting['provider']).removesuffix('ExecutionProvider').lower()}"
    figures = draw(report)
    paths = [folder / f"{stem}-{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=_DOTS)
    paths.append(folder / f"{stem}.json")
    report.write(paths[-1])
    return paths


def draw(report: BenchReport) -> dict[str, Figure]:
    """Return the plots of a report with curves, by name.

    Raises:
        ValueError: the report has none.
    """
    if not _curve(report, FORWARD):
        raise ValueError("the report holds no curves; measure with curves=True")
    drawings: dict[str, Callable[[BenchReport, Axes, Cost], None]] = {
        "edits": _speed_up_by_edits,
        "length": _latency_by_length,
        "batch": _throughput_by_batch,
    }
    cost = fit_cost(report.timings)
    figures = {}
    for name, drawing in drawings.items():
        figures[name] = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figures[name].subplots()
        drawing(report, axes, cost)
        axes.set_title(f"{report.setting['model']}, {report.setting['provider']}", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figures


def _speed_up_by_edits(report: BenchReport, axes: Axes, cost: Cost) -> None:
    """Draw how much faster than its own greedy decoding each way of drafting is."""
    named = {timing.name: timing for timing in report.timings}
    for way, base in (("guided", "plain greedy"), ("prompt lookup", "transformers generate")):
        if f"{way}, unchanged" not in named:
            continue
        points = [(0, named[f"{way}, unchanged"])]
        points += [(timing.at, timing) for timing in _curve(report, f"{way} by edits")]
        edits = [edits for edits, _ in points]
        axes.plot(edits, [named[base].median / timing.median for _, timing in points], "o-", label=way)
        if way == "guided":
            greedy = cost.of(named[base].blocks)
            theory = [greedy / cost.of(timing.blocks) for _, timing in points]
            axes.plot(edits, theory, "k--", label="guided, theory")
    axes.set(
        xlabel=f"edits in {report.setting['answer_tokens']} tokens", ylabel="times faster than its greedy"
    )
    axes.set_ylim(bottom=0)


def _latency_by_length(report: BenchReport, axes: Axes, cost: Cost) -> None:
    """Draw the time of an unchanged answer over its length, down to one prefill."""
    for color, name in enumerate(("plain greedy", "prompt lookup", "guided", "prefill")):
        timings = _curve(report, name)
        if not timings:
            continue
        lengths = [timing.at for timing in timings]
        style = f"C{color}"
        axes.plot(lengths, [timing.median * 1000 for timing in timings], "o-", color=style, label=name)
        if name != "prompt lookup":  # its forwards are those of another runtime
            theory = [cost.of(timing.blocks) * 1000 for timing in timings]
            axes.plot(lengths, theory, "--", color=style, label=f"{name}, theory")
    axes.set(xlabel="tokens in the answer", ylabel="milliseconds", xscale="log", yscale="log")
    _tick(axes, [timing.at for timing in _curve(report, "prefill")])


def _throughput_by_batch(report: BenchReport, axes: Axes, cost: Cost) -> None:
    """Draw tokens a second over the rows of a forward, and where more tokens stop riding along."""
    for color, name in enumerate(("plain greedy batch", "guided batch")):
        timings, style = _curve(report, name), f"C{color}"
        each = timings[0].new_tokens  # tokens a row
        label = f"{name.removesuffix(' batch')}, {each} token{'s' * (each > 1)} a row"
        label += ", a forward each" * (timings[-1].forwards > 1)
        sizes = [timing.at for timing in timings]
        axes.plot(sizes, [_rate(timing, timing.median) for timing in timings], "o-", color=style, label=label)
        theory = [_rate(timing, cost.of(timing.blocks)) for timing in timings]
        axes.plot(sizes, theory, "--", color=style, label=f"{name.removesuffix(' batch')}, theory")
        knee = cost.knee / each
        if sizes[0] <= knee <= sizes[-1]:
            axes.axvline(knee, color=style, linestyle=":", label=f"knee, {cost.knee:.0f} tokens a forward")
    axes.set(xlabel="rows in a forward", ylabel="tokens a second", xscale="log", yscale="log")
    _tick(axes, sizes)


def _rate(timing: Timing, seconds: float) -> float:
    return timing.new_tokens / seconds


def _curve(report: BenchReport, name: str) -> Sequence[Timing]:
    return sorted((timing for timing in report.timings if timing.curve == name), key=lambda timing: timing.at)


def _tick(axes: Axes, places: Sequence[int]) -> None:
    """Name these places of a logarithmic axis, and no others."""
    axes.set_xticks(places, [str(place) for place in places])
    axes.set_xticks([], minor=True)
