"""One answer of a wrapped LLM: what it says in, the same with corrected text out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from llama_index.core.base.llms.types import (
    ChatResponse,
    CompletionResponse,
    ContentBlock,
    TextBlock,
    ToolCallBlock,
)

from aligner_integrations.llama_index.instrumentation import CorrectionSpan
from aligner_integrations.llama_index.text import AnswerText

R = TypeVar("R", ChatResponse, CompletionResponse)

# Of a provider's own response, which spells the raw text, only this is handed on.
_KEPT_OF_RAW = ("id", "model", "created", "usage", "usage_metadata")
_THINKING = "thinking_delta"  # in a response's own arguments: said once


class LLMAnswer(Generic[R]):
    """An answer that is corrected while it comes. Belongs to one answer.

    Feed each response of the wrapped LLM and hand on what `ready` gives; at the end `end`, and once more. A
    response that is handed on is the latest one of the wrapped LLM, with the corrected text so far in place
    of its own.

    Each text block is a text of its own. A tool call ends the text before it; without `thoughts` the sentence
    that it ends, and what comes after the call, stay as they are.
    """

    def __init__(
        self, open_text: Callable[[], AnswerText], span: CorrectionSpan, *, thoughts: bool = True
    ) -> None:
        self.span = span
        self._open = open_text
        self._thoughts = thoughts
        self._texts = [open_text()]
        self._shown = [""]  # of each text, corrected
        self._raw = ""  # what the wrapped LLM said of the last text
        self._first = 0  # the text with which it began: another one than the first after a restart
        self._calling = False
        self._latest: R | None = None
        self._told = True  # whether the latest response has been handed on ...
        self._due = False  # ... and whether it has to be, text or not

    @property
    def prefix(self) -> str:
        """What was shown so far, less white space at its end: most models continue badly after one."""
        return "".join(self._shown).rstrip()

    @property
    def stale(self) -> bool:
        """Whether upstream has to be asked anew, for what comes after `prefix`."""
        return any(text.stale for text in self._texts)

    @property
    def waiting(self) -> bool:
        """Whether there is anything for `step` to do."""
        return not self.stale and any(text.waiting for text in self._texts)

    def feed(self, response: R) -> None:
        """Take the next response of a stream."""
        self._latest, self._told = response, False
        blocks = response.message.blocks if isinstance(response, ChatResponse) else []
        news = self._news(response)
        begun = len(self._texts) - self._first
        if sum(isinstance(block, TextBlock) for block in blocks) < begun:
            self._feed_text(news[0])  # it has no block, or not yet
        place = 0
        for block in blocks:
            if isinstance(block, TextBlock):
                place += 1
                if place > begun:
                    self._begin_text()
                if place >= begun:
                    self._feed_text(news[place - begun])
            elif isinstance(block, ToolCallBlock):
                self._begin_call()
        calls = isinstance(response, ChatResponse) and _calls_tools(response)
        if calls:
            self._begin_call()
        self._due = not any(news) or calls or _THINKING in response.additional_kwargs

    def feed_whole(self, response: R) -> None:
        """Take a finished response."""
        self.feed(response.model_copy(update={"delta": None}))
        self._due = True

    def end(self) -> None:
        """Take it that no more comes."""
        self._texts[-1].end()
        self._due = self._due or not self._told

    def restart(self) -> None:
        """Go on with another upstream, which continues what was shown."""
        self._first = next(index for index, text in enumerate(self._texts) if text.stale)
        del self._texts[self._first + 1 :], self._shown[self._first + 1 :]
        self._raw, self._calling = "", False
        self._texts[-1].restart(self._shown[-1])

    def step(self) -> str:
        """Do the next thing that waits and return what can be shown of it, which may be nothing."""
        for index, text in enumerate(self._texts):
            if text.waiting:
                shown = text.step()
                self._shown[index] += shown
                return shown
        return ""

    def ready(self) -> Generator[R]:
        """Do all that waits, in place; yield what is to be handed on."""
        while self.waiting:
            if shown := self.step():
                yield self.respond(shown)
        if self._due:
            yield self.respond("")

    async def aready(self) -> AsyncGenerator[R]:
        """Do all that waits in threads, so that the event loop goes on; yield what is to be handed on."""
        while self.waiting:
            if shown := await asyncio.to_thread(self.step):
                yield self.respond(shown)
        if self._due:
            yield self.respond("")

    def whole(self) -> R:
        """Do all that waits and return the finished answer."""
        self.end()
        while self.waiting:
            self.step()
        return self.respond(None)

    def respond(self, delta: str | None) -> R:
        """Return the latest response with the corrected text."""
        if self._latest is None:
            raise ValueError("the wrapped LLM said nothing at all, not even an empty response")
        given = dict(self._latest.additional_kwargs)
        if not self._due:
            given.pop(_THINKING, None)
        self._due, self._told = False, True
        kept = {
            "delta": delta,
            "raw": _without_text(self._latest.raw),
            "logprobs": None,  # they spell the raw text
            "additional_kwargs": given,
        }
        if isinstance(self._latest, CompletionResponse):
            return self._latest.model_copy(update={**kept, "text": "".join(self._shown)})
        blocks = _with_texts(self._latest.message.blocks, self._of_this_upstream())
        message = self._latest.message.model_copy(update={"blocks": blocks})
        return self._latest.model_copy(update={**kept, "message": message})

    def _of_this_upstream(self) -> list[str]:
        """Return what was shown of each text of the latest upstream; the first holds all that was before."""
        return ["".join(self._shown[: self._first + 1]), *self._shown[self._first + 1 :]]

    def _begin_text(self) -> None:
        self._texts[-1].end()
        text = self._open()
        text.restarts = self._texts[-1].restarts  # those that are left are for the whole answer
        self._texts.append(text)
        self._shown.append("")
        self._raw = ""
        if self._calling and not self._thoughts:
            self._texts[-1].leave()

    def _begin_call(self) -> None:
        if self._calling:
            return
        self._calling = True
        if self._thoughts:
            self._texts[-1].end()
        else:
            self._texts[-1].leave()

    def _feed_text(self, text: str) -> None:
        self._texts[-1].feed(text)
        self._raw += text

    def _news(self, response: R) -> list[str]:
        """Return the text that `response` adds to the last text, and one more for each text that it begins.

        It is the delta, or what the blocks have more than was there.
        """
        if isinstance(response, CompletionResponse):
            texts = [response.text]
        else:
            texts = [block.text for block in response.message.blocks if isinstance(block, TextBlock)]
        begun, delta = len(self._texts) - self._first, response.delta
        if delta is not None and len(texts) <= begun:
            return [delta]
        text, *others = texts[begun - 1 :] or [""]
        news = [text.removeprefix(self._raw) if text.startswith(self._raw) else "", *others]
        # One delta may hold text of several blocks; `ChatMessage.content` puts line breaks between them.
        if delta is None or delta in ("".join(news), "\n".join(news)):
            return news
        return [*("" for _ in others), delta]


def _calls_tools(response: ChatResponse) -> bool:
    message = response.message
    is_called = any(isinstance(block, ToolCallBlock) for block in message.blocks)
    return is_called or bool(message.additional_kwargs.get("tool_calls"))


def _with_texts(blocks: Sequence[ContentBlock], texts: Sequence[str]) -> list[ContentBlock]:
    """Return `blocks` with `texts` in their text blocks; what has no block of its own joins the last."""
    places = [index for index, block in enumerate(blocks) if isinstance(block, TextBlock)]
    if not places:
        calls = (index for index, block in enumerate(blocks) if isinstance(block, ToolCallBlock))
        place = next(calls, len(blocks))
        added = [TextBlock(text="".join(texts))] if any(texts) else []
        return [*blocks[:place], *added, *blocks[place:]]
    fitted = [*texts[: len(places) - 1], "".join(texts[len(places) - 1 :])]
    new = dict(zip(places, fitted, strict=False))
    return [
        block.model_copy(update={"text": new.get(index, "")}) if isinstance(block, TextBlock) else block
        for index, block in enumerate(blocks)
    ]


def _without_text(raw: Any) -> dict[str, Any] | None:
    """Return what a provider says beside its text: which model, and what it cost."""
    said = raw if isinstance(raw, Mapping) else {name: getattr(raw, name, None) for name in _KEPT_OF_RAW}
    kept = {name: said.get(name) for name in _KEPT_OF_RAW}
    return {name: value for name, value in kept.items() if value is not None} or None
