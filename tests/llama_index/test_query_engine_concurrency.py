"""Any number of queries on one engine at a time: each gets its own answer, and nothing stays behind."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import pytest
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse

from aligner_integrations import Aligner
from aligner_integrations.llama_index import AlignerQueryEngine
from aligner_integrations.testing import scripted_aligner
from tests.llama_index.engines import BAD, ENGINES, FORMS, Form, ask, make_engine, rag, read, replaying

COUNT = 100
CANARY = re.compile(r"canary-[0-9]+-end")
CANARIES = [f"canary-{number}-end" for number in range(COUNT)]


def answer_to(prompt: str) -> str:
    """The LLM's: as long as no other, and with the canary of the prompt in each sentence but the bad one."""
    (canary,) = set(CANARY.findall(prompt))
    more = f"So says {canary}. " * (1 + int(canary.split("-")[1]) % 4)
    return f"This is {canary}.\n{BAD} {more}It ends {canary}."


def canary_mending() -> Aligner:
    """The aligner's: it says the question's canary in place of the bad sentence."""
    return scripted_aligner(
        lambda question, prefix, sentence: sentence.replace(BAD, f"Asked by {question.split()[0]}.")
    )


def question(canary: str) -> str:
    return f"{canary} asks for treatments"


def expected(canary: str) -> str:
    return answer_to(canary).replace(BAD, f"Asked by {canary}.")


def aligned(*, streaming: bool) -> AlignerQueryEngine:
    return AlignerQueryEngine(rag(replaying(answer_to, chunk_size=16), streaming=streaming), canary_mending())


@pytest.mark.parametrize("streaming", [False, True])
def test_t13_threads_do_not_cross(streaming: bool) -> None:
    engine = aligned(streaming=streaming)
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda canary: str(engine.query(question(canary))), CANARIES))
    assert answers == [expected(canary) for canary in CANARIES]


@pytest.mark.parametrize("streaming", [False, True])
async def test_t13_tasks_do_not_cross(streaming: bool) -> None:
    engine = aligned(streaming=streaming)

    async def answer(canary: str) -> str:
        response = await engine.aquery(question(canary))
        assert isinstance(response, AsyncStreamingResponse) == streaming
        return "".join([token async for token in read(response)])

    answers = await asyncio.gather(*map(answer, CANARIES))
    assert answers == [expected(canary) for canary in CANARIES]


def test_streams_that_are_read_in_turns_do_not_cross() -> None:
    engine = aligned(streaming=True)

    def open_stream(canary: str) -> Generator[str, None, None]:
        response = engine.query(question(canary))
        assert isinstance(response, StreamingResponse)
        return response.response_gen

    rounds = list(zip_longest(*map(open_stream, CANARIES), fillvalue=""))
    assert len(rounds) > 3
    assert ["".join(tokens) for tokens in zip(*rounds, strict=True)] == [expected(each) for each in CANARIES]


async def test_streams_of_threads_are_read_by_other_threads() -> None:
    """As web servers do: a worker asks, and whichever is free reads the next token."""
    engine = aligned(streaming=True)

    async def answer(canary: str) -> str:
        response = await asyncio.to_thread(engine.query, question(canary))
        assert isinstance(response, StreamingResponse)
        shown = ""
        while token := await asyncio.to_thread(next, response.response_gen, ""):
            shown += token
        return shown

    answers = await asyncio.gather(*map(answer, CANARIES[:30]))
    assert answers == [expected(canary) for canary in CANARIES[:30]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ENGINES)
async def test_a_query_leaves_nothing_on_the_engine(name: str, form: Form) -> None:
    for kind in ("Response", "StreamingResponse"):
        engine = AlignerQueryEngine(make_engine(name, replaying(), kind), canary_mending())
        before = {key: (id(value), repr(value)) for key, value in vars(engine).items()}
        async for _ in read(await ask(engine, form)):
            pass
        assert {key: (id(value), repr(value)) for key, value in vars(engine).items()} == before
