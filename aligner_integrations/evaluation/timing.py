"""How `aligner bench` measures: ways in shuffled order within each round, medians, ratios with intervals."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np

from aligner_integrations.backends.base import Backend

_WARM_UP = 2
_RESAMPLES = 2000
_PACKAGES = (
    *("aligner-integrations", "numpy", "onnxruntime", "onnxruntime-gpu"),
    *("torch", "transformers", "optimum", "optimum-onnx"),
)
FORWARD = "forward"  # the curve of single forwards

Setting: TypeAlias = dict[str, str | int | float]
Block: TypeAlias = tuple[int, int]  # the tokens that a forward runs, and the places that it is asked about


@dataclass(frozen=True, slots=True)
class Run:
    """What one run wrote and what it took: `output` holds ids without end-of-text, or texts."""

    output: Sequence[int] | Sequence[str]
    forwards: int
    new_tokens: int
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True, slots=True)
class Way:
    """Something to time. Its output must be `wanted`, where that is given.

    `curve` and `at` place it on a curve of the plots: `at` tokens, edits or texts.
    """

    name: str
    run: Callable[[], Run]
    wanted: Sequence[int] | Sequence[str] | None = None
    curve: str = ""
    at: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one way over the rounds, and the forwards that one run takes."""

    name: str
    median: float
    p5: float
    p95: float
    forwards: int
    new_tokens: int
    samples: tuple[float, ...]
    blocks: tuple[Block, ...] = ()
    curve: str = ""
    at: int = 0


@dataclass(frozen=True, slots=True)
class Ratio:
    """One timing over another: ratio of medians with its 95 % bootstrap interval.

    `goal` is what the project asks for, `None` where the ratio is only reported; `at_least` says on
    which side of it the ratio should lie.
    """

    name: str
    value: float
    low: float
    high: float
    goal: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached, `None` without one."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What was measured, on what."""

    setting: Setting
    timings: tuple[Timing, ...]
    ratios: tuple[Ratio, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, samples included."""
        return asdict(self)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    def shown(self) -> dict[str, dict[str, str]]:
        """Return titles with rows of text, for people."""
        return {
            "setting": {name: str(value) for name, value in self.setting.items()},
            "time (p5 to p95)": {
                each.name: f"{each.median * 1000:.2f} ms ({each.p5 * 1000:.2f} to {each.p95 * 1000:.2f}), "
                f"{each.forwards} forward(s), {each.new_tokens} token(s)"
                for each in self.timings
            },
            "ratio (95 % interval)": {
                each.name: f"{each.value:.2f} ({each.low:.2f} to {each.high:.2f})"
                + ("" if each.goal is None else f", asked: {'>=' if each.at_least else '<='} {each.goal:g}")
                for each in self.ratios
            },
        }


def measure(
    ways: Sequence[Way],
    *,
    rounds: int,
    rng: np.random.Generator,
    parts: Callable[[], dict[str, tuple[float, Run]]] | None = None,
) -> list[Timing]:
    """Time every way once a round, in shuffled order, after a warm-up that is not counted.

    `parts` runs once a round too and brings several times of its own, by name.

    Raises:
        RuntimeError: a way wrote something else than it should have.
    """
    samples: dict[str, list[float]] = {way.name: [] for way in ways}
    runs: dict[str, Run] = {}
    for round_ in range(_WARM_UP + rounds):
        taken: dict[str, float] = {}
        for index in rng.permutation(len(ways)).tolist():
            way = ways[index]
            started = perf_counter()
            runs[way.name] = way.run()
            taken[way.name] = perf_counter() - started
            if way.wanted is not None and list(runs[way.name].output) != list(way.wanted):
                raise RuntimeError(f"{way.name!r} wrote something else than it should have; please report it")
        for name, (seconds, run) in parts().items() if parts else ():
            taken[name], runs[name] = seconds, run
        if round_ >= _WARM_UP:
            for name, seconds in taken.items():
                samples.setdefault(name, []).append(seconds)
    places = {way.name: (way.curve, way.at) for way in ways}
    return [_timing(name, samples[name], runs[name], *places.get(name, ("", 0))) for name in samples]


def _timing(name: str, samples: Sequence[float], run: Run, curve: str, at: int) -> Timing:
    p5, median, p95 = np.percentile(samples, [5, 50, 95]).tolist()
    return Timing(name, median, p5, p95, run.forwards, run.new_tokens, tuple(samples), run.blocks, curve, at)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a forward takes, in seconds: something fixed, and more for each token and each place's logits."""

    fixed: float
    token: float
    place: float

    @property
    def knee(self) -> float:
        """The tokens, with logits each, that cost as much as what is fixed: below, more ride along."""
        return self.fixed / (self.token + self.place) if self.token + self.place else float("inf")

    def of(self, blocks: Sequence[Block]) -> float:
        """Return the seconds of these forwards, one after the other."""
        return sum(self.fixed + self.token * tokens + self.place * places for tokens, places in blocks)


def fit_cost(timings: Sequence[Timing]) -> Cost:
    """Fit the single forwards among `timings`, by least squares of relative errors, nothing below zero."""
    points = [(timing.blocks[0], timing.median) for timing in timings if timing.curve == FORWARD]
    seconds = np.array([median for _, median in points])
    rows = np.array([[1.0, *block] for block, _ in points]) / seconds[:, None]
    kept = [0, 1, 2]
    while True:
        found = np.linalg.lstsq(rows[:, kept], np.ones(len(rows)), rcond=None)[0]
        if (found >= 0).all():
            break
        del kept[int(found.argmin())]
    values = dict(zip(kept, found.tolist(), strict=True))
    return Cost(*(values.get(column, 0.0) for column in range(3)))


def ratio_of(
    timings: Sequence[Timing],
    name: str,
    over: str,
    under: str,
    *,
    goal: float | None = None,
    at_least: bool = False,
    seed: int = 0,
) -> Ratio:
    """Return the timing called `over` over the one called `under`."""
    samples = {timing.name: timing.samples for timing in timings}
    value, low, high = bootstrap_ratio(samples[over], samples[under], seed=seed)
    return Ratio(name, value, low, high, goal, at_least)


def bootstrap_ratio(
    over: Sequence[float], under: Sequence[float], *, seed: int = 0
) -> tuple[float, float, float]:
    """Return the ratio of medians and its 95 % interval; rounds are drawn as pairs."""
    a, b = np.asarray(over), np.asarray(under)
    drawn = np.random.default_rng(seed).integers(0, len(a), size=(_RESAMPLES, len(a)))
    ratios = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5]).tolist()
    return float(np.median(a) / np.median(b)), low, high


def describe(
    backend: Backend, folder: str | os.PathLike[str], chosen: Setting, *, threads: int | None = None
) -> Setting:
    """Return what was measured, on what: model, machine and versions, and what was `chosen`."""
    from aligner_integrations.backends.onnx import available_cores  # onnxruntime is loaded by now

    weights = [path for path in Path(folder).glob("model.onnx*") if path.is_file()]
    return {
        "model": Path(folder).name,
        "model_bytes": sum(path.stat().st_size for path in weights),
        "backend": backend.name,
        "provider": backend.provider,
        "threads": threads or available_cores(),
        "python": platform.python_version(),
        **package_versions(),
        "machine": platform.machine(),
        "cpus": os.cpu_count() or 0,
        "load_average": str(os.getloadavg()[0]) if hasattr(os, "getloadavg") else "",
        **chosen,
    }


def package_versions() -> Setting:
    """Return the versions of what is installed of the packages that matter."""
    return {name: version for name in _PACKAGES if (version := _version(name))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
