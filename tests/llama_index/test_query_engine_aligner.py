"""Every kind of query engine under the aligner gives the same kind of response, corrected."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core import Settings
from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    PydanticResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.chat_engine import CondenseQuestionChatEngine
from llama_index.core.chat_engine.types import AgentChatResponse
from llama_index.core.indices.query.query_transform import StepDecomposeQueryTransform
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import (
    CitationQueryEngine,
    MultiStepQueryEngine,
    RetrieverQueryEngine,
    RetryQueryEngine,
    RouterQueryEngine,
)
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.response_synthesizers.no_text import NoText
from llama_index.core.schema import NodeWithScore, QueryBundle, QueryType, TextNode

from aligner_integrations.errors import CorrectionFailedError
from aligner_integrations.llama_index import AlignedLLM, AlignerQueryEngine
from aligner_integrations.resilience import OnError
from aligner_integrations.testing import scripted_aligner
from aligner_integrations.testing.doubles import Rule
from aligner_integrations.testing.replay_llm import ReplayLLM
from tests.llama_index.engines import (
    ANSWER,
    BAD,
    CORRECTED,
    ENGINES,
    FIRST,
    FORMS,
    GOOD,
    KINDS,
    QUESTION,
    SUB_QUESTIONS,
    Advice,
    Form,
    Judge,
    Telling,
    advising,
    ask,
    astreamed,
    failing,
    index,
    make_engine,
    mending,
    overheard,
    rag,
    read,
    replaying,
    router,
    said_to,
    streamed,
    sub_question,
    telling,
    tool,
    vector,
)
from tests.llama_index.real import medquad, vector_index

# What each engine gives. own: LlamaIndex makes it by itself, and a stream is still one. read: own, but the
# engine has read its stream, to judge it. crossed: LlamaIndex makes the other stream; this one is made by a
# synthesizer of the tests. refused: the engine fails on it, wrapped or not.
TABLE = """
engine        form    Response  PydanticResponse  StreamingResponse  AsyncStreamingResponse
vector        query   own       own               own                crossed
vector        aquery  own       own               crossed            own
bm25          query   own       own               own                crossed
bm25          aquery  own       own               crossed            own
router        query   own       own               own                crossed
router        aquery  own       own               crossed            own
sub_question  query   own       own               own                crossed
sub_question  aquery  own       own               crossed            own
citation      query   own       own               own                crossed
citation      aquery  own       own               crossed            own
retry         query   own       own               read               refused
retry         aquery  own       own               read               refused
multi_step    query   own       own               own                crossed
multi_step    aquery  own       own               crossed            own
transform     query   own       own               own                crossed
transform     aquery  own       own               crossed            own
custom        query   own       own               own                crossed
custom        aquery  own       own               crossed            own
"""


class Cell(NamedTuple):
    engine: str
    form: Form
    kind: str
    gives: str


def cells() -> list[Cell]:
    head, *rows = (line.split() for line in TABLE.strip().splitlines())
    assert head[2:] == list(KINDS)
    forms: dict[str, Form] = {form: form for form in FORMS}
    return [
        Cell(engine, forms[form], kind, gives)
        for engine, form, *row in rows
        for kind, gives in zip(KINDS, row, strict=True)
    ]


@pytest.mark.parametrize("cell", cells(), ids="-".join)
async def test_every_engine_gives_its_kind_of_response_corrected(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = advising() if cell.kind == "PydanticResponse" else replaying(chunk_size=5)
    engine = make_engine(cell.engine, llm, cell.kind, crossed=cell.gives in ("crossed", "refused"))
    aligned = AlignerQueryEngine(engine, mending())
    if cell.gives == "refused":
        for each in (engine, aligned):
            with pytest.raises(AssertionError, match=r"^$"):
                await ask(each, cell.form)
        return
    heard = overheard(engine, monkeypatch)
    response = await ask(aligned, cell.form)
    (raw,) = heard
    assert type(raw) is KINDS[cell.kind]
    assert isinstance(response, KINDS[cell.kind])
    assert response.source_nodes
    assert all(one is other for one, other in zip(response.source_nodes, raw.source_nodes, strict=True))
    assert response.metadata == raw.metadata
    assert response.metadata
    assert response.get_formatted_sources() == raw.get_formatted_sources()
    if isinstance(response, PydanticResponse):
        assert response is raw
        assert response.response is not None
        assert response.response.model_dump() == {"text": f"{FIRST}{BAD}"}
        return
    shown = ""
    handed_out = 0  # when the corrected sentence was shown
    async for token in read(response):
        if GOOD in shown + token and GOOD not in shown:
            handed_out = llm.handed_out
        shown += token
        assert BAD not in shown
    assert shown == CORRECTED
    assert str(response) == str(response) == CORRECTED
    if isinstance(response, Response):
        return
    assert (handed_out < len(ANSWER)) == (cell.gives != "read")
    assert response.response_txt == CORRECTED
    again = [token async for token in read(response)]
    assert again == []
    got = response.get_response()
    finished = got if isinstance(got, Response) else await got
    assert (finished.response, finished.metadata) == (CORRECTED, raw.metadata)
    assert finished.source_nodes is response.source_nodes
    assert llm.open_streams == 0


@pytest.mark.parametrize("cell", [each for each in cells() if each.gives == "crossed"], ids="-".join)
async def test_llamaindex_itself_streams_the_other_way_where_the_table_says_crossed(cell: Cell) -> None:
    (other,) = {"StreamingResponse", "AsyncStreamingResponse"} - {cell.kind}
    engine = make_engine(cell.engine, replaying(), cell.kind)
    assert type(await ask(engine, cell.form)) is KINDS[other]


# Streams


def test_a_stream_read_in_part_becomes_the_whole_text() -> None:
    response = streamed(AlignerQueryEngine(rag(replaying()), mending()))
    assert next(response.response_gen) == FIRST
    assert response.response_txt is None
    assert str(response) == response.response_txt == CORRECTED
    assert response.get_response().response == CORRECTED


@pytest.mark.parametrize("reader", ["response_gen", "break", "aclose", "held"])
async def test_an_async_stream_read_in_part_becomes_the_whole_text(reader: str) -> None:
    """LlamaIndex's own response hangs in `str` when a reader of `async_response_gen` has stopped midway."""
    response = await astreamed(AlignerQueryEngine(rag(replaying()), mending()))
    tokens = response.response_gen if reader == "response_gen" else response.async_response_gen()
    if reader == "break":
        async for token in tokens:
            assert token == FIRST
            break
        del tokens
    else:
        assert await anext(tokens) == FIRST
    if reader == "aclose":
        await tokens.aclose()
    assert str(response) == response.response_txt == CORRECTED


