"""What a streaming handler does with each event that it hears, the same for the sync and the async one."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any, Literal, TypeAlias, get_args
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, GenerationChunk, LLMResult

from aligner_integrations.aligner import Aligner
from aligner_integrations.errors import AlignerError
from aligner_integrations.langchain.heard import HeardAnswer, Update
from aligner_integrations.langchain.jobs import Steps
from aligner_integrations.langchain.options import CorrectionOptions
from aligner_integrations.langchain.outlet import Outlet
from aligner_integrations.langchain.question import question_text
from aligner_integrations.langchain.upstream import as_chunk
from aligner_integrations.resilience import WITHHELD_TEXT, OnError

Mode: TypeAlias = Literal["hold", "optimistic"]
Sink: TypeAlias = Callable[[Any], Any] | BaseCallbackHandler

# The events that are heard: the flag by which a handler says that it does not want them, and the names of
# the arguments that LangChain gives by place or by name, as it likes.
_EVENTS = {
    "on_llm_start": ("ignore_llm", ("serialized", "prompts")),
    "on_chat_model_start": ("ignore_chat_model", ("serialized", "messages")),
    "on_llm_new_token": ("ignore_llm", ("token",)),
    "on_stream_event": ("ignore_llm", ("event",)),
    "on_llm_end": ("ignore_llm", ("response",)),
    "on_llm_error": ("ignore_llm", ("error",)),
    "on_chain_start": ("ignore_chain", ("serialized", "inputs")),
    "on_chain_end": ("ignore_chain", ("outputs",)),
    "on_chain_error": ("ignore_chain", ("error",)),
    "on_tool_start": ("ignore_agent", ("serialized", "input_str")),
    "on_tool_end": ("ignore_agent", ("output",)),
    "on_tool_error": ("ignore_agent", ("error",)),
    "on_retriever_start": ("ignore_retriever", ("serialized", "query")),
    "on_retriever_end": ("ignore_retriever", ("documents",)),
    "on_retriever_error": ("ignore_retriever", ("error",)),
    "on_custom_event": ("ignore_custom_event", ("name", "data")),
}

logger = logging.getLogger(__name__)


class Event:
    """Something to tell the handler that is the sink."""

    def __init__(self, name: str, /, *args: Any, **kwargs: Any) -> None:
        self.name, self.ignore, self.args, self.kwargs = name, _EVENTS[name][0], args, kwargs


class Listening:
    """What both handlers do, as steps: a step is a job, an update for the sink, or an event for it."""

    _awaits = False  # whether the sink may be a coroutine function
    raise_error = True  # or LangChain would log a failed correction and let the raw text go on

    def __init__(
        self,
        aligner: Aligner | None = None,
        *,
        sink: Sink | None = None,
        mode: Mode = "hold",
        question: str | None = None,
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
        feedback: str = "",
        edit_margin: float | None = None,
        buffer_size: int = 256,
        buffer_timeout: float | None = 60.0,
    ) -> None:
        super().__init__()
        self._options = CorrectionOptions(
            aligner=aligner,
            on_error=on_error,
            withheld_text=withheld_text,
            feedback=feedback,
            edit_margin=edit_margin,
        )
        _check(sink, mode, question, buffer_size)
        if _is_async(sink) and not self._awaits:
            raise TypeError("sink is async; AsyncStreamAlignerCallbackHandler awaits it")
        self._sink: Callable[[Any], Any] | None = None
        self._handlers: list[BaseCallbackHandler] = []  # the sink, when it is one
        if isinstance(sink, BaseCallbackHandler):
            self._handlers.append(sink)
        else:
            self._sink = sink
        self._mode = mode
        self._question = question
        self._answers: dict[UUID, HeardAnswer] = {}
        self._outlet: Outlet[Update] = Outlet(buffer_size, buffer_timeout)
        self._lock = threading.Lock()
        self._roots: dict[UUID, UUID] = {}  # runs in progress, each with the outermost run around it
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[Update]:
        """Iterate over what comes, until the outermost run ends; the handler must have no sink.

        Raises:
            Exception: with `on_error="raise"`, what the outermost run ended with.
        """
        self._check_own()
        return iter(self._outlet)

    def __aiter__(self) -> AsyncIterator[Update]:
        """Iterate as `__iter__` does, without blocking the event loop."""
        self._check_own()
        return aiter(self._outlet)

    def _check_own(self) -> None:
        if self._sink is not None or self._handlers:
            raise TypeError("this handler sends its text to its sink; leave sink out to iterate over it")

    # What is heard.

    def steps(self, name: str, /, *args: Any, **about: Any) -> Steps[None]:
        """Return what one event leads to; `about` names the run."""
        places = _EVENTS[name][1][len(args) :]
        args = (*args, *(about.pop(place) for place in places if place in about))
        event = Event(name, *args, **about)
        if name in ("on_chat_model_start", "on_llm_start"):
            return self._started(event, args[1][0] if args[1] else "")
        if name == "on_llm_new_token":
            return self._token(args[0], about.pop("chunk", None), about)
        if name == "on_stream_event":
            return self._protocol_event(args[0], about)
        if name == "on_llm_end":
            return self._ended(args[0], about)
        if name == "on_llm_error":
            about.pop("response", None)  # it holds the raw text so far
            return self._failed(args[0], about)
        if name.endswith("_start"):
            return self._started(event)
        if name.endswith("_error"):
            return self._closed(event, args[0])
        return self._closed(event) if name.endswith("_end") else self._tell(event)

    def _started(self, event: Event, question: object = None) -> Steps[None]:
        run_id, parent = event.kwargs["run_id"], event.kwargs.get("parent_run_id")
        with self._lock:
            if not self._roots:
                self._error = None
                self._outlet.begin()
            self._roots[run_id] = self._roots.get(parent, run_id) if parent else run_id
        if question is not None:
            self._answers[run_id] = HeardAnswer(
                self._options,
                self._question if self._question is not None else question_text(question),
                run_id=run_id,
                is_chat=event.name == "on_chat_model_start",
                optimistic=self._mode == "optimistic",
            )
        yield from self._tell(event)

    def _token(self, token: Any, chunk: Any, about: dict[str, Any]) -> Steps[None]:
        if (answer := self._answers.get(about["run_id"])) is not None:
            message = getattr(chunk, "message", None)
            yield from self._heard(answer, message or AIMessageChunk(content=token), about)

    def _protocol_event(self, event: Any, about: dict[str, Any]) -> Steps[None]:
        answer = self._answers.get(about["run_id"])
        if answer is None:
            return
        if (chunk := answer.chunk_of(event)) is not None:
            yield from self._heard(answer, chunk, about)
        if event.get("event") == "content-block-finish":
            # Whoever waits for the whole message may have it before `on_llm_end` is heard.
            yield from self._give(answer, (yield from answer.end()), about)

    def _heard(self, answer: HeardAnswer, chunk: BaseMessage, about: dict[str, Any]) -> Steps[None]:
        answer.show(chunk)
        yield from self._give(answer, [], about)
        yield from self._give(answer, (yield from answer.take(chunk)), about)

    def _ended(self, response: LLMResult, about: dict[str, Any]) -> Steps[None]:
        error: BaseException | None = None
        answer = self._answers.get(about["run_id"])
        try:
            if answer is not None:
                first = next((each for candidates in response.generations for each in candidates), None)
                if first is not None and not answer.spoke:  # the model did not stream
                    whole = getattr(first, "message", None) or AIMessageChunk(content=first.text)
                    yield from self._heard(answer, whole, about)
                yield from self._give(answer, (yield from answer.end()), about)
                if self._handlers:
                    response = yield partial(answer.corrected_result, response)
                    yield Event("on_llm_end", response, **about)
        except BaseException as raised:
            error = raised
            if answer is not None:
                answer.take_back()
                yield from self._give(answer, [], about)
            raise
        finally:
            self._answers.pop(about["run_id"], None)
            self._finished(about["run_id"], error)

    def _failed(self, error: BaseException, about: dict[str, Any]) -> Steps[None]:
        try:
            if (answer := self._answers.pop(about["run_id"], None)) is not None:
                yield from self._flush(answer, about)
            yield from self._tell(Event("on_llm_error", error, **about))
        finally:
            self._finished(about["run_id"], error)

    def _flush(self, answer: HeardAnswer, about: dict[str, Any]) -> Steps[None]:
        """Send what was held back of an answer that broke off, or what stands for it."""
        if self._options.on_error == "withhold":
            answer.withhold()
            messages: list[BaseMessage] = []
        else:
            try:
                messages = yield from answer.end()
            except AlignerError as error:
                # The run's own error goes on; what could not be corrected is not shown.
                logger.warning(
                    "the last sentence of a failed run could not be corrected: %s", type(error).__name__
                )
                answer.take_back()
                messages = []
        yield from self._give(answer, messages, about)

    def _closed(self, event: Event, error: BaseException | None = None) -> Steps[None]:
        """A run around models ended. What a model inside it left open ends with it."""
        run_id = event.kwargs["run_id"]
        try:
            for lost in [each for each in list(self._answers) if self._roots.get(each) == run_id]:
                yield from self._flush(self._answers.pop(lost), {"run_id": lost})
                self._roots.pop(lost, None)
            yield from self._tell(event)
        finally:
            self._finished(run_id, error)

    def _finished(self, run_id: UUID, error: BaseException | None) -> None:
        with self._lock:
            root = self._roots.pop(run_id, None)
            if root == run_id and self._error is None and isinstance(error, Exception):
                self._error = error
            if root is not None and not self._roots:
                self._outlet.end(self._error if self._options.on_error == "raise" else None)

    # Where it goes.

    def _tell(self, event: Event) -> Steps[None]:
        """Pass an event on. A chain's inputs and outputs hold raw text, so of chains no handler hears."""
        if self._handlers and not event.name.startswith("on_chain"):
            yield event

    def _give(self, answer: HeardAnswer, messages: list[BaseMessage], about: dict[str, Any]) -> Steps[None]:
        updates = list(answer.updates())
        if not self._handlers:
            yield from updates
            return
        if not messages:  # withheld: no chunk of the model's says this
            messages = [AIMessageChunk(content=update.text) for update in updates]
        for message in messages:
            text = str(message.text)
            chunk: Any = GenerationChunk(text=text)
            if answer.is_chat:
                chunk = ChatGenerationChunk(message=as_chunk(message))
            yield Event("on_llm_new_token", text, **{**about, "chunk": chunk})


def _check(sink: object, mode: object, question: object, buffer_size: object) -> None:
    if sink is not None and not callable(sink) and not isinstance(sink, BaseCallbackHandler):
        raise TypeError(
            f"sink must be a callable, a callback handler or None, got {type(sink).__name__}; without "
            "a sink, iterate over the handler"
        )
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}; got {mode!r}")
    if mode == "optimistic" and isinstance(sink, BaseCallbackHandler):
        raise ValueError(
            "mode='optimistic' replaces text that was shown, and a callback handler can only append; give "
            "a callable as sink, or leave mode at 'hold'"
        )
    if question is not None and not isinstance(question, str):
        raise TypeError(f"question must be a str or None, got {type(question).__name__}")
    if not isinstance(buffer_size, int) or buffer_size < 1:
        raise ValueError(f"buffer_size must be a whole number of segments, at least 1; got {buffer_size!r}")


def _is_async(sink: object) -> bool:
    return inspect.iscoroutinefunction(sink) or inspect.iscoroutinefunction(type(sink).__call__)
