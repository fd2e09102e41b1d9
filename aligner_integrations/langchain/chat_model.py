"""`AlignedChatModel`: a chat model whose text is corrected before anyone sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, Self, TypeVar, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig
from langchain_core.runnables.config import ensure_config
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from aligner_integrations.aligner import Aligner
from aligner_integrations.closed_loop import MAX_RESTARTS
from aligner_integrations.continuation import Continuation
from aligner_integrations.correction import Segment
from aligner_integrations.langchain.answers import slices
from aligner_integrations.langchain.chat_answer import ChatAnswer
from aligner_integrations.langchain.closed_answer import ClosedAnswer, astream_closed, stream_closed
from aligner_integrations.langchain.continuation import chosen, going_on
from aligner_integrations.langchain.jobs import apart, arun, run
from aligner_integrations.langchain.messages import without_raw_keys
from aligner_integrations.langchain.upstream import (
    as_chunk,
    as_result,
    astream_chunks,
    child_config,
    stream_chunks,
)
from aligner_integrations.options import CorrectionOptions, is_structured, load_bundled
from aligner_integrations.resilience import WITHHELD_TEXT, OnError

T = TypeVar("T")


class AlignedChatModel(BaseChatModel):
    """Wraps any chat model; whoever listens, to whatever stream, hears corrected text only.

    The call of the wrapped model is not a run of its own: no callback, tracer, LangGraph stream or event
    stream hears of it, unless `trace_original` is set. Tool calls, reasoning and other blocks, ids, metadata
    and usage are the wrapped model's; log probabilities are left out, for they spell its raw tokens. What
    the aligner itself cost is in `response_metadata["aligner"]`.
    Structured output (`with_structured_output`, `response_format=...`) is left alone. The question is the
    last human message.

    Args:
        model: The chat model to wrap.
        aligner: What corrects; without one the bundled model is loaded on first use.
        loop: `"open"`: each sentence is corrected on its own way out. `"closed"`: where a sentence changed,
            the wrapped model goes on from the corrected text. It is then always called as a stream.
        continuation: How the wrapped model is made to go on. `"auto"`: the best way that it is known to have,
            else `"instruct"`, which any chat model takes. Say `"prefill"` if its API goes on from a last
            message of the assistant, `"prefix"` if that message needs `prefix: true` (Mistral, DeepSeek),
            `"continue_final_message"` if a server like vLLM needs that option.
        max_restarts: How often the wrapped model may be interrupted in one answer.
        on_error: What a failed correction does: `"raise"`, `"pass_through"` (the original is shown) or
            `"withhold"` (`withheld_text` is shown in its place).
        withheld_text: Stands for a sentence that was withheld.
        sentence_seconds: A correction that takes longer is dropped and has failed; None: no limit.
        answer_seconds: So long the corrections of one answer may take in all; None: no limit.
        feedback: Tells the aligner what to look for.
        edit_margin: Overrides the model's own margin, in logits.
        thoughts: Whether text beside tool calls is corrected too. Without it, the sentence that a tool call
            ends stays as it is, and so does what comes after the call. While a text streams nobody knows
            whether a tool call will follow, so earlier sentences are corrected in any case.
        sink: Called with every segment once it is corrected. In async runs it is called in a worker thread.
        trace_original: Let callbacks and tracers see the wrapped model's run, raw text included: as a child
            of this model's run, or beside it while streaming.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: BaseChatModel
    aligner: Aligner | None = Field(default=None, exclude=True)
    loop: Literal["open", "closed"] = "open"
    continuation: Continuation = "auto"
    max_restarts: int = Field(default=MAX_RESTARTS, ge=0)
    on_error: OnError = "raise"
    withheld_text: str = WITHHELD_TEXT
    sentence_seconds: float | None = Field(default=None, gt=0.0)
    answer_seconds: float | None = Field(default=None, gt=0.0)
    feedback: str = ""
    edit_margin: float | None = Field(default=None, ge=0.0)
    thoughts: bool = True
    sink: Callable[[Segment], None] | None = Field(default=None, exclude=True)
    trace_original: bool = False
    _structured: bool = PrivateAttr(default=False)
    # Of one call under `trace_original`: langchain-core tells `_stream` nothing of the run it belongs to.
    _traced: RunnableConfig | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _take_after_the_model(self) -> Self:
        """How the wrapped model streams and shapes its content holds for this one, unless it is said."""
        # Under `trace_original` the wrapped model's run tells its own callbacks.
        heard = () if self.trace_original else ("callbacks",)
        for name in ("disable_streaming", "output_version", "tags", "verbose", *heard):
            if name not in self.model_fields_set:
                setattr(self, name, getattr(self.model, name))
        if self.model.metadata:
            self.metadata = {**self.model.metadata, **(self.metadata or {})}
        if self.model.cache is False and "cache" not in self.model_fields_set:
            self.cache = False
        return self

    def _streaming_disabled(self, **kwargs: Any) -> bool:
        """A model that does not stream is called whole: what is cut from a whole message is less than it."""
        ways = (
            self.model._should_stream(async_api=way, **{**kwargs, "stream": True}) for way in (False, True)
        )
        return super()._streaming_disabled(**kwargs) or not any(ways)

    @property
    def _llm_type(self) -> str:
        return f"aligned-{self.model._llm_type}"

    @property
    def model_name(self) -> str:
        """The wrapped model's name, where callers look for it."""
        names = (getattr(self.model, name, None) for name in ("model_name", "model", "model_id"))
        return next((name for name in names if isinstance(name, str) and name), self.model._llm_type)

    def _resolve_model_profile(self) -> ModelProfile | None:
        return self.model.profile

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What tells answers apart in a cache: the wrapped model, the aligner, and how it corrects."""
        aligner = self.aligner or load_bundled()
        own = ["loop", "continuation", "max_restarts", "feedback", "edit_margin", "thoughts"]
        own += CorrectionOptions.of(self).errors()
        return {
            "model": {"type": self.model._llm_type, **self.model._identifying_params},
            "aligner": {
                "source": aligner.source,
                "safeguards": aligner.safeguard_policy.to_dict(),
                **asdict(aligner.config),
                **asdict(aligner.decode_config),
            },
            **{name: getattr(self, name) for name in own},
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = self.model._get_ls_params(stop=stop, **kwargs)
        params.setdefault("ls_model_name", kwargs.get("model", self.model._llm_type))  # fakes have none
        return params

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """What an answer is cached under: all that the wrapped model's is, too."""
        own = super()._get_llm_string(stop=stop, **kwargs)
        return f"{own}---{self.model._get_llm_string(stop=stop, **kwargs)}"

    def get_num_tokens(self, text: str) -> int:
        """Return how many tokens the wrapped model counts."""
        return self.model.get_num_tokens(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Any = None) -> int:
        """Return how many tokens the wrapped model counts."""
        return self.model.get_num_tokens_from_messages(messages, tools=tools)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the wrapped model's token ids."""
        return self.model.get_token_ids(text)

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools as the wrapped model does; its text is corrected all the same.

        Raises:
            NotImplementedError: the wrapped model binds no tools, or in a way that cannot be followed.
        """
        bound = self.model.bind_tools(tools, **kwargs)
        inner = bound.bound if isinstance(bound, RunnableBinding) else bound
        if isinstance(inner, BaseChatModel):
            aligned = self.model_copy(update={"model": inner})
            # Seen here, because the wrapped model may bind it under a name of its provider's.
            aligned._structured = is_structured(None, kwargs)
            rebound = aligned if inner is bound else cast(Any, bound).model_copy(update={"bound": aligned})
            return cast(Runnable[LanguageModelInput, AIMessage], rebound)
        raise NotImplementedError(
            f"{type(self.model).__name__}.bind_tools gives a {type(bound).__name__}, which cannot be "
            "wrapped; give AlignedChatModel a model whose bind_tools gives a chat model or a binding of one"
        )

    def with_structured_output(
        self, schema: Any, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Return the wrapped model's own structured output; it is not corrected."""
        return self.model.with_structured_output(schema, include_raw=include_raw, **kwargs)

    def corrected(self, messages: list[BaseMessage], answer: AIMessage) -> AIMessage:
        """Return an answer to `messages` that is finished already, corrected as this model's would be."""
        return cast(AIMessage, apart(partial(self._answer(messages, {}).correct, answer)))

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """Stream the answer; each sentence goes out as soon as it is corrected."""
        return BaseChatModel.stream(self._with_trace(config), input, config, stop=stop, **kwargs)

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """Stream the answer without blocking the event loop; the corrections run in threads."""
        return BaseChatModel.astream(self._with_trace(config), input, config, stop=stop, **kwargs)

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """Return the corrected answer."""
        return BaseChatModel.invoke(self._with_trace(config), input, config, stop=stop, **kwargs)

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """Return the corrected answer; the correction runs in a thread."""
        return await BaseChatModel.ainvoke(self._with_trace(config), input, config, stop=stop, **kwargs)

    def _with_trace(self, config: RunnableConfig | None) -> AlignedChatModel:
        if not self.trace_original:
            return self
        copy = self.model_copy()
        given = ensure_config(config)
        copy._traced = {"callbacks": given.get("callbacks"), "metadata": given.get("metadata") or {}}
        return copy

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        config = child_config(run_manager) if self.trace_original and run_manager else None
        if answer := self._closed_answer(messages, kwargs):
            ask = self._ask(stream_chunks, messages, config, stop, kwargs)
            return generate_from_stream(_generations(stream_closed(answer, ask)))
        if config:
            result = as_result(self.model.invoke(messages, config, stop=stop, **kwargs))
        else:
            result = self.model._generate_with_cache(messages, stop=stop, **kwargs)
        return apart(
            partial(_corrected, result, [self._answer(messages, kwargs) for _ in result.generations])
        )

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        config = child_config(run_manager) if self.trace_original and run_manager else None
        if answer := self._closed_answer(messages, kwargs):
            ask = self._ask(astream_chunks, messages, config, stop, kwargs)
            parts = [part async for part in astream_closed(answer, ask)]
            return generate_from_stream(_generations(parts))
        if config:
            result = as_result(await self.model.ainvoke(messages, config, stop=stop, **kwargs))
        else:
            result = await self.model._agenerate_with_cache(messages, stop=stop, **kwargs)
        job = partial(_corrected, result, [self._answer(messages, kwargs) for _ in result.generations])
        return await asyncio.to_thread(apart, job)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        if closed := self._closed_answer(messages, kwargs):
            ask = self._ask(stream_chunks, messages, self._traced, stop, kwargs)
            with closing(stream_closed(closed, ask)) as parts:
                yield from _generations(parts)
            return
        answer = self._answer(messages, kwargs)
        with closing(stream_chunks(self.model, messages, self._traced, stop=stop, **kwargs)) as chunks:
            for chunk in chunks:
                for piece in slices(chunk):
                    yield from _generations(run(answer.push(piece)))
        yield from _generations([*run(answer.close()), *answer.receipt()])

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        if closed := self._closed_answer(messages, kwargs):
            ask = self._ask(astream_chunks, messages, self._traced, stop, kwargs)
            async with aclosing(astream_closed(closed, ask)) as parts:
                async for message in parts:
                    yield ChatGenerationChunk(message=as_chunk(message))
            return
        answer = self._answer(messages, kwargs)
        upstream = astream_chunks(self.model, messages, self._traced, stop=stop, **kwargs)
        async with aclosing(upstream) as chunks:
            async for chunk in chunks:
                for piece in slices(chunk):
                    for part in _generations(await arun(answer.push(piece))):
                        yield part
        for part in _generations([*await arun(answer.close()), *answer.receipt()]):
            yield part

    def _closed_answer(self, messages: list[BaseMessage], kwargs: Mapping[str, Any]) -> ClosedAnswer | None:
        """Return an answer that comes in rounds; None where the loop is open, and for data."""
        if self.loop == "open" or self._is_structured(kwargs):
            return None
        return ClosedAnswer(
            CorrectionOptions.of(self),
            messages,
            thoughts=self.thoughts,
            structured=False,
            sink=self.sink,
            max_restarts=self.max_restarts,
            repeats=chosen(self.continuation, self.model) == "instruct",
        )

    def _ask(
        self,
        chunks: Callable[..., T],
        messages: list[BaseMessage],
        traced: RunnableConfig | None,
        stop: list[str] | None,
        kwargs: dict[str, Any],
    ) -> Callable[[str], T]:
        """Return how the wrapped model is asked for what comes after a prefix."""

        def ask(prefix: str) -> T:
            asked, given = going_on(self.continuation, self.model, messages, kwargs, prefix)
            return chunks(self.model, asked, traced, stop=stop, **given)

        return ask

    def _is_structured(self, kwargs: Mapping[str, Any]) -> bool:
        return self._structured or is_structured(self.model, kwargs)

    def _answer(self, messages: list[BaseMessage], kwargs: Mapping[str, Any]) -> ChatAnswer:
        return ChatAnswer(
            CorrectionOptions.of(self),
            messages,
            thoughts=self.thoughts,
            structured=self._is_structured(kwargs),
            sink=self.sink,
        )


def _corrected(result: ChatResult, answers: list[ChatAnswer]) -> ChatResult:
    """Return a result with the text of each generation corrected."""
    generations = []
    for each, answer in zip(result.generations, answers, strict=True):
        info = each.generation_info and without_raw_keys(each.generation_info)
        generations.append(ChatGeneration(message=answer.correct(each.message), generation_info=info))
    output = result.llm_output and without_raw_keys(result.llm_output)
    return ChatResult(generations=generations, llm_output=output)


def _generations(messages: Iterable[BaseMessage]) -> Iterator[ChatGenerationChunk]:
    for message in messages:
        yield ChatGenerationChunk(message=as_chunk(message))