async def test_the_whole_text_of_an_async_stream_can_be_had_anywhere() -> None:
    engine = AlignerQueryEngine(rag(replaying()), mending())
    inside, outside = await astreamed(engine), await astreamed(engine)
    assert (str(inside), str(inside)) == (CORRECTED, CORRECTED)
    assert await asyncio.to_thread(str, outside) == CORRECTED
    assert str(outside) == CORRECTED


async def test_an_async_stream_can_be_read_twice_and_by_two_at_a_time() -> None:
    engine = AlignerQueryEngine(rag(replaying()), mending())
    response = await astreamed(engine)
    first = [token async for token in response.async_response_gen()]
    again = [token async for token in response.async_response_gen()]
    assert "".join(first) == CORRECTED
    assert again == [CORRECTED]
    assert len(first) > 3
    response = await astreamed(engine)

    async def read_all() -> str:
        return "".join([token async for token in response.async_response_gen()])

    assert set(await asyncio.gather(read_all(), read_all())) == {CORRECTED}


async def test_streams_print_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    engine = AlignerQueryEngine(rag(replaying()), mending())
    response = streamed(engine)
    response.print_response_stream()
    assert capsys.readouterr().out == CORRECTED
    response.print_response_stream()
    assert capsys.readouterr().out == f"{CORRECTED}\n"
    assert str(response) == CORRECTED
    response = streamed(engine)
    next(response.response_gen)
    response.print_response_stream()
    assert capsys.readouterr().out == CORRECTED.removeprefix(FIRST)
    assert str(response) == CORRECTED
    aresponse = await astreamed(engine)
    await aresponse.print_response_stream()
    assert capsys.readouterr().out == f"{CORRECTED}\n"
    assert str(aresponse) == CORRECTED


