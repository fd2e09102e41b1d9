"""Doubles for tests, ours and users': an aligner whose model is a function.

Everything but the network is real: templates, tokenizer, decoding, safeguards, streaming, errors.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import tokenizers  # type: ignore[import-untyped, unused-ignore]

from aligner_integrations.aligner import Aligner
from aligner_integrations.backends.base import Ids, KVCache, Logits
from aligner_integrations.config import AlignerConfig, DecodeConfig, Granularity
from aligner_integrations.correction import DecodeStats
from aligner_integrations.decode import draft_decode, greedy_decode
from aligner_integrations.resilience import CircuitBreaker
from aligner_integrations.safeguards.policy import Safeguards
from aligner_integrations.template import TINY_TOKENS
from aligner_integrations.tokenizer import Tokenizer

Rule: TypeAlias = Callable[[str, str, str], str]
# Given all ids so far: where the output begins and what to write there; None inside the prompt.
Script: TypeAlias = Callable[[Ids], tuple[int, Ids] | None]

_KEEP, _QUESTION, _PREFIX, _SENTENCE, _CORRECTION = 2, 3, 5, 6, 7  # places in TINY_TOKENS
_CERTAIN = 1e4  # far above any edit_margin that a test would set


class ScriptedCache:
    """The ids themselves, and what the script said to write after `prompt`."""

    def __init__(self) -> None:
        self.ids, self.prompt, self.target = list[int](), list[int](), list[int]()

    @property
    def length(self) -> int:
        return len(self.ids)

    def trim(self, length: int) -> None:
        del self.ids[length:]
        self.prompt = self.prompt if length >= len(self.prompt) else []


class ScriptedBackend:
    """A backend whose next token is always the one that `script` says."""

    name = "scripted"
    provider = "scripted"

    def __init__(self, script: Script, *, vocab_size: int, eos_id: int) -> None:
        self._script = script
        self._vocab_size = vocab_size
        self._eos_id = eos_id

    def make_cache(self) -> ScriptedCache:
        return ScriptedCache()

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        """Append `ids`; logits of shape (last, vocabulary) put the scripted token far above the rest."""
        assert isinstance(cache, ScriptedCache)
        cache.ids += ids
        if not cache.prompt:
            start, cache.target = self._script(cache.ids) or (0, [])
            cache.prompt = cache.ids[:start]
        target, written = cache.target, cache.ids[len(cache.prompt) :]
        pairs = zip(written, target, strict=False)
        agreed = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        logits = np.zeros((last, self._vocab_size), dtype=np.float32)
        for row in range(last):
            position = len(written) - last + 1 + row  # how many tokens were written before this one
            follows = 0 <= position <= agreed and position < len(target)
            logits[row, target[position] if follows else self._eos_id] = _CERTAIN
        return logits


def scripted_aligner(
    rule: Rule,
    *,
    granularity: Granularity = "sentence",
    delay: float = 0.0,
    safeguards: Safeguards = "off",
    breaker: CircuitBreaker | None = None,
) -> Aligner:
    """Return an aligner whose model is `rule(question, prefix, sentence) -> text`.

    With `granularity="answer"` the rule gets the whole answer as `sentence` and an empty prefix. A rule
    that raises is a failing correction. `delay` is slept once per correction, in seconds. Safeguards
    are off, so that a rule may write anything; they are chosen as in `Aligner.from_pretrained`. `breaker` is
    the aligner's.
    """
    tokenizer = byte_tokenizer()

    def script(ids: Ids) -> tuple[int, Ids] | None:
        """Read the fields of the tiny frame out of the ids, and ask the rule."""
        if _CORRECTION not in ids:
            return None
        start = ids.index(_CORRECTION) + 1
        marks = {ids[at]: at for at in range(start) if ids[at] < len(TINY_TOKENS)}
        ends = dict(itertools.pairwise(marks.values()))
        fields = [ids[marks[mark] + 1 : ends[marks[mark]]] for mark in (_QUESTION, _PREFIX, _SENTENCE)]
        question, prefix, sentence = map(tokenizer.decode, fields)
        time.sleep(delay)
        text = rule(question, prefix, sentence)
        if not isinstance(text, str):
            raise TypeError(f"the rule must return a str, got {type(text).__name__}")
        if text != sentence:
            return start, tokenizer.encode_text(text)
        return start, [_KEEP] if granularity == "sentence" else fields[-1]

    backend = ScriptedBackend(script, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    keep = TINY_TOKENS[_KEEP] if granularity == "sentence" else None
    config = AlignerConfig("tiny", granularity, keep_token=keep, max_length=1 << 20)
    decode = DecodeConfig(max_new_tokens=1 << 16)  # a rule may write more than a model would dare
    return Aligner(backend, tokenizer, config, decode=decode, safeguards=safeguards, breaker=breaker)


def replay_correction(
    tokenizer: Tokenizer, question: str, answer: str, correction: str, *, draft: bool = True
) -> DecodeStats:
    """Decode `answer` with a model that is certain to write `correction`; return what that costs."""
    reference, target = tokenizer.encode_text(answer), tokenizer.encode_text(correction)
    # A prompt cannot be empty, and an empty question and answer are allowed.
    prompt = [tokenizer.eos_id, *tokenizer.encode_text(question), *reference]
    forced = (len(prompt), target)
    backend = ScriptedBackend(lambda ids: forced, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    config, room = DecodeConfig(draft=draft), len(target) + 1
    decode = draft_decode if draft else greedy_decode
    decoded = decode(backend, prompt, reference, config=config, eos_id=tokenizer.eos_id, max_new_tokens=room)
    return decoded.stats


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer of 256 bytes and the bundled model's special tokens."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*TINY_TOKENS, *letters))}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    parts = {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": token, **flags} for index, token in enumerate(TINY_TOKENS)],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    return Tokenizer.from_str(json.dumps(parts))


__all__ = ["ScriptedBackend", "byte_tokenizer", "replay_correction", "scripted_aligner"]
