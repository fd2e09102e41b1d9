"""What is known of how models go on from a text, and what an answer repeats of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner_integrations.continuation import Repetition, claude_goes_on

SHOWN = "Bears eat berries. They sleep in winter. It is cold. "


def new_of(shown: str, answer: str, size: int) -> str:
    repetition = Repetition(shown)
    parts = [repetition.feed(answer[at : at + size]) for at in range(0, len(answer), size)]
    return "".join(parts) + repetition.end()


@pytest.mark.parametrize("size", [1, 4, 400])
@pytest.mark.parametrize(
    ("answer", "new"),
    [
        ("So they rest.", "So they rest."),
        (" So they rest.", " So they rest."),
        ("It is cold. So they rest.", " So they rest."),
        (f"{SHOWN}So they rest.", " So they rest."),
        ("They sleep in winter. It is cold.", ""),
        ("\n\nsleep in winter. It is cold. So.", " So."),
        # These are no repetitions of the end.
        ("They sleep in winter. So they rest.", "They sleep in winter. So they rest."),
        ("cold. So they rest.", "cold. So they rest."),  # too short to tell
        ("It is cold", "It is cold"),
        ("inter. It is cold. So.", "inter. It is cold. So."),  # within a word
        ("", ""),
    ],
)
def test_what_is_repeated_is_removed(answer: str, new: str, size: int) -> None:
    assert new_of(SHOWN, answer, size) == new


def test_a_short_text_is_repeated_as_a_whole() -> None:
    assert new_of("No. ", "No. Yes.", 1) == " Yes."
    assert new_of("很好。", "很好。还没有！", 1) == "还没有！"
    assert new_of("", "Yes.", 1) == "Yes."


@given(shown=st.text(max_size=60), answer=st.text(max_size=60), size=st.integers(1, 70))
def test_what_is_removed_is_the_end_of_the_shown_text(shown: str, answer: str, size: int) -> None:
    new = new_of(shown, answer, size)
    assert answer.endswith(new) and new == new_of(shown, answer, 1)
    removed = answer[: len(answer) - len(new)].strip()
    assert shown.strip().endswith(removed)


@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("claude-2.1", True),
        ("claude-3-5-sonnet-latest", True),
        ("claude-opus-4-20250514", True),
        ("claude-sonnet-4-5-20250929", True),
        ("claude-haiku-4-5", True),
        ("claude-opus-4-6", False),
        ("claude-sonnet-4-6-20260217", False),
        ("claude-opus-4-10", False),
        ("claude-opus-5", False),
        ("", False),
    ],
)
def test_which_claude_models_go_on(name: str, does: bool) -> None:
    assert claude_goes_on(name) is does