def test_t11_closing_a_stream_closes_the_llms() -> None:
    llm = replaying()
    response = streamed(AlignerQueryEngine(rag(llm), mending()))
    assert next(response.response_gen) == FIRST
    assert llm.open_streams == 1
    response.response_gen.close()
    assert llm.open_streams == 0
    assert llm.handed_out < len(ANSWER)
    assert str(response) == response.response_txt == FIRST


def test_dropping_a_stream_closes_the_llms() -> None:
    llm = replaying()
    response = streamed(AlignerQueryEngine(rag(llm), mending()))
    next(response.response_gen)
    del response
    assert llm.open_streams == 0
    tokens = streamed(AlignerQueryEngine(rag(llm), mending())).response_gen
    assert next(tokens) == FIRST  # the generator alone goes on
    assert llm.open_streams == 1
    del tokens
    assert llm.open_streams == 0


def test_t11_a_failing_reader_closes_the_llms_stream() -> None:
    llm = replaying()
    engine = AlignerQueryEngine(rag(llm), mending())
    with pytest.raises(KeyError, match="reader"):
        for _ in streamed(engine).response_gen:
            raise KeyError("reader")
    assert (llm.open_streams, llm.handed_out < len(ANSWER)) == (0, True)


async def closed(llm: ReplayLLM) -> bool:
    """Whether the LLM's stream ends now. LlamaIndex's layers are closed one per turn of the event loop."""
    for _ in range(20):
        await asyncio.sleep(0)
    return llm.open_streams == 0 and llm.handed_out < len(ANSWER)


async def test_closing_or_dropping_an_async_stream_closes_the_llms() -> None:
    llm = replaying()
    engine = AlignerQueryEngine(rag(llm), mending())
    response = await astreamed(engine)
    await anext(response.response_gen)
    assert llm.open_streams == 1
    await response.response_gen.aclose()
    assert await closed(llm)
    assert str(response) == response.response_txt == FIRST
    response = await astreamed(engine)
    await anext(response.response_gen)
    assert llm.open_streams == 1
    del response
    assert await closed(llm)


async def test_a_failing_reader_closes_the_llms_async_stream() -> None:
    llm = replaying()

    async def read_one() -> None:
        async for _ in (await astreamed(AlignerQueryEngine(rag(llm), mending()))).response_gen:
            raise KeyError("reader")

    with pytest.raises(KeyError, match="reader"):
        await read_one()
    assert await closed(llm)


@pytest.mark.parametrize("kind", ["Response", "AsyncStreamingResponse"])
async def test_t11_cancelling_leaves_nothing_running(kind: str) -> None:
    """Also in the middle of a correction, which runs in a thread."""
    begun = threading.Event()
    go_on = threading.Event()

    def wait(question: str, prefix: str, sentence: str) -> str:
        if BAD in sentence:
            begun.set()
            go_on.wait(10)
        return sentence

    llm = replaying()
    engine = AlignerQueryEngine(make_engine("vector", llm, kind), scripted_aligner(wait))

    async def read_all() -> list[str]:
        return [token async for token in read(await engine.aquery(QUESTION))]

    task = asyncio.create_task(read_all())
    await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert kind == "Response" or await closed(llm)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_failing_aligner_does_as_it_was_told(kind: str, form: Form) -> None:
    crossed = kind == {"query": "AsyncStreamingResponse", "aquery": "StreamingResponse"}[form]

    async def answer(on_error: OnError) -> AsyncGenerator[str, None]:
        llm = advising() if kind == "PydanticResponse" else replaying()
        engine = make_engine("vector", llm, kind, crossed=crossed)
        aligned = AlignerQueryEngine(engine, failing(), on_error=on_error, withheld_text="[Withheld.]")
        response = await ask(aligned, form)
        try:
            async for token in read(response):
                yield token
        finally:
            if isinstance(response, StreamingResponse | AsyncStreamingResponse) and on_error == "raise":
                assert response.response_txt == FIRST
                assert [token async for token in read(response)] == []
                assert crossed or await closed(llm)

    shown: list[str] = []
    if kind == "PydanticResponse":  # nothing of it is corrected
        assert [token async for token in answer("raise")] == [Advice(text=f"{FIRST}{BAD}").model_dump_json()]
        return
    with pytest.raises(CorrectionFailedError, match="RuntimeError"):
        async for token in answer("raise"):
            shown.append(token)
    assert shown == ([] if kind == "Response" else [FIRST])
    assert "".join([token async for token in answer("pass_through")]) == ANSWER
    withheld = ANSWER.replace(BAD, "[Withheld.]")
    assert "".join([token async for token in answer("withhold")]) == withheld


