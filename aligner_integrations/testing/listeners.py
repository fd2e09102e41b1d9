"""What listens while a target runs: a reader of protocol events, a callback handler, a tracer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.tracers import BaseTracer
from langchain_core.tracers.schemas import Run

from aligner_integrations.testing.shown import Shown


class ProtocolReader:
    """Reads the events of the v3 protocol; a finished block's text completes its deltas."""

    def __init__(self, shown: Shown) -> None:
        self.shown = shown
        self.blocks: dict[tuple[str, Any], str] = {}

    def event(self, event: Mapping[str, Any]) -> None:
        """Take an event of a model, or of a graph, which wraps the models' events."""
        if "method" not in event:
            self.shown.see(event)
            self.block(event, "")
            return
        data = event["params"]["data"]
        if event["method"] != "custom" and isinstance(data, dict):
            data = {key: value for key, value in data.items() if key != "input"}
        if event["method"] != "messages":
            self.shown.see(data, event["method"])
        else:
            message, metadata = data
            self.shown.see(data, str(metadata.get("run_id", "")))
            if isinstance(message, BaseMessage):
                self.shown.chunk(message, str(message.id))
            else:
                self.block(message, str(metadata.get("run_id", "")))

    def block(self, event: Mapping[str, Any], message: str) -> None:
        """Take one event of a message."""
        if event["event"] == "content-block-delta":
            delta = event["delta"]
            if delta.get("type") == "text-delta":
                key = message, event.get("index")
                self.blocks[key] = self.blocks.get(key, "") + delta["text"]
                self.shown.add(delta["text"], message)
        elif event["event"] == "content-block-finish":
            content = event["content"]
            if "tool_call" in content.get("type", ""):
                self.shown.calls_tools(message)
            if content.get("type") == "text":
                self._finish(content["text"], (message, event.get("index")))
        elif event["event"] == "message-finish":
            text = "".join(text for (of, _), text in self.blocks.items() if of == message)
            self.shown.final(text, message)

    def _finish(self, text: str, key: tuple[str, Any]) -> None:
        so_far = self.blocks.get(key, "")
        if text.startswith(so_far):  # langchain-core's own `.text` shows the rest as one more delta
            self.shown.add(text[len(so_far) :], key[0])
        self.blocks[key] = text


class Listener(BaseCallbackHandler):
    """Hears what callbacks are told while the target streams."""

    raise_error = True  # else langchain-core would hide a fault of this handler

    def __init__(self, shown: Shown) -> None:
        self.shown = shown
        self.readers: dict[int, ProtocolReader] = {}

    def on_llm_new_token(
        self, token: Any, *, chunk: Any = None, run_id: Any, parent_run_id: Any = None, **kwargs: Any
    ) -> None:
        if place := self.shown.place(of_model=True, is_root=parent_run_id is None):
            place.see(token, str(run_id))
            place.chunk(token if chunk is None else getattr(chunk, "message", chunk), str(run_id))

    def on_stream_event(self, event: Any, *, run_id: Any, parent_run_id: Any = None, **kwargs: Any) -> None:
        if place := self.shown.place(of_model=True, is_root=parent_run_id is None):
            place.see(event, str(run_id))
            self.readers.setdefault(id(place), ProtocolReader(place)).block(event, str(run_id))

    def on_llm_end(
        self, response: LLMResult, *, run_id: Any, parent_run_id: Any = None, **kwargs: Any
    ) -> None:
        if place := self.shown.place(of_model=True, is_root=parent_run_id is None):
            place.see(response)
            place.final(response.generations[0][0].text, str(run_id))

    def on_chain_end(self, outputs: Any, *, parent_run_id: Any = None, **kwargs: Any) -> None:
        if place := self.shown.place(of_model=False, is_root=parent_run_id is None):
            place.see(outputs)
            if parent_run_id is None:
                place.final(place.text_of(outputs))

    def on_tool_end(self, output: Any, *, parent_run_id: Any = None, **kwargs: Any) -> None:
        if place := self.shown.place(of_model=False, is_root=parent_run_id is None):
            place.see(output)

    def on_custom_event(self, name: str, data: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.shown.see(data, f"{name} {run_id}")  # meant for the reader, whichever step sends it

    def on_llm_error(self, error: BaseException, *, parent_run_id: Any = None, **kwargs: Any) -> None:
        if place := self.shown.place(of_model=True, is_root=parent_run_id is None):
            place.see(str(error))

    def on_chain_error(self, error: BaseException, *, parent_run_id: Any = None, **kwargs: Any) -> None:
        if place := self.shown.place(of_model=False, is_root=parent_run_id is None):
            place.see(str(error))

    on_tool_error = on_retriever_error = on_chain_error


class Tracer(BaseTracer):
    """Keeps the traced runs, as a tracing service would get them."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        self.runs.append(run)
