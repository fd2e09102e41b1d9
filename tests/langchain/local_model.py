"""A chat model that runs here: it answers by rule, streams word by word, and calls the tools it is given."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.utils.function_calling import convert_to_openai_tool

ANSWER = "Two and two make four. 2 + 2 = 5. So it is, said Dr. Who."
MENDED = "Two and two make four. 2 + 2 = 4. So it is, said Dr. Who."


class LocalModel(BaseChatModel):
    """Says `answer`, or calls the first bound tool whose result it has not seen yet."""

    answer: str | list[Any] = ANSWER
    before_tools: str = "I look it up: 2 + 2 = 5. "

    @property
    def _llm_type(self) -> str:
        return "local"

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | Any],
        *,
        tool_choice: str | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        formatted = [convert_to_openai_tool(tool) for tool in tools]
        return self.bind(tools=formatted, tool_choice=tool_choice, **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        whole: AIMessageChunk | None = None
        for chunk in self._stream(messages, stop, **kwargs):
            assert isinstance(chunk.message, AIMessageChunk)
            whole = chunk.message if whole is None else whole + chunk.message
        assert whole is not None
        message = AIMessage(
            content=whole.content,
            tool_calls=whole.tool_calls,
            usage_metadata=whole.usage_metadata,
            response_metadata=whole.response_metadata,
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        tools = [] if isinstance(messages[-1], ToolMessage) else kwargs.get("tools", [])
        text = self.before_tools if tools else self.answer
        pieces: list[Any] = re.findall(r"\s*\S+\s*", text) if isinstance(text, str) else [[b] for b in text]
        for piece in pieces:
            yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
        if tools:
            yield ChatGenerationChunk(message=_call(tools, kwargs.get("tool_choice"), messages))
        usage = {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18}
        metadata = {"model_name": "local", "model_provider": "local", "finish_reason": "stop"}
        last = AIMessageChunk(content="", usage_metadata=usage, response_metadata=metadata)  # type: ignore[arg-type]
        yield ChatGenerationChunk(message=last)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        return {
            "ls_provider": "local",
            "ls_model_name": kwargs.get("model", "local"),
            "ls_model_type": "chat",
            "ls_stop": stop,
        }


def _call(tools: list[dict[str, Any]], choice: str | None, messages: list[BaseMessage]) -> AIMessageChunk:
    named = [tool for tool in tools if tool["function"]["name"] == choice] or tools
    function = named[0]["function"]
    asked = next(str(m.text) for m in reversed(messages) if isinstance(m, HumanMessage))
    arguments = {
        name: _argument(schema, asked)
        for name, schema in function.get("parameters", {}).get("properties", {}).items()
    }
    call = tool_call_chunk(
        name=function["name"], args=json.dumps(arguments, ensure_ascii=False), id="call_1", index=0
    )
    return AIMessageChunk(content="", tool_call_chunks=[call])


def _argument(schema: dict[str, Any], asked: str) -> Any:
    if schema.get("type") in ("integer", "number"):
        return int((re.findall(r"\d+", asked) or ["3"])[0])
    quoted = re.search(r"'([^']+)'", asked)
    return quoted[1] if quoted else asked
