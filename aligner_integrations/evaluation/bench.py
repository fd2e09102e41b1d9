"""The engine behind `aligner bench`: what guided decoding costs beside plain greedy, on one session.

Every way of decoding writes the same output: the session runs each forward in full, and only then
are its logits changed so that the wanted token wins. So costs are real while the number of edits is
chosen. The ways are interleaved in shuffled order within each round, because a machine's speed
drifts; ratios are of medians over rounds, with a bootstrap interval over rounds.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from aligner_integrations.backends import load_backend
from aligner_integrations.backends.base import Backend, Ids, KVCache, Logits
from aligner_integrations.config import DecodeConfig
from aligner_integrations.decode import Decoded, PromptCache, draft_decode, greedy_decode

_EOS = 1
_KEEP = 2
_FIRST_TEXT_ID = 8
_QUESTION_TOKENS = 43  # with a separator a prompt of 172 tokens for an answer of 128
_SENTENCE_TOKENS = 25
_EARLY, _LATE = 2, 30  # sentences of one stream, counted from 1
_WARM_UP = 2
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one way of decoding over the rounds, and the forwards that one run takes."""

    name: str
    median: float
    p5: float
    p95: float
    forwards: int
    new_tokens: int
    samples: tuple[float, ...]


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

    setting: dict[str, str | int]
    timings: tuple[Timing, ...]
    ratios: tuple[Ratio, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, samples included."""
        return asdict(self)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


class ForcedOutput:
    """A backend around another: runs it in full, then makes a given text win."""

    def __init__(self, inner: Backend, text: Ids) -> None:
        self._inner = inner
        self._text = np.array(text)

    @property
    def name(self) -> str:
        """The inner backend's name."""
        return self._inner.name

    @property
    def provider(self) -> str:
        """The inner backend's provider."""
        return self._inner.provider

    def make_cache(self) -> KVCache:
        """Return an empty cache of the inner backend."""
        return self._inner.make_cache()

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        """Run the inner backend; the token that follows in the text gets the best logit."""
        logits = self._inner.forward(ids, cache, last=last)
        if not logits.flags.writeable:
            logits = logits.copy()
        # A draft may reach past the end of the text; what is written there is never accepted.
        places = np.arange(cache.length - last + 1, cache.length + 1).clip(max=len(self._text) - 1)
        logits[np.arange(last), self._text[places]] = np.inf
        return logits


def run_bench(
    folder: str | os.PathLike[str],
    *,
    rounds: int = 20,
    answer_tokens: int = 128,
    provider: str = "auto",
    threads: int | None = None,
    seed: int = 0,
) -> BenchReport:
    """Measure the model in `folder`: unchanged and edited answers, and one long stream.

    Args:
        folder: a model folder; only its `model.onnx` is used.
        rounds: how often everything is measured, after a warm-up that is not counted.
        answer_tokens: the length of the answer.
        provider: as for `load_backend`.
        threads: as for `load_backend`.
        seed: chooses the ids, the places of the edits and the order within each round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if answer_tokens < 16:
        raise ValueError(f"answer_tokens must be at least 16, got {answer_tokens}")
    backend = load_backend("onnx", folder, provider=provider, threads=threads)
    vocabulary = backend.forward([0], backend.make_cache(), last=1).shape[1]
    rng = np.random.default_rng(seed)
    ways = _answer_ways(backend, vocabulary, answer_tokens, rng)
    samples: dict[str, list[float]] = {}
    costs: dict[str, Decoded] = {}
    for round_ in range(_WARM_UP + rounds):
        measured = {}
        for name in rng.permutation(list(ways)).tolist():
            started = perf_counter()
            costs[name] = ways[name]()
            measured[name] = perf_counter() - started
        stream = _stream(backend, vocabulary, np.random.default_rng(seed))
        for k, (seconds, decoded) in ((k, stream[k - 1]) for k in (_EARLY, _LATE)):
            measured[f"sentence {k}"], costs[f"sentence {k}"] = seconds, decoded
        if round_ >= _WARM_UP:
            for name, seconds in measured.items():
                samples.setdefault(name, []).append(seconds)
    names = [*ways, f"sentence {_EARLY}", f"sentence {_LATE}"]
    return BenchReport(
        setting=describe(backend, folder, rounds=rounds, answer_tokens=answer_tokens, seed=seed),
        timings=tuple(_timing(name, samples[name], costs[name]) for name in names),
        ratios=_ratios(samples, seed),
    )


def _answer_ways(
    backend: Backend, vocabulary: int, length: int, rng: np.random.Generator
) -> dict[str, Callable[[], Decoded]]:
    """Return what to time on one answer, by name; the prompt holds question and answer."""
    question = _some_ids(rng, vocabulary, _QUESTION_TOKENS)
    answer = _some_ids(rng, vocabulary, length)
    prompt = [*question, *answer, 0]
    config = DecodeConfig()

    def guided(edits: int) -> Callable[[], Decoded]:
        target = list(answer)
        for place in rng.choice(length, size=min(edits, length), replace=False).tolist():
            # Another id than the answer's own, so that it is an edit indeed.
            target[place] = (target[place] - _FIRST_TEXT_ID + 1) % (
                vocabulary - _FIRST_TEXT_ID
            ) + _FIRST_TEXT_ID
        forced = ForcedOutput(backend, [*prompt, *target, _EOS])
        return lambda: draft_decode(
            forced, prompt, answer, config=config, eos_id=_EOS, max_new_tokens=length + 1
        )

    def greedy() -> Decoded:
        forced = ForcedOutput(backend, [*prompt, *answer, _EOS])
        return greedy_decode(forced, prompt, answer, config=config, eos_id=_EOS, max_new_tokens=length + 1)

    def prefill() -> Decoded:
        return greedy_decode(backend, prompt, [], config=config, eos_id=_EOS, max_new_tokens=1)

    return {
        "plain greedy": greedy,
        "prefill": prefill,
        "guided, unchanged": guided(0),
        "guided, 1 edit": guided(1),
        "guided, 3 edits": guided(3),
        "guided, 10 edits": guided(10),
    }


def _stream(backend: Backend, vocabulary: int, rng: np.random.Generator) -> list[tuple[float, Decoded]]:
    """Decide on one sentence after the other as a stream does: question, prefix so far, sentence."""
    cache = PromptCache(backend)
    text = _some_ids(rng, vocabulary, _QUESTION_TOKENS)
    results: list[tuple[float, Decoded]] = []
    for _ in range(_LATE):
        sentence = _some_ids(rng, vocabulary, _SENTENCE_TOKENS)
        prompt = [*text, 3, *sentence, 4]
        started = perf_counter()
        decoded = draft_decode(
            backend,
            prompt,
            sentence,
            config=DecodeConfig(edit_margin=float("inf")),  # always keep: one forward each
            eos_id=_EOS,
            max_new_tokens=_SENTENCE_TOKENS,
            keep_id=_KEEP,
            cache=cache,
        )
        results.append((perf_counter() - started, decoded))
        text += sentence
    return results


def _some_ids(rng: np.random.Generator, vocabulary: int, count: int) -> Ids:
    ids: Ids = rng.integers(_FIRST_TEXT_ID, vocabulary, size=count).tolist()
    return ids


def _timing(name: str, samples: Sequence[float], decoded: Decoded) -> Timing:
    p5, median, p95 = np.percentile(samples, [5, 50, 95]).tolist()
    stats = decoded.stats
    return Timing(name, median, p5, p95, stats.forwards, stats.new_tokens, tuple(samples))


def _ratios(samples: dict[str, list[float]], seed: int) -> tuple[Ratio, ...]:
    def ratio(name: str, over: str, under: str, goal: float | None = None, at_least: bool = False) -> Ratio:
        value, low, high = bootstrap_ratio(samples[over], samples[under], seed=seed)
        return Ratio(name, value, low, high, goal, at_least)

    greedy, unchanged = "plain greedy", "guided, unchanged"
    edited = [name for name in samples if name.startswith("guided, ") and name != unchanged]
    return (
        ratio("plain greedy : guided, unchanged answer", greedy, unchanged, 8.0, True),
        ratio("guided : one prefill of question and answer", unchanged, "prefill", 2.0),
        *(ratio(f"plain greedy : {name}", greedy, name) for name in sorted(edited, key=_edits)),
        ratio(
            f"sentence {_LATE} : sentence {_EARLY} of one stream",
            f"sentence {_LATE}",
            f"sentence {_EARLY}",
            1.5,
        ),
    )


def _edits(name: str) -> int:
    return int(name.split()[1])


def bootstrap_ratio(
    over: Sequence[float], under: Sequence[float], *, seed: int = 0
) -> tuple[float, float, float]:
    """Return the ratio of medians and its 95 % interval; rounds are drawn as pairs."""
    a, b = np.asarray(over), np.asarray(under)
    drawn = np.random.default_rng(seed).integers(0, len(a), size=(_RESAMPLES, len(a)))
    ratios = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5]).tolist()
    return float(np.median(a) / np.median(b)), low, high


def describe(backend: Backend, folder: str | os.PathLike[str], **chosen: int) -> dict[str, str | int]:
    """Return what was measured, on what: model, versions and machine, and what was `chosen`."""
    import onnxruntime  # loaded already; here for its version alone

    return {
        "model": Path(folder).name,
        "model_bytes": (Path(folder) / "model.onnx").stat().st_size,
        "backend": backend.name,
        "provider": backend.provider,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count() or 0,
        "load_average": str(os.getloadavg()[0]) if hasattr(os, "getloadavg") else "",
        **chosen,
    }
