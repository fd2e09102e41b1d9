"""The surfaces on which LlamaIndex's engines and LLMs show an answer, each driven once."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole
from llama_index.core.base.response.schema import PydanticResponse, Response
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import QueryBundle

from aligner_integrations.testing.seen import Seen

Kind = Literal["query engine", "chat engine", "llm", "agent"]


@dataclass(frozen=True, slots=True)
class Target:
    """What is driven, and with what question."""

    kind: Kind
    make: Callable[[], Any]  # the engine or LLM itself; a new chat engine or agent for each run
    question: str
    calls: tuple[str, ...] = ()  # the tools that an agent's LLM calls first
    deltas: list[str] = field(default_factory=list)  # what chat engines told the dispatcher so far


Drive: TypeAlias = Callable[[Target, Seen], Awaitable[None] | None]


def _query(read: Callable[[Any, Seen], None]) -> Drive:
    def drive(target: Target, seen: Seen) -> None:
        _read(target.make().query(target.question), seen, read)

    return drive


def _aquery(read: Callable[[Any, Seen], Awaitable[None]]) -> Drive:
    async def drive(target: Target, seen: Seen) -> None:
        await _aread(await target.make().aquery(target.question), seen, read)

    return drive


def _synthesize(target: Target, seen: Seen) -> None:
    engine, query = target.make(), QueryBundle(target.question)
    try:
        response = engine.synthesize(query, engine.retrieve(query))
    except NotImplementedError:  # most engines have no such way
        seen.absent = True
    else:
        _read(response, seen, _stream)


async def _asynthesize(target: Target, seen: Seen) -> None:
    engine, query = target.make(), QueryBundle(target.question)
    try:
        response = await engine.asynthesize(query, engine.retrieve(query))
    except NotImplementedError:
        seen.absent = True
    else:
        await _aread(response, seen, _astream)


def _is_whole(response: Any, seen: Seen, read: Any) -> bool:
    """Note a response that does not stream; it has one way to be read."""
    if not isinstance(response, Response | PydanticResponse):
        return False
    seen.absent = read not in (_stream, _astream)
    seen.see(response)
    seen.put("" if response.response is None else str(response))
    return True


def _read(response: Any, seen: Seen, read: Callable[[Any, Seen], None]) -> None:
    if not _is_whole(response, seen, read):
        read(response, seen)
        seen.see(response)
        _again(str(response), seen, forgets=read is _stream)


async def _aread(response: Any, seen: Seen, read: Callable[[Any, Seen], Awaitable[None]]) -> None:
    if not _is_whole(response, seen, read):
        await read(response, seen)
        seen.see(response)
        _again(str(response), seen, forgets=read is _astream_raw)


def _again(text: str, seen: Seen, *, forgets: bool) -> None:
    """Note what a response gives when it is read again: the same text.

    LlamaIndex's own responses forget it where their `response_gen` was read, and are "None" then.
    """
    if text not in ("", "None") or (seen.answer[0] and not forgets):
        seen.final(text)


def _stream(response: Any, seen: Seen) -> None:
    for token in response.response_gen:
        seen.add(token)
    _again("".join(response.response_gen), seen, forgets=True)


async def _astream(response: Any, seen: Seen) -> None:
    async for token in response.async_response_gen():
        seen.add(token)
    _again("".join([token async for token in response.async_response_gen()]), seen, forgets=False)


async def _astream_raw(response: Any, seen: Seen) -> None:
    async for token in response.response_gen:
        seen.add(token)
    _again("".join([token async for token in response.response_gen]), seen, forgets=True)


def _str(response: Any, seen: Seen) -> None:
    seen.put(str(response))


async def _astr(response: Any, seen: Seen) -> None:
    seen.put(str(response))  # LlamaIndex reads the stream in a thread with a loop of its own


def _get_response(response: Any, seen: Seen) -> None:
    whole = response.get_response()
    seen.see(whole)
    seen.put(whole.response or "")


async def _aget_response(response: Any, seen: Seen) -> None:
    whole = await response.get_response()
    seen.see(whole)
    seen.put(whole.response or "")


def _print(response: Any, seen: Seen) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        response.print_response_stream()
    seen.put(printed.getvalue())


async def _aprint(response: Any, seen: Seen) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        await response.print_response_stream()
    seen.put(printed.getvalue().removesuffix("\n"))  # it ends the line, which the sync way does not


def _chat(target: Target, seen: Seen) -> None:
    engine = target.make()
    before = len(engine.chat_history)
    response = engine.chat(target.question)
    seen.put(str(response))
    _after_chat(engine, before, response, seen)


async def _achat(target: Target, seen: Seen) -> None:
    engine = target.make()
    before = len(engine.chat_history)
    response = await engine.achat(target.question)
    seen.put(str(response))
    _after_chat(engine, before, response, seen)


def _stream_chat(target: Target, seen: Seen) -> None:
    engine = target.make()
    before = len(engine.chat_history)
    target.deltas.clear()
    response = engine.stream_chat(target.question)
    for token in response.response_gen:
        seen.add(token)
    _after_stream(target, engine, before, response, seen)


async def _astream_chat(target: Target, seen: Seen) -> None:
    engine = target.make()
    before = len(engine.chat_history)
    target.deltas.clear()
    response = await engine.astream_chat(target.question)
    async for token in response.async_response_gen():
        seen.add(token)
    _after_stream(target, engine, before, response, seen)


def _after_stream(target: Target, engine: BaseChatEngine, before: int, response: Any, seen: Seen) -> None:
    if target.deltas:
        seen.final("".join(target.deltas))
    _after_chat(engine, before, response, seen)


def _after_chat(engine: BaseChatEngine, before: int, response: Any, seen: Seen) -> None:
    """Note the response and what was stored."""
    seen.see(response)
    stored(str(response), seen)
    history = engine.chat_history[before:]
    seen.see(history)
    stored("".join(one.content or "" for one in history if one.role == MessageRole.ASSISTANT), seen)


def stored(text: str, seen: Seen) -> None:
    """Note a text that was kept: LlamaIndex takes the space around it away, which is no fault of a guard."""
    shown = "".join(seen.answer[0])
    seen.final(shown if text.strip() == shown.strip() else text)


class _Sum:
    """The responses of an LLM's stream: each has to hold what the deltas up to it add up to."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self.text = seen, ""

    def take(self, response: Any) -> None:
        if isinstance(response, str):
            self.seen.add(response)
            return
        self.text += response.delta or ""
        self.seen.see(response, "stream")
        self.seen.add(response.delta or "")
        self.seen.differs |= _text_of(response) != self.text

    def finish(self) -> None:
        if self.text:
            self.seen.final(self.text)


