"""T10: a failure at each place, under each policy, in each form of each surface, cell by cell.

The places are loading, the first, a middle and the last sentence, and what is flushed at the end. In each
cell it is said what is shown, what is raised, that nothing is lost and that nothing is shown twice.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.callbacks import CallbackManager
from llama_index.core.prompts.mixin import PromptMixinType
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from aligner_integrations import Aligner, Segment, resilience
from aligner_integrations import aligner as aligner_module
from aligner_integrations import options as options_module
from aligner_integrations.errors import (
    AlignerError,
    CorrectionFailedError,
    CorrectionTimeoutError,
    ModelLoadError,
)
from aligner_integrations.langchain import (
    AlignedChatModel,
    AlignerMiddleware,
    AlignerRunnable,
    AsyncStreamAlignerCallbackHandler,
    StreamAlignerCallbackHandler,
)
from aligner_integrations.llama_index import AlignedLLM, AlignerPostprocessor, AlignerQueryEngine
from aligner_integrations.resilience import WITHHELD_TEXT
from aligner_integrations.testing import scripted_aligner
from aligner_integrations.testing.replay import ReplayModel
from aligner_integrations.testing.replay_llm import ReplayLLM

QUESTION = "What is said?"
SENTENCES = (
    "The first one is bad. ",
    "The middle one is bad.\n\n",
    "- The last one is bad. ",
    "And the flushed one is bad",
)
ANSWER = "".join(SENTENCES)
PLACES = {"load": None, "first": 0, "middle": 1, "last": 2, "flush": 3}
POLICIES = ("raise", "pass_through", "withhold", "deadline")
SECONDS = 1000.0  # on a clock that jumps ahead at the place that fails, found between two forwards
HANGS = 0.5  # on a real clock, for a model that does not come back


@dataclass(frozen=True)
class Cell:
    """What is set up: the options of a surface, the aligner among them, and what it says."""

    aligner: Aligner | None
    errors: dict[str, Any]
    shown: list[str] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        return {"aligner": self.aligner, **self.errors}

    def take(self, text: object) -> None:
        if str(text):
            self.shown.append(str(text))


Surface: TypeAlias = Callable[[Cell], Any]


def loaded(cell: Cell) -> Aligner:
    return cell.aligner or Aligner.from_pretrained()


def words() -> list[str]:
    return [f"{word} " for word in ANSWER.split(" ")[:-1]] + [ANSWER.rpartition(" ")[2]]


# The core.


def core_stream(cell: Cell) -> None:
    for segment in loaded(cell).correct_stream(QUESTION, words(), **cell.errors):
        cell.take(segment)


def core_push(cell: Cell) -> None:
    stream = loaded(cell).stream(QUESTION, **cell.errors)
    for word in words():
        for segment in stream.push(word):
            cell.take(segment)
    for segment in stream.close():
        cell.take(segment)


def core_correct(cell: Cell) -> None:
    cell.take(loaded(cell).correct(QUESTION, ANSWER, **cell.errors))


async def core_acorrect(cell: Cell) -> None:
    cell.take(await loaded(cell).acorrect(QUESTION, ANSWER, **cell.errors))


def core_batch(cell: Cell) -> None:
    pairs = [(QUESTION, "Good."), (QUESTION, ANSWER), (QUESTION, "Fine.")]
    found = loaded(cell).correct_batch(pairs, **cell.errors)
    assert [found[0].text, found[2].text] == ["Good.", "Fine."]
    cell.take(found[1])


# LangChain.


def upstream() -> ReplayModel:
    return ReplayModel(chunks=words(), delay=0.0)


def text_of(output: Any) -> str:
    return str(output.text) if isinstance(output, BaseMessage) else str(output)


def mapping(text: str = ANSWER) -> dict[str, str]:
    return {"question": QUESTION, "answer": text}


def runnable_stream(cell: Cell) -> None:
    for part in (upstream() | AlignerRunnable(**cell.options)).stream(QUESTION):
        cell.take(text_of(part))


async def runnable_astream(cell: Cell) -> None:
    async for part in (upstream() | AlignerRunnable(**cell.options)).astream(QUESTION):
        cell.take(text_of(part))


def runnable_invoke(cell: Cell) -> None:
    cell.take(AlignerRunnable(**cell.options).invoke(mapping())["answer"])


async def runnable_ainvoke(cell: Cell) -> None:
    cell.take((await AlignerRunnable(**cell.options).ainvoke(mapping()))["answer"])


def runnable_batch(cell: Cell) -> None:
    given = [mapping("Good."), mapping(), mapping("Fine.")]
    found = AlignerRunnable(**cell.options).batch(given)
    assert [found[0]["answer"], found[2]["answer"]] == ["Good.", "Fine."]
    cell.take(found[1]["answer"])


async def runnable_abatch(cell: Cell) -> None:
    found = await AlignerRunnable(**cell.options).abatch([mapping("Good."), mapping()])
    assert found[0]["answer"] == "Good."
    cell.take(found[1]["answer"])


def model(cell: Cell) -> BaseChatModel:
    return AlignedChatModel(model=upstream(), **cell.options)


def model_stream(cell: Cell) -> None:
    for chunk in model(cell).stream(QUESTION):
        cell.take(text_of(chunk))


async def model_astream(cell: Cell) -> None:
    async for chunk in model(cell).astream(QUESTION):
        cell.take(text_of(chunk))


def model_invoke(cell: Cell) -> None:
    cell.take(text_of(model(cell).invoke(QUESTION)))


async def model_ainvoke(cell: Cell) -> None:
    cell.take(text_of(await model(cell).ainvoke(QUESTION)))


def model_batch(cell: Cell) -> None:
    one, other = model(cell).batch([QUESTION, QUESTION])
    assert text_of(one) == text_of(other)
    cell.take(text_of(one))


async def model_abatch(cell: Cell) -> None:
    (one,) = await model(cell).abatch([QUESTION])
    cell.take(text_of(one))


def handler_stream(cell: Cell) -> None:
    handler = StreamAlignerCallbackHandler(sink=lambda segment: cell.take(segment.text), **cell.options)
    for _ in upstream().stream(QUESTION, {"callbacks": [handler]}):
        pass


async def handler_astream(cell: Cell) -> None:
    handler = AsyncStreamAlignerCallbackHandler(sink=lambda segment: cell.take(segment.text), **cell.options)
    async for _ in upstream().astream(QUESTION, {"callbacks": [handler]}):
        pass


def handler_invoke(cell: Cell) -> None:
    handler = StreamAlignerCallbackHandler(sink=lambda segment: cell.take(segment.text), **cell.options)
    ReplayModel(answer=ANSWER, disable_streaming=True).invoke(QUESTION, {"callbacks": [handler]})


def handler_iteration(cell: Cell) -> None:
    """Its reader is in another thread, and gets the error as well as the run does."""
    handler = StreamAlignerCallbackHandler(**cell.options)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            upstream().invoke(QUESTION, {"callbacks": [handler]})
        except AlignerError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for segment in handler:
            cell.take(segment.text)
    finally:
        thread.join()
    assert errors == []


def agent(cell: Cell) -> Any:
    return create_agent(upstream(), middleware=[AlignerMiddleware(**cell.options)])


def agent_stream(cell: Cell) -> None:
    for chunk, _ in agent(cell).stream({"messages": QUESTION}, stream_mode="messages"):
        cell.take(text_of(chunk))


async def agent_ainvoke(cell: Cell) -> None:
    cell.take(text_of((await agent(cell).ainvoke({"messages": QUESTION}))["messages"][-1]))


# LlamaIndex.


def llm(cell: Cell) -> AlignedLLM:
    return AlignedLLM(ReplayLLM(answer=ANSWER, chunk_size=5), **cell.options)


def llm_stream(cell: Cell) -> None:
    for response in llm(cell).stream_complete(QUESTION):
        cell.take(response.delta)
        assert response.text == "".join(cell.shown)


async def llm_astream(cell: Cell) -> None:
    async for response in await llm(cell).astream_complete(QUESTION):
        cell.take(response.delta)
        assert response.text == "".join(cell.shown)


def llm_complete(cell: Cell) -> None:
    cell.take(llm(cell).complete(QUESTION))


async def llm_acomplete(cell: Cell) -> None:
    cell.take(await llm(cell).acomplete(QUESTION))


class Says(BaseQueryEngine):
    """A query engine that says the answer, word by word if it is asked to."""

    def __init__(self, streaming: bool) -> None:
        super().__init__(CallbackManager())
        self._streaming = streaming

    def _get_prompt_modules(self) -> PromptMixinType:
        return {}

    def _query(self, query_bundle: QueryBundle) -> Any:
        return StreamingResponse(word for word in words()) if self._streaming else Response(ANSWER)

    async def _aquery(self, query_bundle: QueryBundle) -> Any:
        async def said() -> AsyncIterator[str]:
            for word in words():
                yield word

        return AsyncStreamingResponse(said()) if self._streaming else Response(ANSWER)  # type: ignore[arg-type]


def engine(cell: Cell, *, streaming: bool) -> AlignerQueryEngine:
    return AlignerQueryEngine(Says(streaming), **cell.options)


def engine_stream(cell: Cell) -> None:
    for token in engine(cell, streaming=True).query(QUESTION).response_gen:  # type: ignore[union-attr]
        cell.take(token)


async def engine_astream(cell: Cell) -> None:
    response = await engine(cell, streaming=True).aquery(QUESTION)
    async for token in response.response_gen:  # type: ignore[union-attr]
        cell.take(token)


def engine_query(cell: Cell) -> None:
    cell.take(engine(cell, streaming=False).query(QUESTION))


async def engine_aquery(cell: Cell) -> None:
    cell.take(await engine(cell, streaming=False).aquery(QUESTION))


def nodes() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text), score=0.5) for text in ("Good.", ANSWER, "Fine.")]


def texts(found: list[NodeWithScore]) -> str:
    assert [found[0].text, found[2].text, len(found)] == ["Good.", "Fine.", 3]
    return found[1].text


def nodes_batch(cell: Cell) -> None:
    cell.take(texts(AlignerPostprocessor(**cell.options).postprocess_nodes(nodes(), query_str=QUESTION)))


async def nodes_abatch(cell: Cell) -> None:
    found = await AlignerPostprocessor(**cell.options).apostprocess_nodes(nodes(), query_str=QUESTION)
    cell.take(texts(found))


# These show the answer bit by bit ...
STREAMS: tuple[Surface, ...] = (
    *(core_stream, core_push, runnable_stream, runnable_astream, model_stream, model_astream),
    *(handler_stream, handler_astream, handler_invoke, handler_iteration),
    *(agent_stream, llm_stream, llm_astream, engine_stream, engine_astream),
)
# ... and these as a whole.
WHOLE: tuple[Surface, ...] = (
    *(core_correct, core_acorrect, core_batch),
    *(runnable_invoke, runnable_ainvoke, runnable_batch, runnable_abatch),
    *(model_invoke, model_ainvoke, model_batch, model_abatch, agent_ainvoke),
    *(llm_complete, llm_acomplete, engine_query, engine_aquery, nodes_batch, nodes_abatch),
)


@contextmanager
def failing_at(place: str, policy: str) -> Iterator[tuple[Aligner | None, dict[str, Any]]]:
    """Give an aligner whose model fails at that place, and what its surface is told to do then."""
    errors: dict[str, Any] = {"on_error": policy}
    if policy == "deadline":
        errors = {"on_error": "pass_through", "sentence_seconds": SECONDS}
    at = PLACES[place]
    if at is None:
        yield None, errors
        return
    word = ("first", "middle", "last", "flushed")[at]
    clock = threading.local()  # each correction under a deadline has a thread of its own

    def rule(question: str, prefix: str, sentence: str) -> str:
        if f" {word} " in sentence:
            if policy != "deadline":
                raise RuntimeError("the device is gone")
            clock.ahead = 2 * SECONDS
        return sentence.replace("bad", "good")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resilience, "monotonic", lambda: time.monotonic() + getattr(clock, "ahead", 0.0))
        yield scripted_aligner(rule), errors


def expected_parts(place: str, policy: str) -> list[str]:
    parts = [sentence.replace("bad", "good") for sentence in SENTENCES]
    at = PLACES[place]
    assert at is not None
    if policy == "raise":
        return parts[:at]
    original = SENTENCES[at]
    core = original.strip().removeprefix("- ")
    parts[at] = original.replace(core, WITHHELD_TEXT) if policy == "withhold" else original
    return parts


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The bundled model is gone, and was not loaded before."""
    monkeypatch.setattr(aligner_module, "BUNDLED_MODEL", tmp_path / "gone")
    monkeypatch.setattr(options_module, "_bundled", [])


