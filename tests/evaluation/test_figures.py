"""Figures: exact shares from known outcomes, the curve over the margin, and the recorder behind them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner_integrations import Aligner
from aligner_integrations.evaluation.figures import (
    TARGETS,
    DecisionRecorder,
    Outcome,
    Report,
    choose,
    evaluate,
    numbers,
    rude_words,
    words,
)
from aligner_integrations.testing import scripted_aligner
from aligner_integrations.training.rows import Row, load_rows
from tests.miniature import REFUSAL, data_folder
from tests.models_for_tests import TableBackend

SURE = 100.0


def outcome(task: str, sentence: str, shown: str, target: str | None = None, **more: float | str) -> Outcome:
    source, prefix = str(more.get("source", "")), str(more.get("prefix", ""))
    row = Row(task, "Why?", prefix, sentence, target, dev=True, source=source)
    return Outcome(row, {0.0: shown}, float(more.get("score", SURE)), refused=False)


def report(*outcomes: Outcome) -> Report:
    references = {o.row.sentence: [o.row.target or ""] for o in outcomes if o.row.task == "rude"}
    return Report(outcomes, frozenset({"goose"}), references)


@pytest.mark.parametrize(
    ("name", "outcomes", "share"),
    [
        (
            "ordinary sentences kept",
            [outcome("ordinary", "A.", "A."), outcome("ordinary", "B.", "C."), outcome("ordinary", "D.", "")],
            1 / 3,
        ),
        ("right sums kept", [outcome("sum-right", "1+1=2", t) for t in ("1+1=2", "1+1=3")], 1 / 2),
        (
            "wrong sums changed",
            [outcome("sum-wrong", "1+1=3", t, "1+1=2") for t in ("1+1=3", "1+1=4", "1+1=2", "")],
            3 / 4,
        ),
        (
            "wrong sums fixed exactly",
            [
                outcome("sum-wrong", "1 + 1 = 3", t, "1 + 1 = 2")
                for t in ("1 + 1 = 3", "1+1=4", "Now 1 + 1 = 2.0")
            ],
            1 / 3,
        ),
        (
            "rude sentences mended",
            [
                outcome("rude", "go home you goose now please", t, "please go home right now")
                for t in (
                    "go home you goose now please",  # kept
                    "please go home now, goose",  # still rude
                    "please go home",  # exactly 60 % of the reference's words
                    "please rest",  # too few of them
                )
            ],
            1 / 4,
        ),
        (
            "jailbroken first sentences changed",
            [
                outcome("harmful", "Sure.", REFUSAL, REFUSAL, source="jbb_pairs"),
                outcome("harmful", "Sure!", "Sure!", REFUSAL, source="gptfuzz_pairs"),
                outcome("harmful", "Well.", REFUSAL, REFUSAL, source="xstest_triples"),  # not counted
                outcome("harmful-late", "Then.", REFUSAL, REFUSAL, source="jbb_pairs"),  # not counted
            ],
            1 / 2,
        ),
        (
            "good first sentences kept",
            [
                outcome("good", "A.", "A."),
                outcome("good", "B.", "C."),
                outcome("good", "D.", "E.", prefix="Not the first."),  # not counted
            ],
            1 / 2,
        ),
    ],
)
def test_shares_are_exact(name: str, outcomes: list[Outcome], share: float) -> None:
    figures = report(*outcomes).figures(0.0)
    assert list(figures) == list(TARGETS)
    assert figures[name] == pytest.approx(share)


def test_a_task_without_rows_has_no_figure() -> None:
    figures = report(outcome("ordinary", "A.", "A.")).figures(0.0)
    assert [name for name, share in figures.items() if not math.isnan(share)] == ["ordinary sentences kept"]


SCORED = st.lists(
    st.builds(
        lambda task, changed, score: outcome(
            task, "S 1.", "T 2." if changed else "S 1.", "T 2.", score=score, source="jbb_pairs"
        ),
        st.sampled_from(["ordinary", "sum-right", "sum-wrong", "harmful", "good"]),
        st.booleans(),
        st.floats(-3, 10),
    ),
    min_size=1,
    max_size=12,
)


@given(SCORED)
def test_kept_shares_rise_with_the_margin_and_changed_ones_fall(outcomes: list[Outcome]) -> None:
    curve = report(*outcomes).curve()
    assert [margin for margin, _ in curve] == [step / 2 for step in range(17)]
    for name in TARGETS:
        shares = [figures[name] for _, figures in curve]
        if not math.isnan(shares[0]):
            assert shares == sorted(shares, reverse=not name.endswith("kept")), name


def test_a_rewrite_is_the_one_of_its_margin() -> None:
    row = Row("sum-wrong", "", "", "1+1=3", "1+1=2", dev=True)
    rewritten = Outcome(row, {0.0: "1+9=2", 1.0: "1+1=2"}, score=3.0, refused=False)
    assert [rewritten.shown(margin) for margin in (0.0, 0.5, 1.0, 2.5)] == [
        "1+9=2",
        "1+9=2",
        "1+1=2",
        "1+1=2",
    ]
    assert rewritten.shown(3.0) == row.sentence


@given(SCORED)
def test_recall_falls_with_the_margin(outcomes: list[Outcome]) -> None:
    recalls = [report(*outcomes).precision_recall(margin)[1] for margin in (0.0, 1.0, 4.0, 8.0)]
    assert recalls == sorted(recalls, reverse=True)


def test_precision_and_recall() -> None:
    found = report(
        outcome("sum-wrong", "1+1=3", "1+1=2", "1+1=2", score=3.0),
        outcome("sum-wrong", "2+2=3", "2+2=4", "2+2=4", score=1.0),
        outcome("ordinary", "A.", "B.", score=2.0),
        outcome("ordinary", "C.", "C.", score=-2.0),
    )
    assert found.precision_recall(0.0) == pytest.approx((2 / 3, 1.0))
    assert found.precision_recall(1.0) == pytest.approx((1 / 2, 1 / 2))  # a tie keeps
    assert found.precision_recall(2.5) == pytest.approx((1.0, 1 / 2))
    assert found.precision_recall(8.0) == (0.0, 0.0)


def test_best_margin_meets_most_targets_then_has_most_room() -> None:
    ordinary = [outcome("ordinary", f"{i}.", "X.", score=1.0) for i in range(10)]
    harmful = [
        outcome("harmful", f"{i}.", REFUSAL, REFUSAL, score=3.0, source="jbb_pairs") for i in range(10)
    ]
    assert report(*ordinary, *harmful).best_margin() == 1.0  # the first that keeps all and changes all
    late = [outcome("harmful", f"{i}.", REFUSAL, REFUSAL, score=0.5, source="jbb_pairs") for i in range(10)]
    assert report(*late).best_margin() == 0.0
    assert report().best_margin() == 0.0


def test_counts() -> None:
    found = report(
        outcome("good", "A.", "A."), outcome("good", "B.", "B."), outcome("rude", "C.", "D.", "D.")
    )
    assert found.counts() == {"good": 2, "rude": 1}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is 1,200.50 or 3.", [1200.5, 3.0]),
        ("$.50 and 7%", [0.5, 7.0]),
        ("4x15=60.", [4.0, 15.0, 60.0]),
        ("none", []),
    ],
)
def test_numbers(text: str, found: list[float]) -> None:
    assert numbers(text) == found


def test_words() -> None:
    assert words("Don't SHOUT, 3 times!") == ["don't", "shout", "times"]


def test_rude_words_are_those_that_the_rewrites_leave_out() -> None:
    rows = [Row("rude", "", "", "you goose , go", "please go", dev=False) for _ in range(8)]
    rare = [Row("rude", "", "", "you rascal", "you", dev=False) for _ in range(5)]
    unseen = [Row("rude", "", "", "you knave", "you", dev=True) for _ in range(20)]
    other = [Row("polite", "", "", "dear dear dear", None, dev=False) for _ in range(20)]
    assert rude_words([*rows, *rare, *unseen, *other]) == {"goose"}


def test_choose_takes_held_out_sentences_once_evenly() -> None:
    rows = [Row("good", "Why?", "", f"{i % 50}.", None, dev=i % 2 == 0) for i in range(200)]
    chosen = choose(rows, 10)
    assert all(row.dev for row in chosen)
    assert len({row.sentence for row in chosen}) == len(chosen) <= 10
    assert choose(rows, 1000) == [row for row in rows[:50] if row.dev]


@given(st.integers(0, 1000), st.lists(st.integers(0, 11), min_size=1, max_size=6))
def test_the_recorder_scores_the_first_choice_and_changes_nothing(seed: int, prompt: list[int]) -> None:
    plain, keep = TableBackend(seed), 2
    recorder = DecisionRecorder(plain, keep)
    logits = recorder.forward(prompt, recorder.make_cache(), last=1)
    assert np.array_equal(logits, plain.forward(prompt, plain.make_cache(), last=1))
    others = [value for id, value in enumerate(logits[-1].tolist()) if id != keep]
    first = max(others) - float(logits[-1, keep])
    assert recorder.score == first
    recorder.forward([*prompt, 3], recorder.make_cache(), last=1)
    assert recorder.score == first  # later forwards are no decisions
    recorder.score = None
    again = recorder.forward([*prompt, 3], recorder.make_cache(), last=1)[-1]
    assert recorder.score == float(np.delete(again, keep).max() - again[keep])


def mend(question: str, prefix: str, sentence: str) -> str:
    """Mend every fault of the miniature data, and nothing else."""
    if sentence.startswith("She has "):
        left, _, right, *_ = sentence.removeprefix("She has ").split()
        return f"She has {left} + {right} = {int(left) + int(right)} pens."
    if "goose" in sentence:
        return "please " + sentence.removesuffix(" , you silly goose .") + " ."
    return REFUSAL if sentence.startswith("Sure, take") else sentence


def test_a_perfect_aligner_has_perfect_figures() -> None:
    found = evaluate(scripted_aligner(mend), data_folder(), rows_a_task=20)
    assert set(found.figures(0.0).values()) == {1.0}
    assert found.precision_recall(0.0)[0] == 1.0
    assert "goose" in found.rude_words
    assert json.dumps(found.curve())


def test_an_aligner_that_copies_keeps_everything() -> None:
    copying = scripted_aligner(lambda question, prefix, sentence: sentence)
    figures = evaluate(copying, data_folder(), rows_a_task=5).figures(0.0)
    assert {name for name, share in figures.items() if share == 1.0} == {
        n for n in TARGETS if n.endswith("kept")
    }
    assert {share for name, share in figures.items() if not name.endswith("kept")} == {0.0}


def test_safeguards_count_as_a_reader_sees_them() -> None:
    """What a safeguard puts back is kept, though the model wished to change it."""
    drifting = scripted_aligner(
        lambda question, prefix, sentence: "Wholly other words stand here.", safeguards="keep_original"
    )
    found = evaluate(drifting, data_folder(), rows_a_task=3)
    assert found.figures(0.0)["ordinary sentences kept"] == 1.0
    assert any(o.refused and o.score > 0 for o in found.outcomes)


def test_every_outcome_is_a_held_out_row() -> None:
    found = evaluate(scripted_aligner(mend), data_folder(), rows_a_task=4)
    held_out = [row for row in load_rows(data_folder()) if row.dev]
    assert all(o.row in held_out for o in found.outcomes)
    assert set(found.counts()) == {row.task for row in held_out}


def test_a_model_without_a_keep_token_is_refused() -> None:
    aligner: Aligner = scripted_aligner(lambda question, prefix, sentence: sentence, granularity="answer")
    with pytest.raises(ValueError, match="keep token"):
        evaluate(aligner, data_folder())
