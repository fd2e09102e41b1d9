"""Five thousand odd texts through every surface: none crashes, none loses a character, none gains one.

The aligner leaves everything as it is, so each surface must give back exactly what went in. Texts are made by
a seeded generator: a failure names its number, which makes the text again.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents.middleware import ModelRequest, ModelResponse
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms import ChatMessage
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from pydantic import Field

from aligner_integrations import Aligner, ClosedLoop, cli
from aligner_integrations.backends.base import Ids
from aligner_integrations.cli import main
from aligner_integrations.config import AlignerConfig
from aligner_integrations.langchain import (
    AlignedChatModel,
    AlignerMiddleware,
    AlignerRunnable,
    AsyncStreamAlignerCallbackHandler,
    StreamAlignerCallbackHandler,
)
from aligner_integrations.llama_index import AlignedLLM, AlignerPostprocessor, AlignerQueryEngine
from aligner_integrations.testing import ScriptedBackend, byte_tokenizer
from aligner_integrations.testing.llama_index import ReplayLLM

INPUTS = 5000
RUNS = 300  # of the command, which is built anew each time
ATTACKS: list[str] = json.loads(
    (Path(__file__).parent / "data" / "delimiter_attacks.json").read_text(encoding="utf-8")
)
FRAGMENTS = (
    *(
        "It is so.",
        "Is it? ",
        "Dr. Lee said: ",
        "e.g. this",
        " 3.50 ",
        "U.S.",
        "…",
        "No!!! ",
        "\n\n",
        "\r\n",
        "\n",
    ),
    *(
        "\r",
        "\t",
        " ",
        "   ",
        "\u00a0",
        "\u3000",
        "\u200b",
        "\u2060",
        "\ufeff",
        "\u2028",
        "\u0085",
        "\x00",
        "\x1b[0m",
    ),
    *(
        ")",
        "]",
        '"',
        "”",
        "»",
        "’",
        "(",
        "[",
        "「",
        "」",
        "*",
        "_",
        "`",
        "```",
        "~~~",
        "```py\n",
        "\n```\n",
        "$$",
        "\\[",
    ),
    *(
        "- ",
        "1. ",
        "> ",
        "# ",
        "| a | b |\n",
        "|---|---|\n",
        "[1]",
        "[^2]",
        "<b>",
        "</b>",
        "&amp;",
        "{}",
        "}",
    ),
    *(
        "👩\u200d👧\u200d👦",
        "🏳️\u200d🌈",
        "e\u0301",
        "\u0301",
        "\ufe0f",
        "👍🏽",
        "🇩🇪",
        "𝒳",
        "\U0010ffff",
        "\ufffe",
    ),
    *(
        "مرحبا. ",
        "שלום",
        "\u202e",
        "\u202c",
        "\u2066",
        "好。",
        "「はい。」",
        "नमस्ते। ",
        "ไทย",
        "한국어. ",
        "ﷺ",
    ),
    *(
        "\ud800",
        "\udfff",
        "\ud83d",
        "\udc80",
        "\ufffd",
        "http://a.b/c?d=1.2",
        "a@b.co",
        "word",
        "Word ",
        "x" * 40,
    ),
)


def odd_text(number: int) -> str:
    """Return text `number`: fragments, attacks and characters from anywhere, 0 to 5 of them."""
    dice = random.Random(number)
    parts: list[str] = []
    for _ in range(dice.randint(0, 5)):
        kind = dice.random()
        if kind < 0.7:
            parts.append(dice.choice(FRAGMENTS))
        elif kind < 0.8:
            parts.append(dice.choice(ATTACKS))
        else:
            parts.append(chr(dice.randrange(0x110000 if kind < 0.85 else 0x3000)))
    return "".join(parts)


def cut(text: str, number: int) -> list[str]:
    """Return the text in chunks of 0 to 20 characters."""
    dice, chunks, start = random.Random(-number), [], 0
    while start < len(text):
        size = dice.randint(0, 20)
        chunks.append(text[start : start + size])
        start += size
    return chunks or [""]


def instant(granularity: Any) -> Aligner:
    """An aligner that leaves everything as it is, at no cost."""
    tokenizer = byte_tokenizer()
    keep, sentence, correction = map(tokenizer.token_id, ("<|keep|>", "<|sentence|>", "<|correction|>"))
    assert keep is not None and sentence is not None and correction is not None

    def script(ids: Ids) -> tuple[int, Ids] | None:
        start = ids.index(correction) + 1
        return start, [keep] if granularity == "sentence" else ids[ids.index(sentence) + 1 : start - 1]

    backend = ScriptedBackend(script, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    keep_token = "<|keep|>" if granularity == "sentence" else None
    return Aligner(
        backend, tokenizer, AlignerConfig("tiny", granularity, keep_token=keep_token, max_length=1 << 20)
    )


SENTENCES, WHOLE = instant("sentence"), instant("answer")


class Says(BaseChatModel):
    """Says the chunks it is given last."""

    chunks: list[str] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "says"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage("".join(self.chunks)))])

    def _stream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in self.chunks or [""]:
            yield ChatGenerationChunk(message=AIMessageChunk(content=chunk))


class Answers(BaseQueryEngine):
    """A query engine that answers with the chunks it is given, at once or as a stream."""

    def __init__(self) -> None:
        super().__init__(CallbackManager([]))
        self.chunks: list[str] = []
        self.streams = False

    def _query(self, query_bundle: QueryBundle) -> Any:
        tokens = (chunk for chunk in self.chunks)
        return StreamingResponse(tokens) if self.streams else Response("".join(self.chunks))

    async def _aquery(self, query_bundle: QueryBundle) -> Any:
        async def tokens() -> AsyncGenerator[str, None]:
            for chunk in self.chunks:
                yield chunk

        return AsyncStreamingResponse(tokens()) if self.streams else Response("".join(self.chunks))

    def _get_prompt_modules(self) -> dict[str, Any]:
        return {}


async def joined(parts: Any) -> str:
    return "".join([str(getattr(part, "text", part)) async for part in parts])


def text_of(parts: Any) -> str:
    return "".join(str(getattr(part, "text", part)) for part in parts)


# What goes in: the question, the answer, its chunks, and a number that says which form is taken.
Way = Callable[[str, str, list[str], int], Any]


def correct(question: str, answer: str, chunks: list[str], number: int) -> str:
    return SENTENCES.correct(question, answer).text


def correct_whole(question: str, answer: str, chunks: list[str], number: int) -> str:
    aligner, batch = WHOLE, number % 2
    if batch:
        return aligner.correct_batch([(question, answer)])[0].text
    return aligner.correct(question, answer).text


def stream(question: str, answer: str, chunks: list[str], number: int) -> str:
    aligner = WHOLE if number % 4 == 3 else SENTENCES
    with aligner.stream(question) as corrector:
        segments = [segment for chunk in chunks for segment in corrector.push(chunk)]
        return text_of([*segments, *corrector.close()])


RUNNABLE = AlignerRunnable(SENTENCES)


def runnable(question: str, answer: str, chunks: list[str], number: int) -> Any:
    whole: dict[str, str] = {"question": question, "answer": answer}
    parts = [{"question": question, "answer": chunks[0]}, *({"answer": each} for each in chunks[1:])]

    async def aparts() -> AsyncIterator[Any]:
        for part in parts:
            yield part

    async def atransform() -> str:
        return "".join([part.get("answer", "") async for part in RUNNABLE.atransform(aparts())])

    if number % 4 == 0:
        return RUNNABLE.invoke(whole)["answer"]
    if number % 4 == 1:
        return "".join(part.get("answer", "") for part in RUNNABLE.transform(iter(parts)))
    return atransform() if number % 4 == 2 else RUNNABLE.batch([whole])[0]["answer"]


UPSTREAM = Says()
CHAT = AlignedChatModel(model=UPSTREAM, aligner=SENTENCES)


def chat_model(question: str, answer: str, chunks: list[str], number: int) -> Any:
    UPSTREAM.chunks = chunks
    if number % 4 == 0:
        return CHAT.invoke(question).text
    if number % 4 == 1:
        return text_of(CHAT.stream(question))
    return (
        joined(CHAT.astream(question))
        if number % 4 == 2
        else CHAT.generate([[HumanMessage(question)]]).generations[0][0].text
    )


CLOSED = AlignedChatModel(model=UPSTREAM, aligner=SENTENCES, loop="closed")


def closed_loop(question: str, answer: str, chunks: list[str], number: int) -> Any:
    UPSTREAM.chunks = chunks
    if number % 4 == 0:
        return CLOSED.invoke(question).text
    if number % 4 == 1:
        return text_of(CLOSED.stream(question))
    if number % 4 == 2:
        return joined(CLOSED.astream(question))
    return text_of(ClosedLoop(lambda question, prefix: chunks, SENTENCES).stream(question))


MIDDLEWARE = AlignerMiddleware(SENTENCES)


def middleware(question: str, answer: str, chunks: list[str], number: int) -> Any:
    """The step of an agent in which its model is called, without the graph around it."""
    UPSTREAM.chunks = chunks
    request: ModelRequest[Any] = ModelRequest(model=UPSTREAM, messages=[HumanMessage(question)])

    def call(request: ModelRequest[Any]) -> ModelResponse[Any]:
        if number % 4 == 3:  # another middleware brings an answer of its own
            return ModelResponse(result=[AIMessage(answer)])
        return ModelResponse(result=[request.model.invoke(request.messages)])

    async def acall(request: ModelRequest[Any]) -> ModelResponse[Any]:
        return ModelResponse(result=[await request.model.ainvoke(request.messages)])

    async def run() -> str:
        return str((await MIDDLEWARE.awrap_model_call(request, acall)).result[0].text)

    return run() if number % 4 == 2 else str(MIDDLEWARE.wrap_model_call(request, call).result[0].text)


def handler(question: str, answer: str, chunks: list[str], number: int) -> Any:
    UPSTREAM.chunks = chunks
    got: list[Any] = []

    async def run() -> str:
        swapping = AsyncStreamAlignerCallbackHandler(SENTENCES, sink=got.append, question=question)
        async for _ in UPSTREAM.astream(question, {"callbacks": [swapping]}):
            pass
        return text_of(got)

    if number % 4 == 2:
        return run()
    swapping = StreamAlignerCallbackHandler(SENTENCES, sink=got.append, question=question)
    for _ in UPSTREAM.stream(question, {"callbacks": [swapping]}):
        pass
    return text_of(got)


REPLAY = ReplayLLM(answer="", chunk_size=5)
LLM = AlignedLLM(REPLAY, SENTENCES)


def llm(question: str, answer: str, chunks: list[str], number: int) -> Any:
    REPLAY.answer, REPLAY.seed = answer, number
    asked = [ChatMessage(question)]

    async def astream() -> str:
        return "".join([part.delta or "" async for part in await LLM.astream_chat(asked)])

    if number % 4 == 0:
        return LLM.chat(asked).message.content or ""
    if number % 4 == 1:
        return "".join(part.delta or "" for part in LLM.stream_chat(asked))
    return astream() if number % 4 == 2 else LLM.complete(question).text


ANSWERS = Answers()
ENGINE = AlignerQueryEngine(ANSWERS, SENTENCES)


def query_engine(question: str, answer: str, chunks: list[str], number: int) -> Any:
    ANSWERS.chunks, ANSWERS.streams = chunks, number % 4 in (1, 2)

    async def astream() -> str:
        response = await ENGINE.aquery(question)
        assert isinstance(response, AsyncStreamingResponse)
        return await joined(response.async_response_gen())

    if number % 4 == 2:
        return astream()
    response = ENGINE.query(question)
    if isinstance(response, StreamingResponse):
        return text_of(response.response_gen)
    assert isinstance(response, Response)
    return response.response


def postprocessor(question: str, answer: str, chunks: list[str], number: int) -> Any:
    nodes = [NodeWithScore(node=TextNode(text=answer), score=1.0)]
    (found,) = AlignerPostprocessor(SENTENCES).postprocess_nodes(nodes, query_str=question)
    return found.node.get_content()


def command(question: str, answer: str, chunks: list[str], number: int) -> Any:
    """The command line: bytes in and bytes out, whether they are UTF-8 or not."""
    arguments = ["correct", "-q", question, "-a", SURROGATE.sub("\udc80", answer)]
    written = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch, io.TextIOWrapper(written, "utf-8", newline="") as stdout:
        patch.setattr(cli, "_load", lambda *given, **more: SENTENCES)
        patch.setattr("sys.stdout", stdout)
        assert main(arguments) == 0
        stdout.flush()
        printed = written.getvalue().decode("utf-8", "surrogateescape")
    assert printed == arguments[-1] + "\n", f"text {number}"
    return answer


SURROGATE = re.compile("[\ud800-\udfff]")
SURFACES: dict[str, Way] = {
    way.__name__: way
    for way in (
        *(correct, correct_whole, stream, runnable, chat_model, closed_loop, middleware, handler),
        *(llm, query_engine, postprocessor, command),
    )
}


@pytest.mark.parametrize("surface", SURFACES)
def test_t2_five_thousand_odd_texts_come_out_as_they_went_in(surface: str) -> None:
    way, first = SURFACES[surface], INPUTS * sorted(SURFACES).index(surface)
    with asyncio.Runner() as runner:
        for number in range(first, first + (RUNS if way is command else INPUTS)):
            answer, question = odd_text(number), "Q" + odd_text(-number)
            shown = way(question, answer, cut(answer, number), number)
            if asyncio.iscoroutine(shown):
                shown = runner.run(shown)
            assert shown == answer, f"text {number}"
