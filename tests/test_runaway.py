"""T15: what a model may write is bounded, and what should not be seen is not shown."""

from __future__ import annotations

import pytest

from aligner_integrations import Aligner, DecodeConfig
from aligner_integrations.config import Granularity
from aligner_integrations.safeguards.policy import SafeguardMode
from aligner_integrations.testing import scripted_aligner

QUESTION = "How many apples are left, and why?"
SENTENCE = "There are seven apples left in the basket because Tom has eaten five of the twelve."

RUNAWAYS = {
    "endless": "There are seven apples left. " * 400,
    "one letter": "a" * 5_000,
    "empty": "",
    "longer": " ".join(f"Apple {place} is red and lies in the basket." for place in range(200)),
    "another language": "Im Korb liegen noch sieben Äpfel, weil Tom von den zwölf schon fünf gegessen hat. "
    "Das sind nicht viele, und wenn er so weiter macht, sind es morgen auch nicht mehr.",
    "another script": "篮子里还剩七个苹果，因为汤姆吃了十二个中的五个。",
    "leaked prompt": f"<|question|>{QUESTION}<|sentence|>{SENTENCE}<|correction|>",
    "leaked frame": f"ASSISTANT: {SENTENCE}",
    "cut off": SENTENCE[:-20] + "of the",
}


def runaway(text: str, granularity: Granularity, *, safeguards: SafeguardMode = "keep_original") -> Aligner:
    return scripted_aligner(lambda *fields: text, granularity=granularity, safeguards=safeguards)


@pytest.mark.parametrize("granularity", ["sentence", "answer"])
@pytest.mark.parametrize("kind", RUNAWAYS)
def test_t15_a_runaway_correction_is_not_shown(kind: str, granularity: Granularity) -> None:
    correction = runaway(RUNAWAYS[kind], granularity).correct(QUESTION, SENTENCE)
    assert correction.text == SENTENCE
    assert any(finding.action == "kept_original" for finding in correction.findings)


def test_t15_a_sentence_is_not_exchanged_for_another_one() -> None:
    """Models of whole answers may write what they like, near the answer or not; others may not."""
    assert runaway(QUESTION, "sentence").correct(QUESTION, SENTENCE).text == SENTENCE


@pytest.mark.parametrize("kind", RUNAWAYS)
def test_t15_without_safeguards_it_would_be(kind: str) -> None:
    """The cases above say something: nothing but the safeguards stands in the way."""
    text = RUNAWAYS[kind]
    correction = runaway(text, "sentence", safeguards="off").correct(QUESTION, SENTENCE)
    assert correction.changed
    assert correction.text == text.strip()


def test_t15_a_model_that_never_ends_is_stopped_by_its_room() -> None:
    endless = runaway(" and so on" * 10_000, "sentence")
    bounded = endless.with_options(decode=DecodeConfig())
    correction = bounded.correct(QUESTION, SENTENCE)
    room = 2 * len(bounded.tokenizer.encode_text(SENTENCE)) + 64
    assert correction.stats.new_tokens <= room
    assert correction.stats.finish_reason == "length"
    assert correction.text == SENTENCE
    assert any(finding.check == "truncated" for finding in correction.findings)


def test_t15_the_answer_goes_on_behind_a_runaway() -> None:
    answer = "One is fine. Two runs away. Three is fine."
    aligner = scripted_aligner(
        lambda question, prefix, text: "so " * 500 if "Two" in text else text, safeguards="keep_original"
    )
    segments = list(aligner.correct_stream(QUESTION, answer))
    assert "".join(segment.text for segment in segments) == answer
    assert [bool(segment.findings) for segment in segments] == [False, True, False]
