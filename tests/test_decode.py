from __future__ import annotations

import random
from functools import cache
from typing import TypedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner_integrations.backends.base import Backend, Ids, KVCache, Logits
from aligner_integrations.backends.onnx import OnnxBackend
from aligner_integrations.config import DecodeConfig
from aligner_integrations.decode import Decoded, PromptCache, draft_decode, greedy_decode
from tests.models_for_tests import EOS, KEEP, TableBackend, TableCache, onnx_model

IDS = st.lists(st.integers(0, 11), max_size=30)
PROMPTS = st.lists(st.integers(3, 11), min_size=1, max_size=8)


class Arguments(TypedDict):
    config: DecodeConfig
    eos_id: int
    max_new_tokens: int


def plain_greedy(backend: Backend, prompt: Ids, *, room: int, keep_id: int | None) -> Ids:
    """The oracle: no cache, no draft, one token at a time."""
    written: Ids = []
    while len(written) < room and EOS not in written:
        row = backend.forward(prompt + written, backend.make_cache(), last=1)[0].copy()
        if keep_id is not None:
            if not written and row[keep_id] == row.max():
                return [keep_id]
            row[keep_id] = -np.inf
        written.append(int(row.argmax()))
    return written


@st.composite
def edited(draw: st.DrawFn, ids: Ids, vocabulary: int) -> Ids:
    """Change `ids` here and there: substitute, insert, delete, repeat or swap spans."""
    ids = list(ids)
    tokens = st.lists(st.integers(0, vocabulary - 1), max_size=6)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(ids)))
        stop = min(len(ids), start + draw(st.integers(0, 8)))
        kind = draw(st.sampled_from(["replace", "repeat", "swap"]))
        if kind == "replace":
            ids[start:stop] = draw(tokens)
        elif kind == "repeat":
            ids[stop:stop] = ids[start:stop]
        else:
            ids = ids[stop:] + ids[start:stop] + ids[:start]
    return ids


def check_costs(decoded: Decoded, cache: PromptCache, prompt: Ids, keep_id: int | None) -> None:
    stats = decoded.stats
    assert stats.forwards <= stats.new_tokens
    assert stats.new_tokens == stats.forwards + stats.accepted_tokens
    assert stats.accepted_tokens <= stats.drafted_tokens
    assert stats.prompt_tokens == len(prompt)
    held = prompt + ([] if decoded.kept else decoded.ids)
    assert cache.ids == held[: len(cache.ids)], "the cache holds prompt and written ids, nothing else"
    assert len(cache.ids) >= len(prompt)
    if not decoded.kept:
        assert stats.new_tokens == len(decoded.ids) + (stats.finish_reason == "eos")
        assert EOS not in decoded.ids
        assert keep_id not in decoded.ids


@settings(max_examples=500, deadline=None)
@given(
    data=st.data(),
    seed=st.integers(0, 50),
    prompt=PROMPTS,
    keep_id=st.sampled_from([None, KEEP]),
    room=st.integers(1, 50),
    longest=st.integers(1, 40),
    history=st.sampled_from([None, 1, 2]),
)
def test_draft_neutral_on_tables(
    data: st.DataObject,
    seed: int,
    prompt: Ids,
    keep_id: int | None,
    room: int,
    longest: int,
    history: int | None,
) -> None:
    backend = TableBackend(seed, history=history)
    expected = plain_greedy(backend, prompt, room=room, keep_id=keep_id)
    reference = data.draw(st.one_of(edited(expected, 12), edited([i for i in expected if i != EOS], 12), IDS))
    config = DecodeConfig(max_draft_tokens=longest)
    caches = PromptCache(backend), PromptCache(backend)
    drafted, plain = (
        decode(
            backend,
            prompt,
            reference,
            config=config,
            eos_id=EOS,
            max_new_tokens=room,
            keep_id=keep_id,
            cache=used,
        )
        for decode, used in zip((draft_decode, greedy_decode), caches, strict=True)
    )
    kept = expected == [keep_id]
    assert drafted.kept == plain.kept == kept
    assert drafted.ids == plain.ids == (reference if kept else [i for i in expected if i != EOS])
    assert drafted.stats.finish_reason == plain.stats.finish_reason
    assert drafted.stats.new_tokens == plain.stats.new_tokens == plain.stats.forwards == len(expected)
    for decoded, used in zip((drafted, plain), caches, strict=True):
        check_costs(decoded, used, prompt, keep_id)
    if not kept and keep_id is None and reference == plain.ids:
        assert drafted.stats.forwards == 1


