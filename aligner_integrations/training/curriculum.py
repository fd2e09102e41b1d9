"""Rows in the order a small model learns them: copy, then copy real text, then correct.

A stage is a mixture of tasks. Examples are drawn without end from a generator seeded by the stage
and a pool number, so a run resumes at a pool border with the data it would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from aligner_integrations.safeguards import word_similarity
from aligner_integrations.training.arithmetic import (
    SumFrame,
    fill_frame,
    fill_sum,
    find_frame,
    find_results,
)
from aligner_integrations.training.rows import Row

END, KEEP, QUESTION, PREFIX, SENTENCE, CORRECTION = 1, 2, 3, 5, 6, 7
_FIRST_CONTENT_ID = 8
_FRESH_SHARE = 0.3  # of generated sums; the others are sums of the data
_DRILL_SUMS = 9
_BETWEEN_SUMS = (". ", ", ", "\n", "; ")
_BARE_SHARE = 0.7  # of real sums: the words before a sum say little of whether it is right
_NEAR = 0.75
_RESULT_WEIGHT = 0.5  # of predicting a result's digit while it is read


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids; for each place what to predict there and the weight of it (0 for most of the prompt).

    What to predict is the id itself nearly everywhere. While a sum is read it is the *right* digit of
    the result, and on the token after the result a verdict: keep, or correction where it is wrong.
    """

    ids: list[int]
    targets: list[int]
    weights: list[float]


@dataclass(frozen=True, slots=True)
class Stage:
    """A named stretch of training: how many tokens, and the share of each task.

    `batch_tokens` are padded tokens a step. Keep it the same in all stages: each shape is compiled once.
    `rate` is the stage's share of the peak rates; with `decay` it falls to zero over the stage's end.
    At its end the weights become a mean, with a share of `before` for what they were before the stage: it
    mends what it is for without forgetting the rest.
    """

    name: str
    tokens: int
    batch_tokens: int
    mixture: dict[str, float]
    rate: float = 1.0
    decay: bool = False
    before: float = 0.0


@dataclass(frozen=True, slots=True)
class Weights:
    """Loss weights: of the first written token, and of tokens that differ from the sentence."""

    first: float
    changed: float


