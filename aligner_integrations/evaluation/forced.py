"""A backend that runs in full and writes what it is told to: honest costs at a chosen output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from aligner_integrations.backends.base import (
    Backend,
    Batching,
    Ids,
    KVCache,
    Logits,
    Row,
    Scores,
    SideBySide,
)
from aligner_integrations.draft import common_start
from aligner_integrations.evaluation.timing import Block

EOS = 1
FIRST_TEXT_ID = 8
QUESTION_TOKENS = 43  # with a separator a prompt of 172 tokens for an answer of 128
_EDITS = (1, 3, 10)


class KnownCache:
    """A cache that knows its ids."""

    def __init__(self, inner: KVCache) -> None:
        self.inner = inner
        self.ids: Ids = []

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return self.inner.length

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.inner.trim(length)
        del self.ids[length:]


class ForcedOutput:
    """A backend around another: runs it in full, then makes a given text win.

    Of several texts, each a prompt and what is to follow, a sequence gets the one that begins as it
    does; without any the scores stay. `blocks` holds the tokens and the places of each forward so far.
    """

    def __init__(self, inner: Backend, *texts: Ids) -> None:
        self._inner = inner
        self._batching = inner if isinstance(inner, Batching) else None
        self._texts = texts
        self.blocks: list[Block] = []

    @property
    def name(self) -> str:
        """The inner backend's name."""
        return self._inner.name

    @property
    def provider(self) -> str:
        """The inner backend's provider."""
        return self._inner.provider

    @property
    def batches(self) -> bool:
        """Whether rows share a forward of the inner backend."""
        return self._batching is not None and self._batching.batches

    def for_batches(self) -> tuple[Backend, int]:
        """Return what the inner backend runs a batch of texts on, forced likewise."""
        if not isinstance(self._inner, SideBySide):
            return self, 1
        inner, workers = self._inner.for_batches()
        return ForcedOutput(inner, *self._texts), workers

    def make_cache(self) -> KnownCache:
        """Return an empty cache of the inner backend."""
        return KnownCache(self._inner.make_cache())

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        """Run the inner backend; the token that follows in the text gets the best logit."""
        known = cast(KnownCache, cache)
        logits = self._inner.forward(ids, known.inner, last=last)
        wanted = self._wanted(ids, known, last)
        if wanted:
            if not logits.flags.writeable:
                logits = logits.copy()
            logits[np.arange(last), wanted] = np.inf
        return logits

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        """Run the inner backend, by one forward for all rows if it can; see `forward`."""
        if self._batching is None:
            return [Scores.of(self.forward(row.ids, row.cache, last=row.last), row.ids) for row in rows]
        caches = [cast(KnownCache, row.cache) for row in rows]
        found = self._batching.score(
            [replace(row, cache=cache.inner) for row, cache in zip(rows, caches, strict=True)]
        )
        return [
            _forced(scores, self._wanted(row.ids, cache, row.last), row)
            for scores, row, cache in zip(found, rows, caches, strict=True)
        ]

    def _wanted(self, ids: Ids, cache: KnownCache, last: int) -> Ids:
        """Note what was run, and return what is to follow at each of the last places."""
        self.blocks.append((len(ids), last))
        cache.ids += ids
        if not self._texts:
            return []
        text = max(self._texts, key=lambda each: common_start(each, cache.ids))
        # A draft may reach past the end of the text; what is written there is never accepted.
        places = range(len(cache.ids) - last + 1, len(cache.ids) + 1)
        return [text[min(place, len(text) - 1)] for place in places]


def _forced(scores: Scores, wanted: Ids, row: Row) -> Scores:
    if not wanted:
        return scores

    def logits_of(place: int) -> Logits:
        logits = scores.row(place).copy()
        logits[wanted[place]] = np.inf
        return logits

    following = [*row.ids[len(row.ids) - row.last + 1 :], None]
    known = zip(scores.next_logits, following, wanted, strict=True)
    return Scores(
        best=wanted,
        best_logits=[float("inf")] * row.last,
        next_logits=[float("inf") if run == best else logit for logit, run, best in known],
        row=logits_of,
    )


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a run is to write after a prompt, beside the answer in it."""

    name: str
    prompt: Ids
    answer: Ids
    target: Ids
    edits: int | None  # None: the target has nothing of the answer

    @property
    def text(self) -> Ids:
        """Prompt, target and end-of-text."""
        return [*self.prompt, *self.target, EOS]


def make_patterns(rng: np.random.Generator, vocabulary: int, length: int) -> list[Pattern]:
    """Return an answer of `length` tokens unchanged, with 1, 3 and 10 edits, and one of other tokens."""
    question, answer, other = (
        some_ids(rng, vocabulary, count) for count in (QUESTION_TOKENS, length, length)
    )
    prompt = [*question, *answer, 0]
    patterns = [Pattern("unchanged", prompt, answer, answer, 0)]
    for edits in _EDITS:
        target = edited(answer, edits, rng, vocabulary)
        patterns.append(Pattern(f"{edits} edit{'s' * (edits > 1)}", prompt, answer, target, edits))
    return [*patterns, Pattern("nothing to copy", prompt, answer, other, None)]


def edited(answer: Ids, edits: int, rng: np.random.Generator, vocabulary: int) -> Ids:
    """Return `answer` with so many tokens replaced by others."""
    target = list(answer)
    for place in rng.choice(len(answer), size=min(edits, len(answer)), replace=False).tolist():
        # Another id than the answer's own, so that it is an edit indeed.
        target[place] = (target[place] - FIRST_TEXT_ID + 1) % (vocabulary - FIRST_TEXT_ID) + FIRST_TEXT_ID
    return target


def some_ids(rng: np.random.Generator, vocabulary: int, count: int) -> Ids:
    """Return random ids of text, never special ones."""
    ids: Ids = rng.integers(FIRST_TEXT_ID, vocabulary, size=count).tolist()
    return ids
