"""Rows: what each source becomes, what is held out, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from aligner_integrations.training.rows import Row, cut_sentences, is_dev, load_rows
from tests.miniature import REFUSAL, Raw, answer_row, data_folder, sentence_row, sources, write_source

TASKS = {"sum-wrong", "sum-right", "rude", "polite", "ordinary", "step", "short", "good"} | {
    "harmful",
    "request",
    "harmful-rest",
    "harmful-late",
}
PLAIN_REFUSAL = "I'm sorry, but I can't assist with that."


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return load_rows(data_folder())


def load_alone(folder: Path, source: str, *raws: Raw) -> list[Row]:
    """The rows of `raws` as the one filled source of a data folder."""
    for name in sources():
        write_source(folder, name, list(raws) if name == source else [])
    return load_rows(folder)


def test_every_task_has_rows_on_both_sides(rows: list[Row]) -> None:
    assert {row.task for row in rows if not row.dev} == TASKS
    assert {row.task for row in rows if row.dev} >= TASKS - {"harmful-late"}
    assert {row.source for row in rows} == set(sources())


def test_held_out_is_disjoint_by_question_and_stable(rows: list[Row]) -> None:
    sides: dict[str, set[bool]] = {}
    for row in rows:
        sides.setdefault(row.question, set()).add(row.dev) if row.question else None
    assert all(len(side) == 1 for side in sides.values())
    assert all(is_dev(row.question) == row.dev for row in rows if row.question)
    # A twentieth is held out; which rows, no run may change.
    assert [i for i in range(100) if is_dev(f"What is fern {i}?")] == [
        i for i in range(100) if is_dev(f" WHAT is fern {i}? ")
    ]
    assert 300 < sum(is_dev(f"question {i}") for i in range(10_000)) < 700


def test_rude_sentence_and_its_rewrite_are_held_out_together(rows: list[Row]) -> None:
    rewrites = {(row.target, row.dev) for row in rows if row.task == "rude"}
    polite = {(row.sentence, row.dev) for row in rows if row.task == "polite"}
    assert rewrites <= polite


def test_loading_twice_gives_the_same_rows_in_the_same_order(rows: list[Row]) -> None:
    assert load_rows(data_folder()) == rows


def test_targets_by_task(rows: list[Row]) -> None:
    kept = {"sum-right", "polite", "ordinary", "step", "short", "good", "request"}
    for row in rows:
        if row.task in kept:
            assert row.target is None, row
        elif row.task == "harmful-rest":
            assert row.target == ""
        else:
            assert row.target is not None and row.target != row.sentence, row


def test_right_sums_are_balanced_against_wrong_ones(rows: list[Row]) -> None:
    counts = Counter(row.task for row in rows)
    slips = sum(raw["meta"]["kind"] == "arithmetic-slip" for raw in sources()["gsm8k_steps"])
    assert counts["sum-wrong"] == slips
    assert counts["sum-right"] == len(sources()["gsm8k_steps"])
    right = {(row.question, row.sentence) for row in rows if row.task == "sum-right"}
    assert all((row.question, row.target) in right for row in rows if row.task == "sum-wrong")


def test_identical_rows_become_keep(tmp_path: Path) -> None:
    same = "She has 1 + 1 = 2 pens."
    raw = sentence_row("How many?", "", f"  {same} ", same, kind="arithmetic-slip")
    assert [(row.task, row.sentence, row.target) for row in load_alone(tmp_path, "gsm8k_steps", raw)] == [
        ("sum-wrong", same, None),
        ("sum-right", same, None),
    ]


def test_refusals_answer_the_first_sentence_and_silence_the_rest(rows: list[Row]) -> None:
    harmful = [row for row in rows if row.task == "harmful"]
    assert {row.target for row in harmful} == {REFUSAL, PLAIN_REFUSAL}
    assert all(row.prefix == "" and row.sentence.startswith("Sure, take") for row in harmful)
    rest = [row for row in rows if row.task == "harmful-rest"]
    assert {row.prefix for row in rest} == {REFUSAL, PLAIN_REFUSAL}
    late = [row for row in rows if row.task == "harmful-late"]
    assert all(row.prefix.startswith("Sure, take") and row.target in (REFUSAL, PLAIN_REFUSAL) for row in late)


def test_a_correction_that_is_no_refusal_is_replaced_by_a_plain_one(tmp_path: Path) -> None:
    raw = answer_row("May I?", "Sure, do.", "Biscuits are baked.")
    found = load_alone(tmp_path, "jbb_pairs", raw)
    assert [row.target for row in found if row.task == "harmful"] == [PLAIN_REFUSAL]


def test_over_cautious_answers_are_left_alone(rows: list[Row]) -> None:
    cautious = [row for row in rows if row.sentence == "I cannot speak of biscuits."]
    assert cautious and all(row.task == "good" and row.target is None for row in cautious)


def test_wrong_steps_and_wrong_facts_are_not_taught(rows: list[Row]) -> None:
    assert not [row for row in rows if "and odd" in row.sentence or row.sentence == "It is loud."]


def test_no_row_carries_margins_or_nothing(rows: list[Row]) -> None:
    for row in rows:
        assert row.sentence and row.sentence == row.sentence.strip()
        assert row.prefix == row.prefix.rstrip() and len(row.prefix) <= 1200
    assert {"Water it often."} <= {row.sentence for row in rows}  # without its list mark


@pytest.mark.parametrize("answer", ["", "   \n", "…", "***"])
def test_answers_without_words_give_no_rows(answer: str, tmp_path: Path) -> None:
    raw = {"task": "qa", "question": "Well?", "answer": answer, "meta": {}}
    assert load_alone(tmp_path, "medquad_qa", raw) == []


def test_cut_sentences_loses_nothing() -> None:
    answer = "One sentence. Another one!\n\n- a point\n- two\n"
    assert "".join(cut_sentences(answer)) == answer


@pytest.mark.parametrize("source", sources())
def test_missing_source_is_named(source: str, tmp_path: Path) -> None:
    for name in sources():
        if name != source:
            write_source(tmp_path, name, [])
    with pytest.raises(FileNotFoundError, match=f"lacks {source}/{source}.jsonl.gz"):
        load_rows(tmp_path)
