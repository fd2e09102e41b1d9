"""How a chat model of LangChain is made to go on from a given text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage

from aligner_integrations.continuation import Continuation, claude_goes_on
from aligner_integrations.template import GO_ON

_Request: TypeAlias = tuple[list[BaseMessage], dict[str, Any]]
_Ways: TypeAlias = dict[str, Callable[[BaseChatModel, list[BaseMessage], dict[str, Any], str], _Request]]


def chosen(continuation: Continuation, model: BaseChatModel) -> Continuation:
    """Return the way that is meant for a model: `auto` takes what the model is known for, else `instruct`.

    A model is known by its class, whichever package it comes from, and by its name; no package is imported.
    """
    if continuation != "auto":
        return continuation
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if "ChatMistralAI" in kinds:
        return "prefix"
    if "ChatDeepSeek" in kinds:  # at this address alone
        return "prefix" if str(getattr(model, "api_base", "")).rstrip("/").endswith("/beta") else "instruct"
    if "ChatAnthropic" in kinds and not getattr(model, "thinking", None):
        return "prefill" if claude_goes_on(str(getattr(model, "model", ""))) else "instruct"
    return "instruct"


def going_on(
    continuation: Continuation,
    model: BaseChatModel,
    messages: list[BaseMessage],
    kwargs: dict[str, Any],
    prefix: str,
) -> _Request:
    """Return the messages and options by which `model` is asked for what comes after `prefix`."""
    if not prefix:
        return messages, kwargs
    return _WAYS[chosen(continuation, model)](model, messages, kwargs, prefix)


def _prefill(
    model: BaseChatModel, messages: list[BaseMessage], kwargs: dict[str, Any], prefix: str
) -> _Request:
    return [*messages, AIMessage(prefix)], kwargs


def _continue_final_message(
    model: BaseChatModel, messages: list[BaseMessage], kwargs: dict[str, Any], prefix: str
) -> _Request:
    options = {"continue_final_message": True, "add_generation_prompt": False}
    if hasattr(model, "extra_body"):  # a client of an OpenAI-compatible server
        options = _in_body(model, kwargs, options)
    return [*messages, AIMessage(prefix)], kwargs | options


def _prefix(
    model: BaseChatModel, messages: list[BaseMessage], kwargs: dict[str, Any], prefix: str
) -> _Request:
    last = AIMessage(prefix, additional_kwargs={"prefix": True})
    payload_of = getattr(model, "_get_request_payload", None)
    if payload_of is None or not hasattr(model, "extra_body"):
        return [*messages, last], kwargs
    # langchain-openai's clients, and those made from them, drop the mark: the messages are sent as they
    # would be, with the mark put back.
    sent = [dict(message) for message in payload_of([*messages, last])["messages"]]
    sent[-1]["prefix"] = True
    return [*messages, last], kwargs | _in_body(model, kwargs, {"messages": sent})


def _instruct(
    model: BaseChatModel, messages: list[BaseMessage], kwargs: dict[str, Any], prefix: str
) -> _Request:
    return [*messages, AIMessage(prefix), HumanMessage(GO_ON)], kwargs


def _in_body(model: BaseChatModel, kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return an `extra_body` with `options` beside what it holds already."""
    given = {**(getattr(model, "extra_body", None) or {}), **(kwargs.get("extra_body") or {})}
    return {"extra_body": {**given, **options}}


_WAYS: _Ways = {
    "prefill": _prefill,
    "continue_final_message": _continue_final_message,
    "prefix": _prefix,
    "instruct": _instruct,
}
