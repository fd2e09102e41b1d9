"""Callback handlers that hear a model and pass on corrected text, sentence by sentence.

A callback cannot change what a chain returns: LangChain ignores what it gives back. So these handlers are
the *source* of a corrected stream, for a screen beside the chain. What the chain itself returns is
corrected by `AlignerRunnable`, `AlignedChatModel` or `AlignerMiddleware`.
"""

from __future__ import annotations

import inspect
from typing import Any

from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.callbacks.manager import ahandle_event, handle_event

from aligner_integrations.langchain.jobs import apart, arun, inline, run, settled
from aligner_integrations.langchain.listening import Event, Listening
from aligner_integrations.langchain.updates import RunSegment, TextUpdate


class StreamAlignerCallbackHandler(Listening, BaseCallbackHandler):
    """Hears models in a run and sends their corrected text to a sink: `config={"callbacks": [handler]}`.

    Both ways in which LangChain streams are heard, and answers that do not stream; one answer is kept per
    run, so several models may speak at once. Text beside tool calls is corrected like any other. A failed
    correction, or a failing sink, ends the run that is listened to: nothing fails open silently.

    With `mode="hold"` (default) only corrected text is sent: a `RunSegment` a sentence. With
    `mode="optimistic"` text is sent at once and replaced when its sentence turns out to need it: the sink
    gets `TextUpdate`s, which `displays.py` turns into what user interfaces take.

    When the model fails or is cancelled, what was held back is corrected and sent; with
    `on_error="withhold"`, `withheld_text` is sent in its place.

    Args:
        aligner: What corrects; without one the bundled model is loaded on first use.
        sink: Where the text goes: a callable, called with each segment (or update); or another callback
            handler, which hears of models, tools and retrievers as usual but gets the corrected text in
            `on_llm_new_token` and `on_llm_end`. What models, tools and retrievers are *given* it hears as it
            is; of chains, whose every step is given the raw text, nothing. Without a sink, iterate over
            the handler itself, in another thread or task.
        mode: `"hold"` or `"optimistic"`; a handler as sink can only append, so it takes `"hold"`.
        question: What was asked, if it is not the last human message (or the prompt of a completion model).
        on_error: What a failed correction does: `"raise"`, `"pass_through"` (the original is shown) or
            `"withhold"` (`withheld_text` is shown in its place).
        withheld_text: Stands for a sentence that was withheld.
        sentence_seconds: A correction that takes longer is dropped and has failed; None: no limit.
        answer_seconds: So long the corrections of one answer may take in all; None: no limit.
        feedback: Tells the aligner what to look for.
        edit_margin: Overrides the model's own margin, in logits.
        buffer_size: How many segments wait for iteration before the run has to.
        buffer_timeout: How long the run waits then, in seconds, until it fails; None: for ever.
    """

    def _run(self, event: str, /, *args: Any, **about: Any) -> None:
        run(self.steps(event, *args, **about), self._perform)

    def _perform(self, step: Any) -> Any:
        if isinstance(step, Event):
            return handle_event(self._handlers, step.name, step.ignore, *step.args, **step.kwargs)
        if not isinstance(step, (RunSegment, TextUpdate)):
            return apart(step)
        return self._sink(step) if callable(self._sink) else self._outlet.put(step)

    def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_llm_start", *args, **kwargs)

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_chat_model_start", *args, **kwargs)

    def on_llm_new_token(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_llm_new_token", *args, **kwargs)

    def on_stream_event(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_stream_event", *args, **kwargs)

    def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_llm_end", *args, **kwargs)

    def on_llm_error(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_llm_error", *args, **kwargs)

    def on_chain_start(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_chain_start", *args, **kwargs)

    def on_chain_end(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_chain_end", *args, **kwargs)

    def on_chain_error(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_chain_error", *args, **kwargs)

    def on_tool_start(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_tool_start", *args, **kwargs)

    def on_tool_end(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_tool_end", *args, **kwargs)

    def on_tool_error(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_tool_error", *args, **kwargs)

    def on_retriever_start(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_retriever_start", *args, **kwargs)

    def on_retriever_end(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_retriever_end", *args, **kwargs)

    def on_retriever_error(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_retriever_error", *args, **kwargs)

    def on_custom_event(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_custom_event", *args, **kwargs)


class AsyncStreamAlignerCallbackHandler(Listening, AsyncCallbackHandler):
    """`StreamAlignerCallbackHandler` for async runs: corrections run in threads, the event loop goes on.

    The sink may be a coroutine function, an async handler, or any that the sync handler takes; iterate with
    `async for`. The arguments are the same. In sync runs LangChain swallows what async handlers raise:
    a failed correction then stops the text but not the run, so take the sync handler there.
    """

    _awaits = True
    run_inline = inline  # awaited where it is called: no task per token, and its order among handlers is kept

    async def _run(self, event: str, /, *args: Any, **about: Any) -> None:
        await arun(self.steps(event, *args, **about), self._perform)

    async def _perform(self, step: Any) -> Any:
        if isinstance(step, Event):
            return await ahandle_event(self._handlers, step.name, step.ignore, *step.args, **step.kwargs)
        if not isinstance(step, (RunSegment, TextUpdate)):
            return await settled(step)
        if not callable(self._sink):
            return await self._outlet.aput(step)
        done = self._sink(step)
        return await done if inspect.isawaitable(done) else done

    async def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_llm_start", *args, **kwargs)

    async def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_chat_model_start", *args, **kwargs)

    async def on_llm_new_token(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_llm_new_token", *args, **kwargs)

    async def on_stream_event(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_stream_event", *args, **kwargs)

    async def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_llm_end", *args, **kwargs)

    async def on_llm_error(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_llm_error", *args, **kwargs)

    async def on_chain_start(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_chain_start", *args, **kwargs)

    async def on_chain_end(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_chain_end", *args, **kwargs)

    async def on_chain_error(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_chain_error", *args, **kwargs)

    async def on_tool_start(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_tool_start", *args, **kwargs)

    async def on_tool_end(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_tool_end", *args, **kwargs)

    async def on_tool_error(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_tool_error", *args, **kwargs)

    async def on_retriever_start(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_retriever_start", *args, **kwargs)

    async def on_retriever_end(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_retriever_end", *args, **kwargs)

    async def on_retriever_error(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_retriever_error", *args, **kwargs)

    async def on_custom_event(self, *args: Any, **kwargs: Any) -> None:
        await self._run("on_custom_event", *args, **kwargs)
