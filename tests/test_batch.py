"""`correct_batch`: the same as one by one, in the same order; what is shared is run once, nothing is left."""

from __future__ import annotations

import gzip
import itertools
import json
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner_integrations import Aligner, Correction, DecodeConfig
from aligner_integrations.backends.base import Backend, Ids, KVCache, Logits, SideBySide
from aligner_integrations.config import Granularity
from aligner_integrations.correction import DecodeStats, apply_edits
from aligner_integrations.errors import CorrectionFailedError, InputTooLongError
from aligner_integrations.testing import scripted_aligner

RECORDED = Path(__file__).parent / "data" / "recorded_answers.jsonl.gz"
CODE = "Run this:\n\n```python\nbad = 1\n```\n\nThat is bad. | a |\n"
Pairs = list[tuple[str, str]]


class Threads:
    """A backend that asks for so many threads a batch."""

    def __init__(self, inner: Backend, workers: int) -> None:
        self._inner, self._workers = inner, workers
        self.name, self.provider = inner.name, inner.provider

    def make_cache(self) -> KVCache:
        return self._inner.make_cache()

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        return self._inner.forward(ids, cache, last=last)

    def for_batches(self) -> tuple[Backend, int]:
        return self, self._workers


def scripted(
    rule: Callable[[str], str], *, workers: int = 3, granularity: Granularity = "sentence"
) -> Aligner:
    """An aligner whose rule sees the sentence alone, and whose batches have so many threads."""
    inner = scripted_aligner(lambda question, prefix, sentence: rule(sentence), granularity=granularity)
    return with_threads(inner, workers)


def with_threads(inner: Aligner, workers: int) -> Aligner:
    backend = Threads(inner.backend, workers)
    return Aligner(backend, inner.tokenizer, inner.config, decode=inner.decode_config, safeguards="off")


def one_by_one(aligner: Aligner, pairs: Pairs, **options: Any) -> list[Correction]:
    return [aligner.correct(question, answer, **options) for question, answer in pairs]


def comparable(corrections: Sequence[Correction]) -> list[Correction]:
    """Everything but the time and what was in the cache: that is what a batch saves."""
    return [replace(each, stats=replace(each.stats, seconds=0.0, cached_tokens=0)) for each in corrections]


def tokens_run(corrections: Sequence[Correction]) -> int:
    return sum(each.stats.prompt_tokens - each.stats.cached_tokens for each in corrections)


def workers_left() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("aligner-batch")]


# --- the law: a batch equals one by one

QUESTIONS = st.sampled_from(["", "Q?", "Q? And more?", "漢字 🤷?"])
ANSWERS = st.one_of(
    st.sampled_from(
        ["", " ", CODE, "One bad. Two bad! ", "One bad. Two bad! ", "🤷", "שלום bad. 坏的。好的。"]
    ),
    st.text(st.characters(exclude_categories=()), max_size=20),
)


@pytest.mark.parametrize("granularity", ["sentence", "answer"])
@pytest.mark.parametrize("workers", [1, 3])
@given(pairs=st.lists(st.tuples(QUESTIONS, ANSWERS), max_size=8))
def test_a_batch_equals_one_by_one(granularity: Granularity, workers: int, pairs: Pairs) -> None:
    def rule(question: str, prefix: str, sentence: str) -> str:
        return f"{sentence.replace('bad', 'good')} ({question}{len(prefix)})" if "b" in sentence else sentence

    aligner = with_threads(scripted_aligner(rule, granularity=granularity), workers)
    batch = aligner.correct_batch(pairs)
    assert comparable(batch) == comparable(one_by_one(aligner, pairs))
    assert all(apply_edits(each.answer, each.edits) == each.text for each in batch)
    assert workers_left() == []


@pytest.fixture(scope="module")
def bundled() -> Aligner:
    # No margin: it rewrites as often as it can.
    return Aligner.from_pretrained(decode=DecodeConfig())


