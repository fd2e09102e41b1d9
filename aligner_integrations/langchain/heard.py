"""What a callback handler hears of one model run, corrected as it comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias
from uuid import UUID

from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, LLMResult

from aligner_integrations.correction import Finding, Segment
from aligner_integrations.langchain.answers import slices
from aligner_integrations.langchain.jobs import Steps
from aligner_integrations.langchain.messages import (
    MessageStream,
    correct_message,
    text_of,
    without_raw,
    without_raw_keys,
)
from aligner_integrations.langchain.updates import RunSegment, TextUpdate
from aligner_integrations.options import CorrectionOptions
from aligner_integrations.stream import StreamCorrector

Update: TypeAlias = RunSegment | TextUpdate

_BLOCK_EVENTS = ("content-block-start", "content-block-delta", "content-block-finish")


class HeardAnswer:
    """One run of a model: what it was asked, what it has said, and how much of that is corrected.

    `take` and `end` give the corrected message chunks, `updates` gives what to show.
    """

    def __init__(
        self, options: CorrectionOptions, question: str, *, run_id: UUID, is_chat: bool, optimistic: bool
    ) -> None:
        self.run_id = run_id
        self.is_chat = is_chat
        self.updates: deque[Update] = deque()  # what there is to show
        self.silent = False  # whether nothing is to be shown any more
        self.spoke = False  # whether anything came before the run's end ...
        self.source: Literal["tokens", "events"] | None = None  # ... and in which of the two ways
        self._options = options
        self._question = question
        self._optimistic = optimistic
        self._stream = MessageStream(self._open)
        self._blocks: dict[int, str] = {}  # text of each block so far, on the path of protocol events
        self._segments: list[RunSegment] = []
        self._settled = 0  # characters shown that stay ...
        self._pending = 0  # ... and characters of raw text that wait for their correction
        self._originals = 0
        self._withholding: list[str] | None = None

    def show(self, chunk: BaseMessage) -> None:
        """Note the text of a chunk as it is, to be shown until it is corrected."""
        blocks = [chunk.content] if isinstance(chunk.content, str) else chunk.content
        text = "".join(text_of(block) or "" for block in blocks)
        self.spoke = self.spoke or bool(chunk.content) or bool(getattr(chunk, "tool_call_chunks", None))
        if text and self._optimistic:
            at = self._settled + self._pending
            self._show(TextUpdate(run_id=self.run_id, start=at, end=at, text=text))
            self._pending += len(text)

    def take(self, chunk: BaseMessage) -> Steps[list[BaseMessage]]:
        """Take a chunk; corrected chunks come of it."""
        done: list[BaseMessage] = []
        for piece in slices(chunk):
            done += yield from self._stream.push(piece)
        return done

    def end(self) -> Steps[list[BaseMessage]]:
        """End the answer; the rest of it, corrected, comes of it."""
        return (yield from self._stream.close())

    def withhold(self) -> None:
        """End the answer without correcting what is held; the withheld text stands in its place."""
        self._withholding = []
        self._stream.leave()
        held, self._withholding = "".join(self._withholding), None
        if held:
            finding = Finding("upstream_failed", "the model stopped in mid-answer", "withheld")
            self._settle(Segment(held, self._options.withheld_text, 0, 0, findings=(finding,)))

    def take_back(self) -> None:
        """Take back provisional text that will not be corrected any more."""
        if self._optimistic and self._pending:
            end = self._settled + self._pending
            self._show(TextUpdate(run_id=self.run_id, start=self._settled, end=end, text=""))
            self._pending = 0

    def chunk_of(self, event: Mapping[str, Any]) -> AIMessageChunk | None:
        """Return the text of a protocol event (`stream_events(version="v3")`) as a message chunk."""
        content = event.get("delta") or event.get("content") or {}
        if event.get("event") not in _BLOCK_EVENTS:
            return None
        self.spoke = True
        if content.get("type") not in ("text", "text-delta"):
            return None
        index, text = event.get("index", 0), content.get("text") or ""
        before = self._blocks.get(index, "")
        if event["event"] == "content-block-finish":
            # What the deltas left out; text that contradicts them has been shown already and stays.
            text = text[len(before) :] if text.startswith(before) else ""
        self._blocks[index] = before + text
        return AIMessageChunk(content=[{"type": "text", "text": text, "index": index}]) if text else None

    def is_ended_by(self, event: Mapping[str, Any]) -> bool:
        """Whether a protocol event ends the text that is running."""
        kind = (event.get("content") or {}).get("type")
        ends = event.get("event") == "content-block-finish" and kind == "text"
        return ends and self._stream.running == event.get("index", 0)

    def corrected_result(self, response: LLMResult) -> LLMResult:
        """Return a run's result with its texts corrected: as they were shown, without running again."""
        generations: list[list[Any]] = [list(each) for each in response.generations]
        for each in generations:
            for at, generation in enumerate(each):
                each[at] = self._corrected(generation, shown=at == 0)
        output = response.llm_output and without_raw_keys(response.llm_output)
        return response.model_copy(update={"generations": generations, "llm_output": output})

    def _corrected(self, generation: Any, *, shown: bool) -> Any:
        message = without_raw(getattr(generation, "message", None) or AIMessageChunk(content=generation.text))
        corrected = self._as_shown(message) if shown else None
        if corrected is None:  # another candidate, or not what was streamed
            corrected = correct_message(message, self._open_unheard)
        info = generation.generation_info and without_raw_keys(generation.generation_info)
        if isinstance(generation, ChatGeneration):
            return type(generation)(message=corrected, generation_info=info)
        return generation.model_copy(update={"text": str(corrected.text), "generation_info": info})

    def _as_shown(self, message: BaseMessage) -> BaseMessage | None:
        """Return the message with each text replaced by the segments shown of it; None if they don't fit."""
        segments = deque(self._segments)
        blocks = [message.content] if isinstance(message.content, str) else message.content
        new: list[Any] = []
        for block in blocks:
            text, parts = text_of(block) or "", list[str]()
            while text and segments and text.startswith(segments[0].original):
                text = text[len(segments[0].original) :]
                parts.append(segments.popleft().text)
            if text:
                return None
            new.append(
                ("".join(parts) if isinstance(block, str) else {**block, "text": "".join(parts)})
                if parts
                else block
            )
        if segments:
            return None
        return message.model_copy(update={"content": new[0] if isinstance(message.content, str) else new})

    def _open_unheard(self, text: str, message_id: str | None) -> StreamCorrector:
        return self._options.open(self._question)

    def _open(self, text: str, message_id: str | None) -> StreamCorrector:
        return self._options.open(self._question, self._note)

    def _show(self, update: Update) -> None:
        if not self.silent:
            self.updates.append(update)

    def _note(self, segment: Segment) -> None:
        if self._withholding is not None:
            self._withholding.append(segment.original)
        else:
            self._settle(segment)

    def _settle(self, segment: Segment) -> None:
        """Turn a segment of one text into one of the run, and say what it does to what is shown."""
        own = RunSegment(
            original=segment.original,
            text=segment.text,
            index=len(self._segments),
            start=self._originals,
            edits=segment.edits,
            findings=segment.findings,
            stats=segment.stats,
            run_id=self.run_id,
        )
        self._segments.append(own)
        self._originals += len(own.original)
        if self._optimistic:
            start, end = self._settled, self._settled + len(own.original)
            self._show(TextUpdate(run_id=self.run_id, start=start, end=end, text=own.text, segment=own))
        else:
            self._show(own)
        self._settled += len(own.text)
        self._pending -= len(own.original) if self._optimistic else 0
