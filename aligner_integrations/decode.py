"""Decoding, plain and guided by a reference: ids in, ids out.

Both functions choose every token by the same rule, so they return the same ids; `draft_decode` only
needs fewer forwards. The rule, with `reference` the tokens of the original answer:

* the token is the one with the best logit, or above temperature 0 one that is drawn (`sampling.py`);
* unless the place reached in the reference foretells another one, and the best beats that one by no
  more than the draft margin: then the foretold token stays;
* with a keep token, the first choice is between it and the best other token: keep unless the other
  beats it by more than `config.edit_margin`. The keep token is never written after that. Above
  temperature 0 and without a margin that choice is drawn like any other.

With margins of 0 this is plain greedy decoding, or plain sampling. The same ids means: as far as a
forward over many tokens rounds like forwards over one, which fp32 does up to near-ties.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from aligner_integrations.backends.base import Backend, Batching, Ids, KVCache, Logits, Row, Scores
from aligner_integrations.config import DecodeConfig
from aligner_integrations.correction import DecodeStats
from aligner_integrations.draft import ON_ACCELERATOR, ON_CPU, Alignment, Drafter, common_start
from aligner_integrations.resilience import Deadline
from aligner_integrations.sampling import Sampler


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the model wrote, without end-of-text; `kept` when it chose the keep token."""

    ids: Ids
    kept: bool
    stats: DecodeStats


class PromptCache:
    """The cache of one stream and the ids that it holds. Not for two threads at a time."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._batching = backend if isinstance(backend, Batching) else None  # the question takes its time
        self._kv: KVCache | None = None  # made where it is needed: on a device that hangs, making it hangs
        self._deadline: Deadline | None = None
        self.ids: Ids = []

    def taking_part(self) -> AbstractContextManager[None]:
        """While entered, other threads' forwards may wait for this one's, where the backend gathers them."""
        gathers: Callable[[], AbstractContextManager[None]] = getattr(
            self._backend, "taking_part", nullcontext
        )
        return gathers()

    def reuse(self, prompt: Ids) -> int:
        """Trim to the longest common start with `prompt`, and return its length.

        It is at most `len(prompt) - 1`, because the last token must be run to get its logits.
        """
        common = min(common_start(self.ids, prompt), max(len(prompt) - 1, 0))
        self.trim(common)
        return common

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if self._kv is not None:
            self._kv.trim(length)
        del self.ids[length:]

    def forget(self) -> None:
        """Begin anew, with another cache of the backend's."""
        self._kv = None
        self.ids = []

    def within(self, deadline: Deadline, decode: Callable[[PromptCache], Decoded]) -> Decoded:
        """Return what `decode` does with this cache, in a thread; a late one keeps it and gives nothing.

        Raises:
            CorrectionTimeoutError: the deadline passed.
        """
        lent = copy(self)
        lent._deadline = deadline
        self.forget()
        decoded = deadline.wait_for(lambda: decode(lent))
        self._kv, self.ids = lent._kv, lent.ids
        return decoded

    def forward(self, ids: Ids, *, last: int) -> Scores:
        """Run `ids` and append them. A forward that fails leaves the cache empty, not half written."""
        check = None if self._deadline is None else self._deadline.check
        try:
            if check is not None:
                check()
            kv = self._backend.make_cache() if self._kv is None else self._kv
            if self._batching is not None:
                scores = self._batching.score([Row(ids, kv, last, check)])[0]
            else:
                scores = Scores.of(self._backend.forward(ids, kv, last=last), ids)
        except BaseException:
            self.forget()
            raise
        self._kv = kv
        self.ids.extend(ids)
        return scores


def greedy_decode(
    backend: Backend,
    prompt: Ids,
    reference: Ids,
    *,
    config: DecodeConfig,
    eos_id: int,
    max_new_tokens: int,
    keep_id: int | None = None,
    cache: PromptCache | None = None,
    draft_margin: float | None = None,
) -> Decoded:
    """Decode one token per forward. Arguments and result are those of `draft_decode`."""
    return _Run(
        backend=backend,
        prompt=prompt,
        reference=reference,
        config=config,
        eos_id=eos_id,
        max_new_tokens=max_new_tokens,
        keep_id=keep_id,
        cache=PromptCache(backend) if cache is None else cache,
        draft_margin=config.edit_margin if draft_margin is None else draft_margin,
        drafting=False,
    ).decode()


def draft_decode(
    backend: Backend,
    prompt: Ids,
    reference: Ids,
    *,
    config: DecodeConfig,
    eos_id: int,
    max_new_tokens: int,
    keep_id: int | None = None,
    cache: PromptCache | None = None,
    draft_margin: float | None = None,
) -> Decoded:
    """Decode with `reference` as the draft: one forward for an unchanged answer, at any length.

    Args:
        backend: runs the network.
        prompt: the ids to continue; at least one.
        reference: the ids of the original answer (or sentence), without end-of-text.
        config: `edit_margin`, `max_draft_tokens` and, if set, `max_new_tokens` are used.
        eos_id: ends the output.
        max_new_tokens: how many tokens may be written, end-of-text included.
        keep_id: the model's keep token, if it has one.
        cache: the stream's cache; what it shares with the prompt is not run again.
        draft_margin: the margin for the tokens of a rewrite; `None` takes `config.edit_margin`.
    """
    return _Run(
        backend=backend,
        prompt=prompt,
        reference=reference,
        config=config,
        eos_id=eos_id,
        max_new_tokens=max_new_tokens,
        keep_id=keep_id,
        cache=PromptCache(backend) if cache is None else cache,
        draft_margin=config.edit_margin if draft_margin is None else draft_margin,
        drafting=True,
    ).decode()


