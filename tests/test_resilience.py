"""Deadlines and the circuit breaker: what is late or keeps failing does not hold an answer up."""

from __future__ import annotations

import asyncio
import gc
import logging
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from aligner_integrations import Aligner, CircuitBreaker, resilience
from aligner_integrations.errors import CorrectionFailedError, CorrectionTimeoutError, InputTooLongError
from aligner_integrations.resilience import WITHHELD_TEXT, Budget, Deadline, ErrorPolicy
from aligner_integrations.testing import scripted_aligner

GRACE = 0.05  # what a stream may take beyond the deadline


@pytest.fixture(scope="module")
def bundled() -> Aligner:
    return Aligner.from_pretrained()


def corrected(question: str, prefix: str, sentence: str) -> str:
    return sentence.replace("bad", "good")


def slow_at(word: str, seconds: float) -> Callable[[str, str, str], str]:
    """A rule that sleeps over the sentences with `word`."""

    def rule(question: str, prefix: str, sentence: str) -> str:
        if word in sentence:
            time.sleep(seconds)
        return corrected(question, prefix, sentence)

    return rule


def gone(before: set[threading.Thread], seconds: float = 5.0) -> bool:
    """Whether every thread that is not in `before` ends in time."""
    end = time.monotonic() + seconds
    while left := set(threading.enumerate()) - before:
        if time.monotonic() > end:
            return False
        next(iter(left)).join(0.05)
    return True


# T8: deadlines.


@pytest.mark.parametrize("granularity", ["sentence", "answer"])
@pytest.mark.parametrize("name", ["sentence_seconds", "answer_seconds"])
def test_t8_a_stream_goes_on_within_the_deadline_and_50_ms(granularity: str, name: str) -> None:
    before = set(threading.enumerate())
    aligner = scripted_aligner(corrected, granularity=granularity, delay=0.6)  # type: ignore[arg-type]
    overshoots = []
    for _ in range(3):  # the middle one counts: on a busy machine any thread may have to wait for a core
        stream = aligner.stream("Q?", on_error="pass_through", **{name: 0.1})  # type: ignore[arg-type]
        started = time.monotonic()
        segments = [*stream.push("A bad one. "), *stream.close()]
        overshoots.append(time.monotonic() - started - 0.1)
        (segment,) = segments
        assert segment.text == segment.original == "A bad one. "
        assert [(each.check, each.action) for each in segment.findings] == [("deadline", "kept_original")]
        assert segment.stats.finish_reason == "deadline"
    assert 0 <= statistics.median(overshoots) <= GRACE
    assert gone(before)


def test_t8_only_the_late_sentence_is_dropped() -> None:
    before = set(threading.enumerate())
    aligner = scripted_aligner(slow_at("SLOW", 0.8))
    stream = aligner.stream("Q?", on_error="withhold", sentence_seconds=0.3)
    text = "A bad start. A SLOW bad one. Another bad one. "
    segments = [*stream.push(text), *stream.close()]
    assert [each.text for each in segments] == ["A good start. ", f"{WITHHELD_TEXT} ", "Another good one. "]
    assert [each.stats.finish_reason for each in segments] == ["eos", "deadline", "eos"]
    assert "".join(each.original for each in segments) == text
    assert gone(before)


def test_t8_raise_names_the_argument_and_loses_nothing() -> None:
    late = [True]

    def rule(question: str, prefix: str, sentence: str) -> str:
        if "SLOW" in sentence and late:
            late.pop()
            time.sleep(0.8)
        return corrected(question, prefix, sentence)

    stream = scripted_aligner(rule).stream("Q?", sentence_seconds=0.3)
    with pytest.raises(CorrectionTimeoutError, match="sentence_seconds"):
        stream.push("A bad start. A SLOW bad one. The end")
    shown = [each.text for each in [*stream.push(""), *stream.close()]]
    assert shown == ["A good start. ", "A SLOW good one. ", "The end"]


