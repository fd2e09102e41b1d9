"""`ReplayModel`: a chat model that says a recorded answer, cut into chunks as you like."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolMessage
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from pydantic import Field, PrivateAttr, model_validator


@dataclass(slots=True)
class _HandedOut:
    """Shared by the copies of one model, so that a wrapper that copies it is counted too."""

    characters: int = 0


class ReplayModel(BaseChatModel):
    """Says `answer`, in `chunks` when it streams, and counts the characters it has handed out.

    Args:
        answer: What it says; may be left out where `chunks` are given.
        chunks: The pieces of a stream, in order. Without them the answer is cut by `chunk_size`.
        chunk_size: The length of a piece, in characters.
        seed: Cut at random, the same way each time: pieces of 1 to `2 * chunk_size - 1` characters.
        calls: Tool calls to make first, as `{"name": ..., "args": {...}}`. The answer follows once there is
            a tool's message.
        before_tools: The text beside those tool calls.
        delay: Seconds to wait after each piece. LangGraph hands pieces to another thread; without a pause
            the model is ahead of its reader, and more seems to be held back than is.
    """

    answer: str = ""
    chunks: list[str] = Field(default_factory=list)
    chunk_size: int = Field(default=4, ge=1)
    seed: int | None = None
    calls: list[dict[str, Any]] = Field(default_factory=list)
    before_tools: str = ""
    delay: float = Field(default=0.001, ge=0.0)
    _handed_out: _HandedOut = PrivateAttr(default_factory=_HandedOut)

    @model_validator(mode="after")
    def _know_the_answer(self) -> Self:
        self.answer = self.answer or "".join(self.chunks)
        if not self.answer:
            raise ValueError("answer is empty and so are chunks; give what the model shall say")
        if self.chunks and "".join(self.chunks) != self.answer:
            raise ValueError("chunks do not join to answer; leave one of the two out")
        return self

    @property
    def handed_out(self) -> int:
        """How many characters the current run has handed out; the last one, if none is going on."""
        return self._handed_out.characters

    @property
    def _llm_type(self) -> str:
        return "replay"

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """Return the model as it is: which tools it calls is said by `calls`."""
        return self

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        pieces, calls = self._turn(messages)
        text = "".join(pieces)
        self._handed_out.characters = len(text)
        made = [{"id": f"call_{at}", **call} for at, call in enumerate(calls)]
        message = AIMessage(content=text, tool_calls=made)
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in self._chunks(messages):
            yield chunk
            time.sleep(self.delay)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._chunks(messages):
            yield chunk
            await asyncio.sleep(self.delay)

    def _chunks(self, messages: list[BaseMessage]) -> Iterator[ChatGenerationChunk]:
        pieces, calls = self._turn(messages)
        self._handed_out.characters = 0
        for piece in pieces:
            self._handed_out.characters += len(piece)
            yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
        for at, call in enumerate(calls):
            chunk = tool_call_chunk(
                name=call["name"], args=json.dumps(call.get("args", {})), id=f"call_{at}", index=at
            )
            yield ChatGenerationChunk(message=AIMessageChunk(content="", tool_call_chunks=[chunk]))

    def _turn(self, messages: list[BaseMessage]) -> tuple[list[str], list[dict[str, Any]]]:
        """Return what is to be said now, in pieces, and the tool calls to make."""
        if self.calls and not any(isinstance(message, ToolMessage) for message in messages):
            return self._cut(self.before_tools), self.calls
        return self.chunks or self._cut(self.answer), []

    def _cut(self, text: str) -> list[str]:
        draw = random.Random(self.seed)
        pieces, start = [], 0
        while start < len(text):
            size = self.chunk_size if self.seed is None else draw.randint(1, 2 * self.chunk_size - 1)
            pieces.append(text[start : start + size])
            start += size
        return pieces
