"""The engine behind `aligner bench`: what guided decoding costs beside plain greedy, and beside peers.

Every way of decoding writes the same output: the network runs each forward in full, and only then
are its scores changed so that the wanted token wins. So costs are real while the number of edits is
chosen. The ways are interleaved in shuffled order within each round, because a machine's speed
drifts; ratios are of medians over rounds, with a bootstrap interval over rounds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from aligner_integrations.backends import load_backend
from aligner_integrations.backends.base import Backend, Batching, Ids, Row
from aligner_integrations.backends.providers import FULL_NAMES
from aligner_integrations.config import DecodeConfig
from aligner_integrations.decode import Decoded, PromptCache, draft_decode, greedy_decode
from aligner_integrations.evaluation.forced import (
    EOS,
    QUESTION_TOKENS,
    ForcedOutput,
    Pattern,
    make_patterns,
    some_ids,
)
from aligner_integrations.evaluation.timing import (
    FORWARD,
    BenchReport,
    Ratio,
    Run,
    Setting,
    Timing,
    Way,
    describe,
    measure,
    ratio_of,
)

if TYPE_CHECKING:
    from aligner_integrations.evaluation.peers import Peers

_KEEP = 2
_SENTENCE_TOKENS = 25
_EARLY, _LATE = 2, 30  # sentences of one stream, counted from 1
# The curves of the plots: tokens that one forward runs after a prompt, and answers by their length.
_FORWARD_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LENGTHS = (16, 32, 64, 256)  # beside the answer of every report
_BATCHES = (1, 2, 4, 8, 16, 32)
_BATCH_PROMPT = 64
_FEW = 16  # from so many tokens on it is worth asking what logits of the last place alone save

_GREEDY, _UNCHANGED = "plain greedy", "guided, unchanged"
_PATTERNS = ("unchanged", "1 edit", "3 edits", "10 edits", "nothing to copy")
# Name, over, under, what is asked for on a CPU in fp32, and whether that is the least or the most.
_RATIOS: tuple[tuple[str, str, str, float | None, bool], ...] = (
    ("plain greedy : guided, unchanged answer", _GREEDY, _UNCHANGED, 9.0, True),
    ("guided : one prefill of question and answer", _UNCHANGED, "prefill", 1.9, False),
    ("guided : one prefill with all logits, as optimum's", _UNCHANGED, "prefill, all logits", None, False),
    ("plain greedy : guided, 1 edit", _GREEDY, "guided, 1 edit", None, True),
    ("plain greedy : guided, 3 edits", _GREEDY, "guided, 3 edits", 6.0, True),
    ("plain greedy : guided, 10 edits", _GREEDY, "guided, 10 edits", None, True),
    ("guided, nothing to copy : plain greedy", "guided, nothing to copy", _GREEDY, 1.05, False),
    (f"sentence {_LATE} : {_EARLY} of one stream", f"sentence {_LATE}", f"sentence {_EARLY}", 1.5, False),
    ("transformers generate : guided, unchanged", "transformers generate", _UNCHANGED, 15.0, True),
    ("optimum generate : guided, unchanged", "optimum generate", _UNCHANGED, None, True),
    *(
        (f"prompt lookup : guided, {name}", f"prompt lookup, {name}", f"guided, {name}", None, True)
        for name in _PATTERNS
    ),
)
_ACCELERATED = 40.0  # asked of plain greedy : guided, unchanged, on an accelerator


def run_bench(
    folder: str | os.PathLike[str],
    *,
    rounds: int = 20,
    answer_tokens: int = 128,
    provider: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    peers: bool = False,
    curves: bool = False,
) -> BenchReport:
    """Measure the model in `folder`: unchanged and edited answers, and one long stream.

    Args:
        folder: a model folder; only its `model.onnx` is used, and for peers a checkpoint if it has one.
        rounds: how often everything is measured, after a warm-up that is not counted.
        answer_tokens: the length of the answer.
        provider: as for `load_backend`.
        threads: as for `load_backend`.
        seed: chooses the ids, the places of the edits and the order within each round.
        peers: measure transformers and optimum too, on the same weights.
        curves: measure single forwards and answers of other lengths too, for the plots.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if answer_tokens < 16:
        raise ValueError(f"answer_tokens must be at least 16, got {answer_tokens}")
    started = perf_counter()
    backend = load_backend("onnx", folder, provider=provider, threads=threads)
    loaded = perf_counter()
    vocabulary = backend.forward([0], backend.make_cache(), last=1).shape[1]
    chosen: Setting = {"rounds": rounds, "answer_tokens": answer_tokens, "seed": seed}
    # On an accelerator this is where engines are built.
    chosen |= {"load_seconds": loaded - started, "first_forward_seconds": perf_counter() - loaded}
    rng = np.random.default_rng(seed)
    patterns = make_patterns(rng, vocabulary, answer_tokens)
    with contextlib.ExitStack() as stack:
        others = stack.enter_context(_peers(Path(folder), backend, threads)) if peers else None
        ways = _answer_ways(backend, patterns, others)
        if curves:
            ways += _forward_ways(backend, patterns[0].prompt)
            ways += _batch_ways(backend, some_ids(rng, vocabulary, _BATCH_PROMPT))
            for length in _LENGTHS:
                pattern = make_patterns(rng, vocabulary, length)[0]
                ways += _length_ways(backend, pattern, others, mark=f", {length} tokens")
        chosen |= others.setting if others is not None else {}
        timings = measure(
            ways,
            rounds=rounds,
            rng=rng,
            parts=lambda: _stream(backend, vocabulary, np.random.default_rng(seed)),
        )
    return BenchReport(
        setting=describe(backend, folder, chosen, threads=threads),
        timings=tuple(timings),
        ratios=_ratios(timings, seed, on_cpu=backend.provider == FULL_NAMES["cpu"]),
    )


