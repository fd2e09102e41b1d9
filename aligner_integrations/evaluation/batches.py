"""What `aligner bench --batch` times: many texts with one question, in one batch and one by one."""

from __future__ import annotations

import os
from time import perf_counter

import numpy as np

from aligner_integrations.aligner import Aligner
from aligner_integrations.evaluation.bench import BenchReport, Ratio, Timing, bootstrap_ratio, describe

QUESTION = "What should I know about looking after a garden pond through the year?"
# Ordinary sentences, which stay: as among retrieved texts most do.
_SENTENCES = (
    "A pond needs little work if it is planted well.",
    "In spring the water is often cloudy for a week or two, and clears by itself.",
    "Remove leaves in autumn, because they rot on the bottom and take oxygen from the water.",
    "Fish should not be fed when the water is colder than ten degrees.",
    "Most pumps run all summer without a fault.",
    "Ask a neighbour who keeps fish which plants do well in your soil.",
    "A net over the water keeps herons away and most of the leaves out.",
    "The filter is rinsed with pond water, not with water from the tap.",
    "Ice does no harm as long as a small part of the surface stays open.",
    "Frogs come by themselves when there is a shallow edge where they can climb out.",
    "Tap water should stand for a day before it is poured in.",
    "Plants that float give shade, which keeps algae from growing.",
)
_WARM_UP = 1


def run_batch_bench(
    folder: str | os.PathLike[str],
    *,
    rounds: int = 10,
    texts: int = 500,
    provider: str = "auto",
    seed: int = 0,
) -> BenchReport:
    """Time `Aligner.correct_batch` beside one `Aligner.correct` a text, interleaved.

    Args:
        folder: a model folder.
        rounds: how often both are measured, after a warm-up that is not counted.
        texts: how many texts, of one to four sentences each.
        provider: as for `Aligner.from_pretrained`.
        seed: chooses the sentences, and the order within each round.

    Raises:
        RuntimeError: the two ways gave different texts.
    """
    if texts < 2:
        raise ValueError(f"texts must be at least 2, got {texts}")
    aligner = Aligner.from_pretrained(str(folder), provider=provider)
    rng = np.random.default_rng(seed)
    pairs = [(QUESTION, " ".join(rng.choice(_SENTENCES, size=rng.integers(1, 5)))) for _ in range(texts)]
    ways = {
        "one by one": lambda: [aligner.correct(question, text) for question, text in pairs],
        "batch": lambda: aligner.correct_batch(pairs),
    }
    samples: dict[str, list[float]] = {name: [] for name in ways}
    done = {}
    for round_ in range(_WARM_UP + rounds):
        for name in rng.permutation(list(ways)).tolist():
            started = perf_counter()
            done[name] = ways[name]()
            if round_ >= _WARM_UP:
                samples[name].append(perf_counter() - started)
    if [each.text for each in done["batch"]] != [each.text for each in done["one by one"]]:
        raise RuntimeError("a batch and one by one gave different texts; please report it with the model")
    timings = []
    for name, seconds in samples.items():
        p5, median, p95 = np.percentile(seconds, [5, 50, 95]).tolist()
        stats = [each.stats for each in done[name]]
        forwards, new = sum(one.forwards for one in stats), sum(one.new_tokens for one in stats)
        timings.append(Timing(name, median, p5, p95, forwards, new, tuple(seconds)))
    value, low, high = bootstrap_ratio(samples["one by one"], samples["batch"], seed=seed)
    return BenchReport(
        setting=describe(aligner.backend, folder, rounds=rounds, texts=texts, seed=seed),
        timings=tuple(timings),
        ratios=(Ratio("one by one : batch", value, low, high, 1.5, True),),
    )
