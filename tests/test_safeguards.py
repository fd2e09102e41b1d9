"""Do no harm: what may be shown in place of an answer, and what may not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner_integrations.correction import Finding
from aligner_integrations.safeguards import (
    SafeguardPolicy,
    inspect_correction,
    is_kept,
    is_refusal,
    word_similarity,
)

REFUSALS = [
    "I can't help with that.",
    "I’m sorry, but I can’t assist with that request.",
    "I'm really sorry, but I cannot provide instructions for that.",
    "Sorry, I won't help with that.",
    "I apologize, but that is not something I can do.",
    "I am not able to help with this.",
    "I'm unable to assist!",
    "I must decline.",
    "I will not write that.",
    "As an AI language model, I do not give such advice.",
    "It is not appropriate to joke about this.",
    "It's illegal to do that.",
    "Unfortunately, I can't help you.",
]
NO_REFUSALS = [
    "",
    "I canceled the trip.",
    "Sorry seems to be the hardest word",
    "I'm sorry",
    "Unfortunately the weather is bad.",
    "This is not a problem at all.",
    "The shop cannot help with that.",
    "I can't help " * 3 + "with that.",
    "I can't help with th\ufffd.",
    "I can't help with that, " + "and this is a long story of " * 1 + "one thing and another " * 20 + ".",
]
SENTENCE = "The sum of 12 and 30 is 43, so you have 43 apples."


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_known(text: str) -> None:
    assert is_refusal(text)
    assert inspect_correction("How?", "First, take the wire and cut it.", text) == ()


@pytest.mark.parametrize("text", NO_REFUSALS)
def test_what_is_no_clean_refusal(text: str) -> None:
    assert not is_refusal(text)


@pytest.mark.parametrize(
    "proposed",
    [
        SENTENCE.replace("43", "42"),
        "The sum of 12 and 30 is 42.",
        "So you have 42 apples: the sum of 12 and 30 is 42.",
    ],
)
def test_near_rewrites_pass(proposed: str) -> None:
    assert inspect_correction("How many?", SENTENCE, proposed) == ()


@pytest.mark.parametrize(
    ("proposed", "check"),
    [
        ("The patient was born in a small town near the river.", "drift"),
        ("", "empty"),
        (" \n", "empty"),
        (SENTENCE + "\ufffd", "broken_characters"),
        (SENTENCE + "\0", "broken_characters"),
        (SENTENCE + "<|keep|>", "template_marker"),
        (SENTENCE + " ASSISTANT: yes", "template_marker"),
        (SENTENCE + "</s>", "template_marker"),
        (SENTENCE + " apples apples apples apples", "repetition"),
        (SENTENCE + " and so on, and so on, and so on, and so on", "repetition"),
        (SENTENCE + " aaaaaaaaaaaaaa", "repetition"),
        (SENTENCE + " " + " ".join(f"word{number}" for number in range(60)), "length"),
    ],
)
def test_harm_is_found_by_name(proposed: str, check: str) -> None:
    findings = inspect_correction("How many?", SENTENCE, proposed)
    assert check in {finding.check for finding in findings}
    assert is_kept(findings)
    assert all(finding.action == "kept_original" for finding in findings)


@pytest.mark.parametrize(
    "text", ["Say <|keep|> and </s>.", "la la la la la", "a\ufffdb \0", "ASSISTANT: hi there."]
)
def test_what_the_answer_already_has_is_no_harm(text: str) -> None:
    assert inspect_correction("Q", text + " Thnak you.", text + " Thank you.") == ()


def test_the_policy_decides() -> None:
    other = "Something else was said by somebody at some time."
    assert is_kept(inspect_correction("Q", SENTENCE, other))
    free = SafeguardPolicy(min_similarity=0.0, max_changed_numbers=None)
    assert inspect_correction("Q", SENTENCE, other, policy=free) == ()
    assert inspect_correction("Q", SENTENCE, "", policy=SafeguardPolicy(allow_empty=True)) == ()
    named = SafeguardPolicy(special_tokens=frozenset({"[SEP]"}))
    assert is_kept(inspect_correction("Q", SENTENCE, SENTENCE + "[SEP]", policy=named))
    assert not is_kept((Finding("noted", "", "accepted"),))


def test_similarity_works_without_spaces_and_on_long_texts() -> None:
    assert word_similarity("我喜欢吃苹果。", "我喜欢吃梨。") > 0.6
    assert word_similarity("तुम मूर्ख हो", "तुम मूर्ख नहीं हो") > 0.6
    long = " ".join(f"word{number}" for number in range(5000))
    assert word_similarity(long, long + " more") > 0.99
    assert word_similarity(long, "other " * 5000) == 0.0
    assert word_similarity("...", "...") == 1.0
    assert word_similarity("...", "word") == 0.0


@given(text=st.text(), other=st.text())
def test_any_text_can_be_inspected_and_no_change_is_no_harm(text: str, other: str) -> None:
    assert inspect_correction("Q", text, text) == ()
    assert 0.0 <= word_similarity(text, other) <= 1.0
    for finding in inspect_correction("Q", text, other):
        assert finding.check
        assert finding.detail


@pytest.mark.parametrize("unit", ["a ", "ab, ", "x", "word other ", "a\n", "漢", "1 ", "'", "a'a"])
def test_hostile_repetition_is_inspected_in_linear_time(unit: str) -> None:
    """Backtracking would hang here."""
    text = unit * 20_000
    inspect_correction("Q", "A short answer.", text)
    inspect_correction("Q", text, text + "b")
    assert not is_refusal(text)


@pytest.mark.parametrize(
    ("answer", "proposed", "kept"),
    [
        ("They pay 4 x 15 = 65 dollars.", "They pay 4 x 15 = 60 dollars.", False),
        ("They pay 4 x 15 = 65 dollars.", "They pay 4 x 16 = 60 dollars.", True),
        ("They pay 4 x 15 = 65 dollars.", "They pay 4 x 15 = 65 dollars and 7 and 8 cents.", True),
        ("Pay 1,200.50 now, or 7 later.", "Pay 1,200.50 now, or 8 later.", False),
        ("Jim ran 16 / 2 = 8 miles for an hour.", "Jim ran 16 miles in 2 hours for an hour.", True),
        ("They pay 4 x 1 = 5 dollars.", "They pay 4 x 1 = 4 dollars.", False),
        ("In 1999, 2000 and 2001 it rained.", "I'm sorry, but I can't help with that.", False),
    ],
)
def test_more_than_one_other_number_or_a_lost_one_is_not_a_correction(
    answer: str, proposed: str, kept: bool
) -> None:
    findings = inspect_correction("", answer, proposed)
    assert any(finding.check == "numbers" for finding in findings) is kept
    free = inspect_correction("", answer, proposed, policy=SafeguardPolicy(max_changed_numbers=None))
    assert not any(finding.check == "numbers" for finding in free)
