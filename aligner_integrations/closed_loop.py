"""The closed loop: upstream goes on from the corrected text, not from what it wrote itself.

This is Stream Aligner's own method (AAAI 2025, section 3): sentence k is corrected, and sentence k + 1 is
written after the corrected one. Here upstream is interrupted only where a sentence did change; the paper's
scripts ask anew after every sentence. While a sentence is corrected upstream writes on; what it writes is
kept if the sentence stays as it is, and thrown away if not.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self, TypeAlias

from aligner_integrations.aligner import Aligner
from aligner_integrations.continuation import Repetition
from aligner_integrations.correction import Segment
from aligner_integrations.read_ahead import READ_AHEAD, read_ahead
from aligner_integrations.resilience import WITHHELD_TEXT, OnError

if TYPE_CHECKING:
    from types import TracebackType

    from aligner_integrations.stream import StreamCorrector

MAX_RESTARTS = 8
_BREAK = re.compile(r"\r?\n")

# Given the question and the text so far (empty at first), the chunks of what comes after it.
Upstream: TypeAlias = Callable[[str, str], Iterable[str]]


class LoopState:
    """One answer whose upstream is asked anew after each sentence that changed.

    Who drives it asks upstream, feeds what comes, and takes the steps that wait. Once it is `stale`, what
    upstream is still writing follows text that nobody will see: close it, call `restart`, and ask for what
    comes after the text that was shown, without the white space at its end, because most models continue
    badly after that. At the end of upstream call `end`.

    Where a sentence was dropped, upstream is not asked anew: what it is to continue is what it was. It is
    left alone, and sentences are corrected on their way out only, after `max_restarts`, and once it says a
    sentence again that led to a restart before: it makes no progress.

    With `repeats` what upstream repeats of the shown text, when it goes on, is removed.
    """

    def __init__(
        self, corrector: StreamCorrector, *, max_restarts: int = MAX_RESTARTS, repeats: bool = False
    ) -> None:
        if max_restarts < 0:
            raise ValueError(f"max_restarts must be at least 0, got {max_restarts}")
        self._corrector = corrector
        self._repeats = repeats
        self._shown = ""
        self._repetition: Repetition | None = None
        self._lead: str | None = None  # at a seam: the white space with which upstream goes on
        self._skipped = 0
        self._interrupted: set[str] = set()  # the sentences that led to a restart, as upstream wrote them
        self._ended = False
        self.left = max_restarts  # restarts that may still come
        self.restarts = 0
        self.stale = False

    @property
    def waiting(self) -> bool:
        """Whether there is anything for `step` to do."""
        return not self.stale and self._corrector.waiting

    @property
    def prefix(self) -> str:
        """What was shown so far, less the white space at its end: what upstream is to go on from."""
        return self._shown.rstrip()

    def feed(self, text: str) -> bool:
        """Take text of upstream; return whether anything waits for `step`."""
        if self._repetition is not None:
            taken = len(text) + len(self._repetition.held)
            text = self._repetition.feed(text)
            if self._repetition.held:
                return self.waiting
            self._skipped += taken - len(text)
            self._repetition = None
        if self._lead is not None:
            rest = text.lstrip()
            self._lead += text[: len(text) - len(rest)]
            if not rest:
                return self.waiting
            text = self._join() + rest
        if text:
            self._corrector.feed(text)
        return self.waiting

    def step(self) -> Segment:
        """Correct the next sentence that waits; raises as `StreamCorrector.step` does."""
        segment = self._corrector.step()
        self._shown += segment.text
        said = " ".join(segment.original.split())
        if said in self._interrupted:
            self.left = 0
        # After the last sentence of an answer there is nothing that could follow from it.
        is_last = self._ended and not self._corrector.waiting
        # A dropped one leaves the prefix as it was: upstream would say the same again.
        is_dropped = not segment.text.strip()
        self.stale = segment.changed and self.left > 0 and not is_last and not is_dropped
        if self.stale:
            self._interrupted.add(said)
        return segment

    def push(self, text: str) -> list[Segment]:
        """Take text and all steps up to where the loop is stale; return what they give."""
        self.feed(text)
        return self._steps()

    def restart(self) -> None:
        """Throw away what upstream wrote after the sentence that changed."""
        self._corrector.discard()
        self._lead = ""
        self._repetition = Repetition(self._shown) if self._repeats else None
        self._skipped = 0
        self._ended = self.stale = False
        self.left -= 1
        self.restarts += 1

    def take_skipped(self) -> int:
        """Return how many characters at the seam are not part of the answer; they are counted once."""
        skipped, self._skipped = self._skipped, 0
        return skipped

    def release(self) -> list[Segment]:
        """End the answer; return what is left of it as it came, uncorrected."""
        self._feed_seam()
        return self._corrector.release()

    def end(self, *, last: bool = True) -> bool:
        """Take it that upstream has ended; return whether anything waits for `step`.

        Without `last` it has not: what it writes now is no prose, but follows from what was.
        """
        self._ended = last
        self._feed_seam()
        self._corrector.end()
        return self.waiting

    def close(self) -> list[Segment]:
        """End the answer; return the steps that wait, up to where the loop is stale."""
        if self.stale:
            return []
        self.end()
        return self._steps()

    def _steps(self) -> list[Segment]:
        segments = []
        while self.waiting:
            segments.append(self.step())
        return segments

    def _feed_seam(self) -> None:
        """Take it that upstream says no more at the seam: what was held of it is a part of the answer."""
        repetition, self._repetition = self._repetition, None
        if repetition is not None and (held := repetition.end()):
            self.feed(held)
        if joint := self._join():
            self._corrector.feed(joint)

    def _join(self) -> str:
        """Return what is still to be shown of the white space that upstream wrote at a seam.

        A space more or less is nothing; a new line, and how far it is indented, is.
        """
        lead, self._lead = self._lead or "", None
        tail = self._shown[len(self._shown.rstrip()) :]
        breaks = [found.start() for found in _BREAK.finditer(lead)]
        shown = tail.count("\n")
        if not tail or (breaks and lead.startswith(tail)):
            kept = lead[len(tail) :]
        else:
            kept = lead[breaks[shown] :] if len(breaks) > shown else ""
        self._skipped += len(lead) - len(kept)
        return kept


@dataclass(slots=True)
class LoopStats:
    """What the answer of a closed loop has cost so far.

    Attributes:
        rounds: How often upstream was asked.
        requested_chunks: Chunks that upstream gave, what was read ahead included; of an upstream that gives
            token by token, its tokens.
        requested_chars: The characters of them.
        shown_chars: Characters that were shown, corrected.
        used_chars: Characters of upstream that are part of the answer, as upstream wrote them.
        waiting_chunks: Chunks that came while who reads the segments had none to read.
        waiting_seconds: How long that was, corrections included.
    """

    rounds: int = 0
    requested_chunks: int = 0
    requested_chars: int = 0
    shown_chars: int = 0
    used_chars: int = 0
    waiting_chunks: int = 0
    waiting_seconds: float = 0.0

    @property
    def restarts(self) -> int:
        """How often upstream was interrupted and asked anew."""
        return max(self.rounds - 1, 0)

    @property
    def thrown_away_chars(self) -> int:
        """What upstream gave and nobody will see: it followed a sentence that changed, or was said twice.

        While the answer is still coming, what waits counts too.
        """
        return self.requested_chars - self.used_chars

    def note(self, text: str) -> str:
        """Count a chunk that upstream gave, and return it."""
        self.requested_chunks += 1
        self.requested_chars += len(text)
        return text

    def show(self, segment: Segment) -> None:
        """Count a segment that is shown."""
        self.shown_chars += len(segment.text)
        self.used_chars += len(segment.original)


class LoopStream(Iterator[Segment]):
    """The corrected segments of one answer, as they are ready; `stats` say what they cost so far.

    Closing it, or leaving it as a context manager, closes upstream; nothing goes on behind it.
    """

    def __init__(self, ask: Callable[[str], Iterable[str]], state: LoopState, size: int) -> None:
        self.stats = LoopStats()
        self._ask = ask
        self._state = state
        self._size = size
        self._segments = self._run()

    def __next__(self) -> Segment:
        began, come = time.perf_counter(), self.stats.requested_chunks
        try:
            return next(self._segments)
        finally:
            self.stats.waiting_seconds += time.perf_counter() - began
            self.stats.waiting_chunks += self.stats.requested_chunks - come

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ask for no more."""
        self._segments.close()

    def _run(self) -> Generator[Segment]:
        state = self._state
        while True:
            ready: Segment | None = None
            with closing(read_ahead(self._read(), self._size)) as chunks:
                for ready in self._steps(chunks):
                    if state.stale:
                        break  # and upstream is closed before anything else
                    yield ready
            if not state.stale or ready is None:
                return
            yield ready
            state.restart()

    def _steps(self, chunks: Iterable[str]) -> Generator[Segment]:
        """Yield the segments of one round; the last of them may be the one that makes it stale."""
        for chunk in chunks:
            self._state.feed(chunk)
            yield from self._waiting()
        self._state.end()
        yield from self._waiting()

    def _waiting(self) -> Generator[Segment]:
        while self._state.waiting:
            segment = self._state.step()
            self.stats.show(segment)
            yield segment

    def _read(self) -> Generator[str]:
        """Yield what upstream gives; this runs in the thread that reads ahead."""
        self.stats.rounds += 1
        said = iter(self._ask(self._state.prefix))
        try:
            for chunk in said:
                yield self.stats.note(chunk)
        finally:
            if isinstance(said, Generator):
                said.close()


