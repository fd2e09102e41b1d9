"""One text of an answer: pieces as they arrive in, corrected pieces out."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import aclosing
from typing import Literal, TypeAlias

from aligner_integrations.closed_loop import MAX_RESTARTS, LoopState
from aligner_integrations.correction import Segment
from aligner_integrations.llama_index.instrumentation import CorrectionSpan
from aligner_integrations.llama_index.parts import PartKind, PartReader, Protocol
from aligner_integrations.options import CorrectionOptions
from aligner_integrations.stream import StreamCorrector

Sink: TypeAlias = Callable[[Segment], None]


class AnswerText:
    """A text that is corrected while it comes. Belongs to one text.

    Feed what arrives and take the steps that wait; each gives text that can be shown. Feeding is fast;
    a step may load a model or run one. An agent's `protocol` says what is no prose; without `thoughts` a
    ReAct agent's thoughts stay as they are, too. With `closed` the text becomes `stale` where upstream has
    to be asked anew (see `LoopState`).
    """

    def __init__(
        self,
        options: CorrectionOptions,
        question: str,
        span: CorrectionSpan,
        *,
        sink: Sink | None = None,
        thoughts: bool = True,
        protocol: Protocol | None = None,
        closed: bool = False,
        max_restarts: int = MAX_RESTARTS,
        repeats: bool = False,
    ) -> None:
        self._options = options
        self._question = question
        self.span = span
        self._sink = sink
        self._thoughts = thoughts
        self._closed = closed
        self._repeats = repeats
        self.restarts = max_restarts  # that are left
        self._reader = PartReader(protocol)
        self._left = False
        self._corrector: StreamCorrector | LoopState | None = None
        self._parts: deque[tuple[PartKind | Literal["end", "leave"], str]] = deque()

    @property
    def stale(self) -> bool:
        """Whether upstream is writing what follows text that nobody will see."""
        return isinstance(self._corrector, LoopState) and self._corrector.stale

    @property
    def waiting(self) -> bool:
        """Whether there is anything for `step` to do."""
        if self.stale:
            return False
        return bool(self._parts) or (self._corrector is not None and self._corrector.waiting)

    def feed(self, text: str) -> None:
        """Take text."""
        if self._left:
            self._parts.append(("as it is", text))
            return
        for kind, part in self._reader.read(text):
            self._take(kind, part)

    def end(self) -> None:
        """Take it that no more text comes, or that what comes is another text."""
        self._take_rest()
        self._parts.append(("end", ""))

    def leave(self) -> None:
        """Leave what is not a whole sentence yet, and all that comes, as it is."""
        self._take_rest()
        self._parts.append(("leave", ""))
        self._left = True

    def restart(self, shown: str) -> None:
        """Go on after `shown`, which ends with the sentence that made the text stale."""
        self._parts.clear()
        self._reader.rewind(shown)
        assert isinstance(self._corrector, LoopState)
        self._corrector.restart()
        self.restarts = self._corrector.left

    def step(self) -> str:
        """Do the next thing that waits and return what can be shown of it, which may be nothing.

        Raises:
            CorrectionFailedError: the model failed and `on_error` is `"raise"`.
        """
        if self._corrector is not None and self._corrector.waiting:
            return self._step(self._corrector)
        kind, part = self._parts[0]
        if self._is_prose(kind):
            self._open().feed(part)
        elif kind == "leave":
            part = self._release()
        elif self._corrector is not None and _end(self._corrector, last=kind == "end"):
            return self._step(self._corrector)
        else:
            self._corrector = None
        self._parts.popleft()
        if self._is_prose(kind):
            return ""
        if kind != "leave":  # what is left was noted sentence by sentence
            self.span.pass_by(part)
        return part

    def _step(self, corrector: StreamCorrector | LoopState) -> str:
        shown = corrector.step().text
        if isinstance(corrector, LoopState):
            self.restarts = corrector.left
        return shown

    def _is_prose(self, kind: str) -> bool:
        return kind == "prose" or (kind == "thought" and self._thoughts)

    def _take(self, kind: PartKind, part: str) -> None:
        """Hand prose on at once where its corrector is open and nothing comes before it."""
        if self._is_prose(kind) and self._corrector is not None and not self._parts:
            self._corrector.feed(part)
        else:
            self._parts.append((kind, part))

    def _take_rest(self) -> None:
        for kind, part in self._reader.read("", last=True):
            self._take(kind, part)

    def _open(self) -> StreamCorrector | LoopState:
        if self._corrector is None:
            self.span.begin()
            corrector = self._options.open(self._question, self._note)
            self._corrector = (
                LoopState(corrector, max_restarts=self.restarts, repeats=self._repeats)
                if self._closed
                else corrector
            )
        return self._corrector

    def _release(self) -> str:
        corrector, self._corrector = self._corrector, None
        return "".join(segment.text for segment in corrector.release()) if corrector else ""

    def _note(self, segment: Segment) -> None:
        placed = self.span.note(segment)
        if self._sink is not None:
            self._sink(placed)


def _end(corrector: StreamCorrector | LoopState, *, last: bool) -> bool:
    return corrector.end(last=last) if isinstance(corrector, LoopState) else corrector.end()


def steps(text: AnswerText) -> Generator[str]:
    """Do all that waits, in place; yield what can be shown."""
    while text.waiting:
        if shown := text.step():
            yield shown


async def asteps(text: AnswerText) -> AsyncGenerator[str]:
    """Do all that waits in threads, so that the event loop goes on; yield what can be shown."""
    while text.waiting:
        if shown := await asyncio.to_thread(text.step):
            yield shown


def read(tokens: Iterator[str], text: AnswerText) -> Generator[str]:
    """Yield the tokens of `text` corrected; closing the generator closes `tokens`."""
    with text.span.around():
        try:
            for token in tokens:
                if isinstance(token, str):
                    text.feed(token)
                    yield from steps(text)
                else:  # an engine with an `output_cls` streams objects: data
                    yield token
            text.end()
            yield from steps(text)
        finally:
            if isinstance(tokens, Generator):
                tokens.close()


async def aread(tokens: AsyncGenerator[str], text: AnswerText) -> AsyncGenerator[str]:
    """Yield the tokens of `text` corrected; closing the generator closes `tokens`."""
    with text.span.around():
        async with aclosing(tokens):
            async for token in tokens:
                if isinstance(token, str):
                    text.feed(token)
                    async for shown in asteps(text):
                        yield shown
                else:
                    yield token
        text.end()
        async for shown in asteps(text):
            yield shown
