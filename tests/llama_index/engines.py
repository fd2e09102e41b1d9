"""Nine kinds of real query engines over real text, and what the tests ask them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from functools import cache
from typing import Any, Literal, TypeAlias

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_selector import BaseSelector, SelectorResult, SingleSelection
from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    PydanticResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.evaluation import BaseEvaluator, EvaluationResult
from llama_index.core.indices.query.query_transform import HyDEQueryTransform, StepDecomposeQueryTransform
from llama_index.core.llms import LLM
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.query_engine import (
    CitationQueryEngine,
    CustomQueryEngine,
    MultiStepQueryEngine,
    RetrieverQueryEngine,
    RetryQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.response_synthesizers import BaseSynthesizer, CompactAndRefine, get_response_synthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import QueryBundle
from llama_index.core.tools import QueryEngineTool, ToolMetadata
from llama_index.core.types import RESPONSE_TEXT_TYPE
from llama_index.retrievers.bm25 import BM25Retriever  # type: ignore[import-untyped, unused-ignore]
from pydantic import BaseModel

from aligner_integrations import Aligner
from aligner_integrations.testing import scripted_aligner
from aligner_integrations.testing.replay_llm import ReplayLLM
from tests.llama_index.real import medquad_nodes, vector_index

Form: TypeAlias = Literal["query", "aquery"]
Streamed: TypeAlias = StreamingResponse | AsyncStreamingResponse

FORMS: tuple[Form, ...] = ("query", "aquery")
QUESTION = "What are the treatments for Acinetobacter in Healthcare Settings ?"
BAD, GOOD = "Nobody needs a doctor for that.", "A doctor decides."
FIRST = "Acinetobacter resists many antibiotics. "
ANSWER = f"{FIRST}{BAD} Treatment is chosen case by case.\r\n\r\n- Ask early.\n- Ask again. 🩺"
CORRECTED = ANSWER.replace(BAD, GOOD)
SUB_ANSWER = "It is treated in hospital."
SUB_QUESTIONS = ("Which antibiotics fail ?", "Who decides on treatments ?")


class Advice(BaseModel):
    """Advice as data."""

    text: str


def mending(**options: Any) -> Aligner:
    """An aligner that puts the good sentence in place of the bad one, and keeps all else."""
    return scripted_aligner(lambda question, prefix, sentence: sentence.replace(BAD, GOOD), **options)


def failing() -> Aligner:
    """An aligner whose model fails on the bad sentence."""

    def rule(question: str, prefix: str, sentence: str) -> str:
        if BAD in sentence:
            raise RuntimeError("no memory left")
        return sentence

    return scripted_aligner(rule)


def replaying(answer: str | Callable[[str], str] = ANSWER, **options: Any) -> ReplayLLM:
    return ReplayLLM(answer=answer, **options)


def advising() -> ReplayLLM:
    """An LLM that is asked for `Advice`, and gives the bad one."""
    return replaying(calls=[{"name": "Advice", "args": {"text": f"{FIRST}{BAD}"}}])


def tool(engine: BaseQueryEngine, name: str = "medquad") -> QueryEngineTool:
    return QueryEngineTool.from_defaults(engine, name=name, description="Answers on diseases.")


@cache
def index() -> VectorStoreIndex:
    """All nodes of the recorded answers; the tests only read it."""
    return vector_index()


def vector() -> BaseRetriever:
    return index().as_retriever(similarity_top_k=2)


@cache
def bm25() -> BaseRetriever:
    retriever: BaseRetriever = BM25Retriever.from_defaults(nodes=medquad_nodes(), similarity_top_k=2)
    return retriever


def rag(llm: LLM, *, streaming: bool = True, **options: Any) -> RetrieverQueryEngine:
    """The plain engine over the vector index."""
    return RetrieverQueryEngine.from_args(vector(), llm=llm, streaming=streaming, **options)


class Crossed(CompactAndRefine):
    """Streams asynchronously when it is asked synchronously, and the other way round."""

    def get_response(self, *args: Any, **kwargs: Any) -> RESPONSE_TEXT_TYPE:
        async def tokens() -> AsyncGenerator[str, None]:
            stream = await CompactAndRefine.aget_response(self, *args, **kwargs)
            assert isinstance(stream, AsyncGenerator)
            async for token in stream:
                yield token

        return tokens()

    async def aget_response(self, *args: Any, **kwargs: Any) -> RESPONSE_TEXT_TYPE:
        return CompactAndRefine.get_response(self, *args, **kwargs)


class _Selector(BaseSelector):
    """Selects the same tools for every question."""

    def __init__(self, *chosen: int) -> None:
        self._chosen = chosen

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        pass

    def _select(self, choices: Sequence[ToolMetadata], query: QueryBundle) -> SelectorResult:
        return SelectorResult(selections=[SingleSelection(index=at, reason="fixed") for at in self._chosen])

    async def _aselect(self, choices: Sequence[ToolMetadata], query: QueryBundle) -> SelectorResult:
        return self._select(choices, query)


class _Questions(BaseQuestionGenerator):
    """Asks the last tool the same two questions, whatever is asked."""

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        pass

    def generate(self, tools: Sequence[ToolMetadata], query: QueryBundle) -> list[SubQuestion]:
        name = tools[-1].name or ""
        return [SubQuestion(sub_question=question, tool_name=name) for question in SUB_QUESTIONS]

    async def agenerate(self, tools: Sequence[ToolMetadata], query: QueryBundle) -> list[SubQuestion]:
        return self.generate(tools, query)


class Judge(BaseEvaluator):
    """Lets every answer pass that has none of some words; keeps what it has read."""

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.read: list[str | None] = []

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        pass

    async def aevaluate(
        self,
        query: str | None = None,
        response: str | None = None,
        contexts: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> EvaluationResult:
        self.read.append(response)
        passing = not any(word in (response or "") for word in self.refused)
        return EvaluationResult(response=response, passing=passing, feedback="Better.")


class _Custom(CustomQueryEngine):
    """As in LlamaIndex's docs: retrieve, then synthesize."""

    retriever: BaseRetriever
    synthesizer: BaseSynthesizer

    def custom_query(self, query_str: str) -> RESPONSE_TYPE:
        return self.synthesizer.synthesize(query_str, self.retriever.retrieve(query_str))

    async def acustom_query(self, query_str: str) -> RESPONSE_TYPE:
        return await self.synthesizer.asynthesize(query_str, await self.retriever.aretrieve(query_str))


