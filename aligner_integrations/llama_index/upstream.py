"""Ask a wrapped LLM, and hand on what it says corrected.

What is asked for is given as a function of the prefix: empty for the first time, and in a closed loop the
text that the wrapped LLM is to continue.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar, cast

from llama_index.core.base.llms.generic_utils import (
    astream_chat_response_to_completion_response,
    astream_completion_response_to_chat_response,
    stream_chat_response_to_completion_response,
    stream_completion_response_to_chat_response,
)
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole
from llama_index.core.llms.callbacks import llm_chat_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import LLM
from llama_index.core.tools import BaseTool

from aligner_integrations.llama_index.answer import LLMAnswer, R
from aligner_integrations.llama_index.instrumentation import amarked, marked, original
from aligner_integrations.read_ahead import READ_AHEAD, read_ahead
from aligner_integrations.read_ahead_async import AsyncReadAhead
from aligner_integrations.template import GO_ON

Ask: TypeAlias = Callable[[str], Generator[R]]
AAsk: TypeAlias = Callable[[str], Awaitable[AsyncGenerator[R]]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[R]):
    """One call of a wrapped LLM in its four forms, each corrected; without an answer each as it is."""

    answer: LLMAnswer[R] | None
    closed: bool = False
    ask: Callable[[], R]
    aask: Callable[[], Awaitable[R]]
    ask_stream: Ask[R]
    aask_stream: AAsk[R]

    def whole(self) -> R:
        """Return the finished answer."""
        if self.answer is not None and self.closed:
            for _ in self.stream():
                pass
            return self.answer.respond(None)
        if self.answer is None:
            return self.ask()
        with original():
            response = self.ask()
        return _corrected(self.answer, response)

    async def awhole(self) -> R:
        """Return the finished answer; the correction runs in a thread."""
        if self.answer is not None and self.closed:
            async for _ in await self.astream():
                pass
            return self.answer.respond(None)
        if self.answer is None:
            return await self.aask()
        with original():
            response = await self.aask()
        return await asyncio.to_thread(_corrected, self.answer, response)

    def stream(self) -> Generator[R]:
        """Ask at once; return the responses as they come. Closing them closes the wrapped LLM's."""
        if self.answer is None:
            return self.ask_stream("")
        with original():
            responses = self.ask_stream("")
        return _stream(self.answer, self.ask_stream, responses, closed=self.closed)

    async def astream(self) -> AsyncGenerator[R]:
        """Ask at once; return the responses as they come. Closing them closes the wrapped LLM's."""
        if self.answer is None:
            return await self.aask_stream("")
        with original():
            responses = await self.aask_stream("")
        return _astream(self.answer, self.aask_stream, responses, closed=self.closed)


def _corrected(answer: LLMAnswer[R], response: R) -> R:
    with answer.span.around():
        answer.feed_whole(response)
        return answer.whole()


def _stream(answer: LLMAnswer[R], ask: Ask[R], responses: Generator[R], *, closed: bool) -> Generator[R]:
    with answer.span.around():
        while True:
            with closing(read_ahead(marked(responses), READ_AHEAD if closed else 0)) as said:
                for response in said:
                    answer.feed(response)
                    yield from answer.ready()
                    if answer.stale:
                        break
            if not answer.stale:
                answer.end()
                yield from answer.ready()
            if not answer.stale:
                return
            answer.restart()
            with original():
                responses = ask(answer.prefix)


async def _astream(
    answer: LLMAnswer[R], ask: AAsk[R], responses: AsyncGenerator[R], *, closed: bool
) -> AsyncGenerator[R]:
    with answer.span.around():
        while True:
            async with aclosing(AsyncReadAhead(amarked(responses), READ_AHEAD if closed else 0)) as said:
                async for response in said:
                    answer.feed(response)
                    async for ready in answer.aready():
                        yield ready
                    if answer.stale:
                        break
            if not answer.stale:
                answer.end()
                async for ready in answer.aready():
                    yield ready
            if not answer.stale:
                return
            answer.restart()
            with original():
                responses = await ask(answer.prefix)