async def test_whoever_reads_gets_the_error() -> None:
    engine = AlignerQueryEngine(rag(replaying()), failing())
    for reader in (str, StreamingResponse.get_response, StreamingResponse.print_response_stream):
        with pytest.raises(CorrectionFailedError):
            reader(streamed(engine))
    for areader in (AsyncStreamingResponse.get_response, AsyncStreamingResponse.print_response_stream):
        with pytest.raises(CorrectionFailedError):
            await areader(await astreamed(engine))
    with pytest.raises(CorrectionFailedError):
        async for _ in (await astreamed(engine)).async_response_gen():
            pass
    with pytest.raises(CorrectionFailedError):
        str(await astreamed(engine))
    with pytest.raises(CorrectionFailedError):
        await asyncio.to_thread(str, await astreamed(engine))


def test_a_failing_llm_is_heard_through_the_aligner() -> None:
    def fail() -> StreamingResponse:
        def tokens() -> Generator[str, None, None]:
            yield FIRST
            yield "Nobody"
            raise ConnectionError("lost")

        return StreamingResponse(tokens())

    response = streamed(AlignerQueryEngine(Telling(make=fail), mending()))
    assert next(response.response_gen) == FIRST
    with pytest.raises(ConnectionError, match="lost"):
        next(response.response_gen)


async def test_an_answer_of_nothing_stays_one() -> None:
    """As LlamaIndex has it: "Empty Response" for no nodes or an empty text, nothing for an empty stream."""
    aligner = scripted_aligner(lambda question, prefix, sentence: f"{sentence}!")
    for form in FORMS:
        whole = await ask(AlignerQueryEngine(rag(replaying(""), streaming=False), aligner), form)
        assert (type(whole), str(whole)) == (Response, "Empty Response!")
        response = await ask(AlignerQueryEngine(rag(replaying("")), aligner), form)
        assert [token async for token in read(response)] == []
        assert str(response) == "None"
        for streaming in (False, True):
            nobody = vector_index([]).as_query_engine(llm=replaying(), streaming=streaming)
            response = await ask(AlignerQueryEngine(nobody, aligner), form)
            assert [token async for token in read(response)] == ["Empty Response!"]
            assert response.source_nodes == []
            assert response.metadata is None
        for nothing in (Response(None), Response("", metadata={"row": 1})):
            silent = AlignerQueryEngine(Telling(make=partial(replace, nothing)), aligner)
            assert await ask(silent, form) == nothing
    no_text = RetrieverQueryEngine(vector(), NoText(llm=replaying()))
    assert len(AlignerQueryEngine(no_text, aligner).query(QUESTION).source_nodes) == 2
    with pytest.raises(StopIteration):
        next(streamed(AlignerQueryEngine(telling(), aligner)).response_gen)


async def test_objects_in_a_stream_are_data() -> None:
    """An engine of your own may stream what it parses."""
    objects: list[Any] = [Advice(text="No"), Advice(text=BAD)]
    response = streamed(AlignerQueryEngine(telling(*objects), mending()))
    assert list(response.response_gen) == objects
    assert str(response) == str(objects[-1])


CUTS = st.lists(st.integers(1, 9), min_size=1, max_size=8)
ANSWERS = [answer for _, answer in medquad() if len(answer) < 300]