class Telling(CustomQueryEngine):
    """An engine that gives what a function makes, whatever it is asked."""

    make: Callable[[], Any]

    def custom_query(self, query_str: str) -> Any:
        return self.make()


def telling(*tokens: str) -> Telling:
    """An engine that streams `tokens`."""
    return Telling(make=lambda: StreamingResponse(token for token in tokens))


def router(llm: LLM, *engines: BaseQueryEngine, chosen: Sequence[int] = (-1,)) -> RouterQueryEngine:
    """Routes to the last engine, or to those that are chosen; `llm` summarizes if there are several."""
    tools = [tool(engine, f"engine_{at}") for at, engine in enumerate(engines)]
    return RouterQueryEngine(_Selector(*chosen), tools, llm=llm)


def sub_question(synthesizer: BaseSynthesizer, *engines: BaseQueryEngine) -> SubQuestionQueryEngine:
    tools = [tool(engine, f"engine_{at}") for at, engine in enumerate(engines)]
    return SubQuestionQueryEngine(_Questions(), synthesizer, tools, verbose=False)


def _sub() -> RetrieverQueryEngine:
    return rag(ReplayLLM(answer=SUB_ANSWER), streaming=False)


def _multi_step(synthesizer: BaseSynthesizer) -> BaseQueryEngine:
    transform = StepDecomposeQueryTransform(llm=ReplayLLM(answer=SUB_QUESTIONS[0]))
    return MultiStepQueryEngine(_sub(), transform, synthesizer, num_steps=2)


