"""The closed loop gives what the paper's sequential algorithm gives, and asks no more than it must."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aligner_integrations import Aligner
from aligner_integrations.closed_loop import MAX_RESTARTS, ClosedLoop, LoopState
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
    """What an answer comes to, and how often upstream was asked anew for it."""

    text: str
    restarts: int


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
    rest stays what it is, until another one changes. So it does after `restarts` changes, and once a sentence
    comes again that was changed before.
    """
    shown, asked = "", 0
    was_dropped, is_left_alone = False, False
    changed: set[str] = set()
    rest = cut([write("")])
    while rest:
        piece, *rest = rest
        text = corrected(rule, shown, piece)
        shown += text
        said = " ".join(piece.split())
        if said in changed:
            restarts = asked
        if not rest:
            break
        if text != piece:
            was_dropped = not text.strip()
            if not was_dropped:
                is_left_alone = asked == restarts
                if not is_left_alone:
                    asked += 1
                    changed.add(said)
        if not (was_dropped or is_left_alone):
            rest = cut([joined(shown, write(shown.rstrip()))])
    return Sequential(shown, asked)


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


def drive(loop: LoopState, write: Write, chunk: int = 3) -> Driven:
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


def loop_of(rule: Rule, **options: Any) -> LoopState:
    return LoopState(scripted_aligner(rule).stream(QUESTION), **options)


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
    assert loop.restarts == naive.restarts
    assert "".join(segment.text for segment in driven.segments) == naive.text
    assert [segment.index for segment in driven.segments] == list(range(len(driven.segments)))


def test_the_random_cases_are_of_every_kind() -> None:
    """Else the law above would say less than it seems to."""
    naive = [sequential(writer(seed), random_rule(seed, 0.3)) for seed in range(200)]
    assert {result.restarts for result in naive} >= set(range(6))
    assert sum(result.restarts == 0 for result in naive) < 80
    often = [sequential(writer(seed), random_rule(seed, 0.9), restarts=99) for seed in range(50)]
    assert any(result.restarts > 3 for result in often)  # more than the budgets above allow


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
    asked: list[str] = []

    def write(prefix: str) -> str:
        asked.append(prefix)
        return "".join(f"{number} is bad. " for number in range(prefix.count("good"), 12))

    driven = drive(loop_of(mending), write, 4)
    assert driven.text == "".join(f"{number} is good. " for number in range(12))
    assert len(asked) == 1 + MAX_RESTARTS


@pytest.mark.parametrize("period", [1, 2, 3])
def test_an_upstream_that_makes_no_progress_is_left_alone(period: int) -> None:
    """It says the same again after each correction, or the same few sentences in turns."""

    def write(prefix: str) -> str:
        begun = prefix.count("good")
        return "".join(f"{number % period} is bad. " for number in range(begun, 12))

    driven = drive(loop_of(mending), write, 4)
    assert driven.text == "".join(f"{number % period} is good. " for number in range(12))
    assert len(driven.prefixes) == 1 + period


def test_an_upstream_that_begins_again_is_left_alone() -> None:
    """As one may that is asked for what comes next, and does not understand."""
    driven = drive(loop_of(mending), lambda prefix: "Fine. It is bad. Weep.")
    assert driven.prefixes == ["", "Fine. It is good."]
    assert driven.text == "Fine. It is good. Fine. It is good. Weep."


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
    loop = LoopState(failing_aligner().stream(QUESTION))
    loop.feed("Fine. It is bad. Weep.")
    assert loop.step().text == "Fine. "
    for _ in range(2):
        with pytest.raises(CorrectionFailedError):
            loop.step()
        assert loop.waiting and not loop.stale
    assert "".join(segment.text for segment in loop.release()) == "It is bad. Weep."


def test_what_is_passed_through_does_not_interrupt_and_what_is_withheld_does() -> None:
    loop = LoopState(failing_aligner().stream(QUESTION, on_error="pass_through"))
    assert drive(loop, saying("It is bad. Weep.")).text == "It is bad. Weep."
    loop = LoopState(failing_aligner().stream(QUESTION, on_error="withhold", withheld_text="Hm."))
    driven = drive(loop, saying("It is bad. Weep.", " Smile."))
    assert driven.text == "Hm. Smile." and driven.prefixes == ["", "Hm."]


def test_an_aligner_of_whole_answers_never_interrupts() -> None:
    aligner = scripted_aligner(mending, granularity="answer")
    driven = drive(LoopState(aligner.stream(QUESTION)), saying("It is bad. Weep."))
    assert driven.text == "It is good. Weep." and driven.prefixes == [""]


# The driver.


class Talking:
    """An upstream that writes as `write` does, in chunks, and notes what becomes of its streams."""

    def __init__(self, write: Write, chunk: int = 3) -> None:
        self.write, self.chunk = write, chunk
        self.asked: list[tuple[str, str]] = []
        self.gave: list[str] = []
        self.open: list[int] = []  # streams that were open when another one was asked for
        self._open = 0

    def __call__(self, question: str, prefix: str) -> Generator[str]:
        self.asked.append((question, prefix))
        self.open.append(self._open)
        self._open += 1
        try:
            text = self.write(prefix)
            for at in range(0, len(text), self.chunk):
                self.gave.append(text[at : at + self.chunk])
                yield self.gave[-1]
        finally:
            self._open -= 1


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_the_driver_is_the_sequential_algorithm_on_a_thousand_answers(no_thread_is_left: None) -> None:
    for seed in range(1000):
        write, rule = writer(seed), random_rule(seed, (0.1, 0.3, 0.8)[seed % 3])
        naive = sequential(write, rule)
        upstream = Talking(write, chunk=1 + seed % 5)
        stream = ClosedLoop(upstream, scripted_aligner(rule), read_ahead=seed % 40).stream(QUESTION)
        segments = list(stream)
        assert "".join(segment.text for segment in segments) == naive.text
        stats = stream.stats
        assert (stats.rounds, stats.restarts) == (len(upstream.asked), naive.restarts)
        assert stats.requested_chunks == len(upstream.gave)
        assert stats.requested_chars == len("".join(upstream.gave))
        assert stats.shown_chars == len(naive.text)
        assert stats.thrown_away_chars == stats.requested_chars - sum(len(one.original) for one in segments)
        assert set(upstream.open) == {0} and {question for question, _ in upstream.asked} == {QUESTION}


