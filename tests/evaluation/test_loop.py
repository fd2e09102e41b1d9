"""What a closed loop asks for: by hand on a small answer, and by the goal on many made-up ones."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aligner_integrations.cli import app
from aligner_integrations.evaluation.loop import (
    WAYS,
    Course,
    Pace,
    closed_loop,
    cut,
    draw_changes,
    one_by_one,
    open_loop,
    reference,
    run_loop,
    whole_answer,
)
from aligner_integrations.sentences import Piece

ANSWER = cut("One two three. Four five six. Seven.")
KEPT, CHANGED = [False] * 3, [True, False, False]
PACE = Pace(correction=20, start=10, read_ahead=32)


def made_up(count: int, sentences: int = 12) -> list[list[Piece]]:
    """Answers of sentences with 8 to 26 words."""
    draw = random.Random(7)
    words = ["bears", "eat", "berries", "in", "the", "old", "wood", "and", "sleep", "there"]

    def sentence() -> str:
        said = " ".join(draw.choices(words, k=draw.randint(8, 26)))
        return f"{said[0].upper()}{said[1:]}. "

    return [cut("".join(sentence() for _ in range(sentences)).strip()) for _ in range(count)]


def times(course: Course) -> tuple[int, int, int | None, int]:
    return course.requested, course.rounds, course.first, course.waited


def test_the_times_of_a_small_answer() -> None:
    # The first sentence is known to have ended with the fourth token; the rest is there when it is corrected.
    assert times(open_loop(ANSWER, KEPT, PACE)) == (7, 1, 34, 34 + (20 - 3) + (20 - 3))
    assert times(closed_loop(ANSWER, KEPT, PACE)) == times(open_loop(ANSWER, KEPT, PACE))
    # All seven were written while the first was corrected; four are asked for again.
    assert times(closed_loop(ANSWER, CHANGED, PACE)) == (7 + 4, 2, 34, 34 + (34 - 4) + (20 - 3))
    assert times(one_by_one(ANSWER, KEPT, PACE)) == (7, 3, 33, 33 + (33 - 3) + (31 - 3))
    assert times(reference(ANSWER, KEPT, PACE)) == (7 + 4 + 1, 3, 37, 37 + (34 - 3) + (31 - 3))
    assert times(whole_answer(ANSWER, KEPT, PACE)) == (7, 1, 37, 37 + (20 - 3) + (20 - 3))


def test_no_more_is_written_than_there_is_room_for() -> None:
    pace = Pace(correction=20, start=10, read_ahead=2)
    assert closed_loop(ANSWER, CHANGED, pace).requested == (4 + 2) + 4


def all_of(way: str, texts: Sequence[list[Piece]], share: float) -> list[Course]:
    return [
        WAYS[way](pieces, draw_changes(pieces, share, number), PACE) for number, pieces in enumerate(texts)
    ]


def test_at_most_1_3_tokens_are_requested_for_one_that_is_shown() -> None:
    """One sentence in ten changes, and upstream writes a sentence while one is corrected."""
    texts = made_up(120)
    courses = all_of("closed loop", texts, 0.1)
    assert sum(course.rounds - 1 for course in courses) > 100
    requested, shown = (sum(getattr(each, name) for each in courses) for name in ("requested", "shown"))
    assert requested <= 1.3 * shown
    # The scripts ask for about half their rounds times the length.
    scripts = all_of("Stream Aligner's scripts", texts, 0.1)
    assert sum(each.requested for each in scripts) > 6 * sum(each.shown for each in scripts)
    assert sum(each.waited for each in courses) < sum(each.waited for each in scripts) / 5
    whole = all_of("whole answer", texts, 0.1)
    assert sum(each.first or 0 for each in courses) < sum(each.first or 0 for each in whole) / 3


def test_all_ways_show_the_same_amount() -> None:
    texts = made_up(20)
    for share in (0.0, 0.3):
        shown = {way: [course.shown for course in all_of(way, texts, share)] for way in WAYS}
        assert len({tuple(each) for each in shown.values()}) == 1
    assert [times(each) for each in all_of("closed loop", texts, 0.0)] == [
        times(each) for each in all_of("open loop", texts, 0.0)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "noncommercial" / "alpaca_eval_aligner2b"
    folder.mkdir(parents=True)
    with gzip.open(folder / "alpaca_eval_aligner2b.jsonl.gz", "wt", encoding="utf-8") as file:
        for pieces in made_up(9, sentences=4):
            file.write(json.dumps({"answer": "".join(pieces)}) + "\n")
    return tmp_path


def test_the_report_is_of_every_way_and_share(data: Path) -> None:
    report = run_loop(data, answers=3)
    assert [(cost.way, cost.share) for cost in report.costs] == [
        (way, share) for share in (0.0, 0.1, 0.3) for way in WAYS
    ]
    assert report.setting["answers"] == 3 and report.setting["sentences per answer"] == 4
    assert report.costs[0].requested == 1.0
    assert "10% of the sentences change" in report.shown()
    with pytest.raises(ValueError, match="alpaca_eval_aligner2b"):
        run_loop(data / "noncommercial")


def test_the_command_shows_it(data: Path) -> None:
    run = CliRunner().invoke
    result = run(app, ["bench", "--loop", "--data", str(data), "--json"])
    assert result.exit_code == 0 and len(json.loads(result.stdout)["costs"]) == 3 * len(WAYS)
    assert "closed loop" in run(app, ["bench", "--loop", "--data", str(data)]).stdout
    assert run(app, ["bench", "--loop"]).exit_code == 2
    assert run(app, ["bench", "--loop", "--memory", "--data", str(data)]).exit_code == 2
