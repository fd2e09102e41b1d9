"""`AlignedLLM`: any LLM of LlamaIndex, its text corrected before anyone sees it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import Field, SerializeAsAny
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import LLM, ToolSelection
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.tools import BaseTool
from llama_index.core.types import TokenAsyncGen, TokenGen

from aligner_integrations.aligner import Aligner
from aligner_integrations.closed_loop import MAX_RESTARTS
from aligner_integrations.continuation import claude_goes_on
from aligner_integrations.llama_index.answer import LLMAnswer
from aligner_integrations.llama_index.instrumentation import CorrectionSpan
from aligner_integrations.llama_index.parts import Protocol, protocol_of
from aligner_integrations.llama_index.question import asking, is_parsed, is_prompted, question_of
from aligner_integrations.llama_index.stored import StoresOptions
from aligner_integrations.llama_index.text import AnswerText, Sink
from aligner_integrations.llama_index.upstream import (
    Call,
    atold,
    chat_call,
    completion_call,
    told,
    tools_call,
)
from aligner_integrations.options import CorrectionOptions, is_structured
from aligner_integrations.resilience import WITHHELD_TEXT, OnError

_dispatcher = get_dispatcher(__name__)

_TAKEN_OVER = (
    *("system_prompt", "messages_to_prompt", "completion_to_prompt"),
    *("output_parser", "pydantic_program_mode", "query_wrapper_prompt"),
)


class AlignedLLM(StoresOptions, FunctionCallingLLM):
    """Wraps any LLM: completion, chat or function calling. Chat engines and agents get corrected text only.

    Deltas, the text so far in every response of a stream, what chat engines store and what agents stream
    are the same corrected text. Tool calls (a ReAct agent's in text, too), thinking and other blocks are the
    wrapped LLM's. Data is left alone: structured prediction, prompts with an output parser, JSON. Of a
    provider's `raw` response and the log probabilities, which spell the raw text, ids and usage are left.

    The question is the query of the prompt, else the last message of the user, else the prompt.

    Observability sees the wrapped LLM's own call, tagged `{"aligner": "original"}`. LlamaIndex's older
    callbacks know no tags: give a `callback_manager` to this LLM, not to the wrapped one.

    Args:
        llm: The LLM to wrap.
        aligner: What corrects; without one the bundled model is loaded on first use.
        loop: `"open"`: each sentence is corrected on its own way out. `"closed"`: where a sentence changed,
            the wrapped LLM goes on from the corrected text. Calls with tools are open all the same.
        continuation: How a chat model is made to go on; a completion model just does. `"prefill"`: its API
            goes on from a last message of the assistant. `"instruct"`: a message of the user asks for it.
            `"auto"`: `"prefill"` for the Claude models that take it, else `"instruct"`.
        max_restarts: How often the wrapped LLM may be interrupted in one answer.
        on_error: What a failed correction does: `"raise"`, `"pass_through"` (the original is shown) or
            `"withhold"` (`withheld_text` is shown in its place).
        withheld_text: Stands for a sentence that was withheld.
        sentence_seconds: A correction that takes longer is dropped and has failed; None: no limit.
        answer_seconds: So long the corrections of one answer may take in all; None: no limit.
        feedback: Tells the aligner what to look for.
        edit_margin: Overrides the model's own margin, in logits.
        thoughts: Whether text beside tool calls is corrected too, and what a ReAct agent thinks. Without it,
            the sentence that a tool call ends stays as it is, and so does what comes after the call.
        sink: Called with every segment once it is corrected; in async calls in a worker thread.
        more: What every LLM of LlamaIndex takes; what is not given is the wrapped one's.

    Raises:
        TypeError: `llm` is no LLM, or another argument is of a wrong type.
    """

    llm: SerializeAsAny[LLM]
    loop: Literal["open", "closed"] = "open"
    continuation: Literal["auto", "prefill", "instruct"] = "auto"
    max_restarts: int = Field(default=MAX_RESTARTS, ge=0)
    on_error: OnError = "raise"
    withheld_text: str = WITHHELD_TEXT
    sentence_seconds: float | None = Field(default=None, gt=0.0)
    answer_seconds: float | None = Field(default=None, gt=0.0)
    feedback: str = ""
    edit_margin: float | None = Field(default=None, ge=0.0)
    thoughts: bool = True
    sink: Sink | None = Field(default=None, exclude=True)

    def __init__(
        self,
        llm: LLM,
        aligner: Aligner | None = None,
        *,
        loop: Literal["open", "closed"] = "open",
        continuation: Literal["auto", "prefill", "instruct"] = "auto",
        max_restarts: int = MAX_RESTARTS,
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
        sentence_seconds: float | None = None,
        answer_seconds: float | None = None,
        feedback: str = "",
        edit_margin: float | None = None,
        thoughts: bool = True,
        sink: Sink | None = None,
        **more: Any,
    ) -> None:
        if not isinstance(llm, LLM):
            raise TypeError(f"llm must be an LLM of LlamaIndex, got {type(llm).__name__}")
        if isinstance(llm, StructuredLLM):
            raise TypeError(
                "llm gives data, not prose; wrap the LLM inside: AlignedLLM(llm).as_structured_llm(...)"
            )
        super().__init__(
            llm=llm,
            aligner=aligner,
            loop=loop,
            continuation=continuation,
            max_restarts=max_restarts,
            on_error=on_error,
            withheld_text=withheld_text,
            sentence_seconds=sentence_seconds,
            answer_seconds=answer_seconds,
            feedback=feedback,
            edit_margin=edit_margin,
            thoughts=thoughts,
            sink=sink,
            **{name: getattr(llm, name) for name in _TAKEN_OVER} | more,
        )
        CorrectionOptions.of(self)  # checks them

    @classmethod
    def class_name(cls) -> str:
        return "AlignedLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """The wrapped LLM's."""
        return self.llm.metadata

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self._chat(messages, kwargs).whole()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return await self._chat(messages, kwargs).awhole()

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Generator[ChatResponse]:
        return self._chat(messages, kwargs).stream()

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> AsyncGenerator[ChatResponse]:
        return await self._chat(messages, kwargs).astream()

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return self._completion(prompt, formatted, kwargs).whole()

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return await self._completion(prompt, formatted, kwargs).awhole()

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> Generator[CompletionResponse]:
        return self._completion(prompt, formatted, kwargs).stream()

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> AsyncGenerator[CompletionResponse]:
        return await self._completion(prompt, formatted, kwargs).astream()

    # With tools: the wrapped LLM prepares them, and reads its calls, in its own way.

    @_dispatcher.span
    def chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        **kwargs: Any,
    ) -> ChatResponse:
        messages, call = self._with_tools(tools, user_msg, chat_history, kwargs)
        return told(self, messages, kwargs, call.whole)

    @_dispatcher.span
    async def achat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        **kwargs: Any,
    ) -> ChatResponse:
        messages, call = self._with_tools(tools, user_msg, chat_history, kwargs)
        return await atold(self, messages, kwargs, call.awhole)

    @_dispatcher.span
    def stream_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        **kwargs: Any,
    ) -> Generator[ChatResponse]:
        messages, call = self._with_tools(tools, user_msg, chat_history, kwargs)
        return told(self, messages, kwargs, call.stream)

    @_dispatcher.span
    async def astream_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[ChatResponse]:
        messages, call = self._with_tools(tools, user_msg, chat_history, kwargs)
        return await atold(self, messages, kwargs, call.astream)

    def _prepare_chat_with_tools(self, tools: Sequence[BaseTool], **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self._able._prepare_chat_with_tools_compat(tools, **kwargs)

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        if not (isinstance(self.llm, FunctionCallingLLM) or error_on_no_tool_call):
            return []  # a code agent asks any LLM that could have some, as this class says of itself
        return self._able.get_tool_calls_from_response(
            response, error_on_no_tool_call=error_on_no_tool_call, **kwargs
        )

    # Prompts of LlamaIndex: what they ask is the question, and what they parse is data.

    def predict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        with self._asking(prompt, prompt_args):
            return super().predict(prompt, **prompt_args)

    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        with self._asking(prompt, prompt_args):
            return await super().apredict(prompt, **prompt_args)

    def stream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenGen:
        with self._asking(prompt, prompt_args):
            return super().stream(prompt, **prompt_args)

    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        with self._asking(prompt, prompt_args):
            return await super().astream(prompt, **prompt_args)

    def structured_predict(self, *args: Any, **kwargs: Any) -> Any:
        return self.llm.structured_predict(*args, **kwargs)

    async def astructured_predict(self, *args: Any, **kwargs: Any) -> Any:
        return await self.llm.astructured_predict(*args, **kwargs)

    def stream_structured_predict(self, *args: Any, **kwargs: Any) -> Any:
        return self.llm.stream_structured_predict(*args, **kwargs)

    async def astream_structured_predict(self, *args: Any, **kwargs: Any) -> Any:
        return await self.llm.astream_structured_predict(*args, **kwargs)

    @property
    def _able(self) -> FunctionCallingLLM:
        if not isinstance(self.llm, FunctionCallingLLM):
            raise ValueError(f"{self.llm.class_name()} does not call functions; take a ReActAgent for it")
        return self.llm

    @property
    def _instructed(self) -> bool:
        """Whether the wrapped LLM has to be told to go on from what was shown."""
        if not self.llm.metadata.is_chat_model:
            return False
        if self.continuation != "auto":
            return self.continuation == "instruct"
        kinds = {kind.__name__ for kind in type(self.llm).__mro__}
        return "Anthropic" not in kinds or not claude_goes_on(self.llm.metadata.model_name)

    def _asking(
        self, prompt: BasePromptTemplate, prompt_args: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        return asking(prompt, prompt_args, parsed=self.output_parser is not None)

    def _chat(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> Call[ChatResponse]:
        closed = self.loop == "closed"
        protocol = None if is_prompted() else protocol_of(messages)
        answer = self._answer(messages, kwargs, protocol=protocol, closed=closed)
        return chat_call(self.llm, answer, messages, kwargs, closed=closed, instructed=self._instructed)

    def _completion(self, prompt: str, formatted: bool, kwargs: dict[str, Any]) -> Call[CompletionResponse]:
        closed = self.loop == "closed"
        answer = self._answer(prompt, kwargs, closed=closed)
        given = {**kwargs, "formatted": formatted}
        return completion_call(self.llm, answer, prompt, given, closed=closed, instructed=self._instructed)

    def _with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None,
        chat_history: list[ChatMessage] | None,
        kwargs: dict[str, Any],
    ) -> tuple[list[ChatMessage], Call[ChatResponse]]:
        last = ChatMessage(role=MessageRole.USER, content=user_msg) if isinstance(user_msg, str) else user_msg
        messages = [*(chat_history or []), *([last] if last is not None else [])]
        given = {**kwargs, "user_msg": user_msg, "chat_history": chat_history}
        answer = self._answer(messages, kwargs, protocol=protocol_of(messages))
        return messages, tools_call(self._able, answer, tools, given)

    def _answer(
        self,
        asked: str | Sequence[ChatMessage],
        kwargs: Mapping[str, Any],
        *,
        protocol: Protocol | None = None,
        closed: bool = False,
    ) -> LLMAnswer[Any] | None:
        """Return a new answer; None for one that is data."""
        if is_parsed() or is_structured(self.llm, kwargs):
            return None
        question = question_of(asked)
        span = CorrectionSpan(self, question)
        open_text = partial(
            AnswerText,
            CorrectionOptions.of(self),
            question,
            span,
            sink=self.sink,
            thoughts=self.thoughts,
            protocol=protocol,
            closed=closed,
            max_restarts=self.max_restarts,
            repeats=self._instructed,
        )
        return LLMAnswer(open_text, span, thoughts=self.thoughts)