def run(surface: Surface, cell: Cell) -> None:
    done = surface(cell)
    if asyncio.iscoroutine(done):
        asyncio.run(done)


@pytest.mark.parametrize("surface", (*STREAMS, *WHOLE), ids=lambda surface: surface.__name__)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.usefixtures("nothing_loads")
def test_t10_every_cell(place: str, policy: str, surface: Surface) -> None:
    before = set(threading.enumerate())
    with failing_at(place, policy) as (aligner, errors):
        cell = Cell(aligner, errors)
        if place == "load":  # no policy hides that nothing at all would be corrected
            with pytest.raises(ModelLoadError, match="gone"):
                run(surface, cell)
            assert cell.shown == []
        elif policy == "raise":
            with pytest.raises(CorrectionFailedError, match="RuntimeError"):
                run(surface, cell)
            before_it = "".join(expected_parts(place, policy))
            assert "".join(cell.shown) == (before_it if surface in STREAMS else "")
        else:
            run(surface, cell)
            assert "".join(cell.shown) == "".join(expected_parts(place, policy))
    left = {thread for thread in set(threading.enumerate()) - before if thread.name == "aligner-correction"}
    for thread in left:
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize("policy", ["raise", "pass_through"])
def test_t10_a_deadline_raises_where_it_is_told_to(policy: str) -> None:
    with failing_at("middle", "deadline") as (aligner, errors):
        assert aligner is not None
        segments: list[Segment] = []
        stream = aligner.correct_stream(QUESTION, words(), **{**errors, "on_error": policy})
        try:
            segments.extend(stream)
        except CorrectionTimeoutError:
            assert policy == "raise"
        shown = "".join(map(str, segments))
        assert shown == "".join(expected_parts("middle", "raise" if policy == "raise" else "deadline"))


