"""The closed loop gives what the paper's sequential algorithm gives, and asks no more than it must."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aligner_integrations import Aligner
from aligner_integrations.closed_loop import MAX_RESTARTS, ClosedLoop
from aligner_integrations.correction import Segment
from aligner_integrations.errors import CorrectionFailedError
from aligner_integrations.sentences import Piece, split_margins
from aligner_integrations.testing import scripted_aligner
from aligner_integrations.testing.doubles import Rule
from tests.pieces import cut

QUESTION = "How is it?"
SENTENCES = (
    *(
        "It is bad.",
        "Nobody knows.",
        "Dr. No said so!",
        "Is it 3.50, i.e. cheap?",
        "很好。",
        "还没有！",
        "And 2 + 2 = 5.",
    ),
    *("`a. b.` is code.", "So it goes...", "He left the U.S.", "नमस्ते।", "Fine 🩺."),
)
GAPS = (" ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\n- ", " \n1. ", "\n> ")
LONGEST = 140

Write: TypeAlias = Callable[[str], str]


class Sequential(NamedTuple):
    """What an answer comes to, and how many of its sentences changed with more to come."""

    text: str
    changed: int


def writer(seed: int) -> Write:
    """An upstream: given what was said so far, it returns all that it says next.

    That hangs on what was said alone, and not on the white space in it: at a seam there may be other white
    space than it wrote itself.
    """

    def sentence_after(text: str) -> str:
        said = "".join(text.split())
        draw = random.Random(f"{seed}|{said}")
        if draw.random() < (0.1 if text else 0.02) or len(said) > LONGEST:
            return ""
        gaps = ("", *GAPS) if text.endswith(("。", "！")) else GAPS
        return (draw.choice(gaps) if text else draw.choice(("", "", "\n"))) + draw.choice(SENTENCES)

    def write(prefix: str) -> str:
        text = prefix
        while more := sentence_after(text):
            text += more
        return text.removeprefix(prefix)

    return write


def random_rule(seed: int, share: float = 0.3) -> Rule:
    """A rule that changes some sentences: into another one, into two, into nothing."""

    def rule(question: str, prefix: str, sentence: str) -> str:
        draw = random.Random(f"{seed}|{len(prefix)}|{sentence}")
        if draw.random() >= share:
            return sentence
        return draw.choice((f"Not so: {sentence}", "It is good.", "It is good. All is well.", "好。", ""))

    return rule


def sequential(write: Write, rule: Rule, *, restarts: int = MAX_RESTARTS) -> Sequential:
    """Stream Aligner's own algorithm: ask for the rest, cut its first sentence, correct, append, repeat.

    Where a sentence was dropped, to ask for what comes after the same text would give the same sentence: the
    rest stays what it is, until another one changes. So it does after `restarts` changes.
    """
    shown, changed, was_dropped = "", 0, False
    rest = cut([write("")])
    while rest:
        piece, *rest = rest
        text = corrected(rule, shown, piece)
        shown += text
        if not rest:
            break
        if text != piece:
            was_dropped = not text.strip()
            changed += not was_dropped
        if changed <= restarts and not was_dropped:
            rest = cut([joined(shown, write(shown.rstrip()))])
    return Sequential(shown, changed)


def joined(shown: str, more: str) -> str:
    """Return `more` without the white space that `shown` ends with; the line breaks are as many as in one."""
    tail, rest = shown[len(shown.rstrip()) :], more.lstrip()
    lead = more[: len(more) - len(rest)]
    if not tail or (lead.startswith(tail) and "\n" in lead):
        return more[len(tail) :]
    lines = lead.splitlines(keepends=True)[tail.count("\n") :]
    lacks = lead.count("\n") > tail.count("\n")
    while lacks and not lines[0].startswith(("\n", "\r\n")):  # the space before the line break
        lines[0] = lines[0][1:]
    return ("".join(lines) if lacks else "") + rest


def corrected(rule: Rule, shown: str, piece: Piece) -> str:
    lead, core, tail = split_margins(piece)
    if piece.kind != "prose" or not re.search(r"\w", core):
        return piece
    new = rule(QUESTION, shown.strip(), core)
    if not new:
        return tail if "\n" in tail else ""
    return lead + new + tail


class Driven(NamedTuple):
    text: str
    prefixes: list[str]
    segments: list[Segment]


def drive(loop: ClosedLoop, write: Write, chunk: int = 3) -> Driven:
    """Drive a loop as its docstring says."""
    shown = ""
    prefixes, segments = [""], list[Segment]()

    def steps() -> Iterator[str]:
        while loop.waiting:
            segments.append(loop.step())
            yield segments[-1].text

    while True:
        text = write(prefixes[-1])
        for at in range(0, len(text), chunk):
            assert loop.feed(text[at : at + chunk]) == loop.waiting
            shown += "".join(steps())
            if loop.stale:
                break
        else:
            assert loop.end() == loop.waiting
            shown += "".join(steps())
        if not loop.stale:
            return Driven(shown, prefixes, segments)
        loop.restart()
        prefixes.append(shown.rstrip())


def loop_of(rule: Rule, **options: int) -> ClosedLoop:
    return ClosedLoop(scripted_aligner(rule).stream(QUESTION), **options)


def saying(*texts: str) -> Write:
    """An upstream that says one text after the other, whatever was said."""
    left = list(texts)
    return lambda prefix: left.pop(0)


def mending(question: str, prefix: str, sentence: str) -> str:
    return sentence.replace("bad", "good")


@settings(max_examples=250)
@given(
    seed=st.integers(0, 10**6),
    chunk=st.sampled_from([1, 2, 5, 17, 400]),
    share=st.sampled_from([0.0, 0.1, 0.3, 0.9]),
    restarts=st.sampled_from([MAX_RESTARTS, 0, 1, 3]),
)
@example(seed=0, chunk=400, share=0.9, restarts=MAX_RESTARTS)
def test_it_is_the_sequential_algorithm(seed: int, chunk: int, share: float, restarts: int) -> None:
    write, rule = writer(seed), random_rule(seed, share)
    naive = sequential(write, rule, restarts=restarts)
    loop = loop_of(rule, max_restarts=restarts)
    driven = drive(loop, write, chunk)
    assert driven.text == naive.text
    # Upstream is interrupted where a sentence changed, and nowhere else.
    assert len(driven.prefixes) == 1 + loop.restarts
    assert loop.restarts == min(naive.changed, restarts)
    assert "".join(segment.text for segment in driven.segments) == naive.text
    assert [segment.index for segment in driven.segments] == list(range(len(driven.segments)))


def test_the_random_cases_are_of_every_kind() -> None:
    """Else the law above would say less than it seems to."""
    naive = [sequential(writer(seed), random_rule(seed, 0.3)) for seed in range(200)]
    assert {result.changed for result in naive} >= set(range(7))
    assert sum(result.changed == 0 for result in naive) < 80
    assert any(sequential(writer(seed), random_rule(seed, 0.9)).changed > MAX_RESTARTS for seed in range(50))


def test_upstream_goes_on_from_the_corrected_text() -> None:
    driven = drive(loop_of(mending), saying("Fine. It is bad. So weep. And so on.", " So smile. Bye."))
    assert driven.text == "Fine. It is good. So smile. Bye."
    assert driven.prefixes == ["", "Fine. It is good."]


def test_what_is_unchanged_does_not_interrupt() -> None:
    driven = drive(loop_of(mending), saying("Fine. It is so.\n\nAll is well."))
    assert driven.text == "Fine. It is so.\n\nAll is well." and driven.prefixes == [""]


@pytest.mark.parametrize("end", ["", " ", "\n"])
def test_after_the_last_sentence_nothing_is_asked(end: str) -> None:
    driven = drive(loop_of(mending), saying(f"Fine. It is bad.{end}"))
    assert driven.text == f"Fine. It is good.{end}" and driven.prefixes == [""]


def test_the_last_but_one_is_not_the_last_although_upstream_has_ended() -> None:
    """Both come at once: whether "U.S." ends a sentence is known when the word after it is whole."""
    driven = drive(
        loop_of(lambda *fields: fields[2].replace("the U.S.", "Spain.")),
        saying("In the U.S. This", " It rains."),
    )
    assert driven.text == "In Spain. It rains." and driven.prefixes == ["", "In Spain."]


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ("It is bad. Weep.", " Smile.", "It is good. Smile."),
        ("It is bad. Weep.", "Smile.", "It is good. Smile."),
        ("It is bad.\n\nWeep.", " Smile.", "It is good.\n\nSmile."),
        ("It is bad.\n\nWeep.", "\n\n- Smile.", "It is good.\n\n- Smile."),
        ("It is bad.  Weep.", "", "It is good.  "),
        ("It is bad.  Weep.", " ", "It is good.  "),
        ("It is bad. Weep.", "   Smile.", "It is good. Smile."),
        ("It is bad. Weep.", " \n ", "It is good. \n "),
        ("It is bad. Weep.", "\n\n- Smile.", "It is good. \n\n- Smile."),
        ("It is bad. Weep.", "  \r\nSmile.", "It is good.  \r\nSmile."),
        ("It is bad.\nWeep.", "\n\nSmile.", "It is good.\n\nSmile."),
        ("It is bad.\nWeep.", "\n\n    code()", "It is good.\n\n    code()"),
        ("It is bad.\nWeep.", "\n  - Smile.", "It is good.\n  - Smile."),
        ("It is bad. \nWeep.", "\n\n  - Smile.", "It is good. \n\n  - Smile."),
        ("那 bad。哭。", "笑。", "那 good。笑。"),
        ("那 bad。哭。", "\n笑。", "那 good。\n笑。"),
        ("bad. Weep.", " Smile. ", "good. Smile. "),
    ],
)
@pytest.mark.parametrize("chunk", [1, 100])
def test_white_space_at_the_seam(first: str, second: str, text: str, chunk: int) -> None:
    assert drive(loop_of(mending), saying(first, second), chunk).text == text


def test_a_dropped_sentence_does_not_interrupt() -> None:
    """Upstream would be asked the same again, and say the same."""

    def rule(question: str, prefix: str, sentence: str) -> str:
        return "" if "bad" in sentence else sentence

    driven = drive(loop_of(rule), saying("Fine. It is bad. It is bad.\nSo be it."))
    assert driven.prefixes == [""] and driven.text == "Fine. \nSo be it."


def test_after_the_last_restart_upstream_is_left_alone() -> None:
    text = "bad. " * 12
    asked: list[str] = []

    def write(prefix: str) -> str:
        asked.append(prefix)
        return text[len(prefix) + 1 if prefix else 0 :].replace("good", "bad")

    driven = drive(loop_of(lambda *fields: fields[2].replace("bad", "god")), write, 4)
    assert driven.text == "god. " * 12
    assert len(asked) == 1 + MAX_RESTARTS


def test_no_restarts() -> None:
    driven = drive(loop_of(mending, max_restarts=0), saying("It is bad. It is bad. Fine."))
    assert driven.text == "It is good. It is good. Fine."
    with pytest.raises(ValueError, match="max_restarts must be at least 0, got -1"):
        loop_of(mending, max_restarts=-1)


def test_a_stale_loop_waits_for_its_restart() -> None:
    loop = loop_of(mending)
    assert loop.feed("It is bad. Weep. And weep. And")
    assert loop.step().text == "It is good. " and loop.stale and not loop.waiting
    loop.restart()
    assert not loop.stale and not loop.waiting and loop.restarts == 1
    assert not loop.feed("  ") and not loop.feed(" Smile.")
    assert loop.end() and loop.step().text == "Smile." and not loop.stale


def test_the_prefix_of_what_comes_after_is_the_shown_text() -> None:
    prefixes: list[str] = []

    def rule(question: str, prefix: str, sentence: str) -> str:
        prefixes.append(prefix)
        return sentence.replace("bad", "good")

    drive(loop_of(rule), saying("It is bad. Weep. Cry.", " Smile. Laugh."))
    assert prefixes == ["", "It is good.", "It is good. Smile."]


def failing_aligner() -> Aligner:
    def rule(question: str, prefix: str, sentence: str) -> str:
        if "bad" in sentence:
            raise RuntimeError("no memory left")
        return sentence

    return scripted_aligner(rule)


def test_a_failure_raises_and_the_sentence_goes_on_waiting() -> None:
    loop = ClosedLoop(failing_aligner().stream(QUESTION))
    loop.feed("Fine. It is bad. Weep.")
    assert loop.step().text == "Fine. "
    for _ in range(2):
        with pytest.raises(CorrectionFailedError):
            loop.step()
        assert loop.waiting and not loop.stale
    assert "".join(segment.text for segment in loop.release()) == "It is bad. Weep."


def test_what_is_passed_through_does_not_interrupt_and_what_is_withheld_does() -> None:
    loop = ClosedLoop(failing_aligner().stream(QUESTION, on_error="pass_through"))
    assert drive(loop, saying("It is bad. Weep.")).text == "It is bad. Weep."
    loop = ClosedLoop(failing_aligner().stream(QUESTION, on_error="withhold", withheld_text="Hm."))
    driven = drive(loop, saying("It is bad. Weep.", " Smile."))
    assert driven.text == "Hm. Smile." and driven.prefixes == ["", "Hm."]


def test_an_aligner_of_whole_answers_never_interrupts() -> None:
    aligner = scripted_aligner(mending, granularity="answer")
    driven = drive(ClosedLoop(aligner.stream(QUESTION)), saying("It is bad. Weep."))
    assert driven.text == "It is good. Weep." and driven.prefixes == [""]