@settings(max_examples=250, deadline=None)
@given(
    data=st.data(),
    seed=st.integers(0, 50),
    prompt=PROMPTS,
    keep_id=st.sampled_from([None, KEEP]),
    margin=st.sampled_from([0.5, 1.0, 2.5, 8.0]),
    longest=st.integers(1, 40),
    history=st.sampled_from([None, 1, 2]),
)
def test_draft_neutral_with_a_margin(
    data: st.DataObject,
    seed: int,
    prompt: Ids,
    keep_id: int | None,
    margin: float,
    longest: int,
    history: int | None,
) -> None:
    backend = TableBackend(seed, history=history)
    base = plain_greedy(backend, prompt, room=40, keep_id=None)
    reference = data.draw(st.one_of(edited(base, 12), IDS))
    config = DecodeConfig(edit_margin=margin, max_draft_tokens=longest)
    drafted, plain = (
        decode(backend, prompt, reference, config=config, eos_id=EOS, max_new_tokens=40, keep_id=keep_id)
        for decode in (draft_decode, greedy_decode)
    )
    assert (drafted.ids, drafted.kept) == (plain.ids, plain.kept)
    assert drafted.stats.forwards <= drafted.stats.new_tokens == plain.stats.new_tokens
    if margin == 8.0 and EOS not in reference and KEEP not in reference and len(reference) < 40:
        # No logit is beaten by more than 7.5, so nothing is ever changed.
        assert drafted.ids == reference
        assert drafted.stats.forwards == 1


@given(seed=st.integers(0, 200), margin=st.sampled_from([0.0, 0.5, 1.0, 3.0]), prompt=PROMPTS)
def test_the_margin_decides_between_keeping_and_rewriting(seed: int, margin: float, prompt: Ids) -> None:
    backend = TableBackend(seed)
    row = backend.forward(prompt, backend.make_cache(), last=1)[0]
    others = np.delete(row, KEEP)
    for decode in (draft_decode, greedy_decode):
        decoded = decode(
            backend,
            prompt,
            [5, 6, 7],
            config=DecodeConfig(edit_margin=margin),
            eos_id=EOS,
            max_new_tokens=9,
            keep_id=KEEP,
        )
        assert decoded.kept == bool(others.max() - row[KEEP] <= margin)
        if decoded.kept:
            assert decoded.ids == [5, 6, 7]
            assert (decoded.stats.forwards, decoded.stats.new_tokens) == (1, 1)
            assert decoded.stats.finish_reason == "eos"


def test_the_draft_margin_can_differ_from_the_margin_of_the_decision() -> None:
    backend = TableBackend(3)
    prompt = [5, 6]
    base = plain_greedy(backend, prompt, room=20, keep_id=None)
    reference = [(id + 1) % 9 + 3 for id in base if id != EOS]
    config = DecodeConfig(edit_margin=8.0)
    arguments = Arguments(config=config, eos_id=EOS, max_new_tokens=20)
    assert draft_decode(backend, prompt, reference, **arguments).ids == reference
    strict = draft_decode(backend, prompt, reference, **arguments, draft_margin=0.0)
    assert strict.ids == [id for id in base if id != EOS]


class Graded(TableBackend):
    """Token 5 always has logit 3, token 6 logit 2 and all others 0."""

    def _row(self, ids: Ids) -> Logits:
        row = np.zeros(12, dtype=np.float32)
        row[5:7] = 3, 2
        return row


@pytest.mark.parametrize(("margin", "written"), [(0.9, 5), (1.0, 6), (2.0, 6)])
def test_a_token_that_is_beaten_by_just_the_margin_stays(margin: float, written: int) -> None:
    for decode in (draft_decode, greedy_decode):
        config = DecodeConfig(edit_margin=margin)
        decoded = decode(Graded(0), [4], [6, 6, 6], config=config, eos_id=EOS, max_new_tokens=3)
        assert decoded.ids == [written] * 3


@cache
def trajectory(seed: int, prompt: tuple[int, ...], keep_id: int | None) -> tuple[Ids, float]:
    """Return the greedy output of the ONNX model and the smallest gap between best and second best."""
    backend = load(seed)
    written = plain_greedy(backend, list(prompt), room=40, keep_id=keep_id)
    logits = backend.forward([*prompt, *written], backend.make_cache(), last=len(written) + 1)
    best_two = np.sort(logits, axis=1)[:, -2:]
    return written, float((best_two[:, 1] - best_two[:, 0]).min())


