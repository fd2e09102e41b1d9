from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner_integrations.backends.base import Ids
from aligner_integrations.draft import ON_ACCELERATOR, ON_CPU, Alignment, Drafter, common_start

END = 99
TOKENS = st.lists(st.integers(0, 5), max_size=25)
MANY = 100


def align(reference: Ids, written: Ids) -> Alignment:
    alignment = Alignment(reference, end=END)
    for token in written:
        alignment.push(token)
    return alignment


def ahead(alignment: Alignment) -> Ids:
    return alignment.reference[alignment.place :]


def draft(prompt: Ids, reference: Ids, written: Ids, count: int = MANY) -> Ids:
    return Drafter(align(reference, written), prompt, end=END, cost=ON_ACCELERATOR).propose(written, count)


@given(TOKENS)
def test_a_copy_is_foretold_to_its_end(reference: Ids) -> None:
    alignment = Alignment(reference, end=END)
    for place, token in enumerate([*reference, END]):
        assert ahead(alignment) == [*reference[place:], END]
        assert alignment.next() == token
        credit = alignment.credit
        alignment.push(token)
        assert alignment.credit == min(16, credit + 1)
    assert alignment.next() is None
    assert ahead(alignment) == []


@pytest.mark.parametrize(
    ("edit", "written", "foretold"),
    [
        ("one token substituted", [10, 11, 12, 50], [14, 15]),
        ("four tokens substituted", [10, 11, 12, 50, 51, 52, 53], [17, 18]),
        ("three tokens became one", [10, 11, 12, 50, 16], [17, 18]),
        ("one token became three", [10, 11, 12, 50, 51, 52, 14, 15], [16, 17]),
        ("inserted", [10, 11, 12, 50, 13], [14, 15]),
        ("two inserted", [10, 11, 12, 50, 51, 13, 14], [15, 16]),
        ("deleted", [10, 11, 12, 16], [17, 18]),
        ("deleted to the end", [10, 11, 12, 18, 19], [END]),
        ("start deleted", [13], [14, 15]),
        ("start inserted", [50, 10], [11, 12]),
        ("moved back", [15, 16, 17, 10, 11, 12], [13, 14]),
    ],
)
def test_the_place_is_found_after(edit: str, written: Ids, foretold: Ids) -> None:
    assert ahead(align(list(range(10, 20)), written))[: len(foretold)] == foretold


def test_of_places_that_look_alike_the_nearest_is_taken_until_the_text_says_otherwise() -> None:
    #            0  1  2  3  4  5  6  7  8  9 10 11 12
    reference = [1, 2, 3, 4, 9, 5, 6, 7, 2, 3, 8, 9, 1]
    assert ahead(align(reference, [1, 2, 3, 9, 5]))[:2] == [6, 7]
    assert ahead(align(reference, [1, 2, 3, 4, 9, 5, 2, 3]))[:2] == [8, 9]
    assert ahead(align(reference, [1, 2, 3, 8, 9, 1])) == [END]


@given(TOKENS, TOKENS)
def test_accepting_what_is_foretold_never_changes_what_comes_after(reference: Ids, written: Ids) -> None:
    # Without this, drafts of different lengths would make a margin favour different tokens.
    alignment = align(reference, written)
    foretold = ahead(alignment)
    for place, token in enumerate(foretold):
        assert ahead(alignment) == foretold[place:]
        alignment.push(token)


def test_the_reference_is_drafted_as_long_as_it_is_copied() -> None:
    reference = list(range(10, 60))
    assert draft([], reference, [10, 11])[:48] == reference[2:]
    assert draft([], reference, [10, 11], 7) == reference[2:9]
    # One substitution, and it goes on behind it; after some more there is little reason to.
    assert draft([], reference, [10, 11, 12, 13, 90, 15])[:44] == reference[6:]
    assert not set(draft([], reference, [90, 91, 92, 93, 94])) & set(reference)


def test_what_followed_the_same_tokens_before_is_drafted_when_the_reference_is_lost() -> None:
    lost = [90, 91, 92, 93]
    assert draft([5, 92, 93, 70, 71, 72], [10, 11, 12], lost)[:3] == [70, 71, 72]
    # The longest context wins over the most frequent one, and of equals the last.
    assert draft([91, 92, 93, 70, 93, 71, 93, 71], [10], lost)[0] == 70
    assert draft([93, 70, 6, 93, 71], [10], lost)[0] == 71
    # The output itself counts as well.
    assert draft([], [10], [80, 81, 82, 83, 84, 80, 81])[:3] == [82, 83, 84]
    # A token that was never seen: the one that follows the most different ones.
    assert draft([1, 7, 2, 7, 3, 7, 1, 4], [10], lost) == [7]


def test_the_end_is_never_drafted() -> None:
    assert END not in draft([], [10, 11], [10, 11])
    assert END not in draft([11, END, 5, END, 6, END, 7, END], [10, 11], [10, 11])
    # What is behind it would be reached only if the text goes on after all.
    assert draft([11, 12, 13], [10, 11], [10, 11])[:1] == [12]


def test_where_tokens_cost_less_likely_ones_are_left_out() -> None:
    prompt, lost = [5, 92, 93, 70, 6, 93, 71, 7], [90, 91, 92, 93]
    on_cpu = Drafter(align([10], lost), prompt, end=END, cost=ON_CPU).propose(lost, MANY)
    assert on_cpu == draft(prompt, [10], lost)[: len(on_cpu)]
    assert 0 < len(on_cpu) < len(draft(prompt, [10], lost))
    # A guess without grounds is worth a token that is free, and none that is not.
    assert len(draft([1, 2], [10], lost)) == 1
    assert Drafter(align([10], lost), [1, 2], end=END, cost=ON_CPU).propose(lost, MANY) == []


def test_guesses_that_keep_failing_are_given_up() -> None:
    prompt = [1, 7, 2, 7, 3, 7, 1, 4]
    drafter = Drafter(align([10], [90, 91]), prompt, end=END, cost=ON_ACCELERATOR)
    written = [90, 91]
    drafts = []
    for token in range(200, 300):
        drafts.append(drafter.propose(written, 8))
        written.append(token)
    assert drafts[0] == [7]
    assert drafts[-1] == []
    assert sum(map(len, drafts)) < 60


@given(TOKENS, TOKENS, st.lists(TOKENS, max_size=4), st.integers(0, 8))
def test_a_draft_is_never_too_long_and_holds_known_tokens_alone(
    prompt: Ids, reference: Ids, grown: list[Ids], count: int
) -> None:
    """However much the output grows between two calls."""
    alignment = Alignment(reference, end=END)
    drafter = Drafter(alignment, prompt, end=END, cost=ON_ACCELERATOR)
    output: Ids = []
    for more in grown:
        for token in more:
            output.append(token)
            alignment.push(token)
        found = drafter.propose(output, count)
        assert len(found) <= count
        assert set(found) <= {*prompt, *reference, *output}


@given(TOKENS, TOKENS, TOKENS)
def test_common_start(shared: Ids, left: Ids, right: Ids) -> None:
    left, right = shared + left, shared + right
    length = common_start(left, right)
    assert left[:length] == right[:length]
    assert length in (len(left), len(right)) or left[length] != right[length]
