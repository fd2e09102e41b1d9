"""Where in the reference are we, and what comes next: pure functions of token lists.

A correction is mostly a copy of its reference, the original answer. After an edit the copy goes on
somewhere else in the reference: one token further (a substitution), at the same place (an
insertion) or further on (a deletion). Which of them is not known at once. `Alignment` keeps several
hypotheses with scores, and drafts from the best: every hypothesis moves one token further at a
mismatch, and wherever the reference holds the token that was written a new one begins. Those that
go on to match outgrow the others, so the longest match wins, and among equals the nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from aligner_integrations.backends.base import Ids

# Log odds, in nats. Chosen by simulation over substitutions, insertions and deletions of 1 to 8
# tokens at edit rates of 2 to 20 %; forwards change by less than 3 % within a factor of 2 of each.
_SUBSTITUTED = -1.0
_JUMPED = -2.0
_JUMPED_FAR = -0.15  # for each token of distance
_MATCHED_MAX = 4.0
_KEPT_HYPOTHESES = 8
_HOPELESS = 8.0  # a hypothesis this far behind the best is dropped
_LOST = 4  # mismatches in a row after which looking elsewhere is worth more

_SHORTEST_DRAFT = 8  # below this a longer draft costs next to nothing
_LOST_DRAFT = 2  # enough to notice that the reference is found again
_LOOKUP_SHORTEST = 2  # an end of one token says too little
_LOOKUP_LONGEST = 4


class Alignment:
    """The place in a reference that the output has reached.

    Its state depends on the tokens pushed and on nothing else. So the same output leads to the same
    state whether it was written token by token or in drafts of any length.
    """

    def __init__(self, reference: Sequence[int], *, end: int) -> None:
        self._reference = [*reference, end]
        self._places: dict[int, list[int]] = {}
        for place, token in enumerate(self._reference):
            self._places.setdefault(token, []).append(place)
        self._hypotheses: list[tuple[int, float]] = [(0, 0.0)]
        self._misses = 0

    @property
    def lost(self) -> bool:
        """Whether the reference has failed to foretell the last few tokens."""
        return self._misses >= _LOST

    def next(self) -> int | None:
        """Return the token that the reference foretells, `None` past its end."""
        place = self._hypotheses[0][0]
        return self._reference[place] if place < len(self._reference) else None

    def ahead(self, count: int) -> Ids:
        """Return up to `count` tokens that the reference foretells."""
        place = self._hypotheses[0][0]
        return self._reference[place : place + count]

    def push(self, token: int) -> None:
        """Take in the next token of the output."""
        hit = self.next() == token
        if hit and len(self._hypotheses) == 1:
            self._hypotheses = [(self._hypotheses[0][0] + 1, 0.0)]
            self._misses = 0
            return
        self._misses = 0 if hit else self._misses + 1
        scores: dict[int, float] = {}
        matched = self._worth(token)
        for place, score in self._hypotheses:
            if self._reference[place : place + 1] == [token]:
                _improve(scores, place + 1, score + matched)
            else:
                _improve(scores, min(place + 1, len(self._reference)), score + _SUBSTITUTED)
        if not hit:
            here, score = self._hypotheses[0]
            for place in self._places.get(token, ()):
                _improve(scores, place + 1, score + matched + _JUMPED + _JUMPED_FAR * abs(place - here))
        ranked = sorted(scores.items(), key=lambda item: -item[1])[:_KEPT_HYPOTHESES]
        best = ranked[0][1]
        self._hypotheses = [(place, score - best) for place, score in ranked if best - score < _HOPELESS]

    def _worth(self, token: int) -> float:
        """Return how much a match of `token` tells: rare tokens tell more."""
        found = len(self._places.get(token, ()))
        return min(_MATCHED_MAX, log((len(self._reference) + 1) / found)) if found else 0.0


def _improve(scores: dict[int, float], place: int, score: float) -> None:
    if score > scores.get(place, float("-inf")):
        scores[place] = score


def propose(alignment: Alignment, *, prompt: Sequence[int], output: Sequence[int], count: int) -> Ids:
    """Return up to `count` tokens: from the reference, or while that is lost from elsewhere."""
    if alignment.lost:
        return look_up((prompt,), output, count) or alignment.ahead(min(count, _LOST_DRAFT))
    return alignment.ahead(count)


def look_up(texts: Sequence[Sequence[int]], output: Sequence[int], count: int) -> Ids:
    """Return up to `count` tokens that followed the end of `output` elsewhere, or nothing.

    The longest end of `output` that occurs earlier in `output` itself or in one of `texts` wins;
    among equals the last occurrence in the first of them.
    """
    if len(output) < _LOOKUP_SHORTEST:
        return []
    longest, found = _LOOKUP_SHORTEST - 1, list[int]()
    end = list(output[-_LOOKUP_LONGEST:])
    for text in (output, *texts):
        for place in range(len(text) - 1, 0, -1):
            if text[place - 1] != end[-1]:
                continue
            size = 1
            while size < min(len(end), place) and text[place - 1 - size] == end[-1 - size]:
                size += 1
            if size > longest and place < len(text):
                longest, found = size, list(text[place : place + count])
    return found


def next_draft_length(length: int, *, drafted: int, accepted: int, longest: int) -> int:
    """Return how many tokens to draft next: more after a success, fewer after a rejection.

    `length` is how many were wished for last, which may be more than there were to draft.
    """
    if accepted == drafted:
        return min(longest, max(_SHORTEST_DRAFT, length, 2 * drafted))
    return min(longest, max(_SHORTEST_DRAFT, length // 2, 2 * accepted))


def common_start(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the longest common start; compares slices, so it is linear and fast."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
