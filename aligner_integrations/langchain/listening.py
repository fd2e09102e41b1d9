"""What a streaming handler does with each event that it hears, the same for the sync and the async one."""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
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
from aligner_integrations.langchain.outlet import Outlet
from aligner_integrations.langchain.question import question_text
from aligner_integrations.langchain.upstream import as_chunk
from aligner_integrations.options import CorrectionOptions
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
        sentence_seconds: float | None = None,
        answer_seconds: float | None = None,
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
            sentence_seconds=sentence_seconds,
            answer_seconds=answer_seconds,
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
        self._outlet: Outlet[Update] = Outlet(buffer_size, buffer_timeout)
        # Runs are noted by number, not by their UUID: that is LangChain's, and its end is watched.
        self._answers: dict[int, HeardAnswer] = {}
        self._roots: dict[int, int] = {}  # runs in progress, each with the outermost run around it
        self._lock = threading.RLock()
        self._first: int | None = None  # the run that began the round ...
        self._error: BaseException | None = None  # ... and what went wrong in it

    def __iter__(self) -> Iterator[Update]:
        """Iterate over what comes, until the outermost run ends; the handler must have no sink.

        Raises:
            Exception: with `on_error="raise"`, what the outermost run ended with; otherwise that only if it
                is an error of this library, such as a model that cannot be loaded.
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
        self._note(run_id, parent, question, is_chat=event.name == "on_chat_model_start")
        try:
            yield from self._tell(event)
        except BaseException:  # a run that is not begun is not ended either
            self._answers.pop(run_id.int, None)
            self._finished(run_id.int, None)
            raise

    def _note(self, run_id: UUID, parent: UUID | None, question: object, *, is_chat: bool) -> None:
        with self._lock:
            root = self._roots.get(parent.int, run_id.int) if parent else run_id.int
            if root == run_id.int:
                if not self._roots:
                    self._first, self._error = root, None
                self._outlet.begin()
                # LangChain does not tell the end of every run: of one that is cancelled or dropped, say.
                weakref.finalize(run_id, self._vanished, root).atexit = False
            self._roots[run_id.int] = root
        if question is not None:
            self._answers[run_id.int] = HeardAnswer(
                self._options,
                self._question if self._question is not None else question_text(question),
                run_id=UUID(int=run_id.int),
                is_chat=is_chat,
                optimistic=self._mode == "optimistic",
            )

    def _answer(self, about: dict[str, Any], *, is_chat: bool) -> HeardAnswer:
        """Return the answer that a run gives; of a run whose start was not heard, what was asked is open."""
        run_id: UUID = about["run_id"]
        if run_id.int not in self._answers:
            self._note(run_id, about.get("parent_run_id"), "", is_chat=is_chat)
        return self._answers[run_id.int]

    def _token(self, token: Any, chunk: Any, about: dict[str, Any]) -> Steps[None]:
        about.pop("logprobs", None)  # they spell the raw text
        message = getattr(chunk, "message", None)
        answer = self._answer(about, is_chat=message is not None)
        if answer.source in (None, "tokens"):
            answer.source = "tokens"
            yield from self._heard(answer, message or AIMessageChunk(content=token), about)

    def _protocol_event(self, event: Any, about: dict[str, Any]) -> Steps[None]:
        answer = self._answer(about, is_chat=True)
        if answer.source == "tokens":  # a model may say its tokens while LangChain makes events of them
            return
        answer.source = "events"
        if (chunk := answer.chunk_of(event)) is not None:
            yield from self._heard(answer, chunk, about)
        if answer.is_ended_by(event):
            # Whoever waits for the whole message may have it before `on_llm_end` is heard.
            yield from self._give(answer, (yield from answer.end()), about)

    def _heard(self, answer: HeardAnswer, chunk: BaseMessage, about: dict[str, Any]) -> Steps[None]:
        answer.show(chunk)
        yield from self._give(answer, [], about)
        yield from self._give(answer, (yield from answer.take(chunk)), about)

    def _ended(self, response: LLMResult, about: dict[str, Any]) -> Steps[None]:
        number, error = about["run_id"].int, None
        answer = self._answer(about, is_chat=_is_chat(response))
        try:
            first = next((each for candidates in response.generations for each in candidates), None)
            if first is not None and not answer.spoke:  # the model did not stream
                whole = getattr(first, "message", None) or AIMessageChunk(content=first.text)
                yield from self._heard(answer, whole, about)
            messages = yield from answer.end()
            answer.take_back()  # of what a failure, swallowed on the way here, kept from being corrected
            yield from self._give(answer, messages, about)
            if self._handlers:
                response = yield partial(answer.corrected_result, response)
                yield Event("on_llm_end", response, **about)
        except BaseException as raised:
            error = raised
            answer.take_back()
            yield from self._give(answer, [], about)
            raise
        finally:
            self._answers.pop(number, None)
            self._finished(number, error)

    def _failed(self, error: BaseException, about: dict[str, Any]) -> Steps[None]:
        number = about["run_id"].int
        try:
            if (answer := self._answers.pop(number, None)) is not None:
                yield from self._flush(answer, about)
            yield from self._tell(Event("on_llm_error", error, **about))
        finally:
            self._finished(number, error)

    def _flush(self, answer: HeardAnswer, about: dict[str, Any]) -> Steps[None]:
        """Send what was held back of an answer that broke off, or what stands for it."""
        messages: list[BaseMessage] = []
        if self._options.on_error == "withhold":
            answer.withhold()
        else:
            try:
                messages = yield from answer.end()
            except AlignerError as error:
                # The run's own error goes on; what could not be corrected is not shown.
                logger.warning(
                    "the last sentence of a failed run could not be corrected: %s", type(error).__name__
                )
        answer.take_back()
        yield from self._give(answer, messages, about)

    def _closed(self, event: Event, error: BaseException | None = None) -> Steps[None]:
        """A run around models ended. Whatever inside it did not say that it ended has ended with it."""
        run_id: UUID = event.kwargs["run_id"]
        try:
            for lost in [each for each, root in tuple(self._roots.items()) if root == run_id.int != each]:
                if (answer := self._answers.pop(lost, None)) is not None:
                    yield from self._flush(answer, {"run_id": answer.run_id})
                self._roots.pop(lost, None)
            yield from self._tell(event)
        finally:
            self._finished(run_id.int, error)

    def _finished(self, number: int, error: BaseException | None) -> None:
        with self._lock:
            if (root := self._roots.pop(number, None)) is None:
                return
            if root == number and isinstance(error, Exception) and self._error is None:
                self._error = error
            if self._roots:
                return
            if number == self._first:
                self._error = error  # the outermost run may have lived with what failed in it
            raised = self._error if isinstance(self._error, Exception) else None
            # What no policy hides (say, a model that cannot be loaded) must not look like the end.
            hidden = self._options.on_error != "raise" and not isinstance(raised, AlignerError)
            self._outlet.end(None if hidden else raised)

    def _vanished(self, root: int) -> None:
        """Forget a run that is no more and never said that it ended, and all that was in it."""
        with self._lock:
            for number in [each for each, above in tuple(self._roots.items()) if above == root]:
                self._answers.pop(number, None)
                self._finished(number, None)

    # Where it goes.

    def _tell(self, event: Event) -> Steps[None]:
        """Pass an event on. A chain's inputs and outputs hold raw text, so of chains no handler hears."""
        if self._handlers and not event.name.startswith("on_chain"):
            yield event

    def _give(self, answer: HeardAnswer, messages: list[BaseMessage], about: dict[str, Any]) -> Steps[None]:
        if not self._handlers:
            while answer.updates:
                try:
                    yield answer.updates[0]
                except Exception:
                    answer.updates.clear()  # the sink is gone; later text would stand in the wrong place
                    answer.silent = True
                    raise
                # Not before: a writer that was cancelled while it waited for room has not delivered.
                if answer.updates:
                    answer.updates.popleft()
            return
        if not messages:  # withheld: no chunk of the model's says this
            messages = [AIMessageChunk(content=update.text) for update in answer.updates]
        answer.updates.clear()
        for message in messages:
            text = str(message.text)
            chunk: Any = GenerationChunk(text=text)
            if answer.is_chat:
                chunk = ChatGenerationChunk(message=as_chunk(message))
            yield Event("on_llm_new_token", text, **{**about, "chunk": chunk})


def _is_chat(response: LLMResult) -> bool:
    return any(hasattr(each, "message") for candidates in response.generations for each in candidates)


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
