"""`AlignedChatModel`: a chat model whose text is corrected before anyone sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self, cast

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    CallbackManager,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig
from langchain_core.runnables.config import ensure_config
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from aligner_integrations.aligner import Aligner
from aligner_integrations.correction import Segment
from aligner_integrations.langchain.messages import MessageStream, correct_message, slices
from aligner_integrations.langchain.question import question_text
from aligner_integrations.langchain.runnable import load_bundled
from aligner_integrations.resilience import WITHHELD_TEXT, OnError
from aligner_integrations.stream import StreamCorrector


class AlignedChatModel(BaseChatModel):
    """Wraps any chat model; whoever listens, to whatever stream, hears corrected text only.

    The call of the wrapped model is not a run of its own: no callback, tracer, LangGraph stream or event
    stream hears of it, unless `trace_original` is set. Tool calls, reasoning and other blocks, ids, metadata
    and usage are the wrapped model's. What the aligner itself cost is in `response_metadata["aligner"]`.
    Structured output (`with_structured_output`) is left alone. The question is the last human message.

    Args:
        model: The chat model to wrap.
        aligner: What corrects; without one the bundled model is loaded on first use.
        loop: `"open"`: each sentence is corrected on its own way out.
        on_error: What a failed correction does: `"raise"`, `"pass_through"` (the original is shown) or
            `"withhold"` (`withheld_text` is shown in its place).
        withheld_text: Stands for a sentence that was withheld.
        feedback: Tells the aligner what to look for.
        edit_margin: Overrides the model's own margin, in logits.
        trace_original: Let callbacks and tracers see the wrapped model's run, raw text included: as a child
            of this model's run, or beside it while streaming.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: BaseChatModel
    aligner: Aligner | None = Field(default=None, exclude=True)
    loop: Literal["open"] = "open"
    on_error: OnError = "raise"
    withheld_text: str = WITHHELD_TEXT
    feedback: str = ""
    edit_margin: float | None = Field(default=None, ge=0.0)
    trace_original: bool = False
    # Of one stream under `trace_original`: langchain-core tells `_stream` nothing of the run it belongs to.
    _stream_config: RunnableConfig | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _take_after_the_model(self) -> Self:
        """How the wrapped model streams and shapes its content holds for this one, unless it is said."""
        for name in ("disable_streaming", "output_version"):
            if name not in self.model_fields_set:
                setattr(self, name, getattr(self.model, name))
        return self

    @property
    def _llm_type(self) -> str:
        return f"aligned-{self.model._llm_type}"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What tells answers apart in a cache: the wrapped model, the aligner, and how it corrects."""
        aligner = self.aligner or load_bundled()
        own = ("loop", "on_error", "withheld_text", "feedback", "edit_margin")
        return {
            "model": {"type": self.model._llm_type, **self.model._identifying_params},
            "aligner": asdict(aligner.config),
            **{name: getattr(self, name) for name in own},
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = self.model._get_ls_params(stop=stop, **kwargs)
        params.setdefault("ls_model_name", kwargs.get("model", self.model._llm_type))  # fakes have none
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """Return the wrapped model's token ids."""
        return self.model.get_token_ids(text)

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools as the wrapped model does; its text is corrected all the same.

        Raises:
            NotImplementedError: the wrapped model binds no tools, or in a way that cannot be followed.
        """
        bound = self.model.bind_tools(tools, **kwargs)
        if isinstance(bound, BaseChatModel):
            return self.model_copy(update={"model": bound})
        if isinstance(bound, RunnableBinding) and isinstance(bound.bound, BaseChatModel):
            aligned = self.model_copy(update={"model": bound.bound})
            return cast(Runnable[LanguageModelInput, AIMessage], aligned.bind(**bound.kwargs))
        raise NotImplementedError(
            f"{type(self.model).__name__}.bind_tools gives a {type(bound).__name__}, which cannot be "
            "wrapped; give AlignedChatModel a model whose bind_tools gives a chat model or a binding of one"
        )

    def with_structured_output(
        self, schema: Any, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Return the wrapped model's own structured output; it is not corrected."""
        return self.model.with_structured_output(schema, include_raw=include_raw, **kwargs)

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """Stream the answer; each sentence goes out as soon as it is corrected."""
        return BaseChatModel.stream(self._for_stream(config), input, config, stop=stop, **kwargs)

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """Stream the answer without blocking the event loop; the corrections run in threads."""
        return BaseChatModel.astream(self._for_stream(config), input, config, stop=stop, **kwargs)

    def _for_stream(self, config: RunnableConfig | None) -> AlignedChatModel:
        if not self.trace_original:
            return self
        copy = self.model_copy()
        given = ensure_config(config)
        copy._stream_config = {"callbacks": given.get("callbacks"), "metadata": given.get("metadata") or {}}
        return copy

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        if self.trace_original and run_manager:
            config = _child_config(run_manager)
            result = _result(self.model.invoke(messages, config, stop=stop, **kwargs))
        else:
            result = self.model._generate_with_cache(messages, stop=stop, **kwargs)
        return self._corrected(messages, result)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        if self.trace_original and run_manager:
            config = _child_config(run_manager)
            result = _result(await self.model.ainvoke(messages, config, stop=stop, **kwargs))
        else:
            result = await self.model._agenerate_with_cache(messages, stop=stop, **kwargs)
        return await asyncio.to_thread(self._corrected, messages, result)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        correction = _Correction(self, messages)
        stream = MessageStream(correction.open)
        with closing(self._upstream(messages, stop, kwargs)) as chunks:
            for chunk in chunks:
                for piece in slices(chunk):
                    yield from _generations(stream.push(piece))
        yield from _generations([*stream.close(), *correction.receipt()])

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        correction = _Correction(self, messages)
        stream = MessageStream(correction.open)
        async with aclosing(self._aupstream(messages, stop, kwargs)) as chunks:
            async for chunk in chunks:
                for piece in slices(chunk):
                    for part in _generations(await asyncio.to_thread(stream.push, piece)):
                        yield part
        for part in _generations([*await asyncio.to_thread(stream.close), *correction.receipt()]):
            yield part

    def _upstream(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> Generator[BaseMessage]:
        """Yield the wrapped model's chunks, without their sign of being last: more is to come."""
        if self._stream_config is not None:
            traced = self.model.stream(messages, self._stream_config, stop=stop, **kwargs)
            with closing(cast(Any, traced)) as chunks:
                yield from map(_open_ended, chunks)
        elif self.model._should_stream(async_api=False, **{**kwargs, "stream": True}):
            if self.model.rate_limiter:
                self.model.rate_limiter.acquire(blocking=True)
            with closing(cast(Any, self.model._stream(messages, stop=stop, **kwargs))) as generations:
                yield from map(_message, generations)
        else:
            result = self.model._generate_with_cache(messages, stop=stop, **kwargs)
            yield _as_chunk(result.generations[0].message)

    async def _aupstream(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> AsyncGenerator[BaseMessage]:
        if self._stream_config is not None:
            traced = self.model.astream(messages, self._stream_config, stop=stop, **kwargs)
            async with aclosing(cast(Any, traced)) as chunks:
                async for chunk in chunks:
                    yield _open_ended(chunk)
        elif self.model._should_stream(async_api=True, **{**kwargs, "stream": True}):
            if self.model.rate_limiter:
                await self.model.rate_limiter.aacquire(blocking=True)
            async with aclosing(cast(Any, self.model._astream(messages, stop=stop, **kwargs))) as generations:
                async for generation in generations:
                    yield _message(generation)
        else:
            result = await self.model._agenerate_with_cache(messages, stop=stop, **kwargs)
            yield _as_chunk(result.generations[0].message)

    def _corrected(self, messages: list[BaseMessage], result: ChatResult) -> ChatResult:
        """Return a result with the text of each generation corrected."""
        generations = []
        for generation in result.generations:
            correction = _Correction(self, messages)
            message = correct_message(generation.message, correction.open)
            for receipt in correction.receipt():
                message.response_metadata = {**message.response_metadata, **receipt.response_metadata}
            generations.append(ChatGeneration(message=message, generation_info=generation.generation_info))
        return ChatResult(generations=generations, llm_output=result.llm_output)


@dataclass(slots=True)
class _Correction:
    """The correction of one answer: its question, and what it cost."""

    model: AlignedChatModel
    messages: list[BaseMessage]
    segments: list[Segment] = field(default_factory=list)

    def open(self, text: str, message_id: str | None) -> StreamCorrector:
        """Return a corrector for one text of the answer."""
        aligned = self.model
        aligner = aligned.aligner or load_bundled()
        if aligned.edit_margin is not None:
            decode = replace(aligner.decode_config, edit_margin=aligned.edit_margin)
            aligner = aligner.with_options(decode=decode)
        return aligner.stream(
            question_text(self.messages),
            feedback=aligned.feedback,
            on_error=aligned.on_error,
            withheld_text=aligned.withheld_text,
            sink=self.segments.append,
        )

    def receipt(self) -> list[AIMessageChunk]:
        """Return a chunk without text that says what the correction cost; none if there was no text."""
        if not self.segments:
            return []
        stats = [segment.stats for segment in self.segments]
        cost = {
            "sentences": len(self.segments),
            "changed": sum(segment.changed for segment in self.segments),
            "failed": sum(any(f.check == "correction_failed" for f in s.findings) for s in self.segments),
            "forwards": sum(one.forwards for one in stats),
            "prompt_tokens": sum(one.prompt_tokens - one.cached_tokens for one in stats),
            "new_tokens": sum(one.new_tokens for one in stats),
            "seconds": sum(one.seconds for one in stats),
            "provider": stats[-1].provider,
            "on_error": self.model.on_error,
        }
        return [AIMessageChunk(content="", response_metadata={"aligner": cost})]


def _child_config(run_manager: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun) -> RunnableConfig:
    """Return a config under which the wrapped model's run is a child of this one."""
    sync = isinstance(run_manager, CallbackManagerForLLMRun)
    kind: Callable[..., Any] = CallbackManager if sync else AsyncCallbackManager
    handlers = run_manager.inheritable_handlers
    manager = kind(handlers=handlers, inheritable_handlers=handlers, parent_run_id=run_manager.run_id)
    return {"callbacks": manager}


def _result(message: AIMessage) -> ChatResult:
    return ChatResult(generations=[ChatGeneration(message=message)])


def _message(generation: ChatGenerationChunk) -> BaseMessage:
    """Return a chunk's message with what stands beside it among its metadata."""
    message = generation.message
    metadata = {**(generation.generation_info or {}), **message.response_metadata}
    return _open_ended(message.model_copy(update={"response_metadata": metadata}))


def _open_ended(message: BaseMessage) -> BaseMessage:
    if getattr(message, "chunk_position", None) is None:
        return message
    return message.model_copy(update={"chunk_position": None})


def _as_chunk(message: BaseMessage) -> AIMessageChunk:
    given = {name: getattr(message, name) for name in type(message).model_fields if name != "type"}
    return AIMessageChunk(**given)


def _generations(messages: Sequence[BaseMessage]) -> Iterator[ChatGenerationChunk]:
    for message in messages:
        chunk = message if isinstance(message, AIMessageChunk) else _as_chunk(message)
        yield ChatGenerationChunk(message=chunk)