def _transform(synthesizer: BaseSynthesizer) -> BaseQueryEngine:
    return TransformQueryEngine(
        ENGINES["vector"](synthesizer), HyDEQueryTransform(ReplayLLM(answer=SUB_ANSWER))
    )


ENGINES: dict[str, Callable[[BaseSynthesizer], BaseQueryEngine]] = {
    "vector": lambda synthesizer: RetrieverQueryEngine(vector(), synthesizer),
    "bm25": lambda synthesizer: RetrieverQueryEngine(bm25(), synthesizer),
    "router": lambda synthesizer: router(ReplayLLM(answer=""), _sub(), ENGINES["vector"](synthesizer)),
    "sub_question": lambda synthesizer: sub_question(synthesizer, _sub()),
    "citation": lambda synthesizer: CitationQueryEngine(vector(), ReplayLLM(answer=""), synthesizer),
    "retry": lambda synthesizer: RetryQueryEngine(ENGINES["vector"](synthesizer), Judge()),
    "multi_step": _multi_step,
    "transform": _transform,
    "custom": lambda synthesizer: _Custom(retriever=vector(), synthesizer=synthesizer),
}
KINDS: dict[str, type[RESPONSE_TYPE]] = {
    "Response": Response,
    "PydanticResponse": PydanticResponse,
    "StreamingResponse": StreamingResponse,
    "AsyncStreamingResponse": AsyncStreamingResponse,
}


def make_engine(
    name: str, llm: LLM, kind: str = "StreamingResponse", *, crossed: bool = False
) -> BaseQueryEngine:
    """Make an engine; its last step is a synthesizer of LlamaIndex, or one that streams the other way."""
    streaming = "Streaming" in kind
    if crossed:
        return ENGINES[name](Crossed(llm=llm, streaming=streaming))
    output_cls = Advice if kind == "PydanticResponse" else None
    return ENGINES[name](get_response_synthesizer(llm=llm, streaming=streaming, output_cls=output_cls))


async def ask(engine: BaseQueryEngine, form: Form, question: str = QUESTION) -> RESPONSE_TYPE:
    """Ask; synchronously in a thread, where no event loop runs."""
    if form == "query":
        return await asyncio.to_thread(engine.query, question)
    return await engine.aquery(question)


async def astreamed(engine: BaseQueryEngine) -> AsyncStreamingResponse:
    response = await engine.aquery(QUESTION)
    assert isinstance(response, AsyncStreamingResponse)
    return response


def streamed(engine: BaseQueryEngine) -> StreamingResponse:
    response = engine.query(QUESTION)
    assert isinstance(response, StreamingResponse)
    return response


async def read(response: RESPONSE_TYPE) -> AsyncGenerator[str, None]:
    """Yield the text of a response of any kind, as it comes."""
    if isinstance(response, AsyncStreamingResponse):
        assert isinstance(response.response_gen, AsyncGenerator)
        async for token in response.response_gen:
            yield token
    elif isinstance(response, StreamingResponse):
        assert isinstance(response.response_gen, Generator)
        for token in response.response_gen:
            yield token
    else:
        yield str(response)


def said_to(llm: ReplayLLM) -> str:
    """All that `llm` was asked, as one text."""
    asked = [[prompt] if isinstance(prompt, str) else prompt for prompt in llm.prompts]
    return "\n".join(str(message) for prompt in asked for message in prompt)


def overheard(engine: BaseQueryEngine, monkeypatch: pytest.MonkeyPatch) -> list[RESPONSE_TYPE]:
    """What `engine` itself answers from now on; the list grows."""
    heard: list[RESPONSE_TYPE] = []
    query, aquery = engine.query, engine.aquery

    def overhear(self: BaseQueryEngine, asked: QueryBundle) -> RESPONSE_TYPE:
        heard.append(query(asked))
        return heard[-1]

    async def aoverhear(self: BaseQueryEngine, asked: QueryBundle) -> RESPONSE_TYPE:
        heard.append(await aquery(asked))
        return heard[-1]

    monkeypatch.setattr(type(engine), "query", overhear)
    monkeypatch.setattr(type(engine), "aquery", aoverhear)
    return heard
