from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from aligner_integrations.evaluation.replay import Triple, best_copy, count, looked_up, run_replay

EOS = 1
ANSWER = list(range(10, 60))


def test_an_unchanged_answer_takes_one_forward() -> None:
    counts = count("", [Triple([5, *ANSWER], ANSWER, ANSWER)] * 3, EOS)
    assert (counts.rows, counts.unchanged, counts.tokens, counts.forwards, counts.drafted) == (
        3,
        3,
        153,
        3,
        150,
    )
    assert counts.tokens_per_forward == 51.0
    assert counts.drafted_per_token == pytest.approx(150 / 153)
    assert counts.best_copy_tokens_per_forward == 51.0
    # Its first forward has nothing to look up, and each of the next writes ten tokens and one more.
    assert counts.lookup_tokens_per_forward == pytest.approx(51 / 6)


def test_the_best_copy_is_the_longest_stretch_each_time() -> None:
    assert best_copy(Triple([], ANSWER, [10, 11, 90, 12, 13, 14, 91, *ANSWER[20:]]), EOS) == 3
    assert best_copy(Triple([], ANSWER, [90, 91, 92]), EOS) == 4
    assert best_copy(Triple([], [], []), EOS) == 1


def test_prompt_lookup_is_never_better_than_what_it_could_copy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        prompt, correction = (rng.integers(10, 14, size=30).tolist() for _ in range(2))
        taken = looked_up(Triple(prompt, prompt, correction), EOS)
        assert len(correction) / 11 <= taken <= len(correction) + 1


def write(data: Path, source: str, rows: list[dict[str, str]]) -> None:
    path = data / source / f"{Path(source).name}.jsonl.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_data_folder_is_replayed(tmp_path: Path) -> None:
    texts = [f"The answer to question {number} is {number * 7}, I think." for number in range(12)]
    old, new = "The sky is geen.", "The sky is green."
    write(
        tmp_path,
        "noncommercial/alpaca_eval_aligner2b",
        [
            {"question": "Why?", "answer": t, "correction": t, "upstream": "gpt-4-turbo-2024-04-09"}
            for t in texts
        ],
    )
    row = {"question": "Which colour?", "prefix": "", "last_sentence": old, "correction": new}
    for source in ("gsm8k_steps", "paradetox", "mrben_steps"):
        write(tmp_path, source, [row] * 10)
    with pytest.raises(ValueError, match=r"data: .*prmbench_steps\.jsonl\.gz does not exist"):
        run_replay(tmp_path)
    write(tmp_path, "prmbench_steps", [row] * 10)
    report = run_replay(tmp_path, rows_a_source=5)
    found = {each.source: each for each in report.sources}
    answers = found["gpt-4-turbo-2024-04-09"]
    assert (answers.rows, answers.unchanged, answers.forwards, answers.goal) == (12, 12, 12, 1.7)
    assert found["gsm8k_steps"].rows == 5
    assert found["gsm8k_steps"].unchanged == 0
    assert 1 < found["gsm8k_steps"].tokens_per_forward < found["gsm8k_steps"].tokens / 5
    assert report.to_dict()["sources"][0]["rows"] == 12
    assert report.shown()["tokens per forward"]["gsm8k_steps"].endswith(
        f"best copy of the answer {found['gsm8k_steps'].best_copy_tokens_per_forward:.2f}"
    )
    assert run_replay(tmp_path, rows_a_source=5) == report