def _peers(folder: Path, backend: Backend, threads: int | None) -> contextlib.AbstractContextManager[Peers]:
    from aligner_integrations.evaluation.peers import load_peers  # loads torch

    return load_peers(folder, provider=backend.provider, threads=threads)


def _answer_ways(backend: Backend, patterns: list[Pattern], peers: Peers | None) -> list[Way]:
    """Return what to time on one answer."""
    unchanged = patterns[0]
    everywhere = len(unchanged.prompt)
    ways = [
        *_length_ways(backend, unchanged, peers),
        Way("prefill, all logits", lambda: _prefill(backend, unchanged.prompt, last=everywhere)),
        *(_guided(backend, pattern) for pattern in patterns[1:]),
    ]
    if peers is not None:
        ways += peers.greedy_ways(unchanged)
        ways += [peers.lookup_way(pattern) for pattern in patterns[1:]]
    return ways


def _length_ways(backend: Backend, pattern: Pattern, peers: Peers | None, *, mark: str = "") -> list[Way]:
    """Return the ways that are timed at every length of an unchanged answer."""
    length = len(pattern.answer)
    forced = ForcedOutput(backend, pattern.text)

    def greedy() -> Run:
        return _decoded(forced, greedy_decode, pattern)

    ways = [
        Way(f"plain greedy{mark}", greedy, pattern.target, "plain greedy", length),
        Way(f"prefill{mark}", lambda: _prefill(backend, pattern.prompt, last=1), None, "prefill", length),
        replace(_guided(backend, pattern, mark=mark), curve="guided", at=length),
    ]
    if peers is not None:
        ways.append(replace(peers.lookup_way(pattern, mark=mark), curve="prompt lookup", at=length))
    return ways


def _guided(backend: Backend, pattern: Pattern, *, mark: str = "") -> Way:
    forced = ForcedOutput(backend, pattern.text)

    def run() -> Run:
        return _decoded(forced, draft_decode, pattern)

    curve = "guided by edits" if pattern.edits else ""
    return Way(f"guided, {pattern.name}{mark}", run, pattern.target, curve, pattern.edits or 0)


def _decoded(forced: ForcedOutput, decode: Callable[..., Decoded], pattern: Pattern) -> Run:
    forced.blocks.clear()
    decoded = decode(
        forced,
        pattern.prompt,
        pattern.answer,
        config=DecodeConfig(),
        eos_id=EOS,
        max_new_tokens=len(pattern.target) + 1,
    )
    return Run(decoded.ids, decoded.stats.forwards, decoded.stats.new_tokens, tuple(forced.blocks))