@pytest.mark.parametrize("ahead", [0, 1, 8])
def test_no_more_is_thrown_away_than_was_read_ahead(ahead: int) -> None:
    """An upstream as fast as can be, whose answer never ends by itself."""

    def write(prefix: str) -> str:
        begun = prefix.count(".")
        return "".join(f" {number} is {'bad' if number % 5 == 0 else 'so'}." for number in range(begun, 60))

    upstream = Talking(write, chunk=4)
    stream = ClosedLoop(upstream, scripted_aligner(mending), max_restarts=20, read_ahead=ahead).stream(
        QUESTION
    )
    assert "".join(segment.text for segment in stream).count("good") == 12
    assert stream.stats.restarts == 12
    # What the sentence buffer holds to see where a sentence ends, what waits, and what is on its way.
    assert stream.stats.thrown_away_chars <= 12 * 4 * (3 + ahead + 1)


def test_upstream_writes_on_while_a_sentence_is_corrected() -> None:
    wrote = threading.Event()

    def rule(question: str, prefix: str, sentence: str) -> str:
        assert wrote.wait(10)
        return sentence

    def upstream(question: str, prefix: str) -> Generator[str]:
        yield from ("Fine. ", "So ", "it ", "is.")
        wrote.set()

    stream = ClosedLoop(upstream, scripted_aligner(rule)).stream(QUESTION)
    assert [segment.text for segment in stream] == ["Fine. ", "So it is."]
    assert stream.stats.thrown_away_chars == 0 and stream.stats.waiting_chunks == 4
    assert stream.stats.waiting_seconds > 0


def test_t11_closing_ends_the_round_that_runs(no_thread_is_left: None) -> None:
    upstream = Talking(lambda prefix: "So it is. " * 1000)
    with ClosedLoop(upstream, scripted_aligner(mending)).stream(QUESTION) as stream:
        assert next(stream).text == "So it is. "
    assert upstream._open == 0 and len(upstream.gave) < 100
    assert list(stream) == []


def test_what_upstream_raises_comes_through(no_thread_is_left: None) -> None:
    def upstream(question: str, prefix: str) -> Generator[str]:
        yield "Fine. It is bad. Weep."
        raise ConnectionError("the line is dead")

    seen: list[str] = []
    loop = ClosedLoop(upstream, scripted_aligner(mending), max_restarts=0)
    with pytest.raises(ConnectionError):
        for segment in loop.stream(QUESTION):
            seen.append(segment.text)
    assert seen == ["Fine. ", "It is good. "]


def test_what_upstream_repeats_is_removed() -> None:
    answers = {"": "Fine. It is bad. Weep.", "Fine. It is good.": "It is good. Smile. All is bad. Cry."}
    answers["Fine. It is good. Smile. All is good."] = "Smile. All is good. Sing."
    loop = ClosedLoop(Talking(answers.__getitem__), scripted_aligner(mending), repeats=True)
    texts = [segment.text for segment in loop.stream(QUESTION)]
    assert "".join(texts) == "Fine. It is good. Smile. All is good. Sing."


def test_t8_a_late_correction_does_not_interrupt(no_thread_is_left: None) -> None:
    rule = partial(_slow_where, "bad")
    loop = ClosedLoop(
        Talking(lambda prefix: "Fine. It is bad. Weep."),
        scripted_aligner(rule),
        on_error="pass_through",
        sentence_seconds=0.3,
    )
    segments = list(stream := loop.stream(QUESTION))
    assert "".join(segment.text for segment in segments) == "Fine. It is bad. Weep."
    assert [[finding.check for finding in segment.findings] for segment in segments] == [[], ["deadline"], []]
    assert stream.stats.restarts == 0
    for thread in threading.enumerate():
        if thread.name == "aligner-correction":  # ends with what its rule sleeps
            thread.join()


def _slow_where(word: str, question: str, prefix: str, sentence: str) -> str:
    if word in sentence:
        time.sleep(2.0)
    return sentence.replace("bad", "good")


def test_any_iterable_is_an_upstream() -> None:
    loop = ClosedLoop(
        lambda question, prefix: [" Fine."] if prefix else [question, " Weep."], scripted_aligner(mending)
    )
    assert "".join(segment.text for segment in loop.stream("It is bad?")) == "It is good? Fine."


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"upstream": "text"}, TypeError, "upstream must be a callable"),
        ({"aligner": "bundled"}, TypeError, "aligner must be an Aligner"),
        ({"max_restarts": -1}, ValueError, "max_restarts"),
        ({"read_ahead": -1}, ValueError, "read_ahead"),
        ({"on_error": "ignore"}, ValueError, "on_error"),
        ({"sentence_seconds": 0}, ValueError, "sentence_seconds"),
        ({"feedback": 3}, TypeError, "feedback"),
    ],
)
def test_wrong_options_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    given: dict[str, Any] = {"upstream": Talking(str), "aligner": scripted_aligner(mending)} | options
    with pytest.raises(error, match=match):
        ClosedLoop(**given)
