"""`AlignerQueryEngine`: any query engine, its answers corrected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any, cast

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    PydanticResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.callbacks import CallbackManager
from llama_index.core.prompts.mixin import PromptDictType, PromptMixinType
from llama_index.core.schema import NodeWithScore, QueryBundle

from aligner_integrations.aligner import Aligner
from aligner_integrations.llama_index.instrumentation import CorrectionSpan, amarked, marked, original
from aligner_integrations.llama_index.responses import (
    CorrectedAsyncStreamingResponse,
    CorrectedStreamingResponse,
)
from aligner_integrations.llama_index.text import AnswerText, Sink, aread, read
from aligner_integrations.options import CorrectionOptions
from aligner_integrations.resilience import WITHHELD_TEXT, OnError


class AlignerQueryEngine(BaseQueryEngine):
    """Wraps any query engine; what it answers is corrected, streams sentence by sentence.

    The kind of response stays: `Response`, `StreamingResponse`, `AsyncStreamingResponse`, with source nodes
    and metadata; a `PydanticResponse` is left alone. Prompts, `retrieve` and the callback manager are the
    wrapped engine's; `synthesize` is corrected too. Nothing of a query is kept on the engine, so any number
    may run at a time. Observability sees the wrapped engine's own events, which hold its raw text, tagged
    `{"aligner": "original"}`.

    Args:
        query_engine: The engine to wrap.
        aligner: What corrects; without one the bundled model is loaded on first use.
        on_error: What a failed correction does: `"raise"`, `"pass_through"` (the original is shown) or
            `"withhold"` (`withheld_text` is shown in its place).
        withheld_text: Stands for a sentence that was withheld.
        sentence_seconds: A correction that takes longer is dropped and has failed; None: no limit.
        answer_seconds: So long the corrections of one answer may take in all; None: no limit.
        feedback: Tells the aligner what to look for.
        edit_margin: Overrides the model's own margin, in logits.
        sink: Called with every segment once it is corrected; in async queries in a worker thread.
        callback_manager: LlamaIndex's older callbacks; without one the wrapped engine's are used.

    Raises:
        TypeError: `query_engine` is no query engine, or another argument is of a wrong type.
    """

    def __init__(
        self,
        query_engine: BaseQueryEngine,
        aligner: Aligner | None = None,
        *,
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
        sentence_seconds: float | None = None,
        answer_seconds: float | None = None,
        feedback: str = "",
        edit_margin: float | None = None,
        sink: Sink | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if not isinstance(query_engine, BaseQueryEngine):
            raise TypeError(
                f"query_engine must be a query engine, got {type(query_engine).__name__}; "
                "index.as_query_engine() makes one"
            )
        self._query_engine = query_engine
        self._options = CorrectionOptions(
            aligner=aligner,
            on_error=on_error,
            withheld_text=withheld_text,
            sentence_seconds=sentence_seconds,
            answer_seconds=answer_seconds,
            feedback=feedback,
            edit_margin=edit_margin,
        )
        self._sink = sink
        super().__init__(callback_manager or query_engine.callback_manager)

    @property
    def query_engine(self) -> BaseQueryEngine:
        """The wrapped engine."""
        return self._query_engine

    def _get_prompts(self) -> PromptDictType:
        return self._query_engine._get_prompts()

    def _get_prompt_modules(self) -> PromptMixinType:
        return self._query_engine._get_prompt_modules()

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._query_engine._update_prompts(prompts)

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """Retrieve as the wrapped engine does."""
        return self._query_engine.retrieve(query_bundle)

    async def aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """Retrieve as the wrapped engine does; in a thread where it has no async way."""
        own = getattr(self._query_engine, "aretrieve", None)
        if own is None:
            return await asyncio.to_thread(self.retrieve, query_bundle)
        return cast(list[NodeWithScore], await own(query_bundle))

    def synthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """Answer from `nodes`, corrected."""
        with original():
            response = self._query_engine.synthesize(query_bundle, nodes, additional_source_nodes)
        return self._corrected(response, _text_of(query_bundle))

    async def asynthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """Answer from `nodes`, corrected."""
        with original():
            response = await self._query_engine.asynthesize(query_bundle, nodes, additional_source_nodes)
        return await self._acorrected(response, _text_of(query_bundle))

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with original():
            response = self._query_engine.query(query_bundle)
        return self._corrected(response, query_bundle.query_str)

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with original():
            response = await self._query_engine.aquery(query_bundle)
        return await self._acorrected(response, query_bundle.query_str)

    async def _acorrected(self, response: RESPONSE_TYPE, question: str) -> RESPONSE_TYPE:
        if isinstance(response, Response):
            return await asyncio.to_thread(self._corrected, response, question)
        return self._corrected(response, question)  # a stream is corrected when it is read

    def _corrected(self, response: RESPONSE_TYPE, question: str) -> RESPONSE_TYPE:
        if isinstance(response, PydanticResponse):
            return response
        if not isinstance(response, Response | StreamingResponse | AsyncStreamingResponse):
            raise TypeError(
                f"the query engine gave a {type(response).__name__}; it must give a Response, a "
                "StreamingResponse, an AsyncStreamingResponse or a PydanticResponse"
            )
        text = AnswerText(self._options, question, CorrectionSpan(self, question), sink=self._sink)
        if isinstance(response, Response):
            if not response.response:
                return response
            return replace(response, response="".join(read(iter([response.response]), text)))
        kept: dict[str, Any] = {"source_nodes": response.source_nodes, "metadata": response.metadata}
        said = response.response_txt  # an engine may have read its own stream, to judge it
        if isinstance(response, StreamingResponse):
            tokens = response.response_gen if said is None else iter([said])
            return CorrectedStreamingResponse(read(marked(tokens), text), **kept)
        atokens = response.response_gen if said is None else _once(said)
        return CorrectedAsyncStreamingResponse(aread(amarked(atokens), text), **kept)


def _text_of(query: QueryBundle | str) -> str:
    return query if isinstance(query, str) else query.query_str


async def _once(text: str) -> AsyncGenerator[str]:
    yield text
