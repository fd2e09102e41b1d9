"""What an agent of LlamaIndex shows: the events of its run, kind by kind, its result and its memory."""

from __future__ import annotations

from typing import Any

from llama_index.core.agent.workflow import (
    AgentOutput,
    AgentStream,
    AgentWorkflow,
    ReActAgent,
    ToolCallResult,
)
from llama_index.core.base.llms.types import MessageRole
from llama_index.core.workflow import Event, StopEvent

from aligner_integrations.testing.llama_surfaces import Drive, Kind, Target, stored
from aligner_integrations.testing.seen import Seen


def opened(value: Any) -> Any:
    """Return a workflow's event with what it keeps beside its fields; anything else as it is."""
    if not isinstance(value, Event):
        return value
    result = value.result if isinstance(value, StopEvent) else None
    return {"fields": value, "data": value.to_dict(), "result": opened(result)}


class _Turns:
    """The events of an agent's run, turn by turn; a turn ends with the agent's output."""

    def __init__(self, agent: Any, watch: str, seen: Seen) -> None:
        agents = agent.agents.values() if isinstance(agent, AgentWorkflow) else [agent]
        self.is_react = any(isinstance(one, ReActAgent) for one in agents)
        self.watch, self.seen = watch, seen
        self.turn, self.text, self.output = 0, "", ""
        self.called: list[str] = []
        seen.absent = watch == "AgentStream" and not any(one.streaming for one in agents)
        seen.has_text = watch != "other events"

    def take(self, event: Any) -> None:
        """Note an event, if it is of the kind that is watched."""
        known = (kind.__name__ for kind in (AgentStream, AgentOutput) if isinstance(event, kind))
        if next(known, "other events") == self.watch:
            self.seen.see(opened(event), f"{self.watch} {self.turn}")
        if isinstance(event, ToolCallResult):
            self.called.append(event.tool_name)
        if isinstance(event, AgentStream) and self.watch == "AgentStream":
            self._stream(event)
        if isinstance(event, AgentOutput):
            self.output = self.answer_in(event.response.content or "")
            if self.watch == "AgentOutput":
                self.seen.put(self.output, str(self.turn))
            self.turn, self.text = self.turn + 1, ""

    def _stream(self, event: AgentStream) -> None:
        before = self.answer_in(self.text) if self._has_answer(self.text) else ""
        self.text += event.delta
        self.seen.differs |= event.response != self.text
        if self._has_answer(self.text):
            self.seen.add(self.answer_in(self.text)[len(before) :], str(self.turn))

    def _has_answer(self, text: str) -> bool:
        begun = text.lstrip()
        is_thought = any(begun.startswith(word) or word.startswith(begun) for word in ("Thought:", "Action:"))
        return not self.is_react or not is_thought or "Answer:" in text

    def answer_in(self, text: str) -> str:
        """Return what a reader is meant to see: of a ReAct agent's text, what comes after its thought."""
        return text.partition("Answer:")[2].strip() if self.is_react and "Answer:" in text else text

    def end(self) -> None:
        """Leave only the last turn: those before called tools, or were tried again."""
        for turn in range(self.turn - 1):
            self.seen.calls_tools(str(turn))


def _agent(watch: str) -> Drive:
    async def drive(target: Target, seen: Seen) -> None:
        agent = target.make()
        turns = _Turns(agent, watch, seen)
        handler = agent.run(user_msg=target.question)
        async for event in handler.stream_events():
            turns.take(event)
        result = await handler
        memory = await (await handler.ctx.store.get("memory")).aget_all()
        said = [one.content or "" for one in memory if one.role == MessageRole.ASSISTANT]
        whole, kept = turns.answer_in(str(result)), turns.answer_in(said[-1] if said else "")
        turns.end()
        if watch == "AgentStream":
            seen.final(turns.output)
        if watch in ("AgentStream", "AgentOutput"):
            seen.final(whole)
            stored(kept, seen)
        if watch == "result":
            seen.see(opened(result))
            seen.put(whole)
        if watch == "memory":
            seen.see(memory)
            seen.put(kept)
        if watch == "other events" and (missing := set(target.calls) - set(turns.called)):
            raise RuntimeError(f"the LLM called tools that the agent did not run: {sorted(missing)}")

    return drive


_WATCHED = ("AgentStream", "AgentOutput", "other events", "result", "memory")
# The name of each surface, in the order of the report, and how it is driven.
AGENTS: dict[Kind, dict[str, Drive]] = {"agent": {name: _agent(name) for name in _WATCHED}}
