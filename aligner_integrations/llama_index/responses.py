"""Streaming responses that remember what they have shown: `str(response)` is what was streamed."""

from __future__ import annotations

import weakref
from contextlib import aclosing, closing
from dataclasses import dataclass

from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.types import TokenAsyncGen, TokenGen


@dataclass
class CorrectedStreamingResponse(StreamingResponse):
    """A `StreamingResponse`; read in part or to its end, in whatever way, it becomes the whole text.

    `response_txt` is set once the stream has ended; after an early close it is what was shown.
    """

    def __post_init__(self) -> None:
        self._shown: list[str] = []
        self.response_gen = _recorded(self.response_gen, self._shown, weakref.ref(self))

    def __str__(self) -> str:
        """Return the whole text; what is left of the stream is read."""
        for _ in self.response_gen:
            pass
        return self.response_txt or "None"

    def get_response(self) -> Response:
        """Return the whole text as a `Response`; what is left of the stream is read."""
        str(self)
        return Response(self.response_txt, self.source_nodes, self.metadata)

    def print_response_stream(self) -> None:
        """Print what is left of the stream as it comes, or the whole text if nothing is."""
        super().print_response_stream()
        self.response_txt = _joined(self._shown)


@dataclass
class CorrectedAsyncStreamingResponse(AsyncStreamingResponse):
    """An `AsyncStreamingResponse`; read in part or to its end, in whatever way, it becomes the whole text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.response_gen = _arecorded(self.response_gen, [], weakref.ref(self))

    async def _yield_response(self) -> TokenAsyncGen:
        """Yield what is left of the stream, or the whole text if nothing is."""
        async with self._lock:
            if self.response_txt is not None:
                yield self.response_txt
                return
            async for token in self.response_gen:
                yield token

    def __str__(self) -> str:
        """Return the whole text; what is left of the stream is read."""
        return super().__str__() if self.response_txt is None else self.response_txt or "None"

    async def _async_str(self) -> str:
        """Read past the lock: a reader that stopped midway may hold it, and `str` would wait for ever."""
        async for _ in self.response_gen:
            pass
        return self.response_txt or "None"


# These hold their response weakly: in a circle with it, a stream that was dropped would go on until the
# garbage collector came by.
def _recorded(
    tokens: TokenGen, shown: list[str], response: weakref.ref[CorrectedStreamingResponse]
) -> TokenGen:
    try:
        with closing(tokens):
            for token in tokens:
                shown.append(token)
                yield token
    finally:
        if (alive := response()) is not None:
            alive.response_txt = _joined(shown)


async def _arecorded(
    tokens: TokenAsyncGen, shown: list[str], response: weakref.ref[CorrectedAsyncStreamingResponse]
) -> TokenAsyncGen:
    try:
        async with aclosing(tokens):
            async for token in tokens:
                shown.append(token)
                yield token
    finally:
        if (alive := response()) is not None:
            alive.response_txt = _joined(shown)


def _joined(shown: list[str]) -> str:
    """Join what was shown; an engine with an `output_cls` streams objects, of which the last is whole."""
    if shown and not isinstance(shown[-1], str):
        return str(shown[-1])
    return "".join(shown)
