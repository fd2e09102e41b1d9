"""Forwards of many threads in one: each gets its own, none waits for nobody, a failure stays with its row."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest

from aligner_integrations.backends.base import Batching, Ids, KVCache, Logits, Row, Scores
from aligner_integrations.backends.gathering import Gathering
from aligner_integrations.backends.onnx import OnnxBackend
from aligner_integrations.config import DecodeConfig
from aligner_integrations.decode import Decoded, PromptCache, draft_decode
from tests.models_for_tests import EOS, onnx_model

LONG = 30.0  # seconds; a test that waits so long has failed


@cache
def model() -> OnnxBackend:
    return OnnxBackend.load(onnx_model(0), provider="cpu", threads=1)


class Counted:
    """A backend that notes how many rows each forward had, and may be told to do something first."""

    name, provider, batches = "counted", "cpu", True

    def __init__(self, before: Callable[[Sequence[Row]], None] = lambda rows: None) -> None:
        self.sizes: list[int] = []
        self._before = before

    def make_cache(self) -> KVCache:
        return model().make_cache()

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        return model().forward(ids, cache, last=last)

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        self.sizes.append(len(rows))
        self._before(rows)
        return model().score(rows)


def texts(count: int) -> list[tuple[Ids, Ids]]:
    rng = np.random.default_rng(5)
    ids = [rng.integers(3, 300, size=int(length)).tolist() for length in rng.integers(2, 40, 2 * count)]
    return list(zip(ids[::2], ids[1::2], strict=True))


def decode(backend: Batching, prompt: Ids, reference: Ids, *, new: int = 12) -> Decoded:
    own = PromptCache(backend)
    with own.taking_part():
        return draft_decode(
            backend, prompt, reference, config=DecodeConfig(), eos_id=EOS, max_new_tokens=new, cache=own
        )


def test_many_decodings_share_forwards_and_write_what_each_writes_alone() -> None:
    work = texts(8)
    wanted = [decode(model(), *each).ids for each in work]
    inner = Counted()
    gathered = Gathering(inner, wait=LONG, max_tokens=1 << 20)
    start = threading.Barrier(8)

    def run(each: tuple[Ids, Ids]) -> Ids:
        start.wait(LONG)
        return decode(gathered, *each).ids

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, work)) == wanted
    alone = Counted()
    for each in work:
        decode(alone, *each)
    assert sum(inner.sizes) == sum(alone.sizes)  # the same rows ...
    assert len(inner.sizes) <= len(alone.sizes) / 3  # ... in far fewer forwards


def test_one_alone_never_waits() -> None:
    inner = Counted()
    gathered = Gathering(inner, wait=LONG, max_tokens=1 << 20)
    finished = threading.Event()

    def run() -> None:
        decode(gathered, [5, 6, 7], [8, 9])
        finished.set()

    threading.Thread(target=run, daemon=True).start()
    assert finished.wait(LONG / 2)
    assert set(inner.sizes) == {1}


def test_a_member_that_does_not_come_holds_nobody_up_for_long() -> None:
    inner = Counted()
    gathered = Gathering(inner, wait=0.01, max_tokens=1 << 20)
    with gathered.taking_part():
        assert decode(gathered, [5, 6, 7], [8, 9]).ids == decode(model(), [5, 6, 7], [8, 9]).ids


def test_a_forward_is_no_wider_than_it_may_be() -> None:
    widest: list[int] = []

    def measure(rows: Sequence[Row]) -> None:
        places = len(rows) * max(row.cache.length + len(row.ids) for row in rows)
        widest.append(places if len(rows) > 1 else 0)

    inner = Counted(measure)
    gathered = Gathering(inner, wait=LONG, max_tokens=150)
    work = texts(8)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda each: decode(gathered, *each).ids, work))
    assert found == [decode(model(), *each).ids for each in work]
    assert 0 < max(widest) <= 150


@pytest.mark.parametrize("error", [MemoryError("no room"), ValueError("bad")])
def test_a_failure_reaches_every_row_and_the_next_round_is_well(error: Exception) -> None:
    broken = threading.Event()
    broken.set()

    def fail(rows: Sequence[Row]) -> None:
        if broken.is_set():
            raise error

    gathered = Gathering(Counted(fail), wait=LONG, max_tokens=1 << 20)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(decode, gathered, *each) for each in texts(3)]
        for run in runs:
            with pytest.raises(type(error), match=str(error)):
                run.result(LONG)
    broken.clear()
    assert decode(gathered, [5, 6], [7]).ids == decode(model(), [5, 6], [7]).ids


@pytest.mark.parametrize("when", ["before", "after"])
def test_t20_rows_that_are_too_much_together_run_alone(when: str) -> None:
    """Out of memory for all at once, before the caches were written or after."""
    work = texts(6)
    wanted = [decode(model(), *each).ids for each in work]

    class Cramped(Counted):
        def score(self, rows: Sequence[Row]) -> list[Scores]:
            self.sizes.append(len(rows))
            if len(rows) > 1 and when == "before":
                raise MemoryError("no room")
            scores = model().score(rows)
            if len(rows) > 1:
                raise MemoryError("no room")
            return scores

    inner = Cramped()
    gathered = Gathering(inner, wait=LONG, max_tokens=1 << 20)
    start = threading.Barrier(6)

    def run(each: tuple[Ids, Ids]) -> Ids:
        start.wait(LONG)
        return decode(gathered, *each).ids

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(run, work)) == wanted
    assert max(inner.sizes) > 1


def test_t20_a_row_that_fails_leaves_the_others_alone() -> None:
    work = texts(5)
    wanted = [decode(model(), *each).ids for each in work]
    poisoned = [*work, ([9, 9, 9], [9, 9])]

    def fail(rows: Sequence[Row]) -> None:
        if any(row.ids[:3] == [9, 9, 9] for row in rows):
            raise ValueError("bad row")

    gathered = Gathering(Counted(fail), wait=LONG, max_tokens=1 << 20)
    start = threading.Barrier(6)

    def run(each: tuple[Ids, Ids]) -> Ids | str:
        start.wait(LONG)
        try:
            return decode(gathered, *each).ids
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(run, poisoned)) == [*wanted, "bad row"]


def test_an_interrupt_in_the_thread_that_runs_leaves_none_waiting() -> None:
    def interrupt(rows: Sequence[Row]) -> None:
        if threading.current_thread().name == "interrupted" and len(rows) == 2:
            raise KeyboardInterrupt

    inner = Counted(interrupt)
    gathered = Gathering(inner, wait=LONG, max_tokens=1 << 20)
    seen: dict[str, BaseException] = {}

    def run(name: str) -> None:
        try:
            own = gathered.make_cache()
            with gathered.taking_part():
                ready.wait(LONG)
                gathered.score([Row([5, 6], own, 1)])
        except BaseException as error:
            seen[name] = error

    # Which of the two runs the forward is not said: until it is the one that is interrupted, again.
    for _ in range(50):
        seen.clear()
        ready = threading.Barrier(2)
        both = [threading.Thread(target=run, args=(name,), name=name) for name in ("interrupted", "other")]
        for each in both:
            each.start()
        for each in both:
            each.join(LONG)
            assert not each.is_alive()
        if seen:
            assert isinstance(seen["interrupted"], KeyboardInterrupt)
            assert "interrupted" in str(seen["other"])
            break
    else:
        pytest.fail("the thread to interrupt never ran the forward")
    assert decode(gathered, [5, 6], [7]).ids == decode(model(), [5, 6], [7]).ids
