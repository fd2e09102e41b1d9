"""The data folder as training rows: one sentence, what came before it, and what to write.

Only permissively licensed sources are read (CC0, MIT, Apache-2.0, CC-BY). Every row whose question
(or sentence, where there is no question) falls into one twentieth of a hash is development data
and is never trained on.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aligner_integrations.safeguards import SafeguardPolicy, is_refusal, word_similarity
from aligner_integrations.sentences import SentenceBuffer, split_margins

_DEV_SHARE = 20
_SENTENCES_PER_ANSWER = 6
_MAX_REFUSAL_WORDS = 24
_MAX_PREFIX_CHARS = 1200
_LEAST_SIMILARITY = SafeguardPolicy().min_similarity
# When the paired refusal's first sentence is no clean refusal, this is written instead.
_PLAIN_REFUSAL = "I'm sorry, but I can't assist with that."


@dataclass(frozen=True, slots=True)
class Row:
    """One decision. `target` is None to keep the sentence, "" to drop it, else the rewrite."""

    task: str
    question: str
    prefix: str
    sentence: str
    target: str | None
    dev: bool
    source: str = ""


def is_dev(key: str) -> bool:
    """Whether rows of this question (or bare sentence) are held out for development."""
    digest = hashlib.sha1(key.strip().lower().encode(), usedforsecurity=False).hexdigest()
    return int(digest[:8], 16) % _DEV_SHARE == 0


def cut_sentences(answer: str) -> list[str]:
    """Cut an answer as the library will at run time; returns the pieces, joined they give it back."""
    buffer = SentenceBuffer()
    return [*buffer.push(answer), *buffer.flush()]


def load_rows(data: Path) -> list[Row]:
    """Read every source under `data`, in a fixed order.

    Raises:
        FileNotFoundError: a source is missing; the message names the file.
    """
    rows: list[Row] = []
    for source, convert in _SOURCES.items():
        path = data / source / f"{source}.jsonl.gz"
        if not path.exists():
            raise FileNotFoundError(f"data folder {data} lacks {source}/{source}.jsonl.gz")
        rng = random.Random(source)
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                raw: dict[str, Any] = json.loads(line)
                dev = is_dev(raw["question"] or raw.get("last_sentence", ""))
                rows += (replace(row, source=source) for row in convert(raw, dev, rng) if row.sentence)
    return rows


def _row(task: str, raw: dict[str, Any], target: str | None, dev: bool, sentence: str | None = None) -> Row:
    text = raw["last_sentence"] if sentence is None else sentence
    core = split_margins(text)[1]
    new = None if target is None else split_margins(target)[1]
    prefix = raw["prefix"].rstrip()[-_MAX_PREFIX_CHARS:]
    return Row(task, raw["question"], prefix, core, None if new == core else new, dev)


def _gsm8k(raw: dict[str, Any], dev: bool, rng: random.Random) -> Iterator[Row]:
    if raw["meta"]["kind"] == "arithmetic-slip":
        yield _row("sum-wrong", raw, raw["correction"], dev)
        # The same step done right: without it only a quarter of the steps would be right.
        yield _row("sum-right", raw, None, dev, sentence=raw["correction"])
    else:
        yield _row("sum-right", raw, None, dev)


def _paradetox(raw: dict[str, Any], dev: bool, rng: random.Random) -> Iterator[Row]:
    if raw["meta"].get("kind") == "already-good":
        yield _row("polite", raw, None, dev)
    else:
        # A rewrite that the safeguards would not show is not worth learning.
        if dev or word_similarity(raw["last_sentence"], raw["correction"]) >= _LEAST_SIMILARITY:
            yield _row("rude", raw, raw["correction"], dev)
        yield _row("polite", raw, None, dev, sentence=raw["correction"])


def _good_steps(raw: dict[str, Any], dev: bool, rng: random.Random) -> Iterator[Row]:
    # Wrong steps of these sources need knowledge that a model of this size does not have.
    if raw["correction"] == raw["last_sentence"]:
        yield _row("step", raw, None, dev)


def _kept(task: str, question: str, answer: str, dev: bool, rng: random.Random) -> Iterator[Row]:
    """Keep rows from some of the sentences of a good answer, always its first."""
    pieces = cut_sentences(answer)[:60]
    indices = range(1, len(pieces))
    chosen = [0, *rng.sample(indices, min(_SENTENCES_PER_ANSWER - 1, len(indices)))]
    for index in chosen:
        prefix = "".join(pieces[:index]).rstrip()[-_MAX_PREFIX_CHARS:]
        core = split_margins(pieces[index])[1] if pieces else ""
        if any(character.isalnum() for character in core):
            yield Row(task, question, prefix, core, None, dev)


def _answers(task: str) -> Callable[[dict[str, Any], bool, random.Random], Iterator[Row]]:
    def convert(raw: dict[str, Any], dev: bool, rng: random.Random) -> Iterator[Row]:
        yield from _kept(task, raw["question"], raw["answer"], dev, rng)

    return convert


def _both_kept(raw: dict[str, Any], dev: bool, rng: random.Random) -> Iterator[Row]:
    """Two answers to an everyday request: whichever is better, neither is to be refused."""
    for answer in dict.fromkeys((raw["answer"], raw["correction"])):
        yield from _kept("request", raw["question"], answer, dev, rng)


def _good_only(raw: dict[str, Any], dev: bool, rng: random.Random) -> Iterator[Row]:
    if raw["correction"] == raw["answer"]:
        yield from _kept("short", raw["question"], raw["answer"], dev, rng)


def _safety(raw: dict[str, Any], dev: bool, rng: random.Random) -> Iterator[Row]:
    """Harmful answers to refusals; good and over-cautious ones are left alone."""
    question, answer, kind = raw["question"], raw["answer"], raw["meta"].get("kind")
    if kind == "already-good":
        yield from _kept("good", question, answer, dev, rng)
        return
    yield from _kept("good", question, raw["correction"], dev, rng)
    if kind == "over-refusal->help":
        yield from _kept("good", question, answer, dev, rng)
        return
    refusal = _first_refusal(raw["correction"])
    pieces = cut_sentences(answer)[:12]
    if not pieces:
        return
    yield Row("harmful", question, "", split_margins(pieces[0])[1], refusal, dev)
    for index in rng.sample(range(1, len(pieces)), min(3, len(pieces) - 1)):
        core = split_margins(pieces[index])[1]
        # After the refusal nothing of the harmful answer may follow; before one, it must come.
        yield Row("harmful-rest", question, refusal, core, "", dev)
    if len(pieces) > 2:
        index = rng.randrange(1, len(pieces))
        prefix = "".join(pieces[:index]).rstrip()
        yield Row("harmful-late", question, prefix, split_margins(pieces[index])[1], refusal, dev)


def _first_refusal(correction: str) -> str:
    pieces = cut_sentences(correction)
    first = split_margins(pieces[0])[1] if pieces else ""
    clean = is_refusal(first) and len(first.split()) <= _MAX_REFUSAL_WORDS
    return first if clean else _PLAIN_REFUSAL


_SOURCES: dict[str, Callable[[dict[str, Any], bool, random.Random], Iterator[Row]]] = {
    "gsm8k_steps": _gsm8k,
    "paradetox": _paradetox,
    "medquad_qa": _answers("ordinary"),
    "caia_safety_qa": _answers("ordinary"),
    "mrben_steps": _good_steps,
    "prmbench_steps": _good_steps,
    "jbb_pairs": _safety,
    "gptfuzz_pairs": _safety,
    "xstest_triples": _safety,
    "truthfulqa_triples": _good_only,
    "bbq_bias": _good_only,
    "pandalm_pairs": _both_kept,
}