@pytest.fixture(scope="module")
def recorded() -> Pairs:
    with gzip.open(RECORDED, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][:12]
    sums = [
        (f"What is {a} times 7?", f"One has {a}. Then {a} x 7 = {a * 7 + a % 2} of them. So it is.")
        for a in range(3, 15)
    ]
    return [
        pair for two in zip([(r["question"], r["answer"]) for r in rows], sums, strict=True) for pair in two
    ]


@pytest.mark.parametrize("one_question", [True, False])
def test_the_bundled_model_says_the_same_in_a_batch(
    bundled: Aligner, recorded: Pairs, one_question: bool
) -> None:
    pairs = [("What is it about, and how much?", text) for _, text in recorded] if one_question else recorded
    batch, single = bundled.correct_batch(pairs), one_by_one(bundled, pairs)
    assert comparable(batch) == comparable(single)
    assert any(each.changed for each in batch)
    assert {each.stats.provider for each in batch} == {"CPUExecutionProvider"}


# --- what is shared is run once


@pytest.mark.parametrize("granularity", ["sentence", "answer"])
def test_a_question_is_run_once(granularity: Granularity) -> None:
    aligner = scripted_aligner(lambda q, p, s: s, granularity=granularity)
    question = "How long is this question, and is it run again? " * 3
    pairs = [(question, f"{number} is a text. {number} ends here.") for number in range(10)]
    saved = tokens_run(one_by_one(aligner, pairs)) - tokens_run(aligner.correct_batch(pairs))
    assert 9 * len(question) <= saved <= 9 * (len(question) + 8)  # a few marks of the frame come with it


def test_questions_that_take_turns_are_run_once_each() -> None:
    aligner = scripted_aligner(lambda q, p, s: s)
    questions = ["First, what is this? " * 5, "Secondly, what is that? " * 5]
    pairs = [(questions[number % 2], f"{number} is a text.") for number in range(10)]
    batch = aligner.correct_batch(pairs)
    saved = tokens_run(one_by_one(aligner, pairs)) - tokens_run(batch)
    assert saved >= 4 * sum(map(len, questions))
    assert [each.answer for each in batch] == [answer for _, answer in pairs]


def test_the_bundled_model_runs_a_question_once_for_each_worker(bundled: Aligner) -> None:
    question = "What are the signs of high blood pressure, and how is it found before it does any harm?"
    pairs = [(question, f"The clinic opens at {number}. Nobody is there then.") for number in range(1, 13)]
    assert isinstance(bundled.backend, SideBySide)
    _, workers = bundled.backend.for_batches()
    saved = tokens_run(one_by_one(bundled, pairs)) - tokens_run(bundled.correct_batch(pairs))
    length = len(bundled.tokenizer.encode_text(question))
    assert (12 - workers) * length <= saved <= 12 * (length + 8)


# --- side by side


def test_texts_are_corrected_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=60)
    aligner = scripted(lambda sentence: f"{sentence} {together.wait() >= 0}", workers=3)
    pairs = [("Q", f"Text {number}.") for number in range(6)]
    assert [each.text for each in aligner.correct_batch(pairs)] == [f"Text {n}. True" for n in range(6)]


def test_the_order_is_that_of_the_pairs_whoever_ends_first() -> None:
    last_done = threading.Event()

    def rule(sentence: str) -> str:
        if sentence == "First.":
            assert last_done.wait(60)
        if sentence == "Last.":
            last_done.set()
        return sentence.upper()

    aligner = scripted(rule, workers=2)
    texts = [each.text for each in aligner.correct_batch([("Q", "First."), ("Q", "More."), ("R", "Last.")])]
    assert texts == ["FIRST.", "MORE.", "LAST."]


def test_one_pair_or_one_worker_stays_in_the_callers_thread() -> None:
    seen: set[str] = set()
    aligner = scripted(lambda sentence: seen.add(threading.current_thread().name) or sentence, workers=3)  # type: ignore[func-returns-value]
    aligner.correct_batch([("Q", "One sentence.")])
    scripted_aligner(lambda q, p, s: seen.add(threading.current_thread().name) or s).correct_batch(  # type: ignore[func-returns-value]
        [("Q", "One sentence."), ("Q", "Another one.")]
    )
    assert seen == {threading.current_thread().name}