@settings(max_examples=25)
@given(answer=st.sampled_from(ANSWERS), cuts=CUTS)
def test_no_cut_of_the_answer_changes_what_is_shown(answer: str, cuts: list[int]) -> None:
    aligner = scripted_aligner(lambda question, prefix, sentence: f"{sentence.upper()} ({len(prefix)})")
    sizes, pieces, rest = itertools.cycle(cuts), list[str](), answer
    while rest:
        size = next(sizes)
        pieces.append(rest[:size])
        rest = rest[size:]
    whole = str(AlignerQueryEngine(Telling(make=lambda: Response(answer)), aligner).query(QUESTION))
    shown = list(streamed(AlignerQueryEngine(telling(*pieces), aligner)).response_gen)
    assert "".join(shown) == whole != answer

    async def tokens() -> AsyncGenerator[str, None]:
        for piece in pieces:
            yield piece

    async def ashown() -> list[str]:
        engine = Telling(make=lambda: AsyncStreamingResponse(tokens()))
        return [token async for token in read(await AlignerQueryEngine(engine, aligner).aquery(QUESTION))]

    assert asyncio.run(ashown()) == shown
    llm = replaying(answer, chunk_size=cuts[0], seed=cuts[-1])
    assert str(AlignerQueryEngine(rag(llm), aligner).query(QUESTION)) == whole


ODD = [
    "Line.\r\n\r\nLine two.\r",
    "🩺👩‍👩‍👧 e\u0301 नमस्ते. 你好。再见。",
    "a \ud800. b \udfff\x00 c.",
    " \t\n x . ",
    "`a. b`",
]


@given(st.one_of(st.text(st.characters(), max_size=60), st.lists(st.sampled_from(ODD)).map("".join)), CUTS)
def test_an_aligner_that_keeps_all_changes_no_character(answer: str, cuts: list[int]) -> None:
    aligner = scripted_aligner(lambda question, prefix, sentence: sentence)
    llm = replaying(answer, chunk_size=cuts[0], seed=cuts[-1])
    assert "".join(streamed(AlignerQueryEngine(rag(llm), aligner)).response_gen) == answer
    whole = AlignerQueryEngine(Telling(make=lambda: Response(answer)), aligner).query(QUESTION)
    assert str(whole) == (answer or "None")


# What the wrapped engine has beside its answers


@pytest.mark.parametrize("name", ENGINES)
def test_prompts_are_the_wrapped_engines(name: str) -> None:
    engine = make_engine(name, replaying())
    assert AlignerQueryEngine(engine, mending()).get_prompts() == engine.get_prompts()
    assert bool(engine.get_prompts()) == (name != "custom")


def test_an_updated_prompt_is_what_the_llm_is_asked() -> None:
    llm = replaying()
    aligned = AlignerQueryEngine(rag(llm), mending())
    key = "response_synthesizer:text_qa_template"
    aligned.update_prompts({key: PromptTemplate("By {context_str} sing: {query_str}")})
    assert str(aligned.query(QUESTION)) == CORRECTED
    assert said_to(llm).startswith("user: By ")
    assert said_to(llm).endswith(f"sing: {QUESTION}")
    with pytest.raises(ValueError, match="nobody not found"):
        aligned.update_prompts({"nobody:text_qa_template": PromptTemplate("")})


async def test_retrieve_and_synthesize_go_through() -> None:
    query = QueryBundle(QUESTION)
    engine = rag(replaying(), streaming=False)
    aligned = AlignerQueryEngine(engine, mending())
    nodes = aligned.retrieve(query)
    assert nodes == engine.retrieve(query) == await aligned.aretrieve(query) == await engine.aretrieve(query)
    assert len(nodes) == 2
    more = [NodeWithScore(node=TextNode(text="More."))]
    for response in (
        aligned.synthesize(query, nodes, more),
        await aligned.asynthesize(query, nodes, additional_source_nodes=more),
    ):
        assert (type(response), str(response)) == (Response, CORRECTED)
        assert response.source_nodes == [*nodes, *more]
    streams = AlignerQueryEngine(rag(replaying()), mending())
    assert str(streams.synthesize(query, nodes)) == CORRECTED
    response = await streams.asynthesize(query, nodes)
    assert [token async for token in read(response)][:2] == [FIRST, f"{GOOD} "]


