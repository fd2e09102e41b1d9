"""Published corrections as the model's output: how many forwards would they take? No model, no clock."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from aligner_integrations.backends.base import Ids, KVCache, Logits, Row, Scores
from aligner_integrations.config import DecodeConfig
from aligner_integrations.decode import draft_decode
from aligner_integrations.draft import common_start
from aligner_integrations.evaluation.forced import ForcedOutput
from aligner_integrations.evaluation.timing import Setting, package_versions
from aligner_integrations.template import CorrectionTemplate
from aligner_integrations.tokenizer import Tokenizer
from aligner_integrations.training.vocabulary import train_tokenizer

# As in the comparison that the goals come from: Llama's vocabulary size, drafts of ten tokens.
_VOCABULARY = 32_000
_LOOKUP_TOKENS = 10
_ANSWERS = "noncommercial/alpaca_eval_aligner2b"
_SENTENCES = ("gsm8k_steps", "paradetox", "mrben_steps", "prmbench_steps")
_GOALS = {
    "Qwen1.5-72B-Chat": 1.6,
    "gpt-4-turbo-2024-04-09": 1.7,
    "claude-3-opus-20240229": 1.45,
    "gsm8k_steps": 12.0,
}
_MOST_DRAFTED = 4.0
_TEXTS = ("question", "prefix", "answer", "last_sentence", "correction")


@dataclass(frozen=True, slots=True)
class Triple:
    """A correction that was published: what was corrected, the prompt around it, and what came out."""

    prompt: Ids
    answer: Ids
    correction: Ids


@dataclass(frozen=True, slots=True)
class ReplayCounts:
    """What the corrections of one source took; end-of-text counts as a token.

    Drafts are as long as they are on an accelerator; on a CPU, where tokens do not ride along for free, they
    are shorter, and `cpu_tokens_per_forward` and `cpu_drafted_per_token` are for those.
    `lookup_tokens_per_forward` is for transformers' prompt lookup with drafts of ten tokens, and
    `best_copy_tokens_per_forward` for one that always drafts the stretch of the answer that goes on longest.
    """

    source: str
    rows: int
    unchanged: int
    tokens: int
    forwards: int
    drafted: int
    tokens_per_forward: float
    drafted_per_token: float
    cpu_tokens_per_forward: float
    cpu_drafted_per_token: float
    lookup_tokens_per_forward: float
    best_copy_tokens_per_forward: float
    goal: float | None


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """The counts of every source."""

    sources: tuple[ReplayCounts, ...]
    setting: Setting

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {"setting": self.setting, "sources": [asdict(source) for source in self.sources]}

    def shown(self) -> dict[str, dict[str, str]]:
        """Return titles with rows of text, for people."""
        return {
            "setting": {name: str(value) for name, value in self.setting.items()},
            "tokens per forward": {
                each.source: f"{each.tokens_per_forward:.2f}"
                + ("" if each.goal is None else f", asked: >= {each.goal:g}")
                + f"; as on a CPU {each.cpu_tokens_per_forward:.2f}"
                + f"; prompt lookup {each.lookup_tokens_per_forward:.2f}"
                + f", best copy of the answer {each.best_copy_tokens_per_forward:.2f}"
                for each in self.sources
            },
            "drafted per token": {
                each.source: f"{each.drafted_per_token:.2f}, asked: <= {_MOST_DRAFTED:g}"
                + f"; as on a CPU {each.cpu_drafted_per_token:.2f}"
                + f" ({each.rows} rows, {each.unchanged} unchanged, {each.tokens} tokens)"
                for each in self.sources
            },
        }


def run_replay(data: Path, *, rows_a_source: int = 1500) -> ReplayReport:
    """Force each published correction as the output of guided decoding, and count forwards and drafts.

    Args:
        data: the folder with the sources; the answers lie in its `noncommercial` folder.
        rows_a_source: of the sentences, at most so many, evenly spread; of the answers, all.

    Raises:
        ValueError: `data` lacks a source; the message names the file.
    """
    sources = _read(data, rows_a_source)
    texts = {row[field] for rows in sources.values() for row in rows for field in _TEXTS if field in row}
    # Sorted, because the order of a set changes from run to run and merges of equal count would too.
    tokenizer = Tokenizer.from_str(train_tokenizer(sorted(texts), size=_VOCABULARY).to_str())
    return ReplayReport(
        sources=tuple(
            count(source, [_triple(tokenizer, row) for row in rows], tokenizer.eos_id)
            for source, rows in sources.items()
        ),
        setting={"vocabulary": tokenizer.vocab_size, "lookup_tokens": _LOOKUP_TOKENS, **package_versions()},
    )


def count(source: str, triples: Sequence[Triple], eos_id: int) -> ReplayCounts:
    """Count what guided decoding, prompt lookup and the best copy take for `triples`."""
    tokens = sum(len(triple.correction) + 1 for triple in triples)
    forwards, drafted = _replayed(triples, eos_id, "accelerator")
    cpu_forwards, cpu_drafted = _replayed(triples, eos_id, "cpu")
    return ReplayCounts(
        source=source,
        rows=len(triples),
        unchanged=sum(triple.answer == triple.correction for triple in triples),
        tokens=tokens,
        forwards=forwards,
        drafted=drafted,
        tokens_per_forward=tokens / forwards,
        drafted_per_token=drafted / tokens,
        cpu_tokens_per_forward=tokens / cpu_forwards,
        cpu_drafted_per_token=cpu_drafted / tokens,
        lookup_tokens_per_forward=tokens / sum(looked_up(triple, eos_id) for triple in triples),
        best_copy_tokens_per_forward=tokens / sum(best_copy(triple, eos_id) for triple in triples),
        goal=_GOALS.get(source),
    )


def _replayed(triples: Sequence[Triple], eos_id: int, provider: str) -> tuple[int, int]:
    """Return the forwards and the drafted tokens of guided decoding."""
    forwards = drafted = 0
    for triple in triples:
        decoded = draft_decode(
            ForcedOutput(_Nothing(provider), [*triple.prompt, *triple.correction, eos_id]),
            triple.prompt,
            triple.answer,
            config=DecodeConfig(),
            eos_id=eos_id,
            max_new_tokens=len(triple.correction) + 1,
        )
        if decoded.ids != triple.correction:
            raise RuntimeError("guided decoding wrote something else than it was told to; please report it")
        forwards += decoded.stats.forwards
        drafted += decoded.stats.drafted_tokens
    return forwards, drafted


def looked_up(triple: Triple, eos_id: int) -> int:
    """Return the forwards that transformers' own prompt lookup takes."""
    text = torch.tensor([[*triple.prompt, *triple.correction, eos_id]])
    end = text.shape[1]
    lookup = PromptLookupCandidateGenerator(
        eos_token_id=torch.tensor([eos_id]), num_output_tokens=_LOOKUP_TOKENS, max_length=end
    )
    written, forwards = len(triple.prompt), 0
    while written < end:
        draft = lookup.get_candidates(cast(torch.LongTensor, text[:, :written]))[0][0, written : end - 1]
        agree = draft == text[0, written : written + len(draft)]
        written += 1 + int(agree.cumprod(0).sum())
        forwards += 1
    return forwards


