"""What a review found of the conformance kit: leaks it called clean, and clean guards it did not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import adispatch_custom_event, dispatch_custom_event
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.graph import START, MessagesState, StateGraph

from aligner_integrations.langchain import AlignedChatModel
from aligner_integrations.testing import scripted_aligner
from aligner_integrations.testing.conformance import ReplayModel, Report, check
from tests.testing import guards
from tests.testing.guards import ANSWER, CANARY, CLEAN, HIDDEN, PROMPT, upstream

ALIGNER = scripted_aligner(lambda question, prefix, sentence: sentence.replace(CANARY, HIDDEN))
PIECES = [ANSWER[at : at + 3] for at in range(0, len(ANSWER), 3)]


def leaking(report: Report) -> set[str]:
    return {surface.name for surface in report.surfaces if surface.leaked}


def graph(node: Any) -> Any:
    built: Any = StateGraph(MessagesState)
    built.add_node("answer", node)
    built.add_edge(START, "answer")
    return built.compile()


def sending(*payloads: Any) -> Any:
    """A graph that says the clean answer, and sends custom events before."""

    def answer(state: MessagesState, config: RunnableConfig) -> Any:
        for payload in payloads:
            dispatch_custom_event("progress", payload, config=config)
        return {"messages": [AIMessage(CLEAN)]}

    async def aanswer(state: MessagesState, config: RunnableConfig) -> Any:
        for payload in payloads:
            await adispatch_custom_event("progress", payload, config=config)
        return {"messages": [AIMessage(CLEAN)]}

    return graph(RunnableLambda(answer, aanswer))


class Noted(ReplayModel):
    """A model that says the answer without the secret, and keeps more beside it: all at once, or by piece."""

    secret: str = CANARY
    beside: Any = None
    by_piece: tuple[dict[str, Any], ...] = ()

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(**self._said()))])

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        yield ChatGenerationChunk(message=AIMessageChunk(**self._said()))
        for piece in self.by_piece:
            yield ChatGenerationChunk(message=AIMessageChunk(content="", response_metadata=piece))

    _astream = BaseChatModel._astream

    def _said(self) -> dict[str, Any]:
        text = self.answer.replace(self.secret, HIDDEN)
        return {"content": text, "response_metadata": {"original": self.beside}}


def check_noted(canary: str, beside: Any, **given: Any) -> Report:
    answer = f"It is {canary}, they say."
    model = Noted(answer=answer, secret=canary, beside=beside, **given)
    return check(model, canary=canary, expected=answer.replace(canary, HIDDEN))


@pytest.mark.parametrize("shape", [lambda piece: piece, lambda piece: {"token": piece}])
def test_raw_tokens_on_the_custom_stream_leak(shape: Callable[[str], Any]) -> None:
    def answer(state: MessagesState) -> Any:
        write = get_stream_writer()
        for piece in PIECES:
            write(shape(piece))
        return {"messages": [AIMessage(CLEAN)]}

    report = check(
        graph(answer), canary=CANARY, expected=CLEAN, surfaces=["updates", "custom", "async custom"]
    )
    assert leaking(report) == {"custom", "async custom"}
    assert report["custom"].leaked == len(CANARY)


@pytest.mark.parametrize("key", [None, "token", "input"])
def test_raw_tokens_in_custom_events_leak(key: str | None) -> None:
    report = check(sending(*({key: piece} if key else piece for piece in PIECES)), canary=CANARY)
    assert leaking(report) == {"events v2", "callbacks"}


def test_custom_events_of_a_chain_count_too() -> None:
    def show(text: str, config: RunnableConfig) -> str:
        for piece in PIECES:
            dispatch_custom_event("token", piece, config=config)
        return text.replace(CANARY, HIDDEN)

    target = PROMPT | upstream() | (lambda message: message.text) | RunnableLambda(show)
    report = check(target, canary=CANARY, expected=CLEAN, surfaces=["stream", "callbacks"])
    assert leaking(report) == {"callbacks", "callbacks, model runs"}


@pytest.mark.parametrize("payload", ["half way", 0.5, None, ["half", "way"], {"done": "half"}])
def test_a_custom_event_may_have_any_shape(payload: Any) -> None:
    check(sending(payload), canary=CANARY, expected=CLEAN).assert_clean()


@pytest.mark.parametrize("streamed", [False, True])
def test_logprobs_that_spell_the_canary_leak(streamed: bool) -> None:
    tokens = [
        {"token": piece, "logprob": -0.1} for piece in ("It is ", "ann.l", "ee@", "exam", "ple", ".org")
    ]
    by_piece = tuple({"logprobs": {"content": [token]}} for token in tokens)
    given = {"by_piece": by_piece} if streamed else {}
    report = check_noted(CANARY, None if streamed else {"content": tokens}, **given)
    # Of metadata that comes by piece, `invoke` of this model has none and v3 keeps the last.
    streams = {"stream", "astream", "events v2", "callbacks", "tracer"}
    assert leaking(report) == (streams if streamed else {surface.name for surface in report.surfaces})
    assert report["stream"].leaked == len(CANARY)
    if streamed:
        model = Noted(answer=ANSWER, by_piece=by_piece)
        report = check(create_agent(model), canary=CANARY, expected=CLEAN)
        assert leaking(report) >= {"messages", "async messages", "events v2", "callbacks", "tracer"}


def test_other_strings_beside_each_other_do_not_spell_it() -> None:
    beside = [{"first": "ann.l", "second": "ee@exam"}, {"first": "Bob", "second": "ple.org"}]
    assert check_noted(CANARY, beside)["invoke"].leaked == len("ee@example.org")
    assert check_noted(CANARY, list(reversed(beside)))["invoke"].leaked < len("ee@example.org")


@pytest.mark.parametrize(
    "canary", ["123e4567-e89b-12d3-a456-426614174000", "0xdeadbeefcafe", "sk-0xdeadbeef", "deadbeef-cafe"]
)
def test_a_canary_that_looks_like_an_id_is_found(canary: str) -> None:
    around = f"0x{canary}" if canary.startswith("deadbeef") else f"the key {canary}"
    assert check_noted(canary, around)["invoke"].leaked >= 8
    check_noted(canary, "1f0e4567-a89c-42d3-b456-42f0a417c0de at 0x7f30dead10").assert_clean()


def test_errors_of_inner_runs_that_recover_are_read() -> None:
    def strict(text: str) -> str:
        raise ValueError(f"blocked: {text}")

    def answer(state: MessagesState, config: RunnableConfig) -> Any:
        step = RunnableLambda(strict).with_fallbacks([RunnableLambda(lambda text: CLEAN)])
        return {"messages": [AIMessage(step.invoke(ANSWER, config))]}

    report = check(graph(answer), canary=CANARY, expected=CLEAN)
    assert leaking(report) == {"callbacks", "tracer"}


@pytest.mark.parametrize("fails", [False, True])
def test_what_tools_give_is_heard(fails: bool) -> None:
    @tool
    def look_up(name: str) -> str:
        """Look a name up."""
        if fails:
            raise ValueError(ANSWER)
        return ANSWER

    def answer(state: MessagesState, config: RunnableConfig) -> Any:
        step = look_up.with_fallbacks([RunnableLambda(lambda given: "")]) if fails else look_up
        step.invoke({"name": "Ann"}, config)
        return {"messages": [AIMessage(CLEAN)]}

    report = check(graph(answer), canary=CANARY, expected=CLEAN, surfaces=["updates", "callbacks", "tracer"])
    assert leaking(report) == {"callbacks", "tracer"}


def test_errors_of_a_model_are_heard() -> None:
    class Failing(ReplayModel):
        def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
            raise ValueError(self.answer)

        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            raise ValueError(self.answer)
            yield

    model = Failing(answer=ANSWER).with_fallbacks([upstream(answer=CLEAN)])

    def answer(state: MessagesState, config: RunnableConfig) -> Any:
        return {"messages": [model.invoke(state["messages"], config)]}

    report = check(graph(answer), canary=CANARY, expected=CLEAN, surfaces=["updates", "callbacks", "tracer"])
    assert leaking(report) == {"callbacks", "tracer"}


SAID = f"Write to {CANARY}."
CALL = {"name": "look_up", "args": {"name": CANARY}, "id": "call"}
HISTORIES: dict[str, list[Any]] = {
    "same answer": [HumanMessage("Who?"), AIMessage(CLEAN), HumanMessage("Again?")],
    "canary": [HumanMessage("Who?"), AIMessage(SAID), HumanMessage("Again?")],
    "with ids": [HumanMessage("Who?", id="1"), AIMessage(SAID, id="2"), HumanMessage("Again?", id="3")],
    "pairs": [("human", "Who?"), ("ai", SAID), ("human", "Again?")],
    "dicts": [{"role": "user", "content": SAID}, {"role": "assistant", "content": SAID}, ("human", "Again?")],
    "tools": [
        AIMessage("", tool_calls=[CALL]),
        ToolMessage(CANARY, tool_call_id="call"),
        ("human", "Again?"),
    ],
}


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("remembers", [False, True])
def test_history_in_the_input_is_no_answer_and_no_leak(history: str, remembers: bool) -> None:
    model = upstream()
    agent = create_agent(
        AlignedChatModel(model=model, aligner=ALIGNER), checkpointer=InMemorySaver() if remembers else None
    )
    given = {"messages": HISTORIES[history]}
    check(agent, canary=CANARY, expected=CLEAN, upstream=model, input=given).assert_clean()


def test_a_node_may_hand_the_history_on() -> None:
    model = AlignedChatModel(model=upstream(), aligner=ALIGNER)

    def answer(state: MessagesState) -> Any:
        return {"messages": [*state["messages"], model.invoke(state["messages"])]}

    given = {"messages": HISTORIES["canary"]}
    check(graph(answer), canary=CANARY, expected=CLEAN, input=given).assert_clean()


def test_history_excuses_nothing_that_is_new() -> None:
    given = {"messages": [HumanMessage("Who?"), AIMessage(ANSWER, id="old"), HumanMessage("Again?")]}
    again = check(create_agent(upstream()), canary=CANARY, expected=CLEAN, input=given)
    assert leaking(again) == {surface.name for surface in again.surfaces} - {"custom", "async custom"}

    def rewrite(state: MessagesState) -> Any:
        return {"messages": [AIMessage(f"Now: {CANARY}", id="old"), AIMessage(CLEAN)]}

    report = check(graph(rewrite), canary=CANARY, expected=CLEAN, input=given, surfaces=["updates", "values"])
    assert leaking(report) == {"updates", "values"}
    silent = check(graph(lambda state: {"messages": []}), canary=CANARY, expected=CLEAN, input=given)
    assert silent["invoke"].lost == silent["values"].lost == len(CLEAN)


@pytest.mark.parametrize(
    ("canary", "number", "leaks"),
    [
        ("4111111111111111", 4111111111111111, True),
        ("0041234567", 41234567, True),
        ("4111111111111111", 1111111, False),  # counts and times are not searched for pieces
        ("42", 42, False),
        ("1111", True, False),
    ],
)
def test_a_canary_of_digits_may_leak_as_a_number(canary: str, number: int, leaks: bool) -> None:
    assert check_noted(canary, {"found": number}).clean is not leaks


def test_counts_beside_each_other_spell_no_number() -> None:
    check_noted("4111111111111111", [4, *[1] * 15]).assert_clean()


def test_the_clean_guard_stays_clean() -> None:
    check(guards.chain(guards.by_sentence), canary=CANARY, expected=CLEAN).assert_clean()


def test_a_new_message_without_content_is_searched() -> None:
    beside = {"id": "new", "content": None, "original": CANARY}
    assert check_noted(CANARY, beside)["invoke"].leaked == len(CANARY)


def test_an_input_that_has_a_role_and_content_stays_as_it_is() -> None:
    heard: list[dict[str, str]] = []

    def note(given: dict[str, str]) -> dict[str, str]:
        heard.append(given)
        return {"question": given["content"]}

    given = {"role": "pirate", "content": "Who?"}
    target = RunnableLambda(note) | PROMPT | upstream() | guards.Guard(pieces=guards.by_sentence)
    check(target, canary=CANARY, expected=CLEAN, input=given, surfaces=["invoke"]).assert_clean()
    assert heard == [given]
