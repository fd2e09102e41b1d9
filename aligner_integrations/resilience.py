"""Faults: how long a correction may take, what is shown when it fails, and when not to try at all.

What is shown is the caller's choice, `on_error`; nothing is swallowed in silence. Nothing here knows what it
is that is called.
"""

from __future__ import annotations

import atexit
import contextvars
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal, TypeAlias, TypeVar, get_args

from aligner_integrations.correction import Finding
from aligner_integrations.errors import AlignerError, CorrectionFailedError, CorrectionTimeoutError

OnError: TypeAlias = Literal["raise", "pass_through", "withhold"]
T = TypeVar("T")

WITHHELD_TEXT = "[This part of the answer could not be checked.]"
_EXIT_SECONDS = 5.0  # the most that the end of the program waits for corrections that nobody waits for

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ErrorPolicy:
    """Decides for one answer, or one batch, what a failed correction shows. Logs the first failure only.

    A correction that is not done within `sentence_seconds`, or within what is left of the answer's
    `answer_seconds`, has failed.
    """

    on_error: OnError = "raise"
    withheld_text: str = WITHHELD_TEXT
    sentence_seconds: float | None = None
    answer_seconds: float | None = None
    _logged: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.on_error not in get_args(OnError):
            raise ValueError(f"on_error must be one of {', '.join(get_args(OnError))}; got {self.on_error!r}")
        if not isinstance(self.withheld_text, str):
            raise TypeError(f"withheld_text must be a str, got {type(self.withheld_text).__name__}")
        for name in ("sentence_seconds", "answer_seconds"):
            seconds = getattr(self, name)
            if seconds is not None and not is_seconds(seconds):
                raise ValueError(f"{name} must be a number of seconds above 0, or None; got {seconds!r}")

    def budget(self) -> Budget:
        """Return the time that one answer has."""
        return Budget(self.sentence_seconds, self.answer_seconds)

    def recover(self, error: AlignerError, original: str) -> tuple[str, Finding]:
        """Return the text to show in place of a correction, and the finding that says so.

        Raises:
            AlignerError: `error` itself, when `on_error` is `"raise"`.
        """
        if self.on_error == "raise":
            raise error
        if not self._logged:
            self._logged = True
            shown = "the original is shown" if self.on_error == "pass_through" else "the text is withheld"
            _log.warning("a correction failed with %s; %s", type(error).__name__, shown)
        check = "deadline" if isinstance(error, CorrectionTimeoutError) else "correction_failed"
        if self.on_error == "pass_through":
            return original, Finding(check, str(error), "kept_original")
        return self.withheld_text, Finding(check, str(error), "withheld")


def is_seconds(value: object) -> bool:
    """Whether `value` is a time that can be waited for: a finite number above 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= threading.TIMEOUT_MAX  # type: ignore[operator]


class Budget:
    """The time that the corrections of one answer may take, each and all; None sets no limit.

    Only the time spent on corrections counts, not the time in which upstream writes.
    """

    def __init__(self, sentence_seconds: float | None = None, answer_seconds: float | None = None) -> None:
        self._sentence = math.inf if sentence_seconds is None else sentence_seconds
        self._answer = answer_seconds
        self._left = math.inf if answer_seconds is None else answer_seconds

    @contextmanager
    def sentence(self) -> Iterator[Deadline | None]:
        """Count the time of the next correction; gives its deadline, or None where there is none.

        Raises:
            CorrectionTimeoutError: nothing is left for the answer.
        """
        if self._left <= 0:
            raise CorrectionTimeoutError(
                f"the {self._answer:g} s that the corrections of one answer may take are used up "
                "(answer_seconds); give it more, or take a faster model or provider"
            )
        if math.inf == self._sentence == self._left:
            yield None
            return
        started = monotonic()
        try:
            yield Deadline(min(self._sentence, self._left))
        finally:
            self._left -= monotonic() - started


class Deadline:
    """When one correction has to be done."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = monotonic() + seconds

    def check(self) -> None:
        """Raise a `CorrectionTimeoutError` once it has passed, or once nobody waits any more."""
        if monotonic() >= self._end:
            raise self._error()

    def wait_for(self, job: Callable[[], T]) -> T:
        """Do `job` in a thread and return what it returns, or raise what it raises.

        A job that is late is left to itself: it finds out at its next `check`, and ends. What it works on
        must not be used by anyone else then.

        Raises:
            CorrectionTimeoutError: the job is late.
        """
        done = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                results.append(job())
            except BaseException as error:  # the one who waits raises it
                errors.append(error)
            finally:
                done.set()

        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(work,), name="aligner-correction", daemon=True)
        thread.start()
        try:
            in_time = done.wait(max(self._end - monotonic(), 0.0)) or done.is_set()
        except BaseException:  # interrupted
            self._leave(thread)
            raise
        if not in_time:
            self._leave(thread)
            raise self._error()
        if errors:
            raise errors.pop()
        return results[0]

    def _leave(self, thread: threading.Thread) -> None:
        self._end = -math.inf
        _left_behind(thread)

    def _error(self) -> CorrectionTimeoutError:
        return CorrectionTimeoutError(
            f"a correction was not done within {self._seconds:.3g} s (sentence_seconds, or what was left of "
            "answer_seconds); give it more, or take a faster model or provider"
        )


