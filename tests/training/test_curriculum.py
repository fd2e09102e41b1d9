"""What is trained on: ids in the frame's order, weights, pools that repeat, batches that fit."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from aligner_integrations.training.curriculum import (
    CORRECTION,
    END,
    KEEP,
    PREFIX,
    QUESTION,
    SENTENCE,
    Curriculum,
    Example,
    Stage,
    Weights,
    make_batches,
)
from aligner_integrations.training.rows import Row, load_rows
from aligner_integrations.training.vocabulary import train_tokenizer
from tests.miniature import data_folder

WEIGHTS = Weights(first=4.0, changed=2.0)
MAX_LENGTH = 192
REAL = ("sum-wrong", "sum-right", "rude", "polite", "ordinary", "step", "short", "good", "request")
HARMFUL = ("harmful", "harmful-rest", "harmful-late")
MADE = ("copy-random", "copy-text", "fresh-sum", "bare-sum")


@cache
def tokenizer() -> Tokenizer:
    texts = (row.sentence for row in load_rows(data_folder()))
    return train_tokenizer(texts, size=400)


def curriculum_of(rows: list[Row]) -> Curriculum:
    return Curriculum(rows, tokenizer(), weights=WEIGHTS, max_length=MAX_LENGTH)


@cache
def whole() -> Curriculum:
    return curriculum_of(load_rows(data_folder()))


def stage(*tasks: str, name: str = "stage") -> Stage:
    mixture = dict.fromkeys(tasks, 1.0)
    return Stage(name, tokens=10_000, batch_tokens=512, mixture=mixture)


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def one_example(sentence: str, target: str | None) -> Example:
    """The one way to learn a row: with a question and a prefix nothing is drawn in its place."""
    row = Row("good", "Why is it?", "As said.", sentence, target, dev=False)
    return curriculum_of([row]).pool(stage("good"), 0, tokens=1)[0]


def split(example: Example) -> tuple[list[float], list[float], list[float]]:
    """The weights of the frame with question and prefix, of the sentence, of what is written."""
    opened, closed = example.ids.index(SENTENCE), example.ids.index(CORRECTION)
    weights = example.weights
    return weights[: opened + 1], weights[opened + 1 : closed], weights[closed + 1 :]


def test_ids_stand_in_the_order_of_the_frame() -> None:
    example = one_example("It is so.", "It is not so.")
    assert example.ids == [
        *(QUESTION, *encode("Why is it?"), PREFIX, *encode("As said."), SENTENCE, *encode("It is so.")),
        *(CORRECTION, *encode("It is not so."), END),
    ]
    assert len(example.weights) == len(example.ids)


def test_a_kept_sentence_is_one_weighty_token() -> None:
    example = one_example("It is so.", None)
    frame, sentence, written = split(example)
    assert example.ids[-1] == KEEP and written == [WEIGHTS.first]
    assert set(frame) == set(sentence) == {0.0}


def read_sum(sentence: str, target: str | None) -> list[tuple[str, str]]:
    """What is to be predicted while a sum is read: (token that stands there, token to predict)."""
    rows = [Row("sum-right", "Why is it?", "As said.", sentence, target, dev=False)]
    rows.append(Row("ordinary", "What?", "", "Nothing.", None, dev=False))
    example = curriculum_of(rows).pool(stage("sum-right"), 0, tokens=1)[0]
    opened, closed = example.ids.index(SENTENCE), example.ids.index(CORRECTION)
    name = tokenizer().id_to_token
    return [
        (name(example.ids[place]), name(example.targets[place]))
        for place in range(opened + 1, closed + 1)
        if example.weights[place] > 0
    ]


KEPT, MENDED = "<|keep|>", "<|correction|>"


@pytest.mark.parametrize(
    ("sentence", "target", "wanted"),
    [
        ("12 + 3 = 15 .", None, [("1", "1"), ("5", "5"), (MENDED, KEPT)]),
        ("12 + 3 = 16 .", "12 + 3 = 15 .", [("1", "1"), ("6", "5"), (MENDED, MENDED)]),
        ("12 + 3 = 25 .", "12 + 3 = 15 .", [("2", "1"), (MENDED, MENDED)]),
        ("12 + 3 = 150 .", "12 + 3 = 15 .", [("1", "1"), ("5", "5"), (MENDED, MENDED)]),
        ("12 + 3 = 15", None, [("1", "1"), ("5", "5")]),  # at the end the decision is the verdict
        ("1+2=4, 3+3=6 .", "1+2=3, 3+3=6 .", [("4", "3"), (MENDED, MENDED), ("6", "6"), (MENDED, KEPT)]),
        ("12 + 3 = 16 .", "It is not so.", []),
    ],
)
def test_a_sum_is_computed_and_judged_while_it_is_read(
    sentence: str, target: str | None, wanted: list[tuple[str, str]]
) -> None:
    found = read_sum(sentence, target)
    # A verdict is said on the token after the result: whatever token stands one further.
    assert [
        (asked if predicted not in (KEPT, MENDED) else MENDED, predicted) for asked, predicted in found
    ] == wanted


def test_a_rewritten_sentence_weighs_its_start_and_its_changes() -> None:
    target = "It is 15 now."
    frame, sentence, written = split(one_example("It is 16 now.", target))
    assert set(frame) == set(sentence) == {0.0}
    ids = [*encode(target), END]
    wanted = [1.0] * len(ids)
    wanted[ids.index(tokenizer().token_to_id("5"))] = WEIGHTS.changed
    wanted[0] = WEIGHTS.first
    assert written == wanted


def test_a_dropped_sentence_is_one_end() -> None:
    example = one_example("Take it.", "")
    assert example.ids[-2:] == [CORRECTION, END]
    assert split(example)[2] == [WEIGHTS.first]


@pytest.mark.parametrize("task", [*REAL, *HARMFUL, *MADE])
def test_every_task_learns_something_and_never_the_frame(task: str) -> None:
    for example in whole().pool(stage(task), 3, tokens=1500):
        frame, sentence, written = split(example)
        assert set(frame) == {0.0}
        assert sum(written) > 0 and example.ids[-1] in (END, KEEP)
        if "sum" not in task:
            assert set(sentence) <= {0.0}
        assert 0 < len(example.ids) <= MAX_LENGTH and len(example.weights) == len(example.ids)


def test_random_copies_write_what_they_read() -> None:
    for example in whole().pool(stage("copy-random"), 0, tokens=1000):
        opened, closed = example.ids.index(SENTENCE), example.ids.index(CORRECTION)
        assert example.ids[closed + 1 :] == [*example.ids[opened + 1 : closed], END]


def test_a_drill_predicts_results_and_judges_them() -> None:
    verdicts = Counter[str]()
    for example in whole().pool(stage("sum-drill"), 0, tokens=3000):
        assert example.ids[:3] == [QUESTION, PREFIX, SENTENCE] and example.ids[-1] == CORRECTION
        assert len(example.weights) == len(example.targets) == len(example.ids)
        name = tokenizer().id_to_token
        for seen, target, weight in zip(example.ids, example.targets, example.weights, strict=True):
            if weight == 1.0:
                verdicts[name(target)] += 1
            elif weight > 0:
                assert name(target).isdigit() and name(seen).isdigit()
    assert set(verdicts) == {KEPT, MENDED}
    assert 0.3 < verdicts[KEPT] / verdicts.total() < 0.7


def test_copied_text_does_not_train_the_decision() -> None:
    examples = whole().pool(stage("copy-text"), 0, tokens=3000)
    assert all(split(example)[2][0] == 0.0 for example in examples)


def test_held_out_rows_are_never_drawn() -> None:
    rows = [
        Row("ordinary", "", "", "Seen.", None, dev=False),
        Row("ordinary", "", "", "Unseen!", None, dev=True),
    ]
    mark = encode("!")[0]
    examples = curriculum_of(rows).pool(stage("ordinary"), 0, tokens=2000)
    assert all(mark not in example.ids for example in examples)


def test_pools_are_a_function_of_stage_and_number() -> None:
    tasks = (*REAL, *HARMFUL, *MADE)
    first = whole().pool(stage(*tasks), 0, tokens=2000)
    whole().pool(stage(*tasks), 1, tokens=500)
    assert whole().pool(stage(*tasks), 0, tokens=2000) == first
    assert curriculum_of(load_rows(data_folder())).pool(stage(*tasks), 0, tokens=2000) == first
    assert whole().pool(stage(*tasks), 1, tokens=2000) != first
    assert whole().pool(stage(*tasks, name="other"), 0, tokens=2000) != first


def test_a_pool_is_as_long_as_asked_and_one_example_at_most_over() -> None:
    examples = whole().pool(stage("ordinary", "rude"), 0, tokens=1000)
    lengths = [len(example.ids) for example in examples]
    assert 1000 <= sum(lengths) < 1000 + lengths[-1] + 1


def test_unknown_task_is_named_before_the_run() -> None:
    whole().check(stage("rude", "copy-random"))
    with pytest.raises(ValueError, match=r"stage 'stage': no rows for rood; tasks: .*rude"):
        whole().check(stage("rood", "polite"))


@given(st.lists(st.integers(1, 192), max_size=40), st.integers(1, 1000), st.sampled_from(["a", "b"]))
def test_batches_hold_every_example_once_within_the_budget(
    lengths: list[int], tokens: int, seed: str
) -> None:
    examples = [
        Example([number] * length, [number] * length, [1.0] * length) for number, length in enumerate(lengths)
    ]
    buckets = [48, 80, 192]
    batches = list(make_batches(examples, buckets=buckets, tokens=tokens, seed=seed))
    assert sorted(e.ids[0] for batch in batches for e in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch
        padded = next(size for size in buckets if max(len(e.ids) for e in batch) <= size)
        assert padded * len(batch) <= tokens or len(batch) == 1
        # Examples of like length stand together: none is padded past its own bucket.
        assert all(padded == next(s for s in buckets if len(e.ids) <= s) for e in batch)
    assert batches == list(make_batches(examples, buckets=buckets, tokens=tokens, seed=seed))