def _text_of(response: Any) -> str:
    if isinstance(response, ChatResponse):
        return response.message.content or ""
    return response if isinstance(response, str) else str(response.text)


def _ask(llm: Any, name: str, question: str) -> Any:
    method = getattr(llm, name)
    if name.endswith("with_tools"):
        return method([], user_msg=question)
    if name.endswith("chat"):
        return method([ChatMessage(role="user", content=question)])
    if name.endswith("complete"):
        return method(question)
    return method(PromptTemplate("{question}"), question=question)


def _lacks(llm: Any, name: str) -> bool:
    return name.endswith("with_tools") and not llm.metadata.is_function_calling_model


def _note_whole(response: Any, seen: Seen) -> bool:
    if not isinstance(response, str | ChatResponse | CompletionResponse):
        return False
    seen.see(response)
    seen.put(_text_of(response))
    return True


def _llm(name: str) -> Drive:
    def drive(target: Target, seen: Seen) -> None:
        llm = target.make()
        if _lacks(llm, name):
            seen.absent = True
            return
        response = _ask(llm, name, target.question)
        if not _note_whole(response, seen):
            total = _Sum(seen)
            for part in response:
                total.take(part)
            total.finish()

    return drive


def _allm(name: str) -> Drive:
    async def drive(target: Target, seen: Seen) -> None:
        llm = target.make()
        if _lacks(llm, name):
            seen.absent = True
            return
        response = await _ask(llm, name, target.question)
        if not _note_whole(response, seen):
            total = _Sum(seen)
            async for part in response:
                total.take(part)
            total.finish()

    return drive


_WAYS = {
    "str": (_str, _astr),
    "get_response": (_get_response, _aget_response),
    "print_response_stream": (_print, _aprint),
}
_LLM = ("chat", "stream_chat", "complete", "stream_complete", "predict", "stream")
_TOOLS = ("chat_with_tools", "stream_chat_with_tools")
# By kind of target: the name of each surface, in the order of the report, and how it is driven.
SURFACES: dict[Kind, dict[str, Drive]] = {
    "query engine": {
        "query": _query(_stream),
        **{f"query, {name}": _query(way) for name, (way, _) in _WAYS.items()},
        "aquery": _aquery(_astream),
        "aquery, response_gen": _aquery(_astream_raw),
        **{f"aquery, {name}": _aquery(way) for name, (_, way) in _WAYS.items()},
        "synthesize": _synthesize,
        "asynthesize": _asynthesize,
    },
    "chat engine": {
        "chat": _chat,
        "achat": _achat,
        "stream_chat": _stream_chat,
        "astream_chat": _astream_chat,
    },
    "llm": {
        prefix + name: drive(prefix + name)
        for name in (*_LLM, *_TOOLS)
        for prefix, drive in (("", _llm), ("a", _allm))
    },
}
