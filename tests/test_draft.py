from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner_integrations.backends.base import Ids
from aligner_integrations.draft import Alignment, common_start, look_up, next_draft_length, propose

END = 99
TOKENS = st.lists(st.integers(0, 5), max_size=25)


def align(reference: Ids, written: Ids) -> Alignment:
    alignment = Alignment(reference, end=END)
    for token in written:
        alignment.push(token)
    return alignment


@given(TOKENS)
def test_a_copy_is_foretold_to_its_end(reference: Ids) -> None:
    alignment = Alignment(reference, end=END)
    for place, token in enumerate([*reference, END]):
        assert alignment.ahead(100) == [*reference[place:], END]
        assert alignment.next() == token
        alignment.push(token)
        assert not alignment.lost
    assert alignment.next() is None
    assert alignment.ahead(3) == []


@pytest.mark.parametrize(
    ("edit", "written", "foretold"),
    [
        ("one token substituted", [10, 11, 12, 50], [14, 15]),
        ("four tokens substituted", [10, 11, 12, 50, 51, 52, 53], [17, 18]),
        ("three tokens became one", [10, 11, 12, 50, 16], [17, 18]),
        ("one token became three", [10, 11, 12, 50, 51, 52, 14], [15, 16]),
        ("inserted", [10, 11, 12, 50, 13], [14, 15]),
        ("two inserted", [10, 11, 12, 50, 51, 13], [14, 15]),
        ("deleted", [10, 11, 12, 16], [17, 18]),
        ("deleted to the end", [10, 11, 12, 19], [END]),
        ("start deleted", [13], [14, 15]),
        ("start inserted", [50, 10], [11, 12]),
        ("moved back", [15, 16, 17, 10, 11], [12, 13]),
    ],
)
def test_the_place_is_found_after(edit: str, written: Ids, foretold: Ids) -> None:
    assert align(list(range(10, 20)), written).ahead(len(foretold)) == foretold


def test_of_places_that_look_alike_the_nearest_is_taken_until_the_text_says_otherwise() -> None:
    #            0  1  2  3  4  5  6  7  8  9 10 11 12
    reference = [1, 2, 3, 4, 9, 5, 6, 7, 2, 3, 8, 9, 1]
    assert align(reference, [1, 2, 3, 9]).ahead(2) == [5, 6]
    assert align(reference, [1, 2, 3, 4, 9, 5, 2, 3]).ahead(2) == [8, 9]
    assert align(reference, [1, 2, 3, 8, 9]).ahead(1) == [1]


@given(TOKENS, TOKENS, st.integers(0, 30))
def test_what_is_foretold_comes_from_the_reference(reference: Ids, written: Ids, count: int) -> None:
    alignment = align(reference, written)
    ahead = alignment.ahead(count)
    assert len(ahead) <= count
    assert "".join(map(chr, ahead)) in "".join(map(chr, [*reference, END]))
    assert ahead[:1] == [alignment.next()][: len(ahead)]


@given(TOKENS, TOKENS)
def test_accepting_what_is_foretold_never_changes_what_comes_after(reference: Ids, written: Ids) -> None:
    # Without this, drafts of different lengths would make a margin favour different tokens.
    alignment = align(reference, written)
    ahead = alignment.ahead(100)
    for place, token in enumerate(ahead):
        assert alignment.ahead(100) == ahead[place:]
        alignment.push(token)


def test_an_alignment_is_lost_after_a_few_misses_and_found_by_a_hit() -> None:
    reference = list(range(10, 20))
    alignment = align(reference, [10, 50, 51, 52, 53])
    assert alignment.lost
    assert propose(alignment, prompt=[], output=[10, 50, 51, 52, 53], count=9) == alignment.ahead(2)
    assert propose(alignment, prompt=[52, 53, 54, 55], output=[10, 50, 51, 52, 53], count=9) == [54, 55]
    alignment.push(15)
    alignment.push(16)
    assert not alignment.lost
    assert propose(alignment, prompt=[], output=[15, 16], count=9) == [17, 18, 19, END]


def slow_look_up(texts: list[Ids], output: Ids, count: int) -> Ids:
    for size in (4, 3, 2):
        for text in (output, *texts):
            for place in range(len(text) - 1, size - 1, -1):
                if size <= len(output) and text[place - size : place] == output[-size:]:
                    return text[place : place + count]
    return []


@given(st.lists(TOKENS, max_size=2), TOKENS, st.integers(1, 5))
def test_look_up_takes_the_longest_end_that_occurred_before(
    texts: list[Ids], output: Ids, count: int
) -> None:
    assert look_up(texts, output, count) == slow_look_up(texts, output, count)


@given(st.integers(0, 64), st.integers(1, 64), st.integers(0, 64), st.integers(0, 64))
def test_drafts_grow_with_success_and_shrink_with_rejection(
    length: int, longest: int, drafted: int, accepted: int
) -> None:
    length, accepted = min(length, longest), min(accepted, drafted)
    after = next_draft_length(length, drafted=drafted, accepted=accepted, longest=longest)
    assert 1 <= after <= longest
    if accepted == drafted:
        assert after >= length
        assert after >= min(longest, 2 * drafted)
    elif length >= 16 and 2 * accepted < length:
        assert after < length


@given(TOKENS, TOKENS, TOKENS)
def test_common_start(shared: Ids, left: Ids, right: Ids) -> None:
    left, right = shared + left, shared + right
    length = common_start(left, right)
    assert left[:length] == right[:length]
    assert length in (len(left), len(right)) or left[length] != right[length]