@cache
def load(seed: int) -> OnnxBackend:
    return OnnxBackend.load(onnx_model(seed), provider="cpu", threads=1)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    seed=st.integers(0, 1),
    prompt=st.sampled_from([(7, 8, 9), (100, 5), (33,), tuple(range(40, 70))]),
    keep_id=st.sampled_from([None, KEEP]),
)
def test_draft_neutral_on_random_llamas(
    data: st.DataObject, seed: int, prompt: tuple[int, ...], keep_id: int | None
) -> None:
    expected, gap = trajectory(seed, prompt, keep_id)
    assert gap > 1e-4, "a near-tie: this prompt cannot tell rounding from a mistake"
    reference = data.draw(st.one_of(edited(expected, 300), st.lists(st.integers(0, 299), max_size=40)))
    decoded, plain = (
        decode(
            load(seed),
            list(prompt),
            reference,
            config=DecodeConfig(),
            eos_id=EOS,
            max_new_tokens=40,
            keep_id=keep_id,
        )
        for decode in (draft_decode, greedy_decode)
    )
    assert decoded.ids == plain.ids
    assert [*decoded.ids, EOS][: len(expected)] == expected
    assert decoded.stats.forwards <= decoded.stats.new_tokens == plain.stats.forwards
    if reference == expected and keep_id is None:
        assert decoded.stats.forwards == 1
    assert decoded.stats.backend == "onnx"
    assert decoded.stats.provider == "CPUExecutionProvider"


class Forced:
    """A model whose output is given; what it costs to find that output is under test."""

    name = "forced"
    provider = "none"

    def __init__(self, text: Ids, vocabulary: int) -> None:
        self._text = np.array([*text, *[EOS] * 64])
        self._vocabulary = vocabulary

    def make_cache(self) -> TableCache:
        return TableCache()

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        assert isinstance(cache, TableCache)
        cache.ids.extend(ids)
        following = self._text[cache.length - last + 1 : cache.length + 1]
        logits: Logits = np.eye(self._vocabulary, dtype=np.float32)[following]
        return logits


@pytest.mark.parametrize("length", [0, 1, 128, 1000])
def test_an_unchanged_answer_costs_one_forward_at_any_length(length: int) -> None:
    answer = [3 + i % 50 for i in range(length)]
    decoded = draft_decode(
        Forced([9, *answer], 60), [9], answer, config=DecodeConfig(), eos_id=EOS, max_new_tokens=2000
    )
    assert decoded.ids == answer
    assert decoded.stats.forwards == 1
    assert decoded.stats.finish_reason == "eos"
    assert decoded.stats.accepted_tokens == decoded.stats.drafted_tokens == length


def tokens_per_forward(rate: float, span: int) -> float:
    """Measure on 40 answers of 128 tokens, edited by all kinds of spans of this mean length."""
    rng = random.Random(11)
    # Words as frequent as in text, each followed by few others: places look alike, as in real answers.
    followers = [[3 + int(400 * rng.random() ** 3) for _ in range(12)] for _ in range(403)]
    written = forwards = 0
    for _ in range(40):
        reference = [3]
        while len(reference) < 128:
            reference.append(followers[reference[-1]][int(12 * rng.random() ** 2)])
        target, place = list[int](), 0
        while place < len(reference):
            if rng.random() < rate / span:
                size = 1 if span == 1 else rng.randint(1, 2 * span - 1)
                kind = rng.choice(["substitute", "substitute", "insert", "delete"])
                target += [3 + int(400 * rng.random() ** 3) for _ in range(size * (kind != "delete"))]
                place += size * (kind != "insert")
            target += reference[place : place + 1]
            place += 1
        prompt = [0, *reference, 0]
        backend = Forced(prompt + target, 403)
        decoded = draft_decode(
            backend, prompt, reference, config=DecodeConfig(), eos_id=EOS, max_new_tokens=999
        )
        assert decoded.ids == target
        written += decoded.stats.new_tokens
        forwards += decoded.stats.forwards
    return written / forwards


@pytest.mark.parametrize(
    ("rate", "span", "least"),
    [(0.0, 1, 129.0), (0.02, 1, 18.0), (0.05, 1, 9.0), (0.05, 4, 11.0), (0.1, 4, 6.0), (0.2, 8, 3.5)],
)
def test_the_place_is_found_again_after_edits(rate: float, span: int, least: float) -> None:
    assert tokens_per_forward(rate, span) >= least