class ClosedLoop:
    """An upstream model that goes on from the corrected text, and the aligner that corrects it.

    Any number of threads may share it.

    Args:
        upstream: Given the question and the text so far (empty at first), it returns the chunks of what comes
            after it. A generator is closed when no more of it is wanted. It runs in a thread of its own.
        aligner: What corrects: one of sentences. With one of whole answers nothing is ever asked anew.
        max_restarts: How often an answer may be interrupted.
        repeats: Whether upstream may repeat, when it goes on, what was shown before; that is removed.
        read_ahead: How many chunks upstream may be ahead of the corrections; with 0 it waits for them.
        feedback: Tells the aligner what to look for.
        on_error: What a failed correction does: `"raise"`, `"pass_through"` (the original is shown) or
            `"withhold"` (`withheld_text` is shown in its place).
        withheld_text: Stands for a sentence that was withheld.
        sentence_seconds: How long each correction may take; a late one has failed.
        answer_seconds: How long all corrections of an answer may take together.
        sink: Called with every segment once it is corrected.
    """

    def __init__(
        self,
        upstream: Upstream,
        aligner: Aligner,
        *,
        max_restarts: int = MAX_RESTARTS,
        repeats: bool = False,
        read_ahead: int = READ_AHEAD,
        feedback: str = "",
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
        sentence_seconds: float | None = None,
        answer_seconds: float | None = None,
        sink: Callable[[Segment], None] | None = None,
    ) -> None:
        if not callable(upstream):
            kind = type(upstream).__name__
            raise TypeError(f"upstream must be a callable that takes a question and a prefix, got {kind}")
        if not isinstance(aligner, Aligner):
            raise TypeError(f"aligner must be an Aligner, got {type(aligner).__name__}")
        if read_ahead < 0:
            raise ValueError(f"read_ahead must be at least 0 (chunks), got {read_ahead}")
        self._upstream = upstream
        self._read_ahead = read_ahead
        self._correct = partial(
            aligner.stream,
            feedback=feedback,
            on_error=on_error,
            withheld_text=withheld_text,
            sentence_seconds=sentence_seconds,
            answer_seconds=answer_seconds,
            sink=sink,
        )
        self._begin = partial(LoopState, max_restarts=max_restarts, repeats=repeats)
        self._begin(self._correct(""))  # checks the options

    def stream(self, question: str) -> LoopStream:
        """Return the corrected segments of an answer to `question`; upstream is asked for them as they go."""
        state = self._begin(self._correct(question))
        return LoopStream(partial(self._upstream, question), state, self._read_ahead)
