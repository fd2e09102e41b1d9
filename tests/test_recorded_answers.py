"""Two hundred recorded answers, character by character: nothing is lost, nothing waits."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from aligner_integrations import Aligner
from aligner_integrations.testing import scripted_aligner

RECORDED = Path(__file__).parent / "data" / "recorded_answers.jsonl.gz"
# An end that nobody doubts: a whole word, its stop, a space, and a capitalised word with its end.
PLAIN_END = re.compile(r"(?<![\w.])[a-z]{4,}[.!?] [A-Z][a-z]+(?=[ ,])")


def rows() -> list[tuple[str, str]]:
    with gzip.open(RECORDED, "rt", encoding="utf-8") as lines:
        return [(row["question"], row["answer"]) for row in map(json.loads, lines)]


@pytest.fixture(scope="module")
def copying() -> Aligner:
    return scripted_aligner(lambda question, prefix, sentence: sentence)


def test_there_are_two_hundred() -> None:
    assert len(rows()) == 200


def test_text_is_shown_at_most_one_word_after_its_sentence(copying: Aligner) -> None:
    late: list[str] = []
    for question, answer in rows():
        stream, shown = copying.stream(question), ""
        for count, character in enumerate(answer, 1):
            for segment in stream.push(character):
                shown += segment.text
                waited = answer[len(shown) : count]
                if len(waited.split()) > 1:
                    late.append(f"{segment.text!r} waited for {waited!r}")
        assert shown + "".join(segment.text for segment in stream.close()) == answer
    assert late == []


def test_the_first_sentence_is_shown_once_the_next_word_is_there(copying: Aligner) -> None:
    checked = 0
    for question, answer in rows():
        end = PLAIN_END.search(answer)
        if end is None:
            continue
        checked += 1
        stream = copying.stream(question)
        shown = [segment.text for segment in stream.push(answer[: end.end()])]
        assert shown, answer[: end.end()]
    assert checked > 120