def best_copy(triple: Triple, eos_id: int) -> int:
    """Return the forwards when each draft is the stretch of the answer that goes on longest."""
    answer, text = [*triple.answer, eos_id], [*triple.correction, eos_id]
    places: dict[int, list[int]] = {}
    for place, token in enumerate(answer):
        places.setdefault(token, []).append(place)
    written = forwards = 0
    while written < len(text):
        found = (common_start(answer[place:], text[written:-1]) for place in places.get(text[written], ()))
        written += 1 + max(found, default=0)
        forwards += 1
    return forwards


class _Nothing:
    """A backend without a network: what it would say is forced anyway."""

    name = "none"
    batches = False

    def __init__(self, provider: str) -> None:
        self.provider = provider

    def make_cache(self) -> _Length:
        """Return a cache that holds a length."""
        return _Length()

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        """Return zeros."""
        cast(_Length, cache).length += len(ids)
        return np.zeros((last, _VOCABULARY), np.float32)

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        """Return as little as there is to say about nothing."""
        for row in rows:
            cast(_Length, row.cache).length += len(row.ids)
        return [
            Scores(
                best=[0] * row.last, best_logits=[0.0] * row.last, next_logits=[0.0] * row.last, row=_zeros
            )
            for row in rows
        ]


@dataclass(slots=True)
class _Length:
    length: int = 0

    def trim(self, length: int) -> None:
        self.length = length


def _zeros(place: int) -> Logits:
    return np.zeros(_VOCABULARY, np.float32)


def _read(data: Path, rows_a_source: int) -> dict[str, list[dict[str, str]]]:
    """Return the raw rows by source: of the answers by the model that gave them, and of the sentences."""
    sources: dict[str, list[dict[str, str]]] = {}
    for row in _rows(data, _ANSWERS):
        sources.setdefault(row["upstream"], []).append(row)
    for source in _SENTENCES:
        rows = list(_rows(data, source))
        sources[source] = rows[:: ceil(len(rows) / rows_a_source)]
    return sources


def _rows(data: Path, source: str) -> Iterator[dict[str, str]]:
    path = data / source / f"{source.rpartition('/')[2]}.jsonl.gz"
    if not path.is_file():
        raise ValueError(f"data: {path} does not exist; give the folder that holds {source}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield {field: row[field] for field in (*_TEXTS, "upstream") if field in row}


def _triple(tokenizer: Tokenizer, row: dict[str, str]) -> Triple:
    """Return the ids, in the frame that such a correction is asked for with."""
    if "answer" in row:
        old = row["answer"]
        spans = CorrectionTemplate.named("aligner-revision").spans(question=row["question"], answer=old)
    else:
        old = row["last_sentence"]
        spans = CorrectionTemplate.named("stream-aligner").spans(
            question=row["question"], prefix=row["prefix"], sentence=old
        )
    return Triple(tokenizer.encode(spans), *map(tokenizer.encode_text, (old, row["correction"])))