async def test_what_the_wrapped_engine_cannot_the_aligner_cannot() -> None:
    class Threaded(Telling):
        def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            assert threading.current_thread() is not threading.main_thread()
            return []

    query = QueryBundle(QUESTION)
    aligned = AlignerQueryEngine(telling(), mending())
    for call in (partial(aligned.retrieve, query), partial(aligned.synthesize, query, [])):
        with pytest.raises(NotImplementedError, match="use query directly"):
            call()
    for acall in (aligned.aretrieve(query), aligned.asynthesize(query, [])):
        with pytest.raises(NotImplementedError, match=r"use a?query directly"):
            await acall
    # The base class has no async way to retrieve.
    assert await AlignerQueryEngine(Threaded(make=str), mending()).aretrieve(query) == []


def test_the_callback_manager_is_the_wrapped_engines() -> None:
    debug, own = LlamaDebugHandler(print_trace_on_end=False), CallbackManager()
    callback_manager = CallbackManager([debug])
    engine = RetrieverQueryEngine(
        vector(), get_response_synthesizer(llm=replaying(), callback_manager=callback_manager)
    )
    aligned = AlignerQueryEngine(engine, mending())
    assert aligned.callback_manager is callback_manager
    assert str(aligned.query(QUESTION)) == CORRECTED
    ((start, _),) = debug.get_event_pairs(CBEventType.QUERY)
    assert start.payload == {EventPayload.QUERY_STR: QUESTION}
    assert AlignerQueryEngine(engine, mending(), callback_manager=own).callback_manager is own


@pytest.mark.parametrize("name", ENGINES)
async def test_the_question_is_what_the_user_asked(name: str) -> None:
    """Not what an engine makes of it, and not the prompt."""
    asked: list[str] = []

    def rule(question: str, prefix: str, sentence: str) -> str:
        asked.append(question)
        return sentence

    aligned = AlignerQueryEngine(make_engine(name, replaying(), "Response"), scripted_aligner(rule))
    for form in FORMS:
        assert str(await ask(aligned, form)) == ANSWER
    assert set(asked) == {QUESTION}


# Engines in engines


async def test_an_aligner_can_be_wrapped_again() -> None:
    llm = replaying()
    shout = scripted_aligner(lambda question, prefix, sentence: sentence.upper())
    twice = AlignerQueryEngine(AlignerQueryEngine(rag(llm), mending()), shout)
    for form in FORMS:
        shown: list[str] = []
        async for token in read(await ask(twice, form)):
            if not shown:
                assert llm.handed_out < len(ANSWER)
            shown.append(token)
        assert "".join(shown) == CORRECTED.upper()
    assert twice.get_prompts() == rag(llm).get_prompts()


@pytest.mark.parametrize("streaming", [False, True])
async def test_as_a_tool(streaming: bool) -> None:
    query_tool = tool(AlignerQueryEngine(rag(replaying(), streaming=streaming), mending()))
    for output in (query_tool.call(QUESTION), await query_tool.acall(QUESTION)):
        assert output.content == str(output.raw_output) == CORRECTED
        assert len(output.raw_output.source_nodes) == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("streaming", [False, True])
async def test_inside_a_router(streaming: bool, form: Form) -> None:
    """Of one engine it hands the answer on; those of several it reads, twice, and puts together."""
    other = rag(replaying("No."), streaming=streaming)
    aligned = AlignerQueryEngine(rag(replaying(), streaming=streaming), mending())
    response = await ask(router(replaying("Unasked."), other, aligned), form)
    parts = [token async for token in read(response)]
    assert "".join(parts) == CORRECTED
    assert (len(parts) > 2) == streaming
    assert response.metadata is not None
    assert response.metadata["selector_result"].ind == -1
    llm = replaying("Both.")
    both = await ask(router(llm, aligned, aligned, chosen=(0, 1)), form)
    assert (str(both), len(both.source_nodes)) == ("Both.", 4)
    assert said_to(llm).count(GOOD) == 2
    assert BAD not in said_to(llm)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("streaming", [False, True])
