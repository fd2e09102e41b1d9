"""`ReplayLLM` is an LLM like others: it streams, calls tools, and is seen by the dispatcher."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock, ToolCallBlock
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import ValidationError

from aligner_integrations.testing.replay_llm import ReplayLLM

ANSWER = "It is blue. It is wide: the sky."
CALLS: list[dict[str, Any]] = [{"name": "look_up", "args": {"name": "Ann"}}, {"name": "look_up"}]


def asked(text: str = "What is it?") -> list[ChatMessage]:
    return [ChatMessage(role="user", content=text)]


@pytest.mark.parametrize(
    ("given", "pieces"), [({"chunk_size": 9}, 4), ({"chunk_size": 40}, 1), ({"seed": 3}, 8)]
)
async def test_every_way_says_the_answer(given: dict[str, Any], pieces: int) -> None:
    llm = ReplayLLM(answer=ANSWER, **given)
    chats = [list(llm.stream_chat(asked())), [part async for part in await llm.astream_chat(asked())]]
    for chat in chats:
        assert [part.message.content for part in chat] == _added_up([part.delta or "" for part in chat])
        assert len(chat) == pieces and chat[-1].message.content == ANSWER
    texts = [list(llm.stream_complete("It?")), [part async for part in await llm.astream_complete("It?")]]
    for text in texts:
        assert [part.text for part in text] == _added_up([part.delta or "" for part in text])
        assert [part.delta for part in text] == [part.delta for part in chats[0]]
    assert llm.chat(asked()).message.content == (await llm.achat(asked())).message.content == ANSWER
    assert llm.complete("It?").text == (await llm.acomplete("It?")).text == ANSWER
    assert llm.chat(asked()).delta is None and llm.handed_out == len(ANSWER)


def _added_up(deltas: list[str]) -> list[str]:
    return ["".join(deltas[: end + 1]) for end in range(len(deltas))]


def test_a_seed_cuts_the_same_way_each_time() -> None:
    cuts = [
        [part.delta for part in ReplayLLM(answer=ANSWER, seed=seed).stream_chat(asked())]
        for seed in (1, 1, 2)
    ]
    assert cuts[0] == cuts[1] != cuts[2] and len({len(delta or "") for delta in cuts[0]}) > 2


def test_what_the_provider_sent_is_kept() -> None:
    responses = list(ReplayLLM(answer=ANSWER).stream_chat(asked()))
    assert responses[-1].raw == {"text": ANSWER, "usage": {"completion_tokens": 8}}
    assert ReplayLLM(answer=ANSWER).complete("It?").raw == responses[-1].raw


def test_an_answer_may_depend_on_the_question() -> None:
    llm = ReplayLLM(answer=lambda question: f"You asked: {question}")
    history = [*asked("One?"), ChatMessage(role="assistant", content="1"), *asked("Two?")]
    assert llm.chat(history).message.content == "You asked: Two?"
    assert llm.complete("Three?").text == "You asked: Three?"
    assert llm.predict(PromptTemplate("Now {it}!"), it="four") == "You asked: Now four!"


async def test_a_hundred_questions_at_once_get_a_hundred_answers() -> None:
    llm = ReplayLLM(answer=lambda question: f"The answer to {question} is long enough.", chunk_size=3)

    async def ask(number: int) -> str:
        return "".join([part.delta or "" async for part in await llm.astream_chat(asked(f"no {number}"))])

    def ask_in_thread(number: int) -> str:
        return "".join(part.delta or "" for part in llm.stream_chat(asked(f"no {number}")))

    expected = [f"The answer to no {number} is long enough." for number in range(100)]
    assert await asyncio.gather(*map(ask, range(100))) == expected
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask_in_thread, range(100))) == expected
    assert llm.open_streams == 0
    assert sorted(str(prompt[0].content) for prompt in llm.prompts if not isinstance(prompt, str)) == sorted(
        2 * [f"no {number}" for number in range(100)]
    )


def test_tools_are_called_first() -> None:
    llm = ReplayLLM(answer=ANSWER, calls=CALLS, before_tools="I look it up.")
    for response in (llm.chat(asked()), list(llm.stream_chat(asked()))[-1]):
        assert response.message.blocks[0] == TextBlock(text="I look it up.")
        assert [
            block.tool_name for block in response.message.blocks[1:] if isinstance(block, ToolCallBlock)
        ] == [*("look_up", "look_up")]
        calls = llm.get_tool_calls_from_response(response)
        assert [(call.tool_id, call.tool_kwargs) for call in calls] == [
            ("call_0", {"name": "Ann"}),
            ("call_1", {}),
        ]
    answered = [*asked(), llm.chat(asked()).message, ChatMessage(role=MessageRole.TOOL, content="found")]
    assert llm.chat(answered).message.content == ANSWER
    with pytest.raises(ValueError, match="at least one tool call"):
        llm.get_tool_calls_from_response(llm.chat(answered))
    assert llm.get_tool_calls_from_response(llm.chat(answered), error_on_no_tool_call=False) == []
    silent = ReplayLLM(answer=ANSWER, calls=CALLS)
    assert [type(block) for block in silent.chat(asked()).message.blocks] == [ToolCallBlock] * 2
    plain = ReplayLLM(answer=ANSWER, calls=CALLS, is_function_calling_model=False)
    assert plain.chat(asked()).message.content == ANSWER


async def test_it_chats_with_tools() -> None:
    def look_up(name: str) -> str:
        """Look a name up."""
        return name

    llm = ReplayLLM(answer=ANSWER, calls=CALLS[:1])
    tools = [FunctionTool.from_defaults(look_up)]
    responses = [
        llm.chat_with_tools(tools, user_msg="Who?"),
        await llm.achat_with_tools(tools, chat_history=asked("Who?")),
        list(llm.stream_chat_with_tools(tools, user_msg=asked("Who?")[0]))[-1],
        [part async for part in await llm.astream_chat_with_tools(tools, user_msg="Who?")][-1],
    ]
    for response in responses:
        assert [call.tool_name for call in llm.get_tool_calls_from_response(response)] == ["look_up"]
    assert llm.prompts == [asked("Who?")] * 4
    assert llm.predict_and_call(tools, user_msg="Who?").response == "Ann"


def test_a_completion_model_is_asked_with_a_prompt() -> None:
    llm = ReplayLLM(answer=lambda prompt: prompt, is_chat_model=False, is_function_calling_model=False)
    assert llm.chat(asked("Who?")).message.content == "user: Who?\nassistant: "
    assert llm.predict(PromptTemplate("{it}"), it="Who?") == "Who?"
    assert llm.prompts[-1] == "Who?" and not llm.metadata.is_chat_model


def test_it_goes_on_from_a_text() -> None:
    def rest(prefix: str) -> str:
        return ANSWER[len(prefix) :] if ANSWER.startswith(prefix) else "So it is."

    llm = ReplayLLM(answer=ANSWER, continue_from=rest)
    assert llm.chat(asked()).message.content == ANSWER
    for prefix, said in (("It is blue. ", "It is wide: the sky."), ("It is red. ", "So it is.")):
        begun = [*asked(), ChatMessage(role="assistant", content=prefix)]
        assert llm.chat(begun).message.content == said
        assert ReplayLLM(answer=ANSWER).chat(begun).message.content == ANSWER


def test_a_stream_counts_what_it_has_handed_out_and_whether_it_is_open() -> None:
    llm = ReplayLLM(answer=ANSWER, chunk_size=5)
    stream = llm.stream_chat(asked())
    assert (llm.open_streams, llm.handed_out, len(llm.prompts)) == (0, 0, 1)
    next(stream)
    copied = copy.deepcopy(llm)  # wrappers may copy it
    assert (copied.open_streams, copied.handed_out) == (llm.open_streams, llm.handed_out) == (1, 5)
    stream.close()
    assert llm.open_streams == 0
    assert len(list(llm.stream_complete("It?"))) == 7 and llm.open_streams == 0


async def test_an_async_stream_lets_others_run_and_closes() -> None:
    llm = ReplayLLM(answer=ANSWER, chunk_size=5)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(tick())
    async with aclosing(await llm.astream_chat(asked())) as stream:
        async for _ in stream:
            if ticks > 2:
                break
    # LlamaIndex's own wrapper does not close what it wraps: the loop does, when it is collected.
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    assert ticks > 2 and 0 < llm.handed_out < len(ANSWER) and llm.open_streams == 0


async def test_a_delay_is_waited_for_after_each_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[tuple[str, float]] = []

    async def sleep(seconds: float) -> None:
        waited.append(("async", seconds))

    monkeypatch.setattr("aligner_integrations.testing.replay_llm.asyncio.sleep", sleep)
    monkeypatch.setattr(
        "aligner_integrations.testing.replay_llm.time.sleep", lambda seconds: waited.append(("sync", seconds))
    )
    llm = ReplayLLM(answer="four", chunk_size=2, delay=0.5)
    assert [part async for part in await llm.astream_chat(asked())] and waited == [("async", 0.5)] * 2
    assert list(llm.stream_chat(asked())) and waited[2:] == [("sync", 0.5)] * 2


class Heard(BaseEventHandler):
    names: list[str] = []  # noqa: RUF012

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.names.append(event.class_name())


@contextmanager
def hearing() -> Iterator[list[str]]:
    root, handler = get_dispatcher(), Heard(names=[])
    root.add_event_handler(handler)
    try:
        yield handler.names
    finally:
        root.event_handlers.remove(handler)


def test_the_dispatcher_hears_it() -> None:
    llm = ReplayLLM(answer="four", chunk_size=2)
    with hearing() as names:
        list(llm.stream_chat(asked()))
        llm.complete("It?")
    assert names == [
        *("LLMChatStartEvent", "LLMChatInProgressEvent", "LLMChatInProgressEvent", "LLMChatEndEvent"),
        *("LLMCompletionStartEvent", "LLMCompletionEndEvent"),
    ]
    assert "four" not in str(llm.to_payload())


def test_it_needs_an_answer_and_whole_pieces() -> None:
    refused: list[dict[str, Any]] = [
        {},
        {"answer": ANSWER, "chunk_size": 0},
        {"answer": ANSWER, "delay": -1.0},
    ]
    for given in refused:
        with pytest.raises(ValidationError):
            ReplayLLM(**given)
    empty = ReplayLLM(answer="")
    assert [part.message.content for part in empty.stream_chat(asked())] == [""]