def test_batches_of_many_threads_share_one_aligner(bundled: Aligner, recorded: Pairs) -> None:
    expected = comparable(one_by_one(bundled, recorded[:6]))
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(bundled.correct_batch, recorded[:6]) for _ in range(4)]
        assert [comparable(each.result()) for each in found] == [expected] * 4
    aligner = scripted(str.upper)
    pairs = {name: [("Q", f"{name} {number}. End.") for number in range(20)] for name in "abcdef"}
    with ThreadPoolExecutor(6) as pool:
        batches = dict(zip(pairs, pool.map(aligner.correct_batch, pairs.values()), strict=True))
    for name, batch in batches.items():
        assert [each.text for each in batch] == [answer.upper() for _, answer in pairs[name]]


# --- failing corrections


def failing(sentence: str) -> str:
    if "boom" in sentence:
        raise RuntimeError(sentence)
    return sentence.upper()


BAD = [("Q", "One. Two."), ("Q", "Three goes boom. Four."), ("Q", "Five. Six boom!"), ("R", "Seven.")]


@pytest.mark.parametrize("workers", [1, 3])
def test_one_bad_text_does_not_spoil_the_others(workers: int) -> None:
    aligner = scripted(failing, workers=workers)
    passed = aligner.correct_batch(BAD, on_error="pass_through")
    assert [each.text for each in passed] == [
        "ONE. TWO.",
        "Three goes boom. FOUR.",
        "FIVE. Six boom!",
        "SEVEN.",
    ]
    assert [[finding.action for finding in each.findings] for each in passed] == [
        [],
        ["kept_original"],
        ["kept_original"],
        [],
    ]
    withheld = aligner.correct_batch(BAD, on_error="withhold", withheld_text="[...]")
    assert [each.text for each in withheld] == ["ONE. TWO.", "[...] FOUR.", "FIVE. [...]", "SEVEN."]
    assert all(apply_edits(each.answer, each.edits) == each.text for each in withheld)
    for options in ({"on_error": "pass_through"}, {"on_error": "withhold"}):
        batch = aligner.correct_batch(BAD, **options)  # type: ignore[arg-type]
        assert comparable(batch) == comparable(one_by_one(aligner, BAD, **options))


@pytest.mark.parametrize("on_error", ["pass_through", "withhold"])
@pytest.mark.parametrize("granularity", ["sentence", "answer"])
def test_a_finished_answer_fails_by_the_policy_of_a_stream(granularity: Granularity, on_error: Any) -> None:
    aligner = scripted(failing, granularity=granularity)
    for question, answer in BAD:
        with aligner.stream(question, on_error=on_error) as stream:
            segments = [*stream.push(answer), *stream.close()]
        assert aligner.correct(question, answer, on_error=on_error).text == "".join(map(str, segments))


async def test_acorrect_takes_the_same_policy() -> None:
    aligner = scripted(failing)
    found = await aligner.acorrect("Q", "Boom? No, boom.", on_error="withhold", withheld_text="[...]")
    assert found.text == "BOOM? [...]"
    with pytest.raises(CorrectionFailedError, match="RuntimeError;"):
        await aligner.acorrect("Q", "Boom? No, boom.")


def test_what_does_not_fit_raises_only_where_errors_do() -> None:
    whole = scripted(str.upper, granularity="answer")
    small = Aligner(whole.backend, whole.tokenizer, replace(whole.config, max_length=200), safeguards="off")
    pairs = [("Q", "Short."), ("Q", "x" * 300), ("Q", "Short too.")]
    with pytest.raises(InputTooLongError):
        small.correct_batch(pairs)
    passed = small.correct_batch(pairs, on_error="pass_through")
    assert [each.text for each in passed] == ["SHORT.", "x" * 300, "SHORT TOO."]
    assert [finding.check for finding in passed[1].findings] == ["too_long"]
    withheld = small.correct_batch(pairs, on_error="withhold", withheld_text="[...]")
    assert [each.text for each in withheld] == ["SHORT.", "[...]", "SHORT TOO."]