async def test_inside_a_sub_question_engine(streaming: bool, form: Form) -> None:
    llm = replaying("All in all.")
    aligned = AlignerQueryEngine(rag(replaying(), streaming=streaming), mending())
    response = await ask(sub_question(get_response_synthesizer(llm=llm), aligned), form)
    assert str(response) == "All in all."
    assert said_to(llm).count(GOOD) == len(SUB_QUESTIONS)
    assert BAD not in said_to(llm) + response.get_formatted_sources(10_000)


async def test_what_inner_engines_say_is_corrected_only_by_wrapping_them() -> None:
    """The outer answer's sources and metadata are not its text."""
    inner, llm = rag(replaying(), streaming=False), replaying()
    for engine, is_said in ((inner, True), (AlignerQueryEngine(inner, mending()), False)):
        transform = StepDecomposeQueryTransform(llm=replaying(SUB_QUESTIONS[0]))
        synthesizer = get_response_synthesizer(llm=llm)
        steps = MultiStepQueryEngine(engine, transform, synthesizer, num_steps=1)
        stepped = AlignerQueryEngine(steps, mending()).query(QUESTION)
        subs = AlignerQueryEngine(sub_question(synthesizer, engine), mending()).query(QUESTION)
        assert str(stepped) == str(subs) == CORRECTED
        assert (BAD in subs.get_formatted_sources(10_000)) is is_said
        assert stepped.metadata is not None
        assert (BAD in str(stepped.metadata["sub_qa"][0][1])) is is_said


async def test_a_failing_aligner_of_an_inner_engine_leaves_its_answer_out() -> None:
    """The sub question engine goes on without what failed; nothing uncorrected takes its place."""
    llm = replaying("All in all.")
    failed = AlignerQueryEngine(rag(replaying(), streaming=False), failing())
    for form in FORMS:
        nothing = await ask(sub_question(get_response_synthesizer(llm=llm), failed), form)
        assert (str(nothing), nothing.source_nodes, llm.prompts) == ("Empty Response", [], [])


async def test_inside_a_retry_engine_the_judge_reads_corrected_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_llm", replaying())  # whoever retries loads the default one
    judge = Judge(BAD)
    aligned = AlignerQueryEngine(rag(replaying()), mending())
    assert str(await ask(RetryQueryEngine(aligned, judge), "query")) == CORRECTED
    assert judge.read == [CORRECTED]
    outside = AlignerQueryEngine(RetryQueryEngine(rag(replaying()), judge, max_retries=1), mending())
    assert str(await ask(outside, "query")) == CORRECTED
    assert judge.read == [CORRECTED, ANSWER]  # refused, and asked again


def chatting(engine: AlignerQueryEngine, llm: ReplayLLM) -> CondenseQuestionChatEngine:
    """The default memory would open a database, and not close it."""
    memory = ChatMemoryBuffer.from_defaults(token_limit=3000)
    return CondenseQuestionChatEngine.from_defaults(engine, memory=memory, llm=llm)


@pytest.mark.parametrize("streaming", [False, True])
async def test_inside_a_chat_engine(streaming: bool) -> None:
    llm = replaying(lambda prompt: "What now ?" if "Follow Up Message" in prompt else ANSWER)
    aligned = AlignerQueryEngine(rag(llm, streaming=streaming), mending())
    chat = chatting(aligned, llm)
    assert chat.chat(QUESTION).response == CORRECTED
    assert (await chat.achat("And now ?")).response == CORRECTED
    assert f"Assistant: {CORRECTED}".lower() in said_to(llm).lower()
    assert [message.content for message in chat.chat_history][1::2] == [CORRECTED] * 2


async def test_inside_a_chat_engine_that_streams() -> None:
    """The wrapped engine has to stream: LlamaIndex switches that on only in an engine it knows."""
    llm = replaying(delay=0.001)
    chat = chatting(AlignerQueryEngine(rag(llm), mending()), llm)
    response = await asyncio.to_thread(chat.stream_chat, QUESTION)
    parts = list(response.response_gen)
    assert ("".join(parts), parts[0]) == (CORRECTED, FIRST)
    chat.reset()
    aresponse = await chat.astream_chat(QUESTION)
    aparts = [token async for token in aresponse.async_response_gen()]
    assert aparts == parts
    assert [message.content for message in chat.chat_history] == [QUESTION, CORRECTED]
    quiet = AlignerQueryEngine(rag(llm, streaming=False), mending())
    with pytest.raises(ValueError, match="Streaming is not enabled"):
        chatting(quiet, llm).stream_chat(QUESTION)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("said", ["%s", "My choice:\n%s", "call"])