def test_one_word_in_the_middle_costs_one_forward_more() -> None:
    reference = list(range(10, 110))
    for target in (
        [*reference[:50], 5, *reference[51:]],  # a substitution
        [*reference[:50], *reference[53:]],  # a deletion
    ):
        decoded = draft_decode(
            Forced([9, *target], 120),
            [9],
            reference,
            config=DecodeConfig(max_draft_tokens=64),
            eos_id=EOS,
            max_new_tokens=200,
        )
        assert decoded.ids == target
        assert decoded.stats.forwards == 2


def test_what_the_output_repeats_is_drafted_from_the_output() -> None:
    verse = list(range(10, 30))
    target = verse * 5
    decoded = draft_decode(
        Forced([9, *target], 60), [9], [], config=DecodeConfig(), eos_id=EOS, max_new_tokens=200
    )
    assert decoded.ids == target
    assert decoded.stats.forwards <= 30, "101 without drafts"


@given(st.integers(1, 60), st.integers(1, 60))
def test_the_draft_stays_within_the_room(room: int, config_room: int) -> None:
    answer = list(range(3, 43))
    cache_rows: list[int] = []

    class Watched(Forced):
        def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
            cache_rows.append(cache.length + len(ids))
            return super().forward(ids, cache, last=last)

    decoded = draft_decode(
        Watched([9, *answer], 60),
        [9],
        answer,
        config=DecodeConfig(max_new_tokens=config_room),
        eos_id=EOS,
        max_new_tokens=room,
    )
    room = min(room, config_room)
    assert decoded.ids == answer[:room]
    assert decoded.stats.finish_reason == ("eos" if room > len(answer) else "length")
    assert decoded.stats.forwards == 1
    assert max(cache_rows) <= 1 + room - 1, "no token is run whose logits have no use"


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=5))
def test_reuse_finds_the_longest_common_start(prompts: list[Ids]) -> None:
    backend = TableBackend(0)
    cache = PromptCache(backend)
    held: Ids = []
    for prompt in prompts:
        common = 0
        while common < min(len(held), len(prompt)) and held[common] == prompt[common]:
            common += 1
        assert cache.reuse(prompt) == max(0, min(common, len(prompt) - 1))
        if len(cache.ids) < len(prompt):
            cache.forward(prompt[len(cache.ids) :], last=1)
        held = list(cache.ids)


def test_a_stream_runs_only_what_is_new() -> None:
    backend = load(0)
    cache = PromptCache(backend)
    question = list(range(50, 80))
    prefix: Ids = []
    for _ in range(4):
        prompt = [*question, *prefix, 200, 201]
        arguments = Arguments(config=DecodeConfig(), eos_id=EOS, max_new_tokens=8)
        with_cache = draft_decode(backend, prompt, [4, 5], cache=cache, **arguments)
        without = draft_decode(backend, prompt, [4, 5], **arguments)
        assert with_cache.ids == without.ids
        assert without.stats.cached_tokens == 0
        if prefix:
            assert with_cache.stats.cached_tokens >= len(question) + len(prefix) - 3
        prefix += [210, 211, 212]
    assert (
        draft_decode(backend, prompt, [4, 5], cache=cache, **arguments).stats.cached_tokens == len(prompt) - 1
    )


class Failing(TableBackend):
    """Fails in the middle of one forward, with the cache half written."""

    def __init__(self, seed: int, *, fail_at: int) -> None:
        super().__init__(seed)
        self.left = fail_at

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        self.left -= 1
        if self.left == 0:
            assert isinstance(cache, TableCache)
            cache.ids.extend(ids[:1])
            raise RuntimeError("out of memory")
        return super().forward(ids, cache, last=last)


@given(st.integers(0, 50), st.integers(1, 4))
def test_a_failing_forward_leaves_the_cache_usable(seed: int, fail_at: int) -> None:
    backend = Failing(seed, fail_at=fail_at)
    cache = PromptCache(backend)
    arguments = Arguments(config=DecodeConfig(), eos_id=EOS, max_new_tokens=30)
    try:
        greedy_decode(backend, [4, 5, 6], [], cache=cache, **arguments)
    except RuntimeError:
        assert cache.ids == []
    after = greedy_decode(TableBackend(seed), [4, 5, 6], [], **arguments)
    backend.left = 0
    assert greedy_decode(backend, [4, 5, 6], [], cache=cache, **arguments).ids == after.ids


def test_bad_arguments_are_named() -> None:
    for decode in (draft_decode, greedy_decode):
        for prompt, room, name in (([], 5, "prompt"), ([1], 0, "max_new_tokens")):
            with pytest.raises(ValueError, match=name):
                decode(TableBackend(0), prompt, [], config=DecodeConfig(), eos_id=EOS, max_new_tokens=room)
