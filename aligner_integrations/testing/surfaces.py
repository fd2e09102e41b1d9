"""The surfaces on which a chain, a chat model or a graph shows its answer, each driven once."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from langchain_core._api import LangChainBetaWarning
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import RunnableConfig

from aligner_integrations.testing.listeners import Listener, ProtocolReader, Tracer
from aligner_integrations.testing.shown import Shown

Kind = Literal["model", "chain", "graph", "handler", "async handler"]


@dataclass(frozen=True, slots=True)
class Target:
    """What is driven, and with what input. Of a handler, `runnable` is the model that it listens to."""

    kind: Kind
    runnable: Any
    given: Any
    question: str
    config: RunnableConfig | None
    make_handler: Callable[[Callable[[Any], None]], BaseCallbackHandler] | None = None

    def settings(self, *handlers: BaseCallbackHandler) -> RunnableConfig:
        """Return a config with these handlers, and with a thread of its own where a graph remembers."""
        config: RunnableConfig = {**self.config} if self.config else {}
        if handlers:
            callbacks: Any = config.get("callbacks")
            if callbacks is None or isinstance(callbacks, list):
                config["callbacks"] = [*(callbacks or ()), *handlers]
            else:
                callbacks = callbacks.copy()
                for handler in handlers:
                    callbacks.add_handler(handler, inherit=True)
                config["callbacks"] = callbacks
        if self.remembers:
            config["configurable"] = {**config.get("configurable", {}), "thread_id": str(uuid.uuid4())}
        return config

    @property
    def remembers(self) -> bool:
        """Whether a graph stores its state, so that it can be read after a run."""
        return self.kind == "graph" and bool(getattr(self.runnable, "checkpointer", None))

    def listening(self, shown: Shown) -> RunnableConfig:
        """Return a config whose one more callback handler is the one under test; its sink is `shown`."""
        assert self.make_handler is not None
        return self.settings(self.make_handler(lambda what: shown.add(sunk_text(what))))


Drive: TypeAlias = Callable[[Target, Shown], Awaitable[None] | None]


def sunk_text(what: Any) -> str:
    """Return the text that a handler showed: the string itself, its `text`, or what it prints as."""
    text = what if isinstance(what, str) else getattr(what, "text", None)
    return text if isinstance(text, str) else str(what)


def without_beta_warning() -> AbstractContextManager[Any]:
    """Both v3 streams warn that they are beta; who asks for a check of them knows."""
    return warnings.catch_warnings(action="ignore", category=LangChainBetaWarning)


def _output(shown: Shown, output: Any) -> None:
    shown.see(output)
    shown.put(shown.text_of(output))


def _invoke(target: Target, shown: Shown) -> None:
    _output(shown, target.runnable.invoke(target.given, target.settings()))


async def _ainvoke(target: Target, shown: Shown) -> None:
    _output(shown, await target.runnable.ainvoke(target.given, target.settings()))


def _twins(shown: Shown, outputs: list[Any]) -> None:
    for output in outputs:
        _output(shown, output)
        shown.final(shown.text_of(output))


def _batch(target: Target, shown: Shown) -> None:
    configs = [target.settings(), target.settings()]
    _twins(shown, target.runnable.batch([target.given] * 2, configs))


async def _abatch(target: Target, shown: Shown) -> None:
    configs = [target.settings(), target.settings()]
    _twins(shown, await target.runnable.abatch([target.given] * 2, configs))


class _Sum:
    """The chunks of a stream, added up as a consumer would."""

    def __init__(self, shown: Shown) -> None:
        self.shown = shown
        self.whole: Any = None

    def chunk(self, chunk: Any) -> None:
        self.shown.chunk(chunk)
        if isinstance(chunk, BaseMessage):
            self.whole = chunk if self.whole is None else self.whole + chunk

    def finish(self) -> None:
        if self.whole is not None:
            self.shown.final(self.shown.text_of(self.whole), "")


def _stream(target: Target, shown: Shown) -> None:
    total = _Sum(shown)
    for chunk in target.runnable.stream(target.given, target.settings()):
        total.chunk(chunk)
    total.finish()


async def _astream(target: Target, shown: Shown) -> None:
    total = _Sum(shown)
    async for chunk in target.runnable.astream(target.given, target.settings()):
        total.chunk(chunk)
    total.finish()


async def _events_v2(target: Target, shown: Shown) -> None:
    events = target.runnable.astream_events(target.given, target.settings(), version="v2")
    async for event in events:
        name, is_root = event["event"], not event["parent_ids"]
        of_model = name.startswith(("on_chat_model", "on_llm"))
        if name == "on_custom_event":  # meant for the reader, whichever step sends it, and of any shape
            shown.see(event, f"{event['name']} {event['run_id']}")
            continue
        place = shown.place(of_model=of_model, is_root=is_root)
        if place is None:
            continue
        data = {key: value for key, value in event["data"].items() if key != "input"}
        place.see({**event, "data": data}, f"{name} {event['run_id']}")
        # A chain streams its own text; in a graph, what streams as text is what its models say.
        if name.endswith("_stream") and (of_model or (is_root and target.kind == "chain")):
            place.chunk(data["chunk"], event["run_id"])
        elif name.endswith("_end") and (of_model or is_root):
            place.final(place.text_of(data.get("output")), event["run_id"] if of_model else None)


def _events_v3(target: Target, shown: Shown) -> None:
    protocol = ProtocolReader(shown)
    with without_beta_warning():
        run = target.runnable.stream_events(target.given, target.settings(), version="v3")
        for event in run:
            protocol.event(event)
        shown.see(run.output)
        shown.final(shown.text_of(run.output))


async def _aevents_v3(target: Target, shown: Shown) -> None:
    protocol = ProtocolReader(shown)
    with without_beta_warning():
        run = await target.runnable.astream_events(target.given, target.settings(), version="v3")
        async for event in run:
            protocol.event(event)
        output = await (run.output() if callable(run.output) else run.output)
    shown.see(output)
    shown.final(shown.text_of(output))


def _stream_with(target: Target, handler: BaseCallbackHandler) -> None:
    mode = {"stream_mode": "messages"} if target.kind == "graph" else {}
    for _ in target.runnable.stream(target.given, target.settings(handler), **mode):
        pass


def _callbacks(target: Target, shown: Shown) -> None:
    _stream_with(target, Listener(shown))


def _tracer(target: Target, shown: Shown) -> None:
    tracer = Tracer()
    try:
        _stream_with(target, tracer)
    finally:
        runs = [(run, True) for run in tracer.runs]
        while runs:
            run, is_root = runs.pop(0)
            runs += [(child, False) for child in run.child_runs]
            of_model = run.run_type in ("llm", "chat_model")
            if place := shown.place(of_model=of_model, is_root=is_root):
                place.see([run.outputs, run.error])
                place.see(run.events, str(run.id))
                if is_root:
                    place.put(place.text_of(run.outputs))


class _GraphPart:
    """Reads the parts of a graph's stream in one mode."""

    def __init__(self, mode: str, shown: Shown) -> None:
        self.mode, self.shown = mode, shown
        # Beside the messages their values: the last of them is what the graph gives in this very run.
        self.modes = ["messages", "values"] if mode == "messages" else [mode]
        shown.has_text = mode != "custom"
        self.state: Any = None

    def take(self, mode: str, payload: Any) -> None:
        if mode == "values":
            self.state = payload
        if mode != self.mode:
            return
        if mode == "messages":
            message, metadata = payload
            self.shown.see(metadata)
            if isinstance(message, AIMessage):
                self.shown.chunk(message, str(message.id))
            else:
                self.shown.see(message)
            return
        self.shown.see(payload)
        updates = payload.values() if mode == "updates" and isinstance(payload, Mapping) else [payload]
        for update in updates if mode != "custom" else ():
            messages = self.shown.messages_in(update)
            for message in messages:
                self.shown.message(message)
            if not messages and (text := self.shown.text_of(update)):
                self.shown.put(text)

    def finish(self) -> None:
        if self.mode == "messages":
            self.shown.final(self.shown.text_of(self.state))