def _prefill(backend: Backend, prompt: Ids, *, last: int) -> Run:
    """Run the prompt once, with logits of its last places alone."""
    backend.forward(prompt, backend.make_cache(), last=last)
    return Run([], 1, 0, ((len(prompt), last),))


def _forward_ways(backend: Backend, prompt: Ids) -> list[Way]:
    """Return single forwards after a prompt, of several sizes, with logits of all places or of the last."""
    cache = PromptCache(backend)
    cache.forward(prompt, last=1)

    def way(tokens: int, last: int) -> Way:
        ids = (prompt * (tokens // len(prompt) + 1))[:tokens]

        def run() -> Run:
            cache.forward(ids, last=last)
            cache.trim(len(prompt))
            return Run([], 1, 0, ((tokens, last),))

        return Way(f"forward, {tokens} tokens, {last} logits", run, None, FORWARD, tokens)

    few = [way(tokens, 1) for tokens in _FORWARD_TOKENS if tokens >= _FEW]
    return [*(way(tokens, tokens) for tokens in _FORWARD_TOKENS), *few]


def _batch_ways(backend: Backend, prompt: Ids) -> list[Way]:
    """Return a forward for several sequences: of a token each, and of a token and a draft each."""
    caches = [backend.make_cache() for _ in range(max(_BATCHES))]
    for cache in caches:
        backend.forward(prompt, cache, last=1)

    def way(curve: str, size: int, tokens: int) -> Way:
        rows = [Row(prompt[:tokens], cache, tokens) for cache in caches[:size]]

        def run() -> Run:
            if isinstance(backend, Batching):
                backend.score(rows)
            else:
                for row in rows:
                    backend.forward(row.ids, row.cache, last=row.last)
            for row in rows:
                row.cache.trim(len(prompt))
            together = isinstance(backend, Batching) and backend.batches
            # Theory is of rows that share a forward, also where they do not.
            return Run([], 1 if together else size, size * tokens, ((size * tokens, size * tokens),))

        return Way(f"{curve}, {size} rows", run, None, curve, size)

    drafted = DecodeConfig().max_draft_tokens + 1
    return [
        *(way("plain greedy batch", size, 1) for size in _BATCHES),
        *(way("guided batch", size, drafted) for size in _BATCHES),
    ]


def _stream(backend: Backend, vocabulary: int, rng: np.random.Generator) -> dict[str, tuple[float, Run]]:
    """Decide on one sentence after the other as a stream does: question, prefix so far, sentence."""
    cache = PromptCache(backend)
    text = some_ids(rng, vocabulary, QUESTION_TOKENS)
    results: dict[str, tuple[float, Run]] = {}
    for number in range(1, _LATE + 1):
        sentence = some_ids(rng, vocabulary, _SENTENCE_TOKENS)
        prompt = [*text, 3, *sentence, 4]
        started = perf_counter()
        decoded = draft_decode(
            backend,
            prompt,
            sentence,
            config=DecodeConfig(edit_margin=float("inf")),  # always keep: one forward each
            eos_id=EOS,
            max_new_tokens=_SENTENCE_TOKENS,
            keep_id=_KEEP,
            cache=cache,
        )
        if number in (_EARLY, _LATE):
            run = Run(decoded.ids, decoded.stats.forwards, decoded.stats.new_tokens)
            results[f"sentence {number}"] = perf_counter() - started, run
        text += sentence
    return results


def _ratios(timings: Sequence[Timing], seed: int, *, on_cpu: bool) -> tuple[Ratio, ...]:
    names = {timing.name for timing in timings}
    found = []
    for name, over, under, goal, at_least in _RATIOS:
        if {over, under} <= names:
            asked = goal if on_cpu else _ACCELERATED if under == _UNCHANGED and over == _GREEDY else None
            found.append(ratio_of(timings, name, over, under, goal=asked, at_least=at_least, seed=seed))
    return tuple(found)
