"""An answer that is still coming: whole sentences in, corrected segments out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Self

from aligner_integrations.aligner import Aligner, check_texts, has_words
from aligner_integrations.backends.base import Ids
from aligner_integrations.closed_loop import ClosedLoop as ClosedLoop
from aligner_integrations.correction import Correction, Finding, FinishReason, Segment, make_edits
from aligner_integrations.decode import PromptCache
from aligner_integrations.errors import AlignerError, InputTooLongError
from aligner_integrations.resilience import WITHHELD_TEXT, Budget, ErrorPolicy, OnError
from aligner_integrations.safeguards import is_refusal
from aligner_integrations.safeguards.held import OpenBlocks
from aligner_integrations.sentences import Piece, SentenceBuffer, split_margins

# A correction may be this many tokens longer than its sentence before the prefix has to make room.
_SPARE_TOKENS = 64


class SentenceSession:
    """One answer under a sentence-level model: its question, the accepted prefix, and the cache.

    The prompt holds question and prefix as far as the context reaches. When it is full, whole oldest
    pieces leave in one go until the prefix takes at most half of its room, so that the cache is
    rebuilt rarely.
    """

    def __init__(
        self,
        aligner: Aligner,
        question: str,
        feedback: str = "",
        cache: PromptCache | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._aligner = aligner
        self._question = question
        self._question_ids = aligner.encode_text(question)
        self._feedback = feedback
        self._cache = PromptCache(aligner.backend) if cache is None else cache
        self._budget = budget or Budget()
        self._window: deque[tuple[str, int]] = deque()  # accepted pieces with their tokens
        self._held = 0  # tokens in the window
        self._refused = False
        self._blocks = OpenBlocks()

    def accept(self, text: str) -> None:
        """Take a piece of the answer into the prefix: the reader has seen it."""
        tokens = len(self._aligner.encode_text(text))
        self._window.append((text, tokens))
        self._held += tokens
        self._blocks.take(text)
        # Once refused, what is left of a harmful answer may be dropped.
        self._refused = self._refused or is_refusal(split_margins(text)[1])

    def correct(self, piece: str) -> Correction:
        """Correct `piece` as the next sentence of the answer; it is not accepted yet.

        Only the core of prose is shown to the model: list marks and outer white space are put back.

        Raises:
            CorrectionFailedError: the model failed.
            CorrectionTimeoutError: the correction was late, or the answer's time is used up.
            InputTooLongError: the sentence and its correction alone exceed the context.
        """
        margins = split_margins(piece)
        core = margins[1]
        is_prose = not isinstance(piece, Piece) or piece.kind == "prose"
        if not is_prose or not has_words(core) or self._is_structure(piece):
            return self._aligner.untouched(self._question, str(piece))
        with self._budget.sentence() as deadline:
            reference = self._aligner.encode_text(core)
            prompt, findings = self._fit(core, len(reference))
            room = self._aligner.config.max_length - len(prompt)
            wanted = self._aligner.decode_config.max_new_tokens or 2 * len(reference) + _SPARE_TOKENS
            decoded = self._aligner.run(prompt, reference, min(wanted, room), self._cache, deadline)
        return self._aligner.finish(
            self._question, margins, reference, decoded, findings, may_be_empty=self._refused
        )

    def _is_structure(self, piece: str) -> bool:
        """Whether `piece` is a line of a formula or of JSON that takes several, which stay as they are."""
        actions = self._aligner.safeguard_policy.actions
        held = zip(("formula_changed", "json_changed"), self._blocks.holds(piece), strict=True)
        return any(inside and actions[check] == "keep_original" for check, inside in held)

    def _fit(self, core: str, tokens: int) -> tuple[Ids, tuple[Finding, ...]]:
        """Return the prompt for `core` with as much question and prefix as the context holds."""
        limit = self._aligner.config.max_length - tokens - _SPARE_TOKENS
        frame = len(self._aligner.encode_prompt("", "", core, self._feedback))
        if frame > limit:
            raise InputTooLongError(
                f"the sentence takes {frame} tokens in its frame and a correction up to "
                f"{tokens + _SPARE_TOKENS} more; the model's context has {self._aligner.config.max_length}"
            )
        room = limit - frame
        question, taken = self._fit_question(min(room, self._aligner.config.max_length // 2))
        if self._held > room - taken:
            self._drop_oldest((room - taken) // 2)
        prompt = self._encode(question, core)
        while len(prompt) > limit and self._window:  # joined text may take a few tokens more than its parts
            self._drop_oldest(self._held // 2)
            prompt = self._encode(question, core)
        if question == self._question:
            return prompt, ()
        detail = f"the question has {len(self._question_ids)} tokens; its last {taken} were read"
        return prompt, (Finding("question_truncated", detail, "accepted"),)

    def _fit_question(self, limit: int) -> tuple[str, int]:
        """Return the end of the question that takes at most `limit` tokens, and how many it takes."""
        tokenizer, ids = self._aligner.tokenizer, self._question_ids
        question, taken, keep = self._question, len(ids), limit
        while taken > limit:
            # Cut inside a character, the first one reads as broken; it goes.
            question = tokenizer.decode(ids[len(ids) - keep :]).lstrip("\ufffd")
            taken = len(self._aligner.encode_text(question))
            keep -= 1 + keep // 16
        return question, taken

    def _encode(self, question: str, core: str) -> Ids:
        prefix = "".join([text for text, _ in self._window]).strip()
        return self._aligner.encode_prompt(question, prefix, core, self._feedback)

    def _drop_oldest(self, target: int) -> None:
        while self._window and self._held > target:
            self._held -= self._window.popleft()[1]


class StreamCorrector:
    """Corrects one answer while it comes in. Belongs to one answer; the `Aligner` is shared.

    With a sentence-level model each sentence leaves as soon as it is complete. With an answer-level
    model everything is gathered and corrected once, by `close` (a finding, `corrected_at_end`, says
    so). Code and tables pass as they are.

    With `on_error="raise"` a failing sentence raises at once. Nothing is lost by it: segments that were
    finished before it in the same call come with the next `push` (`push("")` will do), and the failed
    sentence is then tried again. `close` raises as long as a sentence fails. With `"pass_through"` the
    original is shown, with `"withhold"` the `withheld_text`; a finding says so.

    A correction that is not done within `sentence_seconds`, or within what is left of `answer_seconds`, is
    dropped and counts as failed: a `CorrectionTimeoutError`, or a finding `deadline`. Once `answer_seconds`
    are used up, the sentences that are left fail at once. Only the time spent on corrections counts, not
    the time in which upstream writes. An answer-level model's one correction has the shorter of the two.
    With neither, no thread is started.

    A `sink` is called with every segment, once, when it is corrected.

    As a context manager it lets go of its state on leaving; text that was pushed but not closed is
    then not corrected any more.
    """

    def __init__(
        self,
        aligner: Aligner,
        question: str,
        *,
        feedback: str = "",
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
        sentence_seconds: float | None = None,
        answer_seconds: float | None = None,
        sink: Callable[[Segment], None] | None = None,
    ) -> None:
        check_texts(question=question, feedback=feedback)
        self._sink = sink
        self._aligner = aligner
        self._question = question
        self._feedback = feedback
        self._errors = ErrorPolicy(on_error, withheld_text, sentence_seconds, answer_seconds)
        self._buffer = SentenceBuffer()
        self._gathered: list[str] = []  # an answer-level model's whole answer
        self._session = (
            SentenceSession(aligner, question, feedback, budget=self._errors.budget())
            if aligner.granularity == "sentence"
            else None
        )
        self._pending: deque[str] = deque()  # whole sentences that wait for their correction
        self._ready: list[Segment] = []  # corrected, but not handed out because a later one failed
        self._count = 0
        self._offset = 0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def push(self, text: str) -> list[Segment]:
        """Take text as it arrives; return the sentences that it completes, corrected.

        Raises:
            ValueError: the stream is closed.
            CorrectionFailedError: the model failed and `on_error` is `"raise"`.
        """
        self._take(text)
        late = bool(self._ready)
        try:
            self._deliver()
        except AlignerError:
            # What an earlier call could not hand out goes first; the failure comes up again next time.
            if not late:
                raise
        delivered, self._ready = self._ready, []
        return delivered

    def feed(self, text: str) -> bool:
        """Take text as `push` does, but correct nothing yet; return whether anything waits for it.

        `push("")` then does the rest. So an event loop needs a thread only where a model has work.
        """
        self._take(text)
        return self.waiting

    @property
    def waiting(self) -> bool:
        """Whether there is anything for `step` to do."""
        return bool(self._pending or self._ready)

    def step(self) -> Segment:
        """Correct the next of the sentences that wait after `feed` or `end`, and no other.

        Raises:
            ValueError: no sentence waits.
            CorrectionFailedError: the model failed and `on_error` is `"raise"`; the sentence goes on waiting.
        """
        if self._ready:
            return self._ready.pop(0)
        for correction in self._corrections():
            return self._as_segment(correction)
        raise ValueError("no sentence waits; feed text, or end it")

    def end(self) -> bool:
        """Take it that no more text comes; return whether anything waits for `step`."""
        self._take_end()
        return self.waiting

    def discard(self) -> None:
        """Forget all text that is not corrected yet: the answer goes on in another way."""
        self._buffer = SentenceBuffer()
        self._pending.clear()
        self._gathered = []

    def release(self) -> list[Segment]:
        """End the answer; return what is left of it as it came, uncorrected."""
        if self._closed:
            return []
        self._take_end()
        note = Finding("left_alone", "released without a correction", "accepted")
        for piece in self._pending:
            self._ready.append(self._as_segment(self._aligner.untouched(self._question, str(piece), note)))
        delivered = self._ready
        self._release()
        return delivered

    def close(self) -> list[Segment]:
        """End the answer; return what is left of it, corrected. A second call returns nothing.

        Raises:
            CorrectionFailedError: the model failed and `on_error` is `"raise"`; the stream stays open.
        """
        if self._closed:
            return []
        self._take_end()
        self._deliver()
        delivered = self._ready
        self._release()
        return delivered

    def correct_chunks(self, chunks: Iterable[str]) -> Iterator[Segment]:
        """Yield the segments of an answer that comes in `chunks`, each as soon as it is corrected.

        Closing the iterator early closes `chunks` too, when it is a generator.
        """
        if not isinstance(chunks, Iterable):
            raise TypeError(f"chunks must be an iterable of str, got {type(chunks).__name__}")
        return self._each(iter(chunks))

    def _each(self, chunks: Iterator[str]) -> Iterator[Segment]:
        try:
            for chunk in chunks:
                self._take(chunk)
                for correction in self._corrections():
                    yield self._as_segment(correction)
            self._take_end()
            for correction in self._corrections():
                yield self._as_segment(correction)
        finally:
            self._release()
            if isinstance(chunks, Generator):
                chunks.close()

    def _take(self, text: str) -> None:
        if self._closed:
            raise ValueError("the stream is closed; make a new one for the next answer")
        check_texts(text=text)
        if self._session is None:
            self._gathered.append(text)
        else:
            self._pending += self._buffer.push(text)

    def _take_end(self) -> None:
        if self._session is None:
            whole, self._gathered = "".join(self._gathered), []
            self._pending += [whole] if whole else []
        else:
            self._pending += self._buffer.flush()

    def _deliver(self) -> None:
        for correction in self._corrections():
            self._ready.append(self._as_segment(correction))

    def _corrections(self) -> Iterator[Correction]:
        """Correct what waits, in order; a piece leaves the queue only once it is corrected."""
        while self._pending:
            correction = self._correct(self._pending[0])
            self._pending.popleft()
            if self._session is not None:
                self._session.accept(correction.text)
            yield correction

    def _correct(self, piece: str) -> Correction:
        try:
            if self._session is not None:
                return self._session.correct(piece)
            correction = self._aligner.correct(
                self._question,
                piece,
                feedback=self._feedback,
                sentence_seconds=self._errors.sentence_seconds,
                answer_seconds=self._errors.answer_seconds,
            )
            note = Finding("corrected_at_end", "the model corrects whole answers only", "accepted")
            return replace(correction, findings=(*correction.findings, note))
        except AlignerError as error:
            return stand_in(self._aligner, self._question, piece, error, self._errors)

    def _as_segment(self, correction: Correction) -> Segment:
        segment = Segment(
            original=correction.answer,
            text=correction.text,
            index=self._count,
            start=self._offset,
            edits=correction.edits,
            findings=correction.findings,
            stats=correction.stats,
        )
        self._count += 1
        self._offset += len(correction.answer)
        if self._sink is not None:
            self._sink(segment)
        return segment

    def _release(self) -> None:
        self._closed = True
        self._pending.clear()
        self._ready = []
        self._gathered = []


def stand_in(
    aligner: Aligner, question: str, piece: str, error: AlignerError, errors: ErrorPolicy
) -> Correction:
    """Return what is shown of a piece whose correction failed.

    Raises:
        AlignerError: `error` itself, when `errors` says so; a piece that is too long never raises.
    """
    if isinstance(error, InputTooLongError) and errors.on_error != "withhold":
        return aligner.untouched(question, str(piece), Finding("too_long", str(error), "kept_original"))
    lead, core, tail = split_margins(piece)
    shown, finding = errors.recover(error, core)
    text = lead + shown + tail
    same = aligner.untouched(question, str(piece), finding)
    reason: FinishReason = "deadline" if finding.check == "deadline" else same.stats.finish_reason
    stats = replace(same.stats, finish_reason=reason)
    return replace(same, text=text, edits=make_edits(piece, text), stats=stats)
