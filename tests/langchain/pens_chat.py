"""The pens model as a chat model of LangChain, in this process: greedy, token by token."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import Field

from tests.pens_model import pens_model


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
        import torch

        model, tokenizer = _loaded(self.template)
        ids = tokenizer.apply_chat_template(
            [_as_dict(message) for message in messages],
            return_tensors="pt",
            **{"add_generation_prompt": True} | kwargs,
        )
        yield _chunk("", ids.shape[1], 0)
        written: list[int] = []
        said, cache = "", None
        while len(written) < 100 and tokenizer.eos_token_id not in written:
            with torch.inference_mode():  # of the thread that runs this step
                output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            written.append(int(ids))
            self.tokens.append(int(ids))
            text = tokenizer.decode(written, skip_special_tokens=True)
            yield _chunk(text.removeprefix(said), 0, 1)
            said = text


@functools.cache
def _loaded(template: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = pens_model(template)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def _as_dict(message: BaseMessage) -> dict[str, Any]:
    role = "assistant" if isinstance(message, AIMessage) else "user"
    mark = {"prefix": True} if message.additional_kwargs.get("prefix") else {}
    return {"role": role, "content": message.content, **mark}


def _chunk(text: str, read: int, written: int) -> ChatGenerationChunk:
    usage: Any = {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
    return ChatGenerationChunk(message=AIMessageChunk(content=text, usage_metadata=usage))