def _graph_mode(mode: str) -> Drive:
    def drive(target: Target, shown: Shown) -> None:
        part, config = _GraphPart(mode, shown), target.settings()
        for name, payload in target.runnable.stream(target.given, config, stream_mode=part.modes):
            part.take(name, payload)
        part.finish()
        if target.remembers:
            shown.final(shown.text_of(target.runnable.get_state(config).values))

    return drive


def _agraph_mode(mode: str) -> Drive:
    async def drive(target: Target, shown: Shown) -> None:
        part, config = _GraphPart(mode, shown), target.settings()
        stream = target.runnable.astream(target.given, config, stream_mode=part.modes)
        async for name, payload in stream:
            part.take(name, payload)
        part.finish()
        if target.remembers:
            shown.final(shown.text_of((await target.runnable.aget_state(config)).values))

    return drive


def _stored_state(target: Target, shown: Shown) -> None:
    """What is left when the run is over: in the checkpointer, else the last values."""
    config = target.settings()
    values = list(target.runnable.stream(target.given, config, stream_mode="values"))
    _output(shown, target.runnable.get_state(config).values if target.remembers else values[-1])


_WHOLE: dict[str, Drive] = {"invoke": _invoke, "ainvoke": _ainvoke, "batch": _batch, "abatch": _abatch}
_STREAMS: dict[str, Drive] = {"stream": _stream, "astream": _astream}
_V3: dict[str, Drive] = {"events v3": _events_v3, "events v3 async": _aevents_v3}
_HEARD: dict[str, Drive] = {"callbacks": _callbacks, "tracer": _tracer}
_MODES: dict[str, Drive] = {
    f"{prefix}{mode}": make(mode)
    for mode in ("messages", "updates", "values", "custom")
    for prefix, make in (("", _graph_mode), ("async ", _agraph_mode))
}
# By kind of target: the name of each surface, in the order of the report, and how it is driven.
SURFACES: dict[Kind, dict[str, Drive]] = {
    "model": {**_WHOLE, **_STREAMS, "events v2": _events_v2, **_V3, **_HEARD},
    "chain": {**_WHOLE, **_STREAMS, "events v2": _events_v2, **_HEARD},
    "graph": {**_WHOLE, **_MODES, "events v2": _events_v2, **_V3, "stored state": _stored_state, **_HEARD},
}
# Surfaces on which a chain's model runs are told apart from its own output.
WITH_MODEL_RUNS = ("events v2", "callbacks", "tracer")
