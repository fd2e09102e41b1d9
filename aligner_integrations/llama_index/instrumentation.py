"""What observability sees of a correction: two events and a span on LlamaIndex's dispatcher."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast
from uuid import uuid4

from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.dispatcher import active_instrument_tags, instrument_tags
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.instrumentation.span import active_span_id

from aligner_integrations.correction import Correction, DecodeStats, Edit, Finding, Segment

T = TypeVar("T")

ORIGINAL = {"aligner": "original"}  # the tag of what the wrapped LLM or engine says itself

_dispatcher = get_dispatcher(__name__)


class CorrectionStart(BaseEvent):
    """A text is about to be corrected.

    Attributes:
        question: What the text answers.
        surface: The class that corrects it.
        node_id: The node that it is the text of, if it is one's.
    """

    question: str
    surface: str
    node_id: str | None = None

    @classmethod
    def class_name(cls) -> str:
        return "CorrectionStart"


class CorrectionEnd(BaseEvent):
    """A text was corrected; what it was before is not told.

    Attributes:
        question: What the text answers.
        surface: The class that corrected it.
        node_id: The node that it is the text of, if it is one's.
        text: What was shown.
        edits: What was replaced, as character spans of the original.
        findings: What checks noticed.
        stats: What each sentence cost, in order; one for a node.
        complete: Whether the text came to its end; a stream may be closed early, or fail.
    """

    question: str
    surface: str
    node_id: str | None = None
    text: str
    edits: tuple[Edit, ...] = ()
    findings: tuple[Finding, ...] = ()
    stats: tuple[DecodeStats, ...] = ()
    complete: bool = True

    @classmethod
    def class_name(cls) -> str:
        return "CorrectionEnd"


class CorrectionSpan:
    """The span of one correction, with its events; a child of the span in which it was made.

    Nothing is sent before `begin`, and nothing after the first of `end` and `drop`.
    """

    def __init__(self, surface: object, question: str, *, node_id: str | None = None) -> None:
        self._surface = surface
        self._about: dict[str, Any] = {
            "question": question,
            "surface": type(surface).__name__,
            "node_id": node_id,
        }
        self._id = f"{type(surface).__name__}.correct-{uuid4()}"
        self._parent = active_span_id.get()
        self._bound = inspect.signature(lambda question: None).bind(question)
        self._segments: list[Segment] = []
        self._shown: list[str] = []
        self._offset = 0  # in the original
        self._state: Literal["new", "begun", "over"] = "new"

    def begin(self) -> None:
        """Send the start."""
        if self._state != "new":
            return
        self._state = "begun"
        _dispatcher.span_enter(
            id_=self._id,
            bound_args=self._bound,
            instance=self._surface,
            parent_id=self._parent,
            tags=active_instrument_tags.get(),
        )
        _dispatcher.event(CorrectionStart(**self._about, span_id=self._id))

    def note(self, segment: Segment) -> Segment:
        """Take a sentence that was corrected; return it with its place in the whole answer."""
        placed = replace(segment, index=len(self._segments), start=self._offset)
        self._segments.append(placed)
        self._shown.append(segment.text)
        self._offset += len(segment.original)
        return placed

    def pass_by(self, text: str) -> None:
        """Take text that is shown as it is."""
        self._shown.append(text)
        self._offset += len(text)

    def end(self, correction: Correction | None = None, *, complete: bool = True) -> None:
        """Send the end: of what was noted, or of a text that was corrected as a whole."""
        if self._state != "begun":
            return
        text = self._send_end(correction, complete)
        _dispatcher.span_exit(id_=self._id, bound_args=self._bound, instance=self._surface, result=text)

    @contextmanager
    def around(self) -> Iterator[None]:
        """End the span with what is done inside: well, or early, or with an error."""
        try:
            yield
        except GeneratorExit:  # the reader has seen enough
            self.end(complete=False)
            raise
        except BaseException as error:
            self.drop(error)
            raise
        self.end()

    def drop(self, error: BaseException) -> None:
        """Send the end of a correction that failed."""
        if self._state != "begun":
            return
        self._send_end(None, complete=False)
        _dispatcher.span_drop(id_=self._id, bound_args=self._bound, instance=self._surface, err=error)

    def _send_end(self, correction: Correction | None, complete: bool) -> str:
        self._state = "over"
        said = self._said() if correction is None else _said_of_whole(correction)
        _dispatcher.event(CorrectionEnd(**self._about, **said, complete=complete, span_id=self._id))
        return cast(str, said["text"])

    def _said(self) -> dict[str, Any]:
        return {
            "text": "".join(self._shown),
            "edits": tuple(
                Edit(segment.start + edit.start, segment.start + edit.end, edit.replacement)
                for segment in self._segments
                for edit in segment.edits
            ),
            "findings": tuple(finding for segment in self._segments for finding in segment.findings),
            "stats": tuple(segment.stats for segment in self._segments),
        }


def _said_of_whole(correction: Correction) -> dict[str, Any]:
    return {
        "text": correction.text,
        "edits": correction.edits,
        "findings": correction.findings,
        "stats": (correction.stats,),
    }


@contextmanager
def original() -> Iterator[None]:
    """Tag what is sent meanwhile as upstream's own: it is what nobody else gets to see."""
    with instrument_tags({**active_instrument_tags.get(), **ORIGINAL}):
        yield


def marked(items: Iterator[T]) -> Generator[T]:
    """Yield what upstream gives; what it sends to observability meanwhile is tagged as its own.

    The tag is there while upstream works, never while the reader does. Closing closes upstream.
    """
    try:
        while True:
            with original():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
    finally:
        if isinstance(items, Generator):
            with original():
                items.close()


async def amarked(items: AsyncIterator[T]) -> AsyncGenerator[T]:
    """Yield what upstream gives, as `marked` does."""
    try:
        while True:
            with original():
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
            yield item
    finally:
        if isinstance(items, AsyncGenerator):
            with original():
                await items.aclose()