def test_t8_a_used_up_answer_runs_no_forward_and_leaves_code_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    # A clock on which each correction takes a minute.
    monkeypatch.setattr(resilience, "monotonic", lambda: time.monotonic() + 60 * len(seen))

    def rule(question: str, prefix: str, sentence: str) -> str:
        seen.append(sentence)
        return corrected(question, prefix, sentence)

    answer = "One bad. Two bad. Three bad. Four bad.\n\n```py\nbad = 1\n```\n"
    correction = scripted_aligner(rule).correct("Q?", answer, on_error="withhold", answer_seconds=100.0)
    # The second is late, and then nothing is left.
    assert seen == ["One bad.", "Two bad."]
    assert correction.text.startswith("One good. ")
    assert correction.text.count(WITHHELD_TEXT) == 3
    assert correction.text.endswith("```py\nbad = 1\n```\n")
    assert {each.check for each in correction.findings} == {"deadline"}
    assert correction.stats.finish_reason == "deadline"


def test_t8_the_time_in_which_upstream_writes_does_not_count() -> None:
    stream = scripted_aligner(corrected).stream("Q?", answer_seconds=0.25)
    shown = []
    for sentence in ("One bad. ", "Two bad. ", "Three bad. "):
        time.sleep(0.1)
        shown += stream.push(sentence)
    assert "".join(each.text for each in [*shown, *stream.close()]) == "One good. Two good. Three good. "


def test_t8_the_bundled_model_with_a_long_answer(bundled: Aligner) -> None:
    """Real forwards are dropped too, and the next answer is what it would have been."""
    before = set(threading.enumerate())
    question = "What is 12 + 13? " * 60
    answer = "The sum is 26, as 12 plus 13 makes 26 and not 27. " * 20
    whole = bundled.correct(question, answer)
    for budget in (0.002, 0.01):
        stream = bundled.stream(question, on_error="pass_through", sentence_seconds=budget)
        stream.feed(answer)
        stream.end()
        took, segments = [], []
        while stream.waiting:
            started = time.monotonic()
            segments.append(stream.step())
            took.append(time.monotonic() - started)
        late = [each for each in segments if each.stats.finish_reason == "deadline"]
        assert late
        assert all(each.text == each.original for each in late)
        # The middle one: on a busy machine any single thread may have to wait for a core.
        assert statistics.median(took) <= budget + GRACE
    assert gone(before)
    assert bundled.correct(question, answer, sentence_seconds=60.0).text == whole.text


def test_t8_a_late_correction_never_touches_the_cache_of_the_stream(bundled: Aligner) -> None:
    """Between a dropped correction and the next there is nothing that they share."""
    answer = "The sum of 12 and 13 is 26. It is 26. "
    plain = [each.text for each in bundled.correct_stream("What is 12 + 13?", [answer])]
    stream = bundled.stream("What is 12 + 13?", sentence_seconds=60.0)
    with pytest.raises(CorrectionTimeoutError):
        late = bundled.stream("What is 12 + 13?", sentence_seconds=1e-6)
        late.push(answer)
    assert [each.text for each in [*stream.push(answer), *stream.close()]] == plain
    late._session._budget = Budget()  # type: ignore[union-attr]
    assert [each.text for each in [*late.push(""), *late.close()]] == plain


async def test_t8_async_and_batch_have_deadlines_too() -> None:
    aligner = scripted_aligner(slow_at("SLOW", 0.8))
    correction = await aligner.acorrect("Q?", "A SLOW bad.", on_error="pass_through", sentence_seconds=0.05)
    assert correction.findings[0].check == "deadline"
    pairs = [("Q?", "A bad."), ("Q?", "A SLOW bad."), ("Q?", "Also bad.")]
    found = await asyncio.to_thread(
        lambda: aligner.correct_batch(pairs, on_error="withhold", sentence_seconds=0.3)
    )
    assert [each.text for each in found] == ["A good.", WITHHELD_TEXT, "Also good."]


def test_without_a_deadline_no_thread_is_started() -> None:
    threads: set[int] = set()

    def rule(question: str, prefix: str, sentence: str) -> str:
        threads.add(threading.get_ident())
        return sentence

    scripted_aligner(rule).correct("Q?", "One. Two.")
    assert threads == {threading.get_ident()}
    scripted_aligner(rule).correct("Q?", "One. Two.", sentence_seconds=5.0)
    assert len(threads) > 1