@pytest.mark.parametrize("surface", [core_stream, runnable_astream, model_stream, llm_stream, engine_aquery])
def test_t10_a_model_that_does_not_come_back(surface: Surface) -> None:
    over = threading.Event()

    def rule(question: str, prefix: str, sentence: str) -> str:
        if " middle " in sentence:
            over.wait(60)
        return sentence.replace("bad", "good")

    cell = Cell(scripted_aligner(rule), {"on_error": "pass_through", "sentence_seconds": HANGS})
    try:
        run(surface, cell)
        assert "".join(cell.shown) == "".join(expected_parts("middle", "deadline"))
    finally:
        over.set()
    for thread in threading.enumerate():
        if thread.name == "aligner-correction":
            thread.join(5)
            assert not thread.is_alive()


@pytest.mark.parametrize("surface", (*STREAMS, *WHOLE), ids=lambda surface: surface.__name__)
def test_t10_the_time_of_an_answer_is_limited_on_every_surface(surface: Surface) -> None:
    asked: list[str] = []

    def rule(question: str, prefix: str, sentence: str) -> str:
        asked.append(sentence)
        return sentence.replace("bad", "good")

    cell = Cell(scripted_aligner(rule), {"on_error": "pass_through", "answer_seconds": 1e-9})
    run(surface, cell)
    assert "".join(cell.shown) == ANSWER
    assert len(asked) <= 4  # the first of each answer at most; what is left never gets to the model