def chat_call(
    llm: LLM,
    answer: LLMAnswer[ChatResponse] | None,
    messages: Sequence[ChatMessage],
    kwargs: dict[str, Any],
    *,
    closed: bool,
    instructed: bool,
) -> Call[ChatResponse]:
    """Return a call that answers `messages`."""

    def ask(prefix: str) -> Generator[ChatResponse]:
        if not prefix or llm.metadata.is_chat_model:
            return llm.stream_chat(_with_prefix(messages, prefix, instructed=instructed), **kwargs)
        prompt = _rendered(llm, messages) + prefix
        return stream_completion_response_to_chat_response(
            llm.stream_complete(prompt, formatted=True, **kwargs)
        )

    async def aask(prefix: str) -> AsyncGenerator[ChatResponse]:
        if not prefix or llm.metadata.is_chat_model:
            return await llm.astream_chat(_with_prefix(messages, prefix, instructed=instructed), **kwargs)
        prompt = _rendered(llm, messages) + prefix
        completions = await llm.astream_complete(prompt, formatted=True, **kwargs)
        return astream_completion_response_to_chat_response(completions)

    return Call(
        answer=answer,
        closed=closed,
        ask=partial(llm.chat, messages, **kwargs),
        aask=partial(llm.achat, messages, **kwargs),
        ask_stream=ask,
        aask_stream=aask,
    )


def completion_call(
    llm: LLM,
    answer: LLMAnswer[CompletionResponse] | None,
    prompt: str,
    kwargs: dict[str, Any],
    *,
    closed: bool,
    instructed: bool,
) -> Call[CompletionResponse]:
    """Return a call that completes `prompt`; `kwargs` says whether it is `formatted` already."""

    def more(prefix: str) -> tuple[str, dict[str, Any]]:
        if not prefix:
            return prompt, kwargs
        framed = prompt if kwargs["formatted"] else cast(Any, llm.completion_to_prompt)(prompt)
        return framed + prefix, {**kwargs, "formatted": True}

    # A chat model takes a prompt for a message of the user: what it is to continue needs one of its own.
    chats = llm.metadata.is_chat_model
    messages = [ChatMessage(role=MessageRole.USER, content=prompt)]
    rest = {name: value for name, value in kwargs.items() if name != "formatted"}

    def ask(prefix: str) -> Generator[CompletionResponse]:
        if prefix and chats:
            responses = llm.stream_chat(_with_prefix(messages, prefix, instructed=instructed), **rest)
            return stream_chat_response_to_completion_response(responses)
        text, given = more(prefix)
        return llm.stream_complete(text, **given)

    async def aask(prefix: str) -> AsyncGenerator[CompletionResponse]:
        if prefix and chats:
            responses = await llm.astream_chat(_with_prefix(messages, prefix, instructed=instructed), **rest)
            return astream_chat_response_to_completion_response(responses)
        text, given = more(prefix)
        return await llm.astream_complete(text, **given)

    return Call(
        answer=answer,
        closed=closed,
        ask=partial(llm.complete, prompt, **kwargs),
        aask=partial(llm.acomplete, prompt, **kwargs),
        ask_stream=ask,
        aask_stream=aask,
    )


def tools_call(
    llm: FunctionCallingLLM,
    answer: LLMAnswer[ChatResponse] | None,
    tools: Sequence[BaseTool],
    kwargs: dict[str, Any],
) -> Call[ChatResponse]:
    """Return a call that may use `tools`; its loop is open, since no API continues behind a tool call."""
    return Call(
        answer=answer,
        ask=partial(llm.chat_with_tools, tools, **kwargs),
        aask=partial(llm.achat_with_tools, tools, **kwargs),
        ask_stream=lambda prefix: llm.stream_chat_with_tools(tools, **kwargs),
        aask_stream=lambda prefix: llm.astream_chat_with_tools(tools, **kwargs),
    )


def told(llm: LLM, messages: Sequence[ChatMessage], kwargs: dict[str, Any], give: Callable[[], T]) -> T:
    """Return what `give` does, told to observability as a chat of `llm` is.

    LlamaIndex's own calls with tools are told that way too: they go on to `chat` and its twins.
    """

    @llm_chat_callback()
    def chat(_self: LLM, messages: Sequence[ChatMessage], **kwargs: Any) -> T:
        return give()

    return cast(T, chat(llm, messages, **kwargs))


async def atold(
    llm: LLM, messages: Sequence[ChatMessage], kwargs: dict[str, Any], give: Callable[[], Awaitable[T]]
) -> T:
    """Do as `told` does."""

    @llm_chat_callback()
    async def chat(_self: LLM, messages: Sequence[ChatMessage], **kwargs: Any) -> T:
        return await give()

    return cast(T, await chat(llm, messages, **kwargs))


def _with_prefix(messages: Sequence[ChatMessage], prefix: str, *, instructed: bool) -> list[ChatMessage]:
    more = [ChatMessage(role=MessageRole.ASSISTANT, content=prefix)] if prefix else []
    told = [ChatMessage(role=MessageRole.USER, content=GO_ON)] if prefix and instructed else []
    return [*messages, *more, *told]


def _rendered(llm: LLM, messages: Sequence[ChatMessage]) -> str:
    render = cast(Callable[[Sequence[ChatMessage]], str], llm.messages_to_prompt)  # validated: never None
    return render(messages)
