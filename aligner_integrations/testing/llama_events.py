"""What LlamaIndex's dispatcher is told while a target runs: events, and what spans gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.instrumentation.events.chat_engine import StreamChatDeltaReceivedEvent
from llama_index.core.instrumentation.span_handlers import NullSpanHandler
from llama_index.core.node_parser import NodeParser
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.schema import BaseComponent, NodeWithScore, QueryBundle
from llama_index.core.tools import ToolOutput

from aligner_integrations.testing.llama_agents import opened
from aligner_integrations.testing.seen import Seen

# Fields of events that say what went in.
_ASKED = {
    *("query", "query_str", "question", "str_or_query_bundle", "prompt", "messages", "template"),
    *("template_args", "text_chunks", "message_chunks", "chunks", "model_dict", "additional_kwargs"),
}
# Of a workflow's steps: what their spans give, as text, cut short. Its tags tell the same of what went in.
_SUMMARIES = ("step.output", "workflow.output")
_SAYS = (MessageRole.USER, MessageRole.SYSTEM, MessageRole.DEVELOPER)


def is_input(value: Any) -> bool:
    """Return whether a value went in: a person's or the system's message, a prompt, what was retrieved."""
    if isinstance(value, ChatMessage):
        return value.role in _SAYS
    if isinstance(value, ToolOutput):
        nodes = value.raw_output
        return isinstance(nodes, list) and all(isinstance(node, NodeWithScore) for node in nodes)
    return isinstance(value, BaseComponent | QueryBundle | BasePromptTemplate)


class Listener:
    """Hears the root dispatcher, and keeps apart what comes before a guard.

    That is what is tagged `{"aligner": "original"}`, as a guarded LLM does with what the LLM within sends;
    and of a query engine all but its own spans.
    """

    def __init__(self, new: Callable[..., Seen], *, engine: Any = None) -> None:
        self.deltas: list[str] = []
        self._engine = engine
        self._own, self._wrapped, self._inner = new(), new(judged=False), new(judged=False)
        for place in (self._own, self._wrapped, self._inner):
            place.has_text = False
        self._spans: dict[str, Seen] = {}

    def places(self, name: str) -> list[tuple[str, Seen]]:
        """Return what was heard, by the names of its rows; those not judged only where something was."""
        apart = ((f"{name}, wrapped LLM", self._wrapped), (f"{name}, inner runs", self._inner))
        return [(name, self._own), *((row, place) for row, place in apart if place.everything)]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear what is sent meanwhile."""
        root = get_dispatcher()
        events, spans = _Events(listener=self), _Spans()
        spans.listener = self
        root.add_event_handler(events)
        root.add_span_handler(spans)
        try:
            yield
        finally:
            # By identity: pydantic calls handlers with the same fields equal.
            root.event_handlers[:] = [one for one in root.event_handlers if one is not events]
            root.span_handlers[:] = [one for one in root.span_handlers if one is not spans]

    def event(self, event: BaseEvent) -> None:
        """Take an event."""
        is_inner = self._spans.get(str(event.span_id)) is self._inner
        place = self._wrapped if _is_original(event.tags) else self._inner if is_inner else self._own
        if isinstance(event, StreamChatDeltaReceivedEvent) and place is self._own:
            self.deltas.append(event.delta)
        if event.class_name() not in _SUMMARIES:
            said = {name: getattr(event, name) for name in type(event).model_fields if name not in _ASKED}
            tags = {key: tag for key, tag in event.tags.items() if not key.startswith("llamaindex.")}
            place.see({**said, "tags": tags}, f"{event.class_name()} {event.span_id}")

    def enter(self, span: str, instance: Any, tags: Mapping[str, Any]) -> None:
        """Take the beginning of a span."""
        is_own = self._engine is None or instance is self._engine
        self._spans[span] = self._wrapped if _is_original(tags) else self._own if is_own else self._inner

    def leave(self, span: str, instance: Any, result: Any) -> None:
        """Take what a span gave, or the error that it ended with; what splits a text gives what went in."""
        if not isinstance(instance, NodeParser):
            said = str(result) if isinstance(result, BaseException) else opened(result)
            self._spans.get(span, self._own).see(said)

    def hear(self, take: Callable[..., None], *what: Any) -> None:
        """Take what a handler is told; a fault is noted, for the dispatcher hides what its handlers raise."""
        try:
            take(*what)
        except Exception as error:
            self._own.note(error)


def _is_original(tags: Mapping[str, Any]) -> bool:
    return tags.get("aligner") == "original"


class _Events(BaseEventHandler):
    listener: Any

    @classmethod
    def class_name(cls) -> str:
        return "ConformanceEvents"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.listener.hear(self.listener.event, event)


class _Spans(NullSpanHandler):
    listener: Any = None

    @classmethod
    def class_name(cls) -> str:
        return "ConformanceSpans"

    def span_enter(
        self,
        id_: str,
        bound_args: Any,
        instance: Any = None,
        parent_id: Any = None,
        tags: Any = None,
        **_: Any,
    ) -> None:
        self.listener.hear(self.listener.enter, id_, instance, tags or {})

    def span_exit(
        self, id_: str, bound_args: Any, instance: Any = None, result: Any = None, **_: Any
    ) -> None:
        self.listener.hear(self.listener.leave, id_, instance, result)

    def span_drop(self, id_: str, bound_args: Any, instance: Any = None, err: Any = None, **_: Any) -> None:
        self.listener.hear(self.listener.leave, id_, instance, err)
