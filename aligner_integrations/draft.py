"""Where in the reference are we, and what comes next: from lists of tokens alone.

A correction is mostly a copy of its reference, the original answer. After an edit the copy goes on
somewhere else in the reference: one token further (a substitution), at the same place (an
insertion) or further on (a deletion). Which of them is not known at once. `Alignment` keeps several
hypotheses with scores and foretells by the best: every hypothesis moves one token further at a
mismatch, and wherever the reference holds the token that was written a new one begins. Those that
go on to match outgrow the others, so the longest match wins, and among equals the nearest.

Where the reference has not been copied lately, `Drafter` asks what followed the same tokens earlier in
prompt and output instead, and it drafts as far as the chance that the model writes that is worth what the
tokens cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import TypeAlias

from aligner_integrations.backends.base import Ids

# Log odds, in nats. Chosen, as all constants here, by counting forwards over corrections of sentences and
# answers (`aligner bench --replay`); these change by less than 1 % within a factor of 2 of each.
_SUBSTITUTED = -1.0
_INSERTED = -1.0
_JUMPED = -3.0
_JUMPED_FAR = -0.15  # for each token of distance
_JUMPED_BACK = -0.5  # for each of the last hits, up to 8: who copies in order seldom goes back
_MATCHED_MAX = 4.0
_KEPT_HYPOTHESES = 8
_HOPELESS = 8.0  # a hypothesis this far behind the best is dropped

_MOST_CREDIT = 16
_TRUSTED = 4  # with this much credit the reference alone foretells
_HEARD = 2  # with less it has no say
_LONGEST_CONTEXT = 4
_PLACES = 64  # of a token's places, the last so many are looked at
_FORETOLD_VOTES = 2.0
_FAMILIAR = 0.3
_PRIOR_WEIGHT = 20.0  # in guesses


class Alignment:
    """The place in a reference that the output has reached.

    Its state depends on the tokens pushed and on nothing else. So the same output leads to the same
    state whether it was written token by token or in drafts of any length. `hit` says whether the
    reference foretold the last token, and `credit` how well the last few: one more for each hit, half of
    it for a miss.
    """

    def __init__(self, reference: Sequence[int], *, end: int) -> None:
        self.reference = [*reference, end]
        self._places: dict[int, list[int]] = {}
        for place, token in enumerate(self.reference):
            self._places.setdefault(token, []).append(place)
        self._hypotheses: list[tuple[int, float]] = [(0, 0.0)]
        self.credit = _MOST_CREDIT // 2
        self.hit = True

    @property
    def place(self) -> int:
        """How far into the reference the output has come."""
        return self._hypotheses[0][0]

    def next(self) -> int | None:
        """Return the token that the reference foretells, `None` past its end."""
        return self.reference[self.place] if self.place < len(self.reference) else None

    def push(self, token: int) -> None:
        """Take in the next token of the output."""
        hit = self.next() == token
        was_hit, before = self.hit, self.credit
        self.hit, self.credit = hit, credit_after(before, hit=hit)
        if hit and len(self._hypotheses) == 1:
            self._hypotheses = [(self.place + 1, 0.0)]
            return
        scores: dict[int, float] = {}
        matched = self._worth(token)
        for place, score in self._hypotheses:
            if self.reference[place : place + 1] == [token]:
                _improve(scores, place + 1, score + matched)
            else:
                _improve(scores, min(place + 1, len(self.reference)), score + _SUBSTITUTED)
        if not hit:
            for place in self._places.get(token, ()):
                _improve(scores, place + 1, matched + self._jump(place, before, was_hit))
        ranked = sorted(scores.items(), key=lambda item: -item[1])[:_KEPT_HYPOTHESES]
        best = ranked[0][1]
        self._hypotheses = [(place, score - best) for place, score in ranked if best - score < _HOPELESS]

    def _jump(self, place: int, credit: int, was_hit: bool) -> float:
        """Return how likely the output has gone to `place`, not on from where it was."""
        here = self.place
        if place == here - 1 and not was_hit:  # what the miss before seemed to replace: that was inserted
            return _INSERTED
        back = _JUMPED_BACK * min(credit, 8) if place < here else 0.0
        return _JUMPED + _JUMPED_FAR * abs(place - here) + back

    def _worth(self, token: int) -> float:
        """Return how much a match of `token` tells: rare tokens tell more."""
        found = len(self._places.get(token, ()))
        return min(_MATCHED_MAX, log((len(self.reference) + 1) / found)) if found else 0.0


def credit_after(credit: int, *, hit: bool) -> int:
    """Return the credit of a reference that has, or has not, foretold one more token."""
    return min(_MOST_CREDIT, credit + 1) if hit else credit // 2


def _improve(scores: dict[int, float], place: int, score: float) -> None:
    if score > scores.get(place, float("-inf")):
        scores[place] = score


_Grounds: TypeAlias = tuple[int, bool, bool, int, bool]


@dataclass(frozen=True, slots=True)
class DraftCost:
    """What drafting costs, in forwards of a single token: `first` for a draft at all, `each` for a token."""

    first: float
    each: float


# Measured with the bundled model on two cores: a forward over 2, 4, 8, 16 or 32 tokens takes 1.2, 1.3, 1.7,
# 2.2 or 3.2 times that over one. On an accelerator tokens ride along nearly for free while they are few.
ON_CPU = DraftCost(first=0.15, each=0.06)
ON_ACCELERATOR = DraftCost(first=0.0, each=0.016)


@dataclass(frozen=True, slots=True)
class _Guess:
    """A token, and what speaks for it.

    `context` is how many tokens it followed before, 0 for none; `alone` whether nothing else did;
    `foretold` whether the reference says so too. Where that alone says so, `credit` is what it has, and
    `hit` whether it was right the last time.
    """

    token: int
    context: int = 0
    alone: bool = False
    foretold: bool = False
    credit: int = 0
    hit: bool = False

    @property
    def grounds(self) -> _Grounds:
        return self.context, self.alone, self.foretold, self.credit, self.hit

    def prior(self) -> float:
        """Return how often such a guess is right, before anything is known of this text."""
        if self.credit:
            known = 0.98 if self.credit == _MOST_CREDIT else 0.94 if self.credit > 8 else 0.77
            return known if self.hit else 0.5
        if not self.context:
            return 0.05
        if self.alone:
            return 0.17 + 0.1 * self.context + 0.2 * self.foretold
        return 0.1 + 0.03 * self.context + 0.1 * self.foretold


class Drafter:
    """Drafts what may come after an output; belongs to one decoding.

    A draft changes how many forwards are needed and never what is written, so it may use anything.
    """

    def __init__(self, alignment: Alignment, prompt: Sequence[int], *, end: int, cost: DraftCost) -> None:
        self._alignment = alignment
        self._end = end
        self._cost = cost
        self._text: Ids = []
        self._after: dict[int, list[int]] = {}  # token -> the places right after it
        self._pairs: set[tuple[int, int]] = set()
        self._company: dict[int, int] = {}  # token -> how many different tokens it has followed
        self._commonest = end  # of the tokens seen, which has the most company; the end for none
        self._output_start = len(prompt)
        self._tried: list[_Guess] = []
        self._found: dict[_Grounds, tuple[int, int]] = {}  # guesses, hits
        for token in prompt:
            self._add(token)

    def propose(self, output: Sequence[int], count: int) -> Ids:
        """Return up to `count` tokens that may follow `output`, which has grown since the last call.

        End-of-text is not among them: what comes before it foretells it, without a forward.
        """
        self._catch_up(output)
        reference, place = self._alignment.reference, self._alignment.place
        credit, hit = self._alignment.credit, self._alignment.hit
        context, chance = self._text[-_LONGEST_CONTEXT:], 1.0
        draft: Ids = []
        gain = -self._cost.first
        while len(draft) < count:
            foretold = reference[place] if place < len(reference) else None
            guess = self._guess(context, foretold, credit, hit)
            if guess is None:
                break
            self._tried.append(guess)
            chance *= self._chance(guess)
            if chance < self._cost.each:
                break
            gain += chance - self._cost.each
            draft.append(guess.token)
            context = [*context[1 - _LONGEST_CONTEXT :], guess.token]
            hit = guess.token == foretold
            credit = credit_after(credit, hit=hit)
            place += 1
        return draft if gain > 0 else []

    def _catch_up(self, output: Sequence[int]) -> None:
        """Take in what was written since, and how the guesses fared."""
        written = output[len(self._text) - self._output_start :]
        for guess, token in zip(self._tried, written, strict=False):
            guesses, hits = self._found.get(guess.grounds, (0, 0))
            self._found[guess.grounds] = guesses + 1, hits + (guess.token == token)
            if guess.token != token:
                break
        self._tried = []
        for token in written:
            self._add(token)

    def _add(self, token: int) -> None:
        if self._text and (pair := (self._text[-1], token)) not in self._pairs:
            self._pairs.add(pair)
            company = self._company[token] = self._company.get(token, 0) + 1
            if token != self._end and company >= self._company.get(self._commonest, 0):
                self._commonest = token
        self._text.append(token)
        self._after.setdefault(token, []).append(len(self._text))

    def _chance(self, guess: _Guess) -> float:
        guesses, hits = self._found.get(guess.grounds, (0, 0))
        return (hits + _PRIOR_WEIGHT * guess.prior()) / (guesses + _PRIOR_WEIGHT)

    def _guess(self, context: Ids, foretold: int | None, credit: int, hit: bool) -> _Guess | None:
        if foretold == self._end:
            foretold = None
        if foretold is not None and credit >= _TRUSTED:
            return _Guess(foretold, credit=credit, hit=hit)
        length, votes = self._votes(context)
        if not votes:
            if foretold is not None and credit >= _HEARD:
                return _Guess(foretold, credit=credit, hit=hit)
            return None if self._commonest == self._end else _Guess(self._commonest)
        alone = len(votes) == 1
        if foretold is not None and (foretold in votes or (length == 1 and credit >= _HEARD)):
            votes[foretold] = votes.get(foretold, 0.0) + _FORETOLD_VOTES
        # What has followed many different tokens is likelier to follow this one (Kneser and Ney 1995).
        for token in votes:
            votes[token] *= (1 + self._company.get(token, 0)) ** _FAMILIAR
        best = max(reversed(votes), key=votes.__getitem__)  # of equals, the one seen last
        return _Guess(best, length, alone, best == foretold)

    def _votes(self, context: Ids) -> tuple[int, dict[int, float]]:
        """Return the length of the longest end of `context` that was seen before, and what followed it."""
        text, longest, votes = self._text, 0, dict[int, float]()
        if not context:
            return 0, votes
        for place in self._after.get(context[-1], ())[-_PLACES:]:
            if place >= len(text) or text[place] == self._end:
                continue
            length = 1
            while length < min(len(context), place) and text[place - 1 - length] == context[-1 - length]:
                length += 1
            if length > longest:
                longest, votes = length, {}
            if length == longest:
                votes[text[place]] = votes.get(text[place], 0.0) + 1.0
        return longest, votes


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
