"""What `aligner bench --batch` times: many texts in one batch, and the same one by one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from aligner_integrations.aligner import Aligner
from aligner_integrations.backends.base import Ids
from aligner_integrations.correction import Correction
from aligner_integrations.evaluation.forced import ForcedOutput, edited, some_ids
from aligner_integrations.evaluation.timing import BenchReport, Run, Way, describe, measure, ratio_of

Pairs: TypeAlias = list[tuple[str, str]]

QUESTION = "What should I know about looking after a garden pond through the year?"
# Ordinary sentences, which stay: as among retrieved texts most do.
SENTENCES = (
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
# Sentences with a slip, which the bundled model mends.
_SLIPS = (
    "There are 7 + 8 = 16 frogs in the pond.",
    "The net costs 4 * 12 = 46 dollars.",
    "He buys 9 + 5 = 13 plants.",
    "After a week 30 - 12 = 19 litres are left.",
)
_RAGGED = 8
RAGGED = f", {_RAGGED} ragged answers"
_RAGGED_QUESTION = 20  # tokens
_LEAST, _MOST = 24, 160  # tokens of a ragged answer with forced edits


def run_batch_bench(
    folder: str | os.PathLike[str],
    *,
    rounds: int = 10,
    texts: int = 500,
    provider: str = "auto",
    seed: int = 0,
) -> BenchReport:
    """Time `Aligner.correct_batch` beside one `Aligner.correct` a text, interleaved.

    A sentence-level model corrects short texts with one question, and 8 ragged answers with a question each,
    by its own judgement. An answer-level one corrects 8 ragged answers whose edits are forced, because
    what a model without training writes has no end; it is one of `random_model`.

    Args:
        folder: a model folder.
        rounds: how often both are measured, after a warm-up that is not counted.
        texts: how many texts with one question, of one to four sentences each.
        provider: as for `Aligner.from_pretrained`.
        seed: chooses the texts, and the order within each round.

    Raises:
        RuntimeError: the two ways gave different texts.
    """
    if texts < 2:
        raise ValueError(f"texts must be at least 2, got {texts}")
    aligner = Aligner.from_pretrained(str(folder), provider=provider)
    backend = aligner.backend
    rng = np.random.default_rng(seed)
    ways: list[Way] = []
    if aligner.granularity == "sentence":
        several = [_join(rng, SENTENCES, int(rng.integers(1, 5))) for _ in range(texts)]
        ways += _both(aligner, [(QUESTION, text) for text in several])
        ragged = [
            (f"{QUESTION} Part {number}.", _join(rng, SENTENCES + _SLIPS, 1 + number))
            for number in rng.permutation(_RAGGED).tolist()
        ]
    else:
        lengths = rng.integers(_LEAST, _MOST, size=_RAGGED).tolist()
        ragged, aligner = forced_answers(aligner, lengths, rng)
    ways += _both(aligner, ragged, mark=RAGGED)
    timings = measure(ways, rounds=rounds, rng=rng)
    names = {timing.name for timing in timings}
    return BenchReport(
        setting=describe(backend, folder, {"rounds": rounds, "texts": texts, "seed": seed}),
        timings=tuple(timings),
        ratios=tuple(
            ratio_of(
                timings,
                f"one by one : batch{mark}",
                f"one by one{mark}",
                f"batch{mark}",
                goal=1.5,
                at_least=True,
                seed=seed,
            )
            for mark in ("", RAGGED)
            if f"batch{mark}" in names
        ),
    )


def _join(rng: np.random.Generator, sentences: Sequence[str], count: int) -> str:
    return " ".join(rng.choice(sentences, size=count))


def _both(aligner: Aligner, pairs: Pairs, *, mark: str = "") -> list[Way]:
    wanted = [aligner.correct(*pair).text for pair in pairs]

    def one_by_one() -> Run:
        return _summed([aligner.correct(*pair) for pair in pairs])

    def batch() -> Run:
        return _summed(aligner.correct_batch(pairs))

    return [Way(f"one by one{mark}", one_by_one, wanted), Way(f"batch{mark}", batch, wanted)]


def _summed(corrections: Sequence[Correction]) -> Run:
    stats = [each.stats for each in corrections]
    texts = [each.text for each in corrections]
    return Run(texts, sum(each.forwards for each in stats), sum(each.new_tokens for each in stats))


def forced_answers(
    aligner: Aligner, lengths: Sequence[int], rng: np.random.Generator
) -> tuple[Pairs, Aligner]:
    """Return answers of so many random tokens, and an aligner that makes 0, 1, 2, ... edits in them.

    It is `aligner`, an answer-level one, with its output forced.
    """
    pairs: Pairs = []
    texts: list[Ids] = []
    tokenizer, vocabulary = aligner.tokenizer, aligner.tokenizer.vocab_size
    for edits, length in enumerate(lengths):
        question, answer = (
            tokenizer.decode(some_ids(rng, vocabulary, count)) for count in (_RAGGED_QUESTION, length)
        )
        pairs.append((question, answer))
        target = edited(tokenizer.encode_text(answer), edits, rng, vocabulary)
        texts.append([*aligner.encode_prompt(question, "", answer, ""), *target, tokenizer.eos_id])
    forced = ForcedOutput(aligner.backend, *texts)
    return pairs, Aligner(
        forced,
        tokenizer,
        aligner.config,
        template=aligner.template,
        decode=aligner.decode_config,
        safeguards="off",
    )
