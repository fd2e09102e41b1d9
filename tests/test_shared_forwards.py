"""Many texts, and many streams, in one forward: the same texts, with fewer forwards."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest

from aligner_integrations import Aligner, DecodeConfig
from aligner_integrations.backends.base import Batching, Ids, KVCache, Logits, Row, Scores
from aligner_integrations.langchain import AlignerRunnable
from tests.checkpoints import plain_onnx
from tests.test_batch import comparable, one_by_one

QUESTION = "What is a pond?"
TEXT = "a pond needs little work if it is planted well and fish come by themselves in spring"
WORDS = TEXT.split()


class Counted:
    """A backend that notes how many rows each forward had, and how many places the padded input had."""

    batches = True

    def __init__(self, inner: Batching) -> None:
        self._inner, self.name, self.provider = inner, inner.name, inner.provider
        self.rows: list[int] = []
        self.places: list[int] = []

    def make_cache(self) -> KVCache:
        return self._inner.make_cache()

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        return self._inner.forward(ids, cache, last=last)

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        self.rows.append(len(rows))
        self.places.append(len(rows) * max(row.cache.length + len(row.ids) for row in rows))
        return self._inner.score(rows)


@cache
def loaded(template: str) -> Aligner:
    decode = DecodeConfig(max_new_tokens=10)
    return Aligner.from_pretrained(
        plain_onnx("llama"), template=template, decode=decode, safeguards="off", threads=1
    )


def counted(template: str, **options: float) -> tuple[Aligner, Counted]:
    inner = loaded(template)
    assert isinstance(inner.backend, Batching)
    backend = Counted(inner.backend)
    aligner = Aligner(
        backend,
        inner.tokenizer,
        inner.config,
        template=inner.template,
        decode=inner.decode_config,
        safeguards="off",
        **options,  # type: ignore[arg-type]
    )
    return aligner, backend


def answers(count: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(3)
    texts = []
    for _ in range(count):
        sentences = (" ".join(rng.choice(WORDS, size=rng.integers(3, 9))) for _ in range(rng.integers(1, 4)))
        texts.append(". ".join(sentence.capitalize() for sentence in sentences) + ".")
    return [(QUESTION if at % 3 else "And a lake?", text) for at, text in enumerate(texts)]


@pytest.mark.parametrize("template", ["aligner-v1", "stream-aligner"])
def test_a_batch_runs_its_rows_together_and_equals_one_by_one(template: str) -> None:
    pairs = answers(24)
    aligner, backend = counted(template)
    wanted = one_by_one(loaded(template), pairs)
    assert comparable(aligner.correct_batch(pairs)) == comparable(wanted)
    alone = sum(each.stats.forwards for each in wanted)
    assert sum(backend.rows) == alone
    assert len(backend.rows) <= alone / 4  # of 16 rows at most; finished ones leave and others join
    assert max(backend.rows) <= 16


def test_a_batch_takes_no_more_places_than_it_may() -> None:
    pairs = answers(12)
    aligner, backend = counted("aligner-v1", max_batch_tokens=600)
    assert comparable(aligner.correct_batch(pairs)) == comparable(one_by_one(loaded("aligner-v1"), pairs))
    shared = [places for rows, places in zip(backend.rows, backend.places, strict=True) if rows > 1]
    assert 0 < max(shared) <= 600


def test_streams_in_many_threads_share_forwards_each_with_its_own_cache() -> None:
    pairs = answers(8)
    aligner, backend = counted("stream-aligner", micro_batch_ms=2_000.0)
    start = threading.Barrier(len(pairs))

    def run(aligner: Aligner, pair: tuple[str, str], wait: bool) -> tuple[str, int]:
        if wait:
            start.wait(30)
        with aligner.stream(pair[0]) as stream:
            segments = [segment for word in pair[1].split(" ") for segment in stream.push(word + " ")]
            segments += stream.close()
        return "".join(each.text for each in segments), sum(each.stats.cached_tokens for each in segments)

    alone = [run(loaded("stream-aligner"), pair, False) for pair in pairs]
    with ThreadPoolExecutor(len(pairs)) as pool:
        assert list(pool.map(lambda pair: run(aligner, pair, True), pairs)) == alone
    assert len(backend.rows) <= sum(backend.rows) / 2
    with_options = aligner.with_options(safeguards="keep_original")
    assert with_options.backend is aligner.backend


def test_streams_of_the_bundled_model_run_side_by_side_and_write_the_same() -> None:
    """Its rows cannot share a forward; two at a time have a core each, and one alone has both."""
    pairs = [(question, answer + " The the pond is is wet.") for question, answer in answers(6)]
    plain, lanes = Aligner.from_pretrained(), Aligner.from_pretrained(micro_batch_ms=1.0)
    wanted = comparable(one_by_one(plain, pairs))
    assert comparable(one_by_one(lanes, pairs)) == wanted
    with ThreadPoolExecutor(6) as pool:
        assert comparable(list(pool.map(lambda pair: lanes.correct(*pair), pairs))) == wanted
    assert comparable(lanes.correct_batch(pairs)) == wanted


def test_a_model_whose_threads_cannot_share_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    inner = Aligner.from_pretrained(threads=1)  # one thread: nothing to put side by side
    with caplog.at_level(logging.WARNING):
        aligner = Aligner(inner.backend, inner.tokenizer, inner.config, micro_batch_ms=3.0)
    assert [record.getMessage().split(" was")[0] for record in caplog.records] == ["micro_batch_ms=3"]
    assert aligner.backend is inner.backend
    assert aligner.correct("How many days has a week?", "A week has seven days.").stats.forwards == 1


@pytest.mark.parametrize("run", ["batch", "abatch"])
def test_a_langchain_batch_shares_forwards(run: str) -> None:
    pairs = answers(8)
    aligner, backend = counted("aligner-v1")
    runnable = AlignerRunnable(aligner)
    inputs = [{"question": question, "answer": answer} for question, answer in pairs]
    together = runnable.batch(inputs) if run == "batch" else asyncio.run(runnable.abatch(inputs))
    assert [each["answer"] for each in together] == [
        each.text for each in one_by_one(loaded("aligner-v1"), pairs)
    ]
    assert len(backend.rows) <= sum(backend.rows) / 2
    assert runnable.aligner is aligner
    with pytest.raises(TypeError, match="AlignerRunnable takes"):
        runnable.batch([*inputs, 7])
    assert isinstance(runnable.batch([*inputs, 7], return_exceptions=True)[-1], TypeError)
