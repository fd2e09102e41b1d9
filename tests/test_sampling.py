from __future__ import annotations

import json
import math
from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from aligner_integrations import Aligner, DecodeConfig
from aligner_integrations.backends.base import Ids, Logits
from aligner_integrations.cli import main
from aligner_integrations.decode import draft_decode, greedy_decode
from aligner_integrations.sampling import Sampler, probabilities
from tests.models_for_tests import EOS, KEEP, TableBackend

PROMPT = [5, 6, 7]
LONGEST = 3


def chances_of_texts(backend: TableBackend, config: DecodeConfig) -> dict[tuple[int, ...], float]:
    """Every text that can be written, with its chance: the product over its tokens."""
    found: dict[tuple[int, ...], float] = {}

    def grow(text: tuple[int, ...], chance: float) -> None:
        if len(text) == LONGEST or text[-1:] == (EOS,):
            found[text] = chance
            return
        logits = backend.forward([*PROMPT, *text], backend.make_cache(), last=1)[0]
        each = probabilities(logits, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
        for token in each.nonzero()[0].tolist():
            grow((*text, token), chance * float(each[token]))

    grow((), 1.0)
    return found


def chi_square_limit(freedom: int, sigmas: float = 4.9) -> float:
    """The value that chi-square passes once in two million times (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * freedom)
    return freedom * float((1 - spread + sigmas * spread**0.5) ** 3)


@pytest.mark.parametrize("drafting", [True, False], ids=["drafted", "plain"])
@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(temperature=1.0),
        DecodeConfig(temperature=0.3),
        DecodeConfig(temperature=2.0, top_k=4, top_p=0.9),
    ],
    ids=["hot", "the paper's", "filtered"],
)
def test_texts_come_as_often_as_the_model_says(config: DecodeConfig, drafting: bool) -> None:
    """The draft is right sometimes and wrong sometimes; what is drawn must not lean to it."""
    backend = TableBackend(3, vocabulary=6)
    wanted = chances_of_texts(backend, config)
    assert sum(wanted.values()) == pytest.approx(1.0)
    reference = (*max(wanted, key=wanted.__getitem__)[:-1], 4)
    runs, accepted = 10_000, 0
    found: Counter[tuple[int, ...]] = Counter()
    for seed in range(runs):
        decoded = (draft_decode if drafting else greedy_decode)(
            backend,
            PROMPT,
            list(reference),
            config=DecodeConfig(
                temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=seed
            ),
            eos_id=EOS,
            max_new_tokens=LONGEST,
        )
        ended = decoded.stats.finish_reason == "eos"
        found[(*decoded.ids, *[EOS] * ended)] += 1
        accepted += decoded.stats.accepted_tokens
    assert found.keys() <= wanted.keys()
    assert (accepted > 0) == drafting
    # Texts too rare for the statistic are counted together.
    rare = {text for text, chance in wanted.items() if chance * runs < 5}
    groups = [(found[text], chance * runs) for text, chance in wanted.items() if text not in rare]
    groups.append((sum(found[text] for text in rare), sum(wanted[text] for text in rare) * runs))
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in groups if mean > 0)
    assert statistic < chi_square_limit(len(groups) - 1)


@pytest.mark.parametrize("drafting", [True, False], ids=["drafted", "plain"])
def test_without_a_margin_the_choice_to_keep_is_drawn(drafting: bool) -> None:
    """Keep and first token come as often as the model says; what follows is drawn without the keep token."""
    backend = TableBackend(1, vocabulary=6)
    chances: dict[tuple[int, ...], float] = {}
    first = probabilities(
        backend.forward(PROMPT, backend.make_cache(), last=1)[0], temperature=1.5, top_k=0, top_p=1.0
    )
    for token, chance in enumerate(first.tolist()):
        if token in (KEEP, EOS):
            chances[(token,)] = chance
            continue
        row = backend.forward([*PROMPT, token], backend.make_cache(), last=1)[0].astype(np.float64)
        weights = np.exp(row / 1.5) * (np.arange(6) != KEEP)
        for second, share in enumerate((weights / weights.sum()).tolist()):
            if share:
                chances[(token, second)] = chance * share
    runs, found = 10_000, Counter[tuple[int, ...]]()
    for seed in range(runs):
        decoded = (draft_decode if drafting else greedy_decode)(
            backend,
            PROMPT,
            [3, 4, 5],
            config=DecodeConfig(temperature=1.5, seed=seed),
            eos_id=EOS,
            max_new_tokens=2,
            keep_id=KEEP,
        )
        ended = decoded.stats.finish_reason == "eos"
        found[(KEEP,) if decoded.kept else (*decoded.ids, *[EOS] * ended)] += 1
    assert found.keys() <= chances.keys()
    assert 0.02 < chances[(KEEP,)] < 0.9
    rare = {text for text, chance in chances.items() if chance * runs < 5}
    groups = [(found[text], chance * runs) for text, chance in chances.items() if text not in rare]
    groups.append((sum(found[text] for text in rare), sum(chances[text] for text in rare) * runs))
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in groups if mean > 0)
    assert statistic < chi_square_limit(len(groups) - 1)


def test_the_statistic_finds_a_small_lean() -> None:
    rng = np.random.default_rng(0)
    seen = rng.multinomial(10_000, [0.225, 0.175, 0.2, 0.2, 0.2])
    assert ((seen - 2000) ** 2 / 2000).sum() > chi_square_limit(4)


TOKENS = st.lists(st.integers(2, 11), max_size=12)


@settings(max_examples=300)
@given(
    model=st.integers(0, 20),
    reference=TOKENS,
    seed=st.integers(0, 2**40),
    temperature=st.sampled_from([0.01, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([1e-9, 0.5, 0.95, 1.0]),
    margin=st.sampled_from([0.0, 0.5, 4.0]),
    keep=st.booleans(),
)
def test_drafts_do_not_change_what_is_drawn(
    model: int,
    reference: Ids,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    margin: float,
    keep: bool,
) -> None:
    backend = TableBackend(model)
    config = DecodeConfig(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, edit_margin=margin)
    drafted, plain = (
        decode(
            backend,
            PROMPT,
            reference,
            config=config,
            eos_id=EOS,
            max_new_tokens=12,
            keep_id=KEEP if keep else None,
        )
        for decode in (draft_decode, greedy_decode)
    )
    assert (drafted.ids, drafted.kept) == (plain.ids, plain.kept)
    assert drafted.stats.forwards <= plain.stats.forwards
    if keep:
        assert KEEP not in drafted.ids or drafted.kept or KEEP in reference


@given(model=st.integers(0, 20), reference=TOKENS, margin=st.sampled_from([0.0, 1.0]), keep=st.booleans())
def test_near_temperature_0_it_is_greedy_decoding(
    model: int, reference: Ids, margin: float, keep: bool
) -> None:
    class NoTies(TableBackend):
        def _row(self, ids: Ids) -> Logits:
            row: Logits = super()._row(ids) + np.linspace(0.1, 0, 12, dtype=np.float32)
            return row

    greedy, cold = (
        draft_decode(
            NoTies(model),
            PROMPT,
            reference,
            config=DecodeConfig(temperature=temperature, edit_margin=margin),
            eos_id=EOS,
            max_new_tokens=12,
            keep_id=KEEP if keep else None,
        )
        for temperature in (0.0, 1e-5)
    )
    assert (greedy.ids, greedy.kept) == (cold.ids, cold.kept)


@given(
    model=st.integers(0, 20),
    reference=TOKENS,
    seed=st.integers(0, 2**40),
    temperature=st.sampled_from([5e-324, 0.3, 50.0]),
    margin=st.sampled_from([0.0, 1.0]),
)
def test_the_best_one_alone_is_greedy_decoding_even_where_others_equal_it(
    model: int, reference: Ids, seed: int, temperature: float, margin: float
) -> None:
    greedy, drawn = (
        draft_decode(TableBackend(model), PROMPT, reference, config=config, eos_id=EOS, max_new_tokens=12)
        for config in (
            DecodeConfig(edit_margin=margin),
            DecodeConfig(temperature=temperature, top_k=1, seed=seed, edit_margin=margin),
        )
    )
    assert greedy.ids == drawn.ids


def test_the_margin_keeps_the_original_before_anything_is_drawn() -> None:
    """With a margin wider than all logits every token of the reference stays, at any temperature."""
    reference = [3, 4, 5, 6]
    for keep in (None, KEEP):
        decoded = draft_decode(
            TableBackend(0),
            PROMPT,
            reference,
            config=DecodeConfig(temperature=9.0, edit_margin=100.0, seed=0),
            eos_id=EOS,
            max_new_tokens=9,
            keep_id=keep,
        )
        assert decoded.ids == reference
        assert decoded.kept == (keep is not None)
        assert decoded.stats.forwards == 1


LOGITS = st.lists(st.sampled_from([-30.0, -2.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=30)


@given(LOGITS, st.sampled_from([0.1, 1.0, 3.0]), st.integers(0, 35), st.floats(0.01, 1.0))
def test_the_filters_are_those_of_transformers(
    values: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    # Among equals transformers takes those that its sort puts last; a little apart, there are none.
    logits = np.array(values, np.float32) + np.linspace(0, 0.2, len(values), dtype=np.float32)
    scores = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits[None], dtype=torch.float64))
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    reached = torch.sort(torch.softmax(scores, -1), descending=True).values.cumsum(-1)
    if (reached - top_p).abs().min() < 1e-9:
        return  # on the border, rounding decides
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    wanted = torch.softmax(scores, -1)[0].numpy()
    found = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(found, wanted, atol=1e-9)


@given(LOGITS, st.sampled_from([5e-324, 0.1, 1.0, 50.0]), st.integers(0, 35), st.floats(0.01, 1.0))
def test_among_equals_the_lowest_ids_stay(
    values: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    """Beside the same filters written out over a sorted list."""
    ranked = sorted(range(len(values)), key=lambda id: (-values[id], id))[: top_k or None]
    weights = {id: math.exp((values[id] - max(values)) / temperature) for id in ranked}
    reached = [
        float(value) for value in accumulate(weight / sum(weights.values()) for weight in weights.values())
    ]
    if min(abs(value - top_p) for value in reached) < 1e-9:
        return  # on the border, rounding decides
    count = next((place for place, value in enumerate(reached) if value >= top_p), len(reached)) + 1
    stays = ranked if top_p == 1.0 else ranked[:count]
    wanted = np.zeros(len(values))
    for id in stays:
        wanted[id] = weights[id] / sum(weights[other] for other in stays)
    found = probabilities(np.array(values, np.float32), temperature=temperature, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_an_infinite_logit_takes_all_and_one_below_all_takes_nothing() -> None:
    logits = np.array([1.0, -np.inf, np.inf, 3.0], np.float32)
    assert probabilities(logits, temperature=1.0, top_k=0, top_p=1.0).tolist() == [0, 0, 1, 0]
    lacking = np.array([-np.inf, 2.0, -np.inf, 2.0, -np.inf], np.float32)
    sampler = Sampler(DecodeConfig(temperature=1.0, seed=0))
    assert {sampler.draw(lacking) for _ in range(50)} == {1, 3}


def test_a_number_of_the_generator_finds_its_token() -> None:
    chances = [0.5, 0.0, 0.125, 0.375]
    sampler = Sampler(DecodeConfig(temperature=1.0, seed=4))
    with np.errstate(divide="ignore"):
        logits = np.log(np.array(chances, np.float32))
    bounds = list(accumulate(chances))
    for number in np.random.default_rng(4).random(200).tolist():
        assert sampler.draw(logits) == next(place for place, bound in enumerate(bounds) if number < bound)


def test_the_bundled_model_samples_the_same_with_and_without_drafts_and_in_batches() -> None:
    question = "How many legs do 3 cats have?"
    texts = ["3 cats have 3*4 = 14 legs. You are a stupid idiot.", "A cat has 4 legs.", "So 3*4 = 13."] * 2
    hot = DecodeConfig(temperature=1.5, seed=11)
    drafted, plain = (
        Aligner.from_pretrained(decode=DecodeConfig(temperature=1.5, seed=11, draft=draft))
        for draft in (True, False)
    )
    one_by_one = [drafted.correct(question, text) for text in texts]
    assert [c.proposed for c in one_by_one] == [plain.correct(question, text).proposed for text in texts]
    assert [c.proposed for c in one_by_one] == [
        c.proposed for c in drafted.correct_batch([(question, text) for text in texts])
    ]
    assert one_by_one[0].proposed == one_by_one[3].proposed
    others = {
        Aligner.from_pretrained(decode=DecodeConfig(temperature=hot.temperature, seed=seed))
        .correct(question, texts[0])
        .proposed
        for seed in range(8)
    }
    assert len(others) > 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be a whole number"),
        ({"top_k": True}, "top_k must be a whole number"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": "now"}, "seed must be a whole number"),
    ],
)
def test_bad_arguments_are_named(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**bad)  # type: ignore[arg-type]


def test_the_command_line_samples_with_the_margin_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    question, answer = "How many legs do 3 cats have?", "3 cats have 3*4 = 14 legs. You are a stupid idiot."
    aligner = Aligner.from_pretrained()
    config = DecodeConfig(
        temperature=40.0, top_p=0.9, top_k=50, seed=5, edit_margin=aligner.decode_config.edit_margin
    )
    wanted = aligner.with_options(decode=config).correct(question, answer)
    assert wanted.proposed != aligner.correct(question, answer).proposed
    chosen = ["--temperature", "40", "--top-p", "0.9", "--top-k", "50", "--seed", "5"]
    assert main(["correct", "-q", question, "-a", answer, "--json", *chosen]) == 0
    assert json.loads(capsys.readouterr().out)["proposed"] == wanted.proposed
    for command in (["correct", "-a", answer], ["stream"]):
        assert main([*command, "-q", question, "--model", "not/here", "--top-p", "0"]) == 1
        assert "top_p must be above 0" in capsys.readouterr().err
        assert main([*command, "-q", question, "--top-k", "-1"]) == 2
        assert "--top-k" in capsys.readouterr().err
