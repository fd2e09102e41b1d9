"""Which way of going on is chosen for a chat model, and what is then asked for."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from langchain_core.language_models import BaseChatModel, FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI
from openai import InternalServerError
from pydantic import SecretStr

from aligner_integrations.langchain.continuation import chosen, going_on
from aligner_integrations.template import GO_ON

MESSAGES = [HumanMessage("How is it?")]


def named(name: str, **fields: Any) -> BaseChatModel:
    """A chat model of a partner package, as far as its class and its fields tell of it."""
    kind = type(name, (FakeListChatModel,), {"model_config": {"extra": "allow"}})
    model = kind(responses=["Fine."], **fields)
    assert isinstance(model, BaseChatModel)
    return model


@pytest.mark.parametrize(
    ("model", "way"),
    [
        (named("ChatMistralAI"), "prefix"),
        (named("ChatDeepSeek", api_base="https://api.deepseek.com/beta/"), "prefix"),
        (named("ChatDeepSeek", api_base="https://api.deepseek.com/v1"), "instruct"),
        (named("ChatAnthropic", model="claude-sonnet-4-5"), "prefill"),
        (named("ChatAnthropic", model="claude-opus-4-6"), "instruct"),
        (named("ChatAnthropic", model="claude-sonnet-4-5", thinking={"type": "enabled"}), "instruct"),
        (named("ChatOpenAI"), "instruct"),
        (FakeListChatModel(responses=[""]), "instruct"),
    ],
)
def test_the_way_is_chosen_by_what_is_known_of_the_model(model: BaseChatModel, way: str) -> None:
    assert chosen("auto", model) == way
    assert chosen("continue_final_message", model) == "continue_final_message"
    # The class may be derived from one that is known.
    assert chosen("auto", type("Own", (type(model),), {})(**dict(model))) == way


def test_the_first_time_nothing_is_added() -> None:
    for way in ("prefill", "prefix", "continue_final_message", "instruct"):
        asked, given = going_on(way, FakeListChatModel(responses=[""]), [*MESSAGES], {"top_k": 3}, "")
        assert asked == MESSAGES and given == {"top_k": 3}


def test_the_text_is_the_assistants() -> None:
    model = FakeListChatModel(responses=[""])
    for way, more in (("prefill", []), ("instruct", [HumanMessage(GO_ON)])):
        asked, given = going_on(way, model, [*MESSAGES], {}, "It is so.")  # type: ignore[arg-type]
        assert asked == [*MESSAGES, AIMessage("It is so."), *more] and given == {}
    asked, given = going_on("prefix", model, [*MESSAGES], {}, "It is so.")
    assert asked[-1].additional_kwargs == {"prefix": True} and given == {}
    asked, given = going_on("continue_final_message", model, [*MESSAGES], {}, "It is so.")
    assert given == {"continue_final_message": True, "add_generation_prompt": False}


def sent(way: Any, **options: Any) -> dict[str, Any]:
    """What a client of an OpenAI-compatible server sends for it."""
    bodies: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(500)

    client = httpx.Client(transport=httpx.MockTransport(answer))
    model = ChatOpenAI(
        model="it",
        api_key=SecretStr("none"),
        base_url="http://it/v1",
        http_client=client,
        max_retries=0,
        **options,
    )
    asked, given = going_on(way, model, [*MESSAGES], {"extra_body": {"top_k": 3}}, "It is so.")
    with pytest.raises(InternalServerError):
        list(model.stream(asked, **given))
    (body,) = bodies
    return body


def test_what_a_vllm_server_is_sent() -> None:
    body = sent("continue_final_message", extra_body={"min_p": 0.1})
    assert body["messages"][-1] == {"role": "assistant", "content": "It is so."}
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert (body["top_k"], body["min_p"]) == (3, 0.1)


def test_what_a_deepseek_server_is_sent() -> None:
    """langchain-openai drops the mark of a message; it is put back."""
    body = sent("prefix")
    assert body["messages"] == [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": "It is so.", "prefix": True},
    ]
