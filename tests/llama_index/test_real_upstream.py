"""A closed loop around a completion model that really writes; the aligner is the bundled one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llama_index.core.base.llms.types import CompletionResponse, CompletionResponseGen, LLMMetadata
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_completion_callback

from aligner_integrations.llama_index import AlignedLLM
from aligner_integrations.options import load_bundled
from tests.pens_model import ROLES, WRONG, answer, loaded, question, written_after

pytestmark = pytest.mark.slow  # the model is trained once


class Pens(CustomLLM):
    """The pens model as LlamaIndex takes a completion model."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="pens", is_chat_model=False)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        parts = self.stream_complete(prompt, formatted, **kwargs)
        return CompletionResponse(text="".join(part.delta or "" for part in parts))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        framed = prompt if formatted else frame(prompt)

        def said() -> CompletionResponseGen:
            text = ""
            for _, delta in written_after(loaded()[1](framed, return_tensors="pt").input_ids):
                text += delta
                yield CompletionResponse(text=text, delta=delta)

        return said()


def frame(prompt: str) -> str:
    return f"{ROLES[0]}{prompt}<|end|>{ROLES[1]}"


@pytest.mark.parametrize("pens", WRONG)
def test_it_goes_on_from_the_corrected_sum(pens: tuple[int, int]) -> None:
    right = answer(*pens, sum(pens))
    upstream = Pens(completion_to_prompt=frame)
    assert upstream.complete(question(*pens)).text == answer(*pens, sum(pens) + 1)
    closed = AlignedLLM(upstream, load_bundled(), loop="closed")
    assert closed.complete(question(*pens)).text == right
    assert "".join(part.delta or "" for part in closed.stream_complete(question(*pens))) == right
    assert asyncio.run(closed.acomplete(question(*pens))).text == right
    opened = AlignedLLM(upstream, load_bundled())
    assert opened.complete(question(*pens)).text != right
