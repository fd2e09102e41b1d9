"""The pens model as a chat model of LangChain, in this process: greedy, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import Field

from tests.pens_model import loaded, written_after


class PensChat(BaseChatModel):
    """Takes the options of `apply_chat_template`, and Mistral's mark on a message."""

    template: str = "prefill"
    tokens: list[int] = Field(default_factory=list)  # all that it ever wrote

    @property
    def _llm_type(self) -> str:
        return "pens"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        _, tokenizer = loaded(self.template)
        ids = tokenizer.apply_chat_template(
            [_as_dict(message) for message in messages],
            return_tensors="pt",
            **{"add_generation_prompt": True} | kwargs,
        )
        yield _chunk("", ids.shape[1], 0)
        for token, text in written_after(ids, self.template):
            self.tokens.append(token)
            yield _chunk(text, 0, 1)


def _as_dict(message: BaseMessage) -> dict[str, Any]:
    role = "assistant" if isinstance(message, AIMessage) else "user"
    mark = {"prefix": True} if message.additional_kwargs.get("prefix") else {}
    return {"role": role, "content": message.content, **mark}


def _chunk(text: str, read: int, written: int) -> ChatGenerationChunk:
    usage: Any = {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
    return ChatGenerationChunk(message=AIMessageChunk(content=text, usage_metadata=usage))
