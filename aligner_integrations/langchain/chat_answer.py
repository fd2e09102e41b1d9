"""One answer of a wrapped chat model: its text corrected, with a receipt that says what that cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from langchain_core.messages import AIMessageChunk, BaseMessage

from aligner_integrations.correction import Segment
from aligner_integrations.langchain.jobs import Steps, inside
from aligner_integrations.langchain.messages import MessageStream, correct_message
from aligner_integrations.langchain.question import question_text
from aligner_integrations.options import CorrectionOptions
from aligner_integrations.stream import StreamCorrector


class ChatAnswer:
    """One answer to `messages`, whole or in chunks. Data (`structured`) is left as it is."""

    def __init__(
        self,
        options: CorrectionOptions,
        messages: list[BaseMessage],
        *,
        thoughts: bool,
        structured: bool,
        sink: Callable[[Segment], None] | None,
    ) -> None:
        self._options = options
        self._messages = messages
        self._thoughts = thoughts
        self._sink = inside(sink)
        self._left_alone = structured
        self._segments: list[Segment] = []
        self._stream = MessageStream(self._open, thoughts=thoughts)

    def push(self, chunk: BaseMessage) -> Steps[list[BaseMessage]]:
        """Take a chunk of the answer; what can be sent comes of it."""
        if self._left_alone:
            return [chunk]
        return (yield from self._stream.push(chunk))

    def close(self) -> Steps[list[BaseMessage]]:
        """End the answer; what is left of it comes of it."""
        return (yield from self._stream.close())

    def correct(self, message: BaseMessage) -> BaseMessage:
        """Return a finished answer corrected, with the receipt."""
        if not self._left_alone:
            message = correct_message(message, self._open, thoughts=self._thoughts)
        metadata = dict(message.response_metadata)
        for receipt in self.receipt():
            metadata |= receipt.response_metadata
        return message.model_copy(update={"response_metadata": metadata})

    def receipt(self) -> list[AIMessageChunk]:
        """Return a chunk without text that says what the correction cost; none if there was no text."""
        said: dict[str, Any]
        if self._left_alone:
            said = {"sentences": 0, "left_alone": "structured output"}
        elif not self._segments:
            return []
        else:
            said = _cost(self._segments) | {"on_error": self._options.on_error}
        return [AIMessageChunk(content="", response_metadata={"aligner": said})]

    def _open(self, text: str, message_id: str | None) -> StreamCorrector:
        """Return a corrector for one text of the answer."""
        return self._options.open(question_text(self._messages), self._note)

    def _note(self, segment: Segment) -> None:
        self._segments.append(segment)
        if self._sink is not None:
            self._sink(segment)


_FAILED = ("correction_failed", "deadline")


def _cost(segments: Sequence[Segment]) -> dict[str, Any]:
    stats = [segment.stats for segment in segments]
    return {
        "sentences": len(segments),
        "changed": sum(segment.changed for segment in segments),
        "failed": sum(any(f.check in _FAILED for f in s.findings) for s in segments),
        "forwards": sum(one.forwards for one in stats),
        "prompt_tokens": sum(one.prompt_tokens - one.cached_tokens for one in stats),
        "new_tokens": sum(one.new_tokens for one in stats),
        "seconds": sum(one.seconds for one in stats),
        "provider": stats[-1].provider,
    }
