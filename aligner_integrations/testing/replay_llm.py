"""`ReplayLLM`: a LlamaIndex LLM that says a recorded answer, cut into chunks as you like."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from pydantic import Field, PrivateAttr

_Response = TypeVar("_Response", ChatResponse, CompletionResponse)


class _Counters:
    """Shared by the copies of one LLM, deep ones too, so that a wrapper that copies it is counted."""

    def __init__(self) -> None:
        self.handed_out, self.open_streams = 0, 0
        self.prompts: list[str | list[ChatMessage]] = []
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @contextmanager
    def stream(self) -> Iterator[None]:
        with self.lock:
            self.open_streams += 1
        try:
            yield
        finally:
            with self.lock:
                self.open_streams -= 1


class ReplayLLM(FunctionCallingLLM):
    """Says `answer`, in pieces when it streams, and counts what it has handed out.

    Args:
        answer: What it says; or a function that is given the last user message, or the prompt of a
            completion, and returns it.
        chunk_size: The length of a piece, in characters.
        seed: Cut at random, the same way each time: pieces of 1 to `2 * chunk_size - 1` characters.
        calls: Tool calls to make first, as `{"name": ..., "args": {...}}`. The answer follows once there is
            a tool's message.
        before_tools: The text beside those tool calls.
        continue_from: Given the text of an assistant's message that stands last, returns what follows it.
            Without it, such a message changes nothing. (A completion has no messages: there `answer`, as a
            function, finds in its prompt what is to be continued.)
        is_chat_model: Whether LlamaIndex asks it with messages, or with one prompt.
        is_function_calling_model: Whether it can call tools.
        delay: Seconds to wait after each piece. Chat engines read a stream in a thread of their own; without
            a pause the LLM is ahead of its reader, and more seems to be held back than is.
    """

    answer: str | Callable[[str], str]
    chunk_size: int = Field(default=4, ge=1)
    seed: int | None = None
    calls: list[dict[str, Any]] = Field(default_factory=list)
    before_tools: str = ""
    continue_from: Callable[[str], str] | None = None
    is_chat_model: bool = True
    is_function_calling_model: bool = True
    delay: float = Field(default=0.0, ge=0.0)
    _counters: _Counters = PrivateAttr(default_factory=_Counters)

    @classmethod
    def class_name(cls) -> str:
        return "ReplayLLM"

    @property
    def handed_out(self) -> int:
        """How many characters the run that began last has handed out."""
        return self._counters.handed_out

    @property
    def open_streams(self) -> int:
        """How many streams have begun, and neither ended nor been closed."""
        return self._counters.open_streams

    @property
    def prompts(self) -> list[str | list[ChatMessage]]:
        """What was asked, in order: a list of messages, or a prompt."""
        return list(self._counters.prompts)

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(
            model_name="replay",
            is_chat_model=self.is_chat_model,
            is_function_calling_model=self.is_function_calling_model,
        )

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self._whole(messages)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        await asyncio.sleep(self.delay)
        return self._whole(messages)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return self._stream(self._responses(messages))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        return self._astream(self._responses(messages))

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return _as_completion(self._whole(prompt))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        await asyncio.sleep(self.delay)
        return _as_completion(self._whole(prompt))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        return self._stream(map(_as_completion, self._responses(prompt)))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        return self._astream(map(_as_completion, self._responses(prompt)))

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[Any],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        asked = ChatMessage(role="user", content=user_msg) if isinstance(user_msg, str) else user_msg
        messages = [*(chat_history or ()), *([asked] if asked else ())]
        return {"messages": messages, "tools": [tool.metadata.to_openai_tool() for tool in tools], **kwargs}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Return the tool calls of a response; an error is raised if there has to be one and is none."""
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if error_on_no_tool_call and not calls:
            raise ValueError("Expected at least one tool call, but got 0 tool calls.")
        return [
            ToolSelection.model_validate(
                {"tool_id": call.tool_call_id, "tool_name": call.tool_name, "tool_kwargs": call.tool_kwargs}
            )
            for call in calls
        ]

    def _stream(self, responses: Iterator[_Response]) -> Generator[_Response, None, None]:
        with self._counters.stream():
            for response in responses:
                yield response
                time.sleep(self.delay)

    async def _astream(self, responses: Iterator[_Response]) -> AsyncGenerator[_Response, None]:
        with self._counters.stream():
            for response in responses:
                yield response
                await asyncio.sleep(self.delay)

    def _whole(self, asked: str | Sequence[ChatMessage]) -> ChatResponse:
        last = list(self._responses(asked))[-1]
        return last.model_copy(update={"delta": None})

    def _responses(self, asked: str | Sequence[ChatMessage]) -> Iterator[ChatResponse]:
        """Return the responses of a stream: each holds all the text so far, the last one the tool calls."""
        # A copy: agents write into the messages that they have sent.
        prompt = asked if isinstance(asked, str) else [one.model_copy(deep=True) for one in asked]
        self._counters.prompts.append(prompt)
        self._counters.handed_out = 0
        return self._say(*self._turn(prompt))

    def _say(self, text: str, calls: Sequence[dict[str, Any]]) -> Iterator[ChatResponse]:
        shown = ""
        for piece in self._cut(text):
            shown += piece
            self._counters.handed_out += len(piece)
            yield _response(shown, piece)
        if calls or not text:
            yield _response(shown, "", calls)

    def _turn(self, prompt: str | list[ChatMessage]) -> tuple[str, list[dict[str, Any]]]:
        """Return what is to be said now, and the tool calls to make."""
        if isinstance(prompt, str):
            return self._answer_to(prompt), []
        if not self.is_chat_model:
            assert self.messages_to_prompt is not None  # LLM itself fills it in
            return self._answer_to(self.messages_to_prompt(prompt)), []
        has_called = any(message.role == MessageRole.TOOL for message in prompt)
        if self.calls and self.is_function_calling_model and not has_called:
            return self.before_tools, self.calls
        if self.continue_from and prompt and prompt[-1].role == MessageRole.ASSISTANT:
            return self.continue_from(prompt[-1].content or ""), []
        questions = [message.content or "" for message in prompt if message.role == MessageRole.USER]
        return self._answer_to(questions[-1] if questions else ""), []

    def _answer_to(self, question: str) -> str:
        return self.answer if isinstance(self.answer, str) else self.answer(question)

    def _cut(self, text: str) -> Iterator[str]:
        draw, start = random.Random(self.seed), 0
        while start < len(text):
            size = self.chunk_size if self.seed is None else draw.randint(1, 2 * self.chunk_size - 1)
            yield text[start : start + size]
            start += size


def _response(text: str, delta: str, calls: Sequence[dict[str, Any]] = ()) -> ChatResponse:
    made = [
        ToolCallBlock(tool_call_id=f"call_{at}", tool_name=call["name"], tool_kwargs=call.get("args", {}))
        for at, call in enumerate(calls)
    ]
    blocks = [*([TextBlock(text=text)] if text or not made else ()), *made]
    # As providers do: what they sent, and what it cost. A guard that hands it on shows the raw text.
    raw = {"text": text, "usage": {"completion_tokens": len(text.split())}}
    return ChatResponse(message=ChatMessage(role="assistant", blocks=blocks), delta=delta, raw=raw)


def _as_completion(response: ChatResponse) -> CompletionResponse:
    return CompletionResponse(text=response.message.content or "", delta=response.delta, raw=response.raw)
