"""`StreamCorrector`: sentences in as they come, corrected segments out; nothing lost or shown twice."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner_integrations import Aligner, Segment, StreamCorrector
from aligner_integrations.correction import apply_edits
from aligner_integrations.errors import CorrectionFailedError
from aligner_integrations.testing import scripted_aligner

ANSWER = (
    "Dr. Smith paid 3.50 for it. Is that bad? No!\n\n1. A bad item.\n2. Another one.\n\n"
    "```\nbad. Code. Here.\n```\n\n| a | b |\n|---|---|\n| bad. | x |\n\nBad ends 好的。坏的。 the end"
)
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([ANSWER, "One. ", "Two? ", "\n", "```\n", "- a\n", "| a |\n", "\ud83d", "3.", "5 "]),
        st.text(st.characters(exclude_categories=()), max_size=15),
    ),
    max_size=6,
).map("".join)


def copying(**options: Any) -> Aligner:
    return scripted_aligner(lambda question, prefix, sentence: sentence, **options)


def rewriting(**options: Any) -> Aligner:
    return scripted_aligner(
        lambda question, prefix, sentence: sentence.replace("bad", "good").title(), **options
    )


def cut(text: str, borders: Sequence[int]) -> list[str]:
    places = sorted({0, len(text), *(border % (len(text) + 1) for border in borders)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


def run(aligner: Aligner, chunks: Sequence[str], **options: Any) -> list[Segment]:
    with aligner.stream("Q?", **options) as stream:
        segments = [segment for chunk in chunks for segment in stream.push(chunk)]
        return [*segments, *stream.close()]


def shown(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def timeless(segments: Sequence[Segment]) -> list[Segment]:
    return [replace(segment, stats=replace(segment.stats, seconds=0.0)) for segment in segments]


# --- the laws


@given(text=TEXTS, borders=st.lists(st.integers(0, 10_000), max_size=10))
def test_t2_identity(text: str, borders: list[int]) -> None:
    segments = run(copying(), cut(text, borders))
    assert shown(segments) == text
    assert not any(segment.changed for segment in segments)


@given(text=TEXTS, borders=st.lists(st.integers(0, 10_000), max_size=10))
def test_t3_chunk_blind(text: str, borders: list[int]) -> None:
    aligner = rewriting()
    whole = run(aligner, [text])
    assert timeless(run(aligner, cut(text, borders))) == timeless(whole)
    assert timeless(run(aligner, list(text))) == timeless(whole)
    assert shown(whole) == aligner.correct("Q?", text).text


@given(text=TEXTS)
def test_segments_tile_the_answer(text: str) -> None:
    segments = run(rewriting(), [text])
    for index, segment in enumerate(segments):
        assert segment.index == index
        assert text[segment.start : segment.start + len(segment.original)] == segment.original
        assert apply_edits(segment.original, segment.edits) == segment.text
    assert "".join(segment.original for segment in segments) == text


@given(text=TEXTS, borders=st.lists(st.integers(0, 10_000), max_size=10), stop=st.integers(0, 12))
def test_cut_short(text: str, borders: list[int], stop: int) -> None:
    """A stream that is left early leaves nothing behind; the next one is unaffected."""
    aligner = rewriting()
    chunks = cut(text, borders)
    expected = timeless(run(aligner, chunks))
    with aligner.stream("Q?") as stream:
        early = [segment for chunk in chunks[:stop] for segment in stream.push(chunk)]
    assert timeless(early) == expected[: len(early)]
    assert timeless(run(aligner, chunks)) == expected


# --- open streams


def test_a_segment_leaves_when_its_sentence_is_complete() -> None:
    with rewriting().stream("Q?") as stream:
        assert stream.push("This is") == []
        assert stream.push(" bad.") == []
        (first,) = stream.push(" And")
        assert first.text == "This Is Good. "
        (last,) = stream.close()
        assert last.text == "And"


def test_code_and_tables_pass_as_they_are() -> None:
    segments = run(rewriting(), [ANSWER])
    text = shown(segments)
    assert "```\nbad. Code. Here.\n```" in text
    assert "| bad. | x |" in text
    assert [segment.stats.forwards for segment in segments if "```" in segment.original] == [0]


@given(text=TEXTS, borders=st.lists(st.integers(0, 10_000), max_size=10))
def test_feeding_first_and_correcting_later_is_pushing(text: str, borders: list[int]) -> None:
    """An event loop feeds in place and corrects in a thread; nothing else differs."""
    chunks, aligner = cut(text, borders), rewriting()
    whole = run(aligner, chunks)
    stream, parts = aligner.stream("Q?"), list[Segment]()
    for chunk in chunks:
        waits = stream.feed(chunk)
        done = stream.push("") if waits else []
        assert waits == bool(done)
        parts += done
    assert timeless([*parts, *stream.close()]) == timeless(whole)


@given(text=TEXTS, borders=st.lists(st.integers(0, 10_000), max_size=10))
def test_released_text_is_what_push_has_not_given(text: str, borders: list[int]) -> None:
    stream, parts = rewriting().stream("Q?"), list[Segment]()
    for chunk in cut(text, borders):
        parts += stream.push(chunk)
    rest = stream.release()
    assert "".join(segment.original for segment in [*parts, *rest]) == text
    assert all(not segment.changed and segment.findings[0].check == "left_alone" for segment in rest)
    assert stream.release() == stream.close() == []


def test_a_closed_stream_takes_no_more() -> None:
    stream = copying().stream("Q?")
    stream.push("A sentence. ")
    assert shown(stream.close()) == "A sentence. "
    assert stream.close() == []
    with pytest.raises(ValueError, match="closed"):
        stream.push("more")
    with copying().stream("Q?") as left:
        left.push("A sentence")
    with pytest.raises(ValueError, match="closed"):
        left.push("more")


def test_an_empty_answer_gives_no_segment() -> None:
    assert run(copying(), []) == []
    assert run(copying(), ["", ""]) == []
    assert run(copying(granularity="answer"), ["", ""]) == []


def test_an_answer_level_model_corrects_once_at_the_end() -> None:
    calls: list[str] = []
    aligner = scripted_aligner(lambda q, p, s: calls.append(s) or s.upper(), granularity="answer")  # type: ignore[func-returns-value]
    with aligner.stream("Q?") as stream:
        assert stream.push("One. Two. ") == []
        assert stream.push("Three.") == []
        (segment,) = stream.close()
    assert calls == ["One. Two. Three."]
    assert segment.text == "ONE. TWO. THREE."
    assert [finding.check for finding in segment.findings] == ["corrected_at_end"]


def test_the_cache_is_kept_from_sentence_to_sentence() -> None:
    segments = run(copying(), ["The first sentence is here. The second one is here. The third one is here."])
    cached = [segment.stats.cached_tokens for segment in segments]
    assert cached[0] == 0
    assert cached[2] > cached[1] > 0


def test_streams_side_by_side_do_not_mix() -> None:
    aligner = scripted_aligner(lambda q, p, s: f"{q}{len(p)} {s}")
    expected = {f"Q{n}": shown(run_one(aligner, f"Q{n}")) for n in range(8)}
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda q: shown(run_one(aligner, q)), expected)) == list(expected.values())
    left, right = aligner.stream("L"), aligner.stream("R")
    parts: dict[str, str] = {"L": "", "R": ""}
    for chunk in ("One is. Two", " is. Three is. "):
        parts["L"] += shown(left.push(chunk))
        parts["R"] += shown(right.push(chunk))
    assert (parts["L"] + shown(left.close())).replace("L", "R") == parts["R"] + shown(right.close())


def run_one(aligner: Aligner, question: str) -> list[Segment]:
    with aligner.stream(question) as stream:
        return [*stream.push("One is here. Two is here. Three"), *stream.close()]


# --- correct_stream


def test_correct_stream_yields_before_the_input_ends() -> None:
    asked: list[str] = []

    def chunks() -> Iterator[str]:
        for chunk in ("One is", " bad. Two", " is bad. ", "Three"):
            asked.append(chunk)
            yield chunk

    segments = rewriting().correct_stream("Q?", chunks())
    assert next(segments).text == "One Is Good. "
    assert len(asked) == 2
    assert shown(list(segments)) == "Two Is Good. Three"


def test_closing_the_iterator_closes_what_feeds_it() -> None:
    closed = threading.Event()

    def chunks() -> Iterator[str]:
        try:
            while True:
                yield "One is here. "
        finally:
            closed.set()

    segments = copying().correct_stream("Q?", chunks())
    next(segments)
    assert not closed.is_set()
    segments.close()  # type: ignore[attr-defined]
    assert closed.is_set()


def test_an_error_of_the_upstream_comes_through_after_what_was_whole() -> None:
    def chunks() -> Iterator[str]:
        yield "One is here. Two"
        raise ConnectionError("gone")

    segments = copying().correct_stream("Q?", chunks())
    assert next(segments).text == "One is here. "
    with pytest.raises(ConnectionError, match="gone"):
        next(segments)


# --- failing corrections


class Failing:
    """A rule that fails on sentences with "boom", as long as `left` lasts."""

    def __init__(self, left: int = 1000) -> None:
        self.left = left

    def __call__(self, question: str, prefix: str, sentence: str) -> str:
        if "boom" in sentence and self.left > 0:
            self.left -= 1
            raise RuntimeError("boom")
        return sentence.upper()


BOOM = "One is fine. Two goes boom. Three is fine. Four goes boom. Five"


def test_raise_loses_nothing_and_shows_nothing_twice() -> None:
    stream = scripted_aligner(Failing(left=2)).stream("Q?")
    with pytest.raises(CorrectionFailedError, match="correcting: RuntimeError;"):
        stream.push(BOOM)
    # The finished segment comes first; the second failure waits behind it.
    first = stream.push("")
    assert shown(first) == "ONE IS FINE. "
    rest = [*stream.push(" and six."), *stream.close()]
    assert shown(first + rest) == BOOM.upper() + " AND SIX."
    assert [segment.index for segment in first + rest] == list(range(5))


def test_close_raises_as_long_as_a_sentence_fails() -> None:
    stream = scripted_aligner(Failing(left=3)).stream("Q?")
    stream.push("One is fine")
    stream.push(". Two goes boom")
    for _ in range(3):
        with pytest.raises(CorrectionFailedError):
            stream.close()
    assert shown(stream.close()) == "TWO GOES BOOM"
    assert stream.close() == []


def test_correct_stream_yields_what_came_before_the_failure() -> None:
    segments = scripted_aligner(Failing()).correct_stream("Q?", [BOOM])
    assert next(segments).text == "ONE IS FINE. "
    with pytest.raises(CorrectionFailedError):
        next(segments)


@given(borders=st.lists(st.integers(0, 100), max_size=10))
def test_pass_through_shows_the_original(borders: list[int]) -> None:
    segments = run(scripted_aligner(Failing()), cut(BOOM, borders), on_error="pass_through")
    assert shown(segments) == "ONE IS FINE. Two goes boom. THREE IS FINE. Four goes boom. FIVE"
    findings = [finding for segment in segments for finding in segment.findings]
    assert [(finding.check, finding.action) for finding in findings] == [
        ("correction_failed", "kept_original")
    ] * 2


@given(borders=st.lists(st.integers(0, 100), max_size=10))
def test_withhold_shows_the_withheld_text(borders: list[int]) -> None:
    aligner = scripted_aligner(Failing())
    segments = run(aligner, cut(BOOM, borders), on_error="withhold", withheld_text="[...]")
    assert shown(segments) == "ONE IS FINE. [...] THREE IS FINE. [...] FIVE"
    assert "".join(segment.original for segment in segments) == BOOM
    assert all(apply_edits(segment.original, segment.edits) == segment.text for segment in segments)
    assert [finding.action for segment in segments for finding in segment.findings] == ["withheld"] * 2


def test_a_whole_answer_fails_by_the_same_policy() -> None:
    aligner = scripted_aligner(Failing(), granularity="answer")
    (kept,) = run(aligner, [BOOM], on_error="pass_through")
    assert kept.text == BOOM
    (withheld,) = run(aligner, [BOOM], on_error="withhold", withheld_text="[...]")
    assert withheld.text == "[...]"
    with pytest.raises(CorrectionFailedError):
        run(aligner, [BOOM])


def test_the_first_failure_is_logged_once_without_text(caplog: pytest.LogCaptureFixture) -> None:
    run(scripted_aligner(Failing()), [BOOM], on_error="pass_through")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "CorrectionFailedError" in record.message
    assert "boom" not in record.message


@pytest.mark.parametrize("on_error", ["raise", "pass_through", "withhold"])
def test_a_piece_that_does_not_fit_never_raises(on_error: str) -> None:
    aligner = copying()
    small = Aligner(aligner.backend, aligner.tokenizer, replace(aligner.config, max_length=256))
    text = "One is here. " + "x" * 300 + " and so on. Three is here."
    segments = run(small, [text], on_error=on_error, withheld_text="[...]")
    (long,) = [segment for segment in segments if "xxx" in segment.original]
    if on_error == "withhold":  # what could not be checked is not shown
        assert long.text == "[...] "
    else:
        assert shown(segments) == text
        assert [(finding.check, finding.action) for finding in long.findings] == [
            ("too_long", "kept_original")
        ]


def test_wrong_types_and_values_are_named() -> None:
    aligner: Any = copying()
    with pytest.raises(TypeError, match="question must be a str"):
        aligner.stream(None)
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        aligner.stream("Q").push(b"text")
    with pytest.raises(TypeError, match="chunks must be an iterable"):
        aligner.correct_stream("Q", 3)
    with pytest.raises(TypeError, match="text must be a str, got int"):
        list(aligner.correct_stream("Q", [1]))
    with pytest.raises(ValueError, match="on_error must be one of raise, pass_through, withhold"):
        aligner.stream("Q", on_error="ignore")
    with pytest.raises(TypeError, match="withheld_text must be a str"):
        StreamCorrector(aligner, "Q", withheld_text=None)  # type: ignore[arg-type]