@pytest.mark.parametrize("name", ["sentence_seconds", "answer_seconds"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_a_deadline_must_be_a_time(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        scripted_aligner(corrected).stream("Q?", **{name: value})  # type: ignore[arg-type]


def test_what_a_job_raises_is_raised_where_it_is_waited_for() -> None:
    def job() -> None:
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        Deadline(5.0).wait_for(job)


def test_an_interrupt_while_waiting_stops_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    deadline = Deadline(60.0)

    def job() -> None:
        while True:
            time.sleep(0.01)
            deadline.check()

    def interrupted(self: threading.Event, timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    # A thread waits for its start with an event, too.
    real = threading.Event.wait
    monkeypatch.setattr(
        threading.Event,
        "wait",
        lambda self, timeout=None: (interrupted if timeout and timeout > 1 else real)(self, timeout),
    )
    with pytest.raises(KeyboardInterrupt):
        deadline.wait_for(job)
    assert gone(before)


AT_EXIT = """
from aligner_integrations import Aligner
aligner = Aligner.from_pretrained()
answer = "The sum of 12 and 13 is 26, and that is so. " * 30
for _ in range(3):
    aligner.correct("What is 12 + 13? " * 100, answer, on_error="pass_through", answer_seconds=0.01)
print("done")
"""


def test_a_program_may_end_while_a_late_correction_still_runs() -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


# T9: the circuit breaker.


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Model:
    """A rule that fails while `down`, and counts how often it is asked."""

    def __init__(self) -> None:
        self.down = True
        self.asked = 0
        self._lock = threading.Lock()

    def __call__(self, question: str, prefix: str, sentence: str) -> str:
        with self._lock:
            self.asked += 1
        if self.down:
            raise RuntimeError("model down")
        return corrected(question, prefix, sentence)


def guarded(model: Callable[[str, str, str], str], breaker: CircuitBreaker) -> Aligner:
    return scripted_aligner(model, breaker=breaker)


def test_t9_it_opens_probes_and_closes(caplog: pytest.LogCaptureFixture) -> None:
    clock, model = Clock(), Model()
    breaker = CircuitBreaker(failures=3, reset_seconds=10.0, clock=clock)
    aligner = guarded(model, breaker)
    with caplog.at_level(logging.INFO, logger="aligner_integrations.resilience"):
        for _ in range(3):
            assert breaker.state == "closed"
            with pytest.raises(CorrectionFailedError, match="RuntimeError"):
                aligner.correct("Q?", "A bad.")
        assert breaker.state == "open"
        with pytest.raises(CorrectionFailedError, match="circuit open after 3"):
            aligner.correct("Q?", "A bad.")
        assert model.asked == 3
        clock.now = 10.0
        assert breaker.state == "half_open"
        with pytest.raises(CorrectionFailedError, match="RuntimeError"):
            aligner.correct("Q?", "A bad.")  # the probe
        assert (breaker.state, model.asked) == ("open", 4)
        clock.now = 20.0
        model.down = False
        assert aligner.correct("Q?", "A bad.").text == "A good."
        assert breaker.state == "closed"
    assert [each.levelname for each in caplog.records] == ["WARNING", "WARNING", "INFO"]
    assert "bad" not in caplog.text
    model.down = True
    for _ in range(2):  # it counts from 0 again
        with pytest.raises(CorrectionFailedError, match="RuntimeError"):
            aligner.correct("Q?", "A bad.")
    assert breaker.state == "closed"


def test_t9_a_success_in_between_counts_from_zero() -> None:
    model = Model()
    breaker = CircuitBreaker(failures=2)
    aligner = guarded(model, breaker)
    for _ in range(5):
        model.down = True
        with pytest.raises(CorrectionFailedError, match="RuntimeError"):
            aligner.correct("Q?", "A bad.")
        model.down = False
        aligner.correct("Q?", "A bad.")
    assert breaker.state == "closed"


def test_t9_timeouts_count_and_input_that_is_too_long_does_not() -> None:
    breaker = CircuitBreaker(failures=2)
    aligner = guarded(slow_at("SLOW", 0.2), breaker)
    for _ in range(2):
        with pytest.raises(CorrectionTimeoutError):
            aligner.correct("Q?", "SLOW.", sentence_seconds=0.02)
    assert breaker.state == "open"
    for _ in range(3):
        with pytest.raises(InputTooLongError), (other := CircuitBreaker(failures=1)).around():
            raise InputTooLongError("too long")
    assert other.state == "closed"


def test_t9_a_probe_that_says_nothing_makes_room_for_the_next() -> None:
    clock = Clock()
    breaker = CircuitBreaker(failures=1, reset_seconds=1.0, clock=clock)
    with pytest.raises(CorrectionFailedError), breaker.around():
        raise CorrectionFailedError("down")
    clock.now = 1.0
    with pytest.raises(KeyboardInterrupt), breaker.around():
        raise KeyboardInterrupt
    assert breaker.state == "half_open"
    with breaker.around():
        pass
    assert breaker.state == "closed"


@pytest.mark.parametrize("kind", ["threads", "tasks"])
async def test_t9_of_64_one_probes_and_no_sentence_is_lost(kind: str) -> None:
    clock = Clock()
    breaker = CircuitBreaker(failures=5, reset_seconds=1.0, clock=clock)
    lock, asked, gate = threading.Lock(), [0], threading.Event()
    gate.set()
    down = [True]

    def rule(question: str, prefix: str, sentence: str) -> str:
        with lock:
            asked[0] += 1
        gate.wait(20)
        if down[0]:
            raise RuntimeError("model down")
        return corrected(question, prefix, sentence)

    aligner = guarded(rule, breaker)
    text = "One bad. Two bad. Three bad. "

    def one(number: int) -> tuple[str, str, list[str]]:
        segments = list(aligner.correct_stream(f"Q{number}?", [text], on_error="pass_through"))
        details = [finding.detail for each in segments for finding in each.findings]
        return "".join(each.original for each in segments), "".join(each.text for each in segments), details

    async def all_64() -> list[tuple[str, str, list[str]]]:
        with ThreadPoolExecutor(64) as pool:
            if kind == "threads":
                return await asyncio.to_thread(lambda: list(pool.map(one, range(64))))
            loop = asyncio.get_running_loop()
            return await asyncio.gather(*(loop.run_in_executor(pool, one, number) for number in range(64)))

    found = await all_64()
    assert all((original, shown) == (text, text) for original, shown, _ in found)
    assert breaker.state == "open"
    assert 5 <= asked[0] < 5 + 64  # what was under way when it opened may have asked
    # Half open: while the probe is under way nobody else gets to the model.
    asked[0], down[0], clock.now = 0, False, 1.0
    gate.clear()
    waiting = asyncio.create_task(all_64())
    while True:
        await asyncio.sleep(0.01)
        if asked[0]:
            break
    await asyncio.sleep(0.3)
    assert asked[0] == 1
    assert breaker.state == "half_open"
    gate.set()
    found = await waiting
    assert breaker.state == "closed"
    refused = [detail for _, _, details in found for detail in details]
    assert all(original == text for original, _, _ in found)
    assert all("circuit open" in detail for detail in refused)
    # A sentence is shown as it was or corrected, each once, never lost.
    for _, shown, details in found:
        assert shown.replace("good", "bad") == text
        assert shown.count("good") == 3 - len(details)


def test_options_share_the_breaker_and_the_policy_applies() -> None:
    breaker = CircuitBreaker(failures=1)
    aligner = guarded(Model(), breaker)
    assert aligner.with_options(safeguards="keep_original").breaker is breaker
    correction = aligner.correct("Q?", "One bad. Two bad.", on_error="withhold")
    assert correction.text == f"{WITHHELD_TEXT} {WITHHELD_TEXT}"
    assert "circuit open" in correction.findings[-1].detail
    assert "breaker=CircuitBreaker(failures=1, reset_seconds=30, state='open')" in repr(aligner)
    assert Aligner.from_pretrained(breaker=breaker).breaker is breaker


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"failures": 0}, "failures"), ({"failures": 1.5}, "failures"), ({"reset_seconds": 0}, "reset_seconds")],
)
def test_a_breaker_checks_its_arguments(arguments: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        CircuitBreaker(**arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="breaker"):
        guarded(corrected, "yes")  # type: ignore[arg-type]


def test_a_dropped_correction_is_not_kept_in_memory() -> None:
    """What was left behind goes once its thread has ended."""
    aligner = scripted_aligner(slow_at("SLOW", 0.05))
    for _ in range(20):
        aligner.correct("Q?", "SLOW.", on_error="pass_through", sentence_seconds=0.005)
    before = {thread for thread in threading.enumerate() if thread.name != "aligner-correction"}
    assert gone(before)
    gc.collect()
    assert sum(thread.is_alive() for thread in resilience._behind) == 0


def test_the_policy_logs_no_text(caplog: pytest.LogCaptureFixture) -> None:
    policy = ErrorPolicy("pass_through")
    policy.recover(CorrectionTimeoutError("late"), "SECRET")
    assert "SECRET" not in caplog.text
    assert "CorrectionTimeoutError" in caplog.text
