"""`AlignerMiddleware`: an agent whose answers are corrected, streamed and stored."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, ClassVar

try:
    import langgraph  # noqa: F401
    from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
except ImportError as error:
    from aligner_integrations.errors import MissingDependencyError

    if (error.name or "").partition(".")[0] not in ("langchain", "langgraph"):
        raise  # something that they need is broken: its own message says more
    raise MissingDependencyError(
        "AlignerMiddleware needs langchain and langgraph, at least 1.4 and 1.2; "
        'pip install "aligner-integrations[agents]"',
        name=error.name,
    ) from error

try:
    from langgraph.stream import StreamChannel, StreamTransformer
except ImportError:  # a langgraph before `stream_events(version="v3")`
    StreamTransformer = None  # type: ignore[assignment, misc]

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import RunnableBinding

from aligner_integrations.aligner import Aligner
from aligner_integrations.correction import Segment
from aligner_integrations.langchain.chat_model import AlignedChatModel
from aligner_integrations.options import CorrectionOptions
from aligner_integrations.resilience import WITHHELD_TEXT, OnError

logger = logging.getLogger(__name__)


if StreamTransformer is not None:

    class CorrectionsTransformer(StreamTransformer):
        """`run.extensions["corrections"]`: for each message of the agent what its correction did and cost.

        One dictionary a message: its `message_id`, and what `response_metadata["aligner"]` says. The text of
        the other channels needs no transformer: it was corrected before it came here.
        """

        required_stream_modes: ClassVar[tuple[str, ...]] = ("messages",)

        def __init__(self, scope: tuple[str, ...] = ()) -> None:
            super().__init__(scope)
            self._channel: StreamChannel[dict[str, Any]] = StreamChannel("corrections")
            self._ids: dict[str, str] = {}  # of the messages that are coming, by run

        def init(self) -> dict[str, Any]:
            return {"corrections": self._channel}

        def process(self, event: Any) -> bool:
            if event["method"] == "messages" and tuple(event["params"]["namespace"]) == self.scope:
                payload, metadata = event["params"]["data"]
                self._note(payload, str((metadata or {}).get("run_id")))
            return True

        def _note(self, payload: Any, run_id: str) -> None:
            if isinstance(payload, BaseMessage):  # a message that did not stream
                self._say(payload.id, payload.response_metadata)
            elif payload.get("event") == "message-start":
                self._ids[run_id] = payload.get("id", "")
            elif payload.get("event") in ("message-finish", "error"):
                self._say(self._ids.pop(run_id, None), payload.get("metadata") or {})

        def _say(self, message_id: str | None, metadata: dict[str, Any]) -> None:
            if "aligner" in metadata:
                self._channel.push({"message_id": message_id, **metadata["aligner"]})


class AlignerMiddleware(AgentMiddleware[Any, Any, Any]):
    """Corrects what an agent's model writes, at its source: `create_agent(model, middleware=[...])`.

    Each model call goes through an `AlignedChatModel`. So every stream of the agent (LangGraph's stream
    modes, `astream_events`, `stream_events`), its callbacks, its state and its checkpoints hold the same
    corrected text, and none of them the raw one. Tool calls are never changed, structured output is left
    alone, and a model that is an `AlignedChatModel` already stays as it is.

    Put it last in the list: what stands after it sees the wrapping model in place of the agent's own. A
    middleware that stands there and brings another model (a fallback) gets that one wrapped too.

    Args:
        aligner: What corrects; without one the bundled model is loaded on first use.
        thoughts: Whether the text beside tool calls is corrected before the tools run, too. Without it the
            sentence that a tool call ends stays as the model wrote it; sentences before it, which may
            be the beginning of an answer as far as anyone knows while they stream, are corrected.
        on_error: What a failed correction does: `"raise"`, `"pass_through"` (the original is shown) or
            `"withhold"` (`withheld_text` is shown in its place).
        withheld_text: Stands for a sentence that was withheld.
        sentence_seconds: A correction that takes longer is dropped and has failed; None: no limit.
        answer_seconds: So long the corrections of one answer may take in all; None: no limit.
        feedback: Tells the aligner what to look for.
        edit_margin: Overrides the model's own margin, in logits.
        sink: Called with every segment once it is corrected. In async runs it is called in a worker thread.
        trace_original: Let callbacks and tracers, and with them every stream, see the raw text as well.
    """

    transformers = (CorrectionsTransformer,) if StreamTransformer is not None else ()

    def __init__(
        self,
        aligner: Aligner | None = None,
        *,
        thoughts: bool = False,
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
        sentence_seconds: float | None = None,
        answer_seconds: float | None = None,
        feedback: str = "",
        edit_margin: float | None = None,
        sink: Callable[[Segment], None] | None = None,
        trace_original: bool = False,
    ) -> None:
        super().__init__()
        self._options = CorrectionOptions(
            aligner=aligner,
            on_error=on_error,
            withheld_text=withheld_text,
            sentence_seconds=sentence_seconds,
            answer_seconds=answer_seconds,
            feedback=feedback,
            edit_margin=edit_margin,
        )
        self._thoughts = thoughts
        self._sink = sink
        self._trace_original = trace_original
        self._warned = False
        self._kinds: dict[type, type] = {}  # requests as they come, and as they are handed on

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        return self._checked(request, handler(self._aligned(request)))

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        response = await handler(self._aligned(request))
        if not any(map(self._is_raw, response.result)):
            return response
        return await asyncio.to_thread(self._checked, request, response)

    def _aligned(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        """Return a copy of `request`, of its own kind, with its model wrapped."""
        kind = type(request)
        if kind not in self._kinds:
            bases = (_AlignedRequest,) if kind is ModelRequest else (_AlignedRequest, kind)
            self._kinds[kind] = type(kind.__name__, bases, {"_wrap": staticmethod(self._wrap)})
        aligned = copy.copy(request)
        object.__setattr__(aligned, "__class__", self._kinds[kind])
        object.__setattr__(aligned, "model", self._wrap(request.model))
        return aligned

    def _wrap(self, model: Any) -> Any:
        """Return the model of a request so that its text is corrected."""
        if isinstance(model, AlignedChatModel):
            return model
        if isinstance(model, BaseChatModel):
            return AlignedChatModel(
                model=model,
                thoughts=self._thoughts,
                sink=self._sink,
                trace_original=self._trace_original,
                **self._options.by_name(),
            )
        if isinstance(model, RunnableBinding):
            return model.model_copy(update={"bound": self._wrap(model.bound)})
        raise TypeError(
            f"AlignerMiddleware wraps chat models, but the agent's model is a {type(model).__name__}; give "
            "create_agent a chat model, or set request.override(model=...) in a middleware before this one"
        )

    def _checked(self, request: ModelRequest[Any], response: ModelResponse[Any]) -> ModelResponse[Any]:
        """Correct what did not come from the wrapped model: an answer that another middleware made."""
        around = [at for at, message in enumerate(response.result) if self._is_raw(message)]
        if not around or response.structured_response is not None:
            return response
        if not self._warned:
            self._warned = True
            logger.warning(
                "an answer came from a middleware after AlignerMiddleware, not from the model it wraps; it "
                "is corrected now, but streams may have shown it before. Put AlignerMiddleware last."
            )
        aligned = self._wrap(request.model)
        aligned = getattr(aligned, "bound", aligned)  # of a model with options bound to it
        result = list(response.result)
        for at in around:
            result[at] = aligned.corrected(request.messages, result[at])
        return replace(response, result=result)

    def _is_raw(self, message: BaseMessage) -> bool:
        """Whether this is an answer that should have been corrected and was not."""
        if not isinstance(message, AIMessage) or not message.text:
            return False
        return "aligner" not in message.response_metadata and (self._thoughts or not message.tool_calls)


class _AlignedRequest(ModelRequest[Any]):
    """A request whose model is wrapped, whoever sets it and however: `override`, `replace`, an attribute."""

    _wrap: Callable[[Any], Any]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._wrap(value) if name == "model" else value)
