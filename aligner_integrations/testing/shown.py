"""What one surface of LangChain showed: messages, chunks and states, read as their text."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from aligner_integrations.testing.seen import Seen

_INPUTS = ("human", "user", "system", "developer")
_OF_HISTORY = ("ai", "assistant", "tool")  # went in, or is new: its id tells

WentIn = Mapping[str, Any]  # the content of each message that went in, by its id


class Shown(Seen):
    """What LangChain showed: messages are told apart by id, and those that went in are left out."""

    def __init__(
        self,
        canary: str,
        *,
        handed_out: Callable[[], int] | None = None,
        went_in: WentIn | None = None,
        judged: bool = True,
    ) -> None:
        self._went_in = went_in or {}
        is_input = partial(_is_input, went_in=self._went_in)
        super().__init__(canary, is_input=is_input, handed_out=handed_out, judged=judged)
        self.models: Shown | None = None  # the model runs of a chain, where they are apart

    def place(self, *, of_model: bool, is_root: bool) -> Shown | None:
        """Return where a run's output counts; None for a chain's inner steps, which come before its guard."""
        if self.models is None or is_root:
            return self
        return self.models if of_model else None

    def message(self, message: AIMessage) -> None:
        """Note a whole message, which takes the place of what was shown under its id."""
        if calls_tools(message):
            self.calls_tools(str(message.id))
        self.put(self.text_of(message), str(message.id))

    def chunk(self, chunk: Any, message: str = "") -> None:
        """Note a chunk of a stream, all of it, and its text."""
        if _has_gone_in(chunk, self._went_in):
            return
        self.see(chunk, message)
        if calls_tools(chunk):
            self.calls_tools(message)
        self.add(self.text_of(chunk), message)

    def text_of(self, output: Any) -> str:
        """Return the text that a reader of this output is shown; of a graph's state, the last answer."""
        return text_of(output, self._went_in)

    def messages_in(self, output: Any) -> list[AIMessage]:
        """Return the model's messages in a state or an update of one, in order."""
        return messages_in(output, self._went_in)


def text_of(output: Any, went_in: WentIn) -> str:
    """Return the text that a reader of this output is shown; see `Shown.text_of`."""
    if isinstance(output, str):
        return output
    if isinstance(output, Mapping):
        if "messages" in output:
            answers = [message for message in messages_in(output, went_in) if not calls_tools(message)]
            return str(answers[-1].text) if answers else ""
        if "generations" in output:
            return str(output["generations"][0][0]["text"])
        return next((text_of(output[key], went_in) for key in ("answer", "output") if key in output), "")
    text = getattr(output, "text", "")
    return str(text) if isinstance(text, str) else ""


def messages_in(output: Any, went_in: WentIn) -> list[AIMessage]:
    """Return the model's messages, without those that went in; see `Shown.messages_in`."""
    if isinstance(output, AIMessage):
        return [] if _has_gone_in(output, went_in) else [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [message for part in output for message in messages_in(part, went_in)]
    return []


def calls_tools(output: Any) -> bool:
    """Return whether this is a message, or a chunk of one, that calls tools."""
    names = ("tool_calls", "tool_call_chunks", "invalid_tool_calls")
    return isinstance(output, BaseMessage) and any(getattr(output, name, None) for name in names)


def _is_input(value: Any, went_in: WentIn) -> bool:
    if isinstance(value, HumanMessage | SystemMessage):
        return True
    if isinstance(value, Mapping) and "content" in value and value.get("role") in _INPUTS:
        return True
    return _has_gone_in(value, went_in)


def _has_gone_in(value: Any, went_in: WentIn) -> bool:
    """Return whether this is a message that went in, as it was: one rewritten under its id is not."""
    if isinstance(value, BaseMessage):
        return value.id is not None and value.id in went_in and bool(went_in[value.id] == value.content)
    if isinstance(value, Mapping) and "content" in value and isinstance(value.get("id"), str):
        return value["id"] in went_in and bool(went_in[value["id"]] == value["content"])
    return False


def with_ids(given: Any) -> Any:
    """Return an input whose messages have ids, so that each is known where it comes out again."""
    if isinstance(given, BaseMessage):
        return given if given.id else given.model_copy(update={"id": str(uuid.uuid4())})
    if isinstance(given, list):
        return [with_ids(part) for part in given]
    if isinstance(given, dict):
        filled = {key: with_ids(part) for key, part in given.items()}
        if isinstance(said := filled.get("messages"), list):
            filled["messages"] = [with_ids(_from_pair(message)) for message in said]
        is_message = "content" in given and given.get("role") in _OF_HISTORY
        return {"id": str(uuid.uuid4()), **filled} if is_message else filled
    return given


def _from_pair(message: Any) -> Any:
    if isinstance(message, tuple) and len(message) == 2 and message[0] in _OF_HISTORY[:2]:
        return AIMessage(message[1])
    return message


def messages_that_went_in(given: Any) -> dict[str, Any]:
    """Return the content of each message of an input, by its id."""
    if isinstance(given, BaseMessage):
        return {given.id: given.content} if given.id else {}
    if isinstance(given, dict):
        if {"role", "content", "id"} <= given.keys():
            return {given["id"]: given["content"]}
        given = list(given.values())
    if not isinstance(given, list):
        return {}
    return {id: content for part in given for id, content in messages_that_went_in(part).items()}