async def test_a_router_reads_its_selection_from_an_aligned_llm_as_it_was_written(
    said: str, form: Form
) -> None:
    """By a selector of LlamaIndex, from JSON or from a tool call."""
    reason = f"{FIRST}{BAD}"
    choice = said.replace("%s", json.dumps([{"choice": 2, "reason": reason}]))
    calls = [{"name": "SingleSelection", "args": {"index": 2, "reason": reason}}] if said == "call" else []
    chooses = AlignedLLM(replaying(choice, calls=calls, is_function_calling_model=bool(calls)), mending())
    tools = [tool(rag(replaying("No.")), "first"), tool(rag(AlignedLLM(replaying(), mending())), "second")]
    response = await ask(RouterQueryEngine.from_defaults(tools, llm=chooses), form)
    assert response.metadata is not None
    (selection,) = response.metadata["selector_result"].selections
    assert (selection.index, selection.reason) == (1, reason)
    assert "".join([token async for token in read(response)]) == CORRECTED


# Citations


CITED = f"It resists many antibiotics [1]. {BAD[:-1]} [2]. Take 2 doses [2]. Both are certain. [1][2]"
CITED_WELL = CITED.replace("Nobody needs", "Everybody needs")
MARK = re.compile(r"\s?\[[0-9]+\]")


def marks(text: str) -> Counter[str]:
    return Counter(mark.strip() for mark in MARK.findall(text))


def with_marks(question: str, prefix: str, sentence: str) -> str:
    return sentence.replace("Nobody needs", "Everybody needs")


def without_marks(question: str, prefix: str, sentence: str) -> str:
    return MARK.sub("", with_marks(question, prefix, sentence))


def with_wrong_marks(question: str, prefix: str, sentence: str) -> str:
    return sentence.replace("[2]", "[1]")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("rule", [with_marks, without_marks, with_wrong_marks])
async def test_citations_survive(rule: Rule, streaming: bool, form: Form) -> None:
    """A mark that the model drops is put back; one that it makes up is not taken away."""
    engine = CitationQueryEngine.from_args(
        index(), replaying(CITED), streaming=streaming, citation_chunk_size=64
    )
    aligner = scripted_aligner(rule, safeguards="keep_original")
    response = await ask(AlignerQueryEngine(engine, aligner), form)
    shown = "".join([token async for token in read(response)])
    assert marks(CITED) <= marks(shown)
    assert shown == CITED_WELL or rule is with_wrong_marks
    sources = [each.node.get_content().split(":")[0] for each in response.source_nodes]
    assert sources[:2] == ["Source 1", "Source 2"]


# Errors


def test_only_a_query_engine_can_be_wrapped() -> None:
    for other in (None, "engine", vector(), RetrieverQueryEngine):
        with pytest.raises(TypeError, match=r"^query_engine must be a query engine, got .*as_query_engine"):
            AlignerQueryEngine(other, mending())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^aligner must be an Aligner or None, got ReplayLLM"):
        AlignerQueryEngine(rag(replaying()), replaying())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^on_error must be one of"):
        AlignerQueryEngine(rag(replaying()), mending(), on_error="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
async def test_only_a_response_can_be_corrected(form: Form) -> None:
    class Plain(Telling):
        def query(self, str_or_query_bundle: QueryType) -> RESPONSE_TYPE:
            return BAD  # type: ignore[return-value]

        async def aquery(self, str_or_query_bundle: QueryType) -> RESPONSE_TYPE:
            return BAD  # type: ignore[return-value]

    chat = Telling(make=lambda: AgentChatResponse(BAD))
    for engine, name in ((Plain(make=str), "str"), (chat, "AgentChatResponse")):
        with pytest.raises(TypeError, match=rf"^the query engine gave a {name}; it must give a Resp") as info:
            await ask(AlignerQueryEngine(engine, mending()), form)
        assert BAD not in str(info.value)