@dataclass(slots=True, kw_only=True)
class _Run:
    """The state of one decoding: what is written, what it cost, where the reference stands."""

    backend: Backend
    prompt: Ids
    reference: Ids
    config: DecodeConfig
    eos_id: int
    max_new_tokens: int
    keep_id: int | None
    cache: PromptCache
    draft_margin: float
    drafting: bool
    alignment: Alignment = field(init=False)
    room: int = field(init=False)  # tokens that may be written in all
    drafter: Drafter | None = None
    sampler: Sampler | None = field(init=False)  # None at temperature 0
    output: Ids = field(default_factory=list)
    forwards: int = 0
    drafted: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt must hold at least one token")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        self.room = min(self.max_new_tokens, self.config.max_new_tokens or self.max_new_tokens)
        # Nothing after an end-of-text can be reached, so a reference that holds one ends there.
        end = self.reference.index(self.eos_id) if self.eos_id in self.reference else len(self.reference)
        self.alignment = Alignment(self.reference[:end], end=self.eos_id)
        self.sampler = Sampler(self.config) if self.config.temperature > 0 else None

    def decode(self) -> Decoded:
        started = perf_counter()
        cached = self.cache.reuse(self.prompt)
        kept = self._write(self.prompt[cached:])
        ended = not kept and self.output[-1] == self.eos_id
        return Decoded(
            ids=list(self.reference) if kept else self.output[:-1] if ended else self.output,
            kept=kept,
            stats=DecodeStats(
                prompt_tokens=len(self.prompt),
                cached_tokens=cached,
                new_tokens=len(self.output),
                forwards=self.forwards,
                drafted_tokens=self.drafted,
                accepted_tokens=self.accepted,
                seconds=perf_counter() - started,
                finish_reason="eos" if kept or ended else "length",
                backend=self.backend.name,
                provider=self.backend.provider,
            ),
        )

    def _write(self, pending: Ids) -> bool:
        """Run forwards until end-of-text or until the room is used; return whether to keep."""
        if self.keep_id is not None:
            token = self._decide(self._forward(pending, []).row(0), self.keep_id)
            self._emit(token)
            if token == self.keep_id:
                return True
            pending = [token]
        while len(self.output) < self.room and self.eos_id not in self.output[-1:]:
            draft = self._draft() if self.drafting else []
            accepted = self._verify(self._forward(pending, draft), draft)
            self.drafted += len(draft)
            self.accepted += accepted
            self.cache.trim(len(self.cache.ids) - len(draft) + accepted)
            pending = self.output[-1:]
        return False

    def _decide(self, logits: Logits, keep_id: int) -> int:
        """Choose between the keep token and the best other one."""
        if self.sampler is not None and self.config.edit_margin == 0:
            return self.sampler.draw(logits)
        others = _without(logits, keep_id)
        best = int(others.argmax())
        if others[best] - logits[keep_id] <= self.config.edit_margin:
            return keep_id
        return best if self.sampler is None else self.sampler.draw(others)

    def _draft(self) -> Ids:
        count = self.room - len(self.output) - 1  # a forward writes one more than it accepts
        if count < 1:
            return []
        if not self.forwards:  # the first try is the whole reference
            return self.alignment.reference[:-1][:count]
        if self.drafter is None:  # an unchanged answer never comes here
            cost = ON_CPU if "cpu" in self.backend.provider.lower() else ON_ACCELERATOR
            self.drafter = Drafter(self.alignment, self.prompt, end=self.eos_id, cost=cost)
        return self.drafter.propose(self.output, min(count, self.config.max_draft_tokens))

    def _forward(self, pending: Ids, draft: Ids) -> Scores:
        self.forwards += 1
        return self.cache.forward(pending + draft, last=len(draft) + 1)

    def _verify(self, scores: Scores, draft: Ids) -> int:
        """Write tokens as far as the draft agrees and one more; return the accept length."""
        for place, drafted in enumerate(draft):
            token = self._choose(scores, place, drafted)
            self._emit(token)
            if token != drafted:
                return place
        self._emit(self._choose(scores, len(draft), None))
        return len(draft)

    def _choose(self, scores: Scores, place: int, drafted: int | None) -> int:
        """Return the token that the reference foretells if the margin lets it stay, else one by the rule."""
        best, best_logit = scores.best[place], scores.best_logits[place]
        if best == self.keep_id:
            others = _without(scores.row(place), best)
            best = int(others.argmax())
            best_logit = float(others[best])
        if self.draft_margin > 0:
            foretold = self.alignment.next()
            if foretold is not None and foretold not in (best, self.keep_id):
                known = scores.next_logits[place] if foretold == drafted else scores.row(place)[foretold]
                if best_logit - known <= self.draft_margin:
                    return foretold
            elif foretold == best:
                return best
        if self.sampler is None:
            return best
        logits = scores.row(place)
        return self.sampler.draw(logits if self.keep_id is None else _without(logits, self.keep_id))

    def _emit(self, token: int) -> None:
        self.output.append(token)
        self.alignment.push(token)


def _without(logits: Logits, token: int) -> Logits:
    """Return a copy in which `token` cannot be chosen."""
    logits = logits.copy()
    logits[..., token] = -np.inf
    return logits