class CircuitBreaker:
    """Stops asking a model that keeps failing, and tries again after a while. For any number of threads.

    Closed, corrections go through. After `failures` failed ones in a row, late ones included, it opens: for
    `reset_seconds` each correction fails at once. Then it is half open: one correction, the probe, goes
    through and the others go on failing; when the probe succeeds the breaker closes, else it opens again.
    Input that is too long says nothing about the model and does not count.

    Args:
        failures: so many in a row open it.
        reset_seconds: so long it stays open before a probe.
        clock: tells the time in seconds, for tests.
    """

    def __init__(
        self, failures: int = 5, reset_seconds: float = 30.0, *, clock: Callable[[], float] = monotonic
    ) -> None:
        if not isinstance(failures, int) or failures < 1:
            raise ValueError(f"failures must be a whole number from 1 on, got {failures!r}")
        if not is_seconds(reset_seconds):
            raise ValueError(f"reset_seconds must be a number of seconds above 0, got {reset_seconds!r}")
        self.failures = failures
        self.reset_seconds = reset_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._opened: float | None = None  # when, unless it is closed
        self._probing = False

    def __repr__(self) -> str:
        return (
            f"CircuitBreaker(failures={self.failures}, reset_seconds={self.reset_seconds:g}, "
            f"state={self.state!r})"
        )

    @property
    def state(self) -> str:
        """`"closed"`, `"open"`, or `"half_open"` when a probe is due or under way."""
        with self._lock:
            if self._opened is None:
                return "closed"
            return "half_open" if self._probing or self._wait() <= 0 else "open"

    @contextmanager
    def around(self) -> Iterator[None]:
        """Let one correction through and learn from what becomes of it.

        Raises:
            CorrectionFailedError: the breaker is open.
        """
        is_probe = self._admit()
        failed: bool | None = None  # unless it says something about the model
        try:
            yield
            failed = False
        except (CorrectionFailedError, CorrectionTimeoutError):
            failed = True
            raise
        finally:
            self._learn(failed, is_probe)

    def _wait(self) -> float:
        """Return how long it is to the next probe."""
        assert self._opened is not None
        return self._opened + self.reset_seconds - self._clock()

    def _admit(self) -> bool:
        """Return whether the correction is the probe."""
        with self._lock:
            if self._opened is None:
                return False
            wait = self._wait()
            if self._probing or wait > 0:
                when = "one correction is tried just now" if self._probing else f"next try in {wait:.3g} s"
                raise CorrectionFailedError(
                    f"circuit open after {self.failures} failed corrections in a row; {when}. The first "
                    "failures say what is wrong with the model; CircuitBreaker(failures=..., "
                    "reset_seconds=...) says when to try again"
                )
            self._probing = True
            return True

    def _learn(self, failed: bool | None, is_probe: bool) -> None:
        with self._lock:
            if is_probe:
                self._probing = False
                if failed is None:
                    return  # the next one is the probe
                self._in_a_row, self._opened = 0, self._clock() if failed else None
                if failed:
                    _log.warning("circuit open again: the probe failed")
                else:
                    _log.info("circuit closed: the probe succeeded")
            elif self._opened is None and failed is not None:  # what began before it opened says nothing new
                self._in_a_row = self._in_a_row + 1 if failed else 0
                if self._in_a_row >= self.failures:
                    self._opened = self._clock()
                    _log.warning(
                        "circuit open: %d corrections failed in a row; next try in %g s",
                        self._in_a_row,
                        self.reset_seconds,
                    )


_behind: set[threading.Thread] = set()
_behind_lock = threading.Lock()


def _left_behind(thread: threading.Thread) -> None:
    """Note a thread that nobody waits for: the end of the program must not pull the floor from under it."""
    with _behind_lock:
        if not _behind:
            atexit.unregister(_wait_at_exit)
            atexit.register(_wait_at_exit)
        _behind.difference_update([each for each in _behind if not each.is_alive()])
        _behind.add(thread)


def _wait_at_exit() -> None:
    end = monotonic() + _EXIT_SECONDS
    for thread in tuple(_behind):
        thread.join(max(end - monotonic(), 0.0))
