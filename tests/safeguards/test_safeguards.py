"""Do no harm: what may be shown in place of an answer, and what may not."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner_integrations.correction import Finding
from aligner_integrations.safeguards import (
    SafeguardPolicy,
    inspect_correction,
    is_kept,
    is_refusal,
    restore_citations,
    word_similarity,
)
from aligner_integrations.testing import scripted_aligner

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


# --- citations


@pytest.mark.parametrize(
    ("original", "proposed", "restored"),
    [
        ("It is 7 [1].", "It is 8.", "It is 8 [1]."),
        ("It is 7[1].", "It is 8.", "It is 8[1]."),
        ("It is 7. [1]", "It is 8.", "It is 8. [1]"),
        ("It is 7.[1]", "It is 8.", "It is 8.[1]"),
        ("It is 7.[1][2]", "It is 8.", "It is 8.[1][2]"),
        ("It is 7. [1] [2]", "It is 8. [1]", "It is 8. [1] [2]"),
        ("It is 7 [1][2].", "It is 8 [1].", "It is 8 [1][2]."),
        ("It is 7 [1]", "It is 8", "It is 8 [1]"),
        ("As Smith [1] says, it is 7 [2, 3].", "It is 8.", "It is 8 [1] [2, 3]."),
        ("It is 7 [1-3] or 8 [4–6]?!", "Is it 7?!", "Is it 7 [1-3] [4–6]?!"),
        ("It is 7 [^1] [^note].", "It is 8.", "It is 8 [^1] [^note]."),
        ("It is 7 [1](https://a.b/c_(d)).", "It is 8.", "It is 8 [1](https://a.b/c_(d))."),
        ('It is 7 [1](u "A title").', "It is 8.", 'It is 8 [1](u "A title").'),
        ('He said "it is 7." [1]', 'He said "it is 8."', 'He said "it is 8." [1]'),
        ('He said "it is 7 [1]."', 'He said "it is 8."', 'He said "it is 8 [1]."'),
        ("**It is 7 [1].**", "**It is 8.**", "**It is 8 [1].**"),
        ("结果是七[1]。", "结果是八。", "结果是八[1]。"),
        ("The causes [1]:", "The cause:", "The cause [1]:"),
        ("[1] [2] The sum is 7.", "The sum is 8.", "[1] [2] The sum is 8."),
        ("It is 7 [1] and 7 [1].", "It is 8 [1].", "It is 8 [1] [1]."),
    ],
)
def test_a_lost_citation_is_put_back_where_it_stood(original: str, proposed: str, restored: str) -> None:
    assert restore_citations(original, proposed) == restored
    assert restore_citations(original, restored) == restored


@pytest.mark.parametrize(
    ("original", "proposed"),
    [
        ("It is 7 [1].", ""),
        ("It is 7 [1].", " \n"),
        ("It is 7 [1].", "I'm sorry, but I can't help with that."),
        ("It is 7 [1].", "It is 8 [1]."),
        ("It is 7.", "It is 8 [1]."),  # what the model made up is another matter
        ("Write `a[1]`.", "Write it."),
        ("It lies in [0, 1].", "It lies there."),
        ("- [x] Done [ ] [a] [12345].", "Done."),
    ],
)
def test_nothing_is_put_back_where_nothing_was_lost(original: str, proposed: str) -> None:
    assert restore_citations(original, proposed) == proposed


MARKS = ("[1]", "[2]", "[2, 3]", "[1-3]", "[^1]", "[1](https://a.b/c_(d)?e=f)", "[12]")
WORDS = st.sampled_from(["It is 7", "so", ".", ". ", "!", "?", '"', ")", "(", "*", " ", "\n", "。", ":", "é"])
MARKED = st.lists(st.one_of(WORDS, st.sampled_from(MARKS)), max_size=10)


def count_marks(text: str) -> dict[str, int]:
    """How often each mark is in a text; "[1]" with its link is not also "[1]"."""
    counts = {}
    for mark in sorted(MARKS, key=len, reverse=True):
        counts[mark] = text.count(mark)
        text = text.replace(mark, "_")
    return counts


@given(original=MARKED, words=st.lists(WORDS, max_size=8), kept=st.integers(0, 10))
def test_every_mark_of_the_original_is_in_what_is_shown(
    original: list[str], words: list[str], kept: int
) -> None:
    marks = [part for part in original if part in MARKS]
    # The proposal keeps some of the marks, between other words.
    proposed = "".join(
        itertools.chain.from_iterable(itertools.zip_longest(words, marks[:kept], fillvalue=" "))
    )
    text = "".join(original)
    restored = restore_citations(text, proposed)
    if not marks or not proposed.strip():
        assert restored == proposed
        return
    found = count_marks(restored)
    assert all(found[mark] >= count for mark, count in count_marks(text).items())
    # Nothing but marks was added, and nothing was taken away.
    left = iter(restored)
    assert all(char in left for char in proposed)
    assert restore_citations(text, restored) == restored


@given(original=st.text(), proposed=st.text())
def test_text_without_marks_stays_as_it_is(original: str, proposed: str) -> None:
    if "]" not in original:
        assert restore_citations(original, proposed) == proposed
    restore_citations(original + "[1]", proposed)


@pytest.mark.parametrize(
    "unit", ["[1]", "[1](", "[1](a", "[1](a(b)", "`", "`[1]", "[1,", "[^a", ". ", '."', "[1] a"]
)
def test_citations_are_looked_for_in_linear_time(unit: str) -> None:
    """Backtracking would hang here."""
    restore_citations(unit * 20_000, unit * 10_000 + "b.")
    restore_citations(unit * 20_000, "b.")


def test_a_stream_keeps_its_citations() -> None:
    def rule(question: str, prefix: str, sentence: str) -> str:
        return {
            "It is 6 x 7 = 41 [1].": "It is 6 x 7 = 42.",
            "Drink it [2].": "I'm sorry, but I can't help with that.",
            "Then some more [3].": "",
        }.get(sentence, sentence)

    aligner = scripted_aligner(rule, safeguards="keep_original")
    answer = "It is 6 x 7 = 41 [1]. So it is [2]. Drink it [2]. Then some more [3]. "
    with aligner.stream("How much?") as stream:
        segments = [*stream.push(answer), *stream.close()]
    assert [segment.text for segment in segments] == [
        "It is 6 x 7 = 42 [1]. ",
        "So it is [2]. ",
        "I'm sorry, but I can't help with that. ",
        "",
    ]
    findings = [finding for segment in segments for finding in segment.findings]
    assert [(finding.check, finding.action) for finding in findings] == [("citations_lost", "repaired")]
    correction = aligner.correct("How much?", "It is 6 x 7 = 41 [1].")
    assert (correction.text, correction.proposed) == ("It is 6 x 7 = 42 [1].", "It is 6 x 7 = 42.")
    free = aligner.with_options(safeguards="off").correct("How much?", "It is 6 x 7 = 41 [1].")
    assert (free.text, free.findings) == ("It is 6 x 7 = 42.", ())


def test_citations_do_not_make_a_refused_proposal_fit() -> None:
    aligner = scripted_aligner(lambda q, p, s: "Bananas grow in warm places.", safeguards="keep_original")
    correction = aligner.correct("Q", "Then run away [1].")
    assert correction.text == "Then run away [1]."
    assert {finding.check for finding in correction.findings} == {"drift"}
