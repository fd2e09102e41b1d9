"""What a wrapped LLM is asked: the question that its answer is corrected against, or data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.prompts import BasePromptTemplate

from aligner_integrations.errors import QuestionNotFoundError

# Of the prompt of LlamaIndex that the LLM answers now, if it is one.
_asked: ContextVar[str | None] = ContextVar("aligner_asked", default=None)
_is_parsed: ContextVar[bool | None] = ContextVar("aligner_is_parsed", default=None)  # None: no prompt
_QUERY_NAMES = ("query_str", "question", "query")


@contextmanager
def asking(prompt: BasePromptTemplate, prompt_args: Mapping[str, Any], *, parsed: bool) -> Iterator[None]:
    """Keep what a prompt asks, so that what is built around it is not taken for the question.

    What is `parsed`, by the prompt's own parser too, is data.
    """
    given = {**prompt.kwargs, **prompt_args}
    query = next((given[name] for name in _QUERY_NAMES if isinstance(given.get(name), str)), None)
    asked_before = _asked.set(query)
    parsed_before = _is_parsed.set(parsed or prompt.output_parser is not None)
    try:
        yield
    finally:
        _is_parsed.reset(parsed_before)
        _asked.reset(asked_before)


def is_parsed() -> bool:
    """Whether the prompt that is answered now has its answer parsed."""
    return bool(_is_parsed.get())


def is_prompted() -> bool:
    """Whether a prompt is answered now: what engines retrieve stands in it, and agents ask without one."""
    return _is_parsed.get() is not None


def question_of(asked: str | Sequence[ChatMessage]) -> str:
    """Return the query of the prompt that is answered now, else what the LLM is asked.

    That is a completion's prompt, or the last text of the user, else of whoever else speaks to the LLM.

    Raises:
        QuestionNotFoundError: nobody says anything to the LLM.
    """
    if (query := _asked.get()) is not None:
        return query
    if isinstance(asked, str):
        return asked
    others = [each for each in asked if each.role not in (MessageRole.ASSISTANT, MessageRole.TOOL)]
    users = [each for each in others if each.role == MessageRole.USER]
    for message in (*reversed(users), *reversed(others)):
        if message.content:
            return message.content
    raise QuestionNotFoundError(
        "the messages hold no text of the user, so there is no question to correct the answer against; "
        "add a message of the user"
    )
