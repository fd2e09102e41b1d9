"""What is measured on published corrections, on small made-up ones: the data itself need not be there."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import pytest

from aligner_integrations.cli import main
from aligner_integrations.evaluation.harm import (
    Label,
    Published,
    Share,
    looks_damaged,
    measure,
    read_labels,
    read_rows,
    run_harm,
    samples,
    wilson,
)

ANSWER = "The tides follow the moon. They rise twice a day, and the sun adds to them in spring."
OTHER = "Both the moon and the sun pull at the sea. Where the pull is strong the water is high."
CODE = "Run this:\n\n```python\nprint(1)\n```\n\nThat is all."


def row(name: str, correction: str, *, answer: str = ANSWER, question: str = "Why tides?") -> Published:
    return Published(name, question, answer, correction)


ROWS = [
    row("same", ANSWER),
    row("good", ANSWER.replace("follow", "obey")),
    row("marks", ANSWER.replace("moon. ", "moon。")),
    row("glued", ANSWER.replace("follow the", "followthe")),
    row("subtle", ANSWER.replace("moon", "mooon")),  # damaged, and nobody finds it
    row("code", CODE.replace("print(1)", "print(2)"), answer=CODE, question="How?"),
    row("other", OTHER, answer=OTHER, question="How?"),
]
LABELS = [
    Label("good", 1, "no", ""),
    Label("marks", 1, "yes", "fullwidth"),
    Label("glued", 2, "yes", "run together"),
    Label("subtle", 2, "yes", "misspelled"),
    Label("code", 2, "structure", "code altered"),
    Label("gone", 2, "yes", "a row that is not there"),
]


def test_the_automatic_definition_is_the_published_one() -> None:
    assert looks_damaged(row("", ANSWER + "。"))
    assert looks_damaged(row("", ANSWER + " thetidesrisetwiceadayandthe sun"))
    assert not looks_damaged(row("", ANSWER + "。", question="什么是潮汐?"))
    assert not looks_damaged(row("", ANSWER.replace("follow the", "followthe")))  # a floor


def test_shares_are_of_the_labels_they_name() -> None:
    report = measure(ROWS, LABELS)
    assert report.rows == {
        "published": 7,
        "changed": 5,
        "look damaged": 1,
        "rejected": 3,
        "labelled": 5,
        "swapped": report.rows["swapped"],
    }
    caught = {name: (share.hits, share.rows) for name, share in report.caught.items()}
    assert caught["labels, round 2, read last"] == (2, 3)
    assert caught["labels, all rounds"] == (3, 4)
    assert caught["labels, all rounds, visible damage alone"] == (2, 3)
    assert caught["all rows that look damaged"] == (1, 1)
    rejected = {name: (share.hits, share.rows) for name, share in report.rejected.items()}
    assert rejected["labels, round 2, read last"] == (0, 0)
    assert rejected["labels, all rounds"] == (0, 1)
    assert rejected["labels, all rounds, with changed structure that reads well"] == (1, 2)
    found = report.checks
    assert (found["words_run_together"].damaged, found["words_run_together"].published) == (1, 1)
    assert (found["code_changed"].structure, found["code_changed"].damaged) == (1, 0)
    assert (found["script_mixing"].damaged, found["script_mixing"].undamaged) == (1, 0)


def test_another_models_answer_counts_unless_it_is_damaged_itself() -> None:
    question = next(f"Q{n}" for n in range(9) if row("", "", question=f"Q{n}").is_held_back)
    rows = [
        row("a", ANSWER, question=question),
        row("b", OTHER, answer=OTHER, question=question),
        row("c", CODE, answer=CODE, question=question),
        row("d", "", answer="The 潮 rises, and the rest of the sea follows it.", question=question),
    ]
    report = measure(rows, [])
    assert report.rows["swapped"] == 9  # each of three answers in place of the three others
    assert report.rejected["another model's answer"].hits == 0
    # What takes the place of code cannot keep it.
    assert report.rejected["another model's answer, changed structure counted"].hits == 2
    assert report.checks["code_changed"].swapped == 2


def test_wilsons_interval() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(95, 100)
    assert (round(low, 3), round(high, 3)) == (0.888, 0.978)
    assert wilson(0, 164)[0] == 0.0
    assert math.isclose(wilson(0, 50)[1], 1 - wilson(50, 50)[0])
    assert str(Share.of([True, True, False, True])).startswith("3 of 4, 75.0% (95 %: ")


def test_labels_hold_ids_and_reasons_but_no_texts() -> None:
    labels = read_labels()
    assert len({label.id for label in labels}) == len(labels) == 490
    assert Counter(label.round for label in labels) == {1: 100, 2: 90, 3: 100, 4: 100, 5: 100}
    assert {label.damaged for label in labels} == {"yes", "structure", "no"}
    assert all(label.reason for label in labels if label.damaged != "no")
    assert max(len(label.reason) for label in labels) < 80


def test_rounds_draw_other_rows_each_time_and_the_same_every_time() -> None:
    rows = [row(f"r{n:04}", ANSWER + " More." * (n % 500), question=f"Q{n}") for n in range(1200)]
    drawn = samples(rows)
    assert drawn == samples(list(reversed(rows)))
    taken = [one.id for some in drawn for one in some]
    assert len(set(taken)) == len(taken) > 300
    assert all(one.is_held_back and one.is_changed for some in drawn for one in some)
    assert len(drawn) == 5 and len(drawn[-1]) == 100


def folder_with(rows: list[Published], folder: Path) -> Path:
    place = folder / "noncommercial" / "alpaca_eval_aligner2b"
    place.mkdir(parents=True)
    with gzip.open(place / "alpaca_eval_aligner2b.jsonl.gz", "wt", encoding="utf-8") as lines:
        for one in rows:
            record = {
                name: getattr(one, name) for name in ("id", "question", "answer", "correction", "upstream")
            }
            lines.write(json.dumps({**record, "corrector": "x"}) + "\n")
    return folder


def test_the_command_prints_every_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder_with(ROWS, tmp_path)
    assert read_rows(data) == ROWS
    assert main(["eval", "--harm", "--data", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "all rows that look damaged\t1 of 1, 100.0%" in shown
    assert "found by each check\twords_run_together\t" in shown
    assert main(["eval", "--harm", "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(run_harm(data).to_dict()))


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="alpaca_eval_aligner2b"):
        run_harm(tmp_path)
