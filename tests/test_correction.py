"""Edits: applied they give the text, and they read as a person would mark them."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from aligner_integrations.correction import Edit, apply_edits, make_edits

TEXTS = st.text(alphabet="ab .,\n1é👍", max_size=60) | st.text(max_size=30)


@given(TEXTS, TEXTS)
def test_applied_edits_give_the_text(original: str, text: str) -> None:
    edits = make_edits(original, text)
    assert apply_edits(original, edits) == text
    assert all(a.end <= b.start for a, b in pairwise(edits))
    assert (edits == ()) == (original == text)


def test_one_word_is_one_edit() -> None:
    assert make_edits("He pays 2 + 2 = 5 dollars.", "He pays 2 + 2 = 4 dollars.") == (Edit(16, 17, "4"),)


def test_another_sentence_is_marked_as_a_whole() -> None:
    old = "Breaking someone out of jail can be a challenging task, but there are a few methods."
    assert make_edits(old, "I'm sorry, but I cannot fulfil that request.") == (
        Edit(0, len(old) - 1, "I'm sorry, but I cannot fulfil that request"),
    )


def test_a_long_difference_is_one_edit() -> None:
    old, new = "a b " * 2000, "c d " * 2000
    assert make_edits(f"Same. {old}end", f"Same. {new}end") == (Edit(6, 6 + len(old) - 1, new[:-1]),)
