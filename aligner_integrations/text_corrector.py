"""One text: its prompt, its decoding, and what the safeguards let be shown of it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from aligner_integrations.backends.base import Backend, CacheLostError, Ids
from aligner_integrations.config import DecodeConfig
from aligner_integrations.correction import Correction, DecodeStats, Finding, make_edits
from aligner_integrations.decode import Decoded, PromptCache, draft_decode, greedy_decode
from aligner_integrations.defuse import Defuser
from aligner_integrations.errors import AlignerError, CorrectionFailedError
from aligner_integrations.resilience import CircuitBreaker, Deadline
from aligner_integrations.safeguards import guard_correction, is_kept
from aligner_integrations.safeguards.policy import SafeguardPolicy
from aligner_integrations.template import CorrectionTemplate
from aligner_integrations.tokenizer import Tokenizer

# Within a rewrite the margin counts up to here, in logits: enough that copying does not stray, and not so
# much that it undoes the edit.
REWRITE_MARGIN = 2.0


class TextCorrector:
    """What an `Aligner` does with one text; `stream.py` and `finished.py` keep the state of an answer."""

    backend: Backend
    tokenizer: Tokenizer
    template: CorrectionTemplate
    decode_config: DecodeConfig
    safeguard_policy: SafeguardPolicy
    breaker: CircuitBreaker | None
    keep_id: int | None
    _defuser: Defuser

    def encode_prompt(self, question: str, prefix: str, text: str, feedback: str) -> Ids:
        """Return the ids of the prompt for `text`: a sentence, or a whole answer without prefix."""
        question, prefix, text, feedback = map(self._defuser, (question, prefix, text, feedback))
        if self.template.granularity == "answer":
            spans = self.template.spans(question=question, answer=text, feedback=feedback)
        else:
            spans = self.template.spans(question=question, prefix=prefix, sentence=text, feedback=feedback)
        return self.tokenizer.encode(spans)

    def encode_text(self, text: str) -> Ids:
        """Return the ids of untrusted text as the prompt holds it: the template's marks in it defused."""
        return self.tokenizer.encode_text(self._defuser(text))

    def run(
        self,
        prompt: Ids,
        reference: Ids,
        max_new_tokens: int,
        cache: PromptCache | None = None,
        deadline: Deadline | None = None,
    ) -> Decoded:
        """Decode a correction; whatever the backend raises becomes a `CorrectionFailedError`.

        With a deadline the decoding is in a thread of its own, which is left to itself when it is late.
        """
        decode = partial(self._decode, prompt, reference, max_new_tokens)
        cache = PromptCache(self.backend) if cache is None else cache
        with nullcontext() if self.breaker is None else self.breaker.around():
            try:
                return decode(cache) if deadline is None else cache.within(deadline, decode)
            except AlignerError:
                raise
            except Exception as error:  # backends share no base class of errors
                # What a backend says may quote the text it failed on: it is chained, and not repeated.
                raise CorrectionFailedError(
                    f"the model failed while correcting: {type(error).__name__}; see the chained error"
                ) from error

    def _decode(self, prompt: Ids, reference: Ids, max_new_tokens: int, cache: PromptCache) -> Decoded:
        decode = draft_decode if self.decode_config.draft else greedy_decode
        margin = self.decode_config.edit_margin
        while True:
            try:
                with cache.taking_part():
                    return decode(
                        self.backend,
                        prompt,
                        reference,
                        config=self.decode_config,
                        eos_id=self.tokenizer.eos_id,
                        max_new_tokens=max_new_tokens,
                        keep_id=self.keep_id,
                        cache=cache,
                        # With a keep token the margin is mostly spent on that one decision: once the model
                        # means to edit, holding it to the copy at any price would undo the edit.
                        draft_margin=None if self.keep_id is None else min(margin, REWRITE_MARGIN),
                    )
            except CacheLostError:
                cache.forget()  # a correction has no side effects: what runs now does it from the start

    def finish(
        self,
        question: str,
        margins: tuple[str, str, str],
        reference: Ids,
        decoded: Decoded,
        findings: tuple[Finding, ...] = (),
        *,
        may_be_empty: bool = False,
    ) -> Correction:
        """Turn what was decoded into a correction, past the safeguards.

        `margins` is what was corrected as (lead, core, tail); only the core was shown to the model. With
        `may_be_empty` nothing need be left of it.
        """
        core = margins[1]
        # The same ids mean the same text: never through decoding, which could lose what ids cannot hold.
        same = decoded.kept or decoded.ids == reference
        proposed = core if same else self.tokenizer.decode(decoded.ids).strip()
        proposed = self._defuser.undo(proposed, core)
        findings += self._defuser.report(question=question, answer=core)
        if decoded.stats.finish_reason != "eos" and not same:
            detail = "the correction ended before it was complete"
            findings += (self.safeguard_policy.find("truncated", detail),)
        shown = proposed
        if proposed != core:
            policy = replace(
                self.safeguard_policy,
                allow_empty=self.safeguard_policy.allow_empty or may_be_empty,
                special_tokens=self.safeguard_policy.special_tokens
                | self.tokenizer.special_tokens_in(proposed),
            )
            shown, found = guard_correction(question, core, proposed, policy=policy)
            findings += found
        answer = "".join(margins)
        # Copied marks stay defused where the text changed; untouched text is the answer, byte for byte.
        shown = core if shown == core else self._defuser(shown)
        text = answer if is_kept(findings) else _put_back(margins, shown)
        return Correction(
            question=question,
            answer=answer,
            text=text,
            proposed=_put_back(margins, proposed),
            edits=make_edits(answer, text),
            findings=findings,
            stats=decoded.stats,
        )

    def untouched(self, question: str, answer: str, *findings: Finding) -> Correction:
        """Return `answer` as its own correction, at no cost."""
        stats = DecodeStats(backend=self.backend.name, provider=self.backend.provider)
        return Correction(question, answer, answer, answer, findings=findings, stats=stats)


def _put_back(margins: tuple[str, str, str], text: str) -> str:
    """Return `text` between its margins; of a dropped sentence only a line break stays."""
    lead, _, tail = margins
    if not text:
        return tail if "\n" in tail else ""
    return lead + text + tail