def test_the_first_pair_that_fails_raises_whichever_fails_first() -> None:
    later = threading.Event()

    def rule(sentence: str) -> str:
        if sentence.startswith("Early"):
            assert later.wait(60)
        if sentence.startswith("Later"):
            later.set()
        return failing(sentence)

    aligner = scripted(rule, workers=2)
    for _ in range(5):
        later.clear()
        with pytest.raises(CorrectionFailedError) as caught:
            aligner.correct_batch([("Q", "Early boom."), ("Q", "Later boom."), ("Q", "One more boom.")])
        assert "Early boom" in str(caught.value.__cause__)
    # Texts of a question are corrected one after the other, so the third pair fails before the second.
    for workers in (1, 2):
        with pytest.raises(CorrectionFailedError) as caught:
            scripted(failing, workers=workers).correct_batch(
                [("Q", "Fine."), ("R", "Second boom."), ("Q", "Third boom.")]
            )
        assert "Second boom" in str(caught.value.__cause__)


def test_nothing_runs_after_a_failure() -> None:
    seen: list[str] = []

    def rule(sentence: str) -> str:
        seen.append(sentence)
        return failing(sentence)

    aligner = scripted(rule, workers=2)
    with pytest.raises(CorrectionFailedError):
        aligner.correct_batch(
            [("Q", "boom. " * 50), *(("Q", f"Text {number}. " * 20) for number in range(200))]
        )
    assert workers_left() == []
    assert len(seen) < 2000
    count = len(seen)
    assert aligner.correct_batch([("Q", "Fine."), ("Q", "Too.")])[1].text == "TOO."
    assert len(seen) == count + 2


def test_the_first_failure_of_a_batch_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    scripted(failing, workers=1).correct_batch(BAD, on_error="pass_through")
    assert len(caplog.records) == 1


def test_an_interrupt_ends_the_batch_and_its_threads() -> None:
    calls, seen = itertools.count(), list[int]()

    def rule(sentence: str) -> str:
        number = next(calls)
        seen.append(number)
        if number == 5:
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)
        return sentence

    long = "This is a sentence. " * 2000
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            scripted(rule, workers=2).correct_batch([("Q", long)] * 4)
    finally:
        signal.signal(signal.SIGINT, before)
    assert workers_left() == []
    assert len(seen) < 4000


# --- what is asked


def test_no_pairs_give_no_corrections() -> None:
    aligner = scripted(str.upper)
    assert aligner.correct_batch([]) == aligner.correct_batch(()) == []


def test_pairs_may_be_lists_and_need_not_hold_words() -> None:
    given_pairs: Any = [["Q", ""], ["Q", "..."], ["", "A sentence."]]
    batch = scripted(str.upper).correct_batch(given_pairs)
    assert [each.text for each in batch] == ["", "...", "A SENTENCE."]
    assert batch[0].stats == DecodeStats(backend="scripted", provider="scripted")


def test_feedback_reaches_every_text() -> None:
    aligner = scripted_aligner(lambda q, p, s: s)
    with_feedback = aligner.correct_batch([("Q", "One."), ("Q", "Two.")], feedback="be kind")
    without = aligner.correct_batch([("Q", "One."), ("Q", "Two.")])
    grown = [
        a.stats.prompt_tokens - b.stats.prompt_tokens for a, b in zip(with_feedback, without, strict=True)
    ]
    assert grown == [len("be kind") + 1] * 2


def test_wrong_options_are_named_before_anything_runs() -> None:
    aligner: Any = scripted(failing)
    with pytest.raises(ValueError, match="on_error must be one of raise, pass_through, withhold"):
        aligner.correct_batch(BAD, on_error="ignore")
    with pytest.raises(TypeError, match="withheld_text must be a str"):
        aligner.correct_batch(BAD, withheld_text=None)
    with pytest.raises(TypeError, match="feedback must be a str"):
        aligner.correct_batch(BAD, feedback=None)
    with pytest.raises(ValueError, match="on_error"):
        aligner.correct("Q", "A.", on_error="ignore")
