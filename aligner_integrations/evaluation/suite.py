"""The parts of `aligner bench`, and the models they run on."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from aligner_integrations.aligner import BUNDLED_MODEL
from aligner_integrations.evaluation.batches import run_batch_bench
from aligner_integrations.evaluation.bench import run_bench
from aligner_integrations.evaluation.memory import MemoryReport, run_memory
from aligner_integrations.evaluation.timing import BenchReport

Part: TypeAlias = Literal["answer", "batch", "memory", "replay"]


class Report(Protocol):
    """What a part returns."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        ...

    def shown(self) -> dict[str, dict[str, str]]:
        """Return titles with rows of text, for people."""
        ...


def run_suite(
    part: Part,
    *,
    model: str | None = None,
    size: str | None = None,
    providers: Sequence[str] = ("auto",),
    rounds: int = 20,
    peers: bool = False,
    plots: Path | None = None,
    data: Path | None = None,
) -> list[Report]:
    """Run one part on every provider in turn, on the same model.

    Args:
        part: `"answer"` times one answer and one stream, and `"batch"` many answers; `"memory"` measures a
            long one; `"replay"` counts the forwards of published corrections, without a model.
        model: a model folder; the bundled model without it and without `size`.
        size: makes a random model of this size in a temporary folder.
        providers: as for `load_backend`.
        rounds: how often everything is measured.
        peers: with `"answer"`, transformers and optimum too.
        plots: with `"answer"`, a folder for plots and for the report as JSON.
        data: with `"replay"`, the folder with the corrections.

    Raises:
        ValueError: `size` or a provider is unknown, or an option is missing or of another part.
        ProviderUnavailableError: a provider did not load.
    """
    _check(part, model=model, size=size, peers=peers, plots=plots, data=data)
    if data is not None:
        from aligner_integrations.evaluation.replay import run_replay

        return [run_replay(data)]
    if plots is not None:
        from aligner_integrations.evaluation.plots import write_plots  # first: to fail before it is measured
    reports: list[Report] = []
    with contextlib.ExitStack() as stack:
        folder = Path(model or BUNDLED_MODEL)
        if size is not None:
            from aligner_integrations.evaluation.bench_models import random_model  # loads torch

            # Rows share a forward in the graph with plain attention alone.
            attention: Literal["fused", "plain"] = "plain" if part == "batch" else "fused"
            folder = stack.enter_context(random_model(size, attention=attention))
        for provider in providers:
            report = _run(
                part, folder, rounds=rounds, provider=provider, peers=peers, curves=plots is not None
            )
            reports.append(report)
            if plots is not None and isinstance(report, BenchReport):
                write_plots(report, plots)
    return reports


def _run(
    part: Part, folder: Path, *, rounds: int, provider: str, peers: bool, curves: bool
) -> BenchReport | MemoryReport:
    if part == "memory":
        return run_memory(folder, provider=provider)
    if part == "batch":
        return run_batch_bench(folder, rounds=rounds, provider=provider)
    return run_bench(folder, rounds=rounds, provider=provider, peers=peers, curves=curves)


def _check(
    part: Part, *, model: str | None, size: str | None, peers: bool, plots: Path | None, data: Path | None
) -> None:
    if size is not None and model is not None:
        raise ValueError("size makes a model of its own: leave model out")
    if (part == "replay") != (data is not None):
        raise ValueError("a replay needs data, the folder with the corrections; nothing else does")
    if part != "answer" and (peers or plots is not None):
        raise ValueError(f"peers and plots belong to the times of one answer, not to {part!r}")
