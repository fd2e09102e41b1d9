"""What listens while a target runs: a reader of protocol events, a callback handler, a tracer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.tracers import BaseTracer
from langchain_core.tracers.schemas import Run

from aligner_integrations.testing.shown import Shown, text_of


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
        self.shown.see({k: v for k, v in data.items() if k != "input"} if isinstance(data, dict) else data)
        if event["method"] == "messages":
            message, metadata = data
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
            place.see(token)
            place.chunk(token if chunk is None else getattr(chunk, "message", chunk), str(run_id))

    def on_stream_event(self, event: Any, *, run_id: Any, parent_run_id: Any = None, **kwargs: Any) -> None:
        if place := self.shown.place(of_model=True, is_root=parent_run_id is None):
            place.see(event)
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
                place.final(text_of(outputs))


class Tracer(BaseTracer):
    """Keeps the traced runs, as a tracing service would get them."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        self.runs.append(run)
