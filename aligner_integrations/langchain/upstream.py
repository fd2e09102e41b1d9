"""The wrapped model's own answer, fetched without a run of its own unless one is asked for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from typing import Any, cast

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    CallbackManager,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig


def stream_chunks(
    model: BaseChatModel,
    messages: list[BaseMessage],
    traced: RunnableConfig | None,
    **kwargs: Any,
) -> Generator[BaseMessage]:
    """Yield the model's chunks, without their sign of being last: more is to come.

    With a config in `traced` the model's call is a run that its callbacks hear of.
    """
    if traced is not None:
        with closing(cast(Any, model.stream(messages, traced, **kwargs))) as chunks:
            yield from map(_open_ended, chunks)
    elif model._should_stream(async_api=False, **{**kwargs, "stream": True}):
        if model.rate_limiter:
            model.rate_limiter.acquire(blocking=True)
        with closing(cast(Any, model._stream(messages, **kwargs))) as generations:
            yield from map(_message, generations)
    else:
        result = model._generate_with_cache(messages, **kwargs)
        yield as_chunk(result.generations[0].message)


async def astream_chunks(
    model: BaseChatModel,
    messages: list[BaseMessage],
    traced: RunnableConfig | None,
    **kwargs: Any,
) -> AsyncGenerator[BaseMessage]:
    """Yield the model's chunks as `stream_chunks` does."""
    if traced is not None:
        async with aclosing(cast(Any, model.astream(messages, traced, **kwargs))) as chunks:
            async for chunk in chunks:
                yield _open_ended(chunk)
    elif model._should_stream(async_api=True, **{**kwargs, "stream": True}):
        if model.rate_limiter:
            await model.rate_limiter.aacquire(blocking=True)
        async with aclosing(cast(Any, model._astream(messages, **kwargs))) as generations:
            async for generation in generations:
                yield _message(generation)
    else:
        result = await model._agenerate_with_cache(messages, **kwargs)
        yield as_chunk(result.generations[0].message)


def child_config(run_manager: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun) -> RunnableConfig:
    """Return a config under which the wrapped model's run is a child of this one."""
    sync = isinstance(run_manager, CallbackManagerForLLMRun)
    kind: Callable[..., Any] = CallbackManager if sync else AsyncCallbackManager
    handlers = run_manager.inheritable_handlers
    manager = kind(handlers=handlers, inheritable_handlers=handlers, parent_run_id=run_manager.run_id)
    return {"callbacks": manager}


def as_result(message: AIMessage) -> ChatResult:
    """Return a result of one message."""
    return ChatResult(generations=[ChatGeneration(message=message)])


def as_chunk(message: BaseMessage) -> AIMessageChunk:
    """Return a message as a chunk that carries all of it."""
    if isinstance(message, AIMessageChunk):
        return message
    given = {name: getattr(message, name) for name in type(message).model_fields if name != "type"}
    return AIMessageChunk(**given)


def _message(generation: ChatGenerationChunk) -> BaseMessage:
    """Return a chunk's message with what stands beside it among its metadata."""
    message = generation.message
    metadata = {**(generation.generation_info or {}), **message.response_metadata}
    return _open_ended(message.model_copy(update={"response_metadata": metadata}))


def _open_ended(message: BaseMessage) -> BaseMessage:
    if getattr(message, "chunk_position", None) is None:
        return message
    return message.model_copy(update={"chunk_position": None})