class Curriculum:
    """Draws examples of a stage's mixture from rows and from generators."""

    def __init__(self, rows: list[Row], tokenizer: Tokenizer, *, weights: Weights, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._weights = weights
        self._max_length = max_length
        self._vocabulary = tokenizer.get_vocab_size()
        self._rows: dict[str, list[Row]] = {}
        for row in rows:
            if not row.dev:
                self._rows.setdefault(row.task, []).append(row)
        # Rewrites that mostly delete are the ones that a small model can learn to write.
        self._rows["rude-near"] = [row for row in self._rows.get("rude", []) if _is_near(row)]
        self._frames = self._make_frames()
        self._makers: dict[str, Callable[[random.Random], Example]] = {
            "copy-random": self._random_copy,
            "copy-text": self._copy_text,
            "fresh-sum": self._fresh_sum,
            "bare-sum": self._bare_sum,
            "sum-drill": lambda rng: self._sum_drill(rng, fresh=_FRESH_SHARE),
            "fact-drill": lambda rng: self._sum_drill(rng, fresh=0.0),
        }

    def check(self, stage: Stage) -> None:
        """Raise a ValueError if the stage names a task that has neither rows nor a generator."""
        known = sorted({*self._makers, *(task for task, rows in self._rows.items() if rows)})
        unknown = sorted(set(stage.mixture) - set(known))
        if unknown:
            raise ValueError(
                f"stage {stage.name!r}: no rows for {', '.join(unknown)}; tasks: {', '.join(known)}"
            )

    def pool(self, stage: Stage, number: int, *, tokens: int) -> list[Example]:
        """Return the examples of pool `number` of `stage`, about `tokens` long in all."""
        rng = random.Random(f"{stage.name}/{number}")
        tasks, shares = list(stage.mixture), list(stage.mixture.values())
        examples: list[Example] = []
        while tokens > 0:
            task = rng.choices(tasks, shares)[0]
            example = self._makers[task](rng) if task in self._makers else self._real(task, rng)
            if len(example.ids) <= self._max_length:
                examples.append(example)
                tokens -= len(example.ids)
        return examples

    def _make_frames(self) -> list[SumFrame]:
        steps = (row.sentence for row in self._rows.get("sum-right", []))
        return [frame for frame in map(find_frame, steps) if frame is not None]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def _example(
        self, question: str, prefix: str, sentence: str, target: str | None, *, sums: bool = False
    ) -> Example:
        """One decision: read the sentence, then write keep, nothing, or the rewrite."""
        source = self._encode(sentence)
        head = [QUESTION, *self._encode(question), PREFIX, *self._encode(prefix), SENTENCE]
        written = [KEEP] if target is None else [*self._encode(target), END]
        ids = [*head, *source, CORRECTION, *written]
        weights = [0.0] * (len(head) + len(source) + 1) + _written_weights(source, written, self._weights)
        example = Example(ids, list(ids), weights)
        if sums:
            self._mark_sums(example, sentence, sentence if target is None else target, start=len(head))
        return example

    def _mark_sums(self, example: Example, sentence: str, right: str, *, start: int) -> None:
        """Let every result in `sentence`, whose tokens begin at `start`, be predicted and judged."""
        offsets = self._tokenizer.encode(sentence, add_special_tokens=False).offsets
        for first_char, end_char, result in find_results(sentence, right):
            inside = [i for i, (low, high) in enumerate(offsets) if first_char <= low and high <= end_char]
            if inside:
                first, end = start + inside[0], start + inside[-1] + 1
                _mark_result(example, first, end, self._encode(result))

    def _real(self, task: str, rng: random.Random) -> Example:
        row = rng.choice(self._rows[task])
        question, prefix = row.question, row.prefix
        sums = task.startswith("sum")
        if sums and rng.random() < _BARE_SHARE:
            return self._example("", "", row.sentence, row.target, sums=True)
        if not question and rng.random() < 0.4:
            question = rng.choice(self._rows["ordinary"]).question
        if not prefix and task not in ("harmful", "good", "request") and rng.random() < 0.25:
            prefix = self._ordinary_text(rng)
        if task == "ordinary" and rng.random() < 0.04:
            prefix = self._ordinary_text(rng, rows=40)
        return self._example(question, prefix, row.sentence, row.target, sums=sums)

    def _ordinary_text(self, rng: random.Random, rows: int = 0) -> str:
        chosen = rng.choices(self._rows["ordinary"], k=rows or rng.randint(1, 3))
        return " ".join(row.sentence for row in chosen)[: 4 * self._max_length // 2]

    def _bare_sum(self, rng: random.Random) -> Example:
        """A sum without its words: more sums a token."""
        frame = rng.choice(self._frames)
        after = " ".join(frame.after.split(" ")[: rng.randint(0, 2)])
        return self._sum(replace(frame, before="", after=after), rng)

    def _sum_drill(self, rng: random.Random, *, fresh: float) -> Example:
        """Sums in a row, right and wrong; their results and verdicts are predicted, nothing else."""
        ids, marks = [QUESTION, PREFIX, SENTENCE], []
        for _ in range(_DRILL_SUMS):
            frame = replace(rng.choice(self._frames), before="")
            start, result, wrong = fill_sum(frame, rng, fresh=rng.random() < fresh)
            words = " ".join(frame.after.split(" ")[: rng.randint(0, 2)])
            shown = self._encode(str(result if rng.random() < 0.5 else wrong))
            ids += self._encode(start)
            marks.append((len(ids), len(ids) + len(shown), self._encode(str(result))))
            ids += [*shown, *self._encode(words + rng.choice(_BETWEEN_SUMS))]
        example = Example([*ids, CORRECTION], [*ids, CORRECTION], [0.0] * (len(ids) + 1))
        for mark in marks:
            _mark_result(example, *mark)
        return example

    def _fresh_sum(self, rng: random.Random) -> Example:
        return self._sum(rng.choice(self._frames), rng)

    def _sum(self, frame: SumFrame, rng: random.Random) -> Example:
        right, wrong = fill_frame(frame, rng, fresh=rng.random() < _FRESH_SHARE)
        if rng.random() < 0.5:
            return self._example("", "", right, None, sums=True)
        return self._example("", "", wrong, right, sums=True)

    def _random_copy(self, rng: random.Random) -> Example:
        """Copy random tokens after some others, forwards and backwards, that are not to be copied."""
        last = self._vocabulary - 1
        source, before = (
            [rng.randint(_FIRST_CONTENT_ID, last) for _ in range(rng.randint(least, most))]
            for least, most in ((6, 60), (0, 20))
        )
        ids = [QUESTION, *before, PREFIX, *before[::-1], SENTENCE, *source, CORRECTION, *source, END]
        written = len(source) + 1
        return Example(ids, ids, [0.0] * (len(ids) - written) + [1.0] * written)

    def _copy_text(self, rng: random.Random) -> Example:
        """Copy a real sentence, now and then without one word; how to begin is not trained."""
        task = rng.choice(("ordinary", "polite", "rude", "sum-right", "step", "good"))
        row = rng.choice(self._rows[task])
        words = row.sentence.split(" ")[:60]
        target = list(words)
        if len(words) > 3 and rng.random() < 0.4:
            del target[rng.randrange(1, len(words))]
        keep_context = rng.random() < 0.3
        question, prefix = (row.question, row.prefix) if keep_context else ("", "")
        source, written = self._encode(" ".join(words)), [*self._encode(" ".join(target)), END]
        head = [QUESTION, *self._encode(question), PREFIX, *self._encode(prefix), SENTENCE]
        ids = [*head, *source, CORRECTION, *written]
        weights = [0.0] * (len(ids) - len(written)) + [0.0] + [1.0] * (len(written) - 1)
        return Example(ids, ids, weights)


def _is_near(row: Row) -> bool:
    return row.target is not None and word_similarity(row.sentence, row.target) >= _NEAR


def _mark_result(example: Example, first: int, end: int, result: list[int]) -> None:
    """Predict `result` over the places from `first` to `end` that show it, rightly or not, then judge it."""
    shown = example.ids[first:end]
    for place, (digit, seen) in enumerate(zip(result, shown, strict=False), start=first):
        example.targets[place] = digit
        example.weights[place] = _RESULT_WEIGHT
        if digit != seen:
            break  # what follows a wrong digit tells nothing
    verdict = end + 1  # said on the token after the result: only there is its end known
    if verdict < len(example.ids) and example.weights[verdict] == 0.0:
        example.targets[verdict] = KEEP if shown == result else CORRECTION
        example.weights[verdict] = 1.0


def _written_weights(source: list[int], written: list[int], weights: Weights) -> list[float]:
    """Weight what is written: the decision most, then what differs from the sentence."""
    start = 0
    while start < min(len(source), len(written)) and source[start] == written[start]:
        start += 1
    end = 0
    limit = min(len(source), len(written) - 1) - start
    while end < limit and source[len(source) - 1 - end] == written[len(written) - 2 - end]:
        end += 1
    result = [1.0] * len(written)
    for index in range(start, len(written) - 1 - end):
        result[index] = weights.changed
    result[0] = weights.first
    return result


def make_batches(
    examples: list[Example], *, buckets: list[int], tokens: int, seed: str
) -> Iterator[list[Example]]:
    """Group examples of like length, `tokens` padded tokens a batch at most, in random order."""
    batches: list[list[Example]] = []
    shelves: dict[int, list[Example]] = {bucket: [] for bucket in buckets}
    for example in sorted(examples, key=lambda item: len(item.ids)):
        bucket = next(size for size in buckets if len(example.ids) <= size)
        shelf = shelves[bucket]
        shelf.append(example)
        if len(shelf) == max(tokens // bucket, 1):
            batches.append(shelf)
            shelves[bucket] = []
    batches += [shelf for shelf in shelves.values() if shelf]
    random.Random(seed).shuffle(batches)
    return iter(batches)
