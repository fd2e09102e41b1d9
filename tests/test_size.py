"""T16: sizes that no answer has. Hold-back stays bounded, time grows with the text, nothing is lost."""

from __future__ import annotations

import asyncio
import itertools
import sys
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core.llms import ChatMessage
from llama_index.core.schema import NodeWithScore, TextNode

from aligner_integrations import Aligner
from aligner_integrations.defuse import Defuser
from aligner_integrations.langchain import AlignerRunnable
from aligner_integrations.llama_index import AlignedLLM, AlignerPostprocessor
from aligner_integrations.sentences import SentenceBuffer
from aligner_integrations.template import CorrectionTemplate
from aligner_integrations.testing.llama_index import ReplayLLM
from tests.test_fuzz import instant

LONGEST = 2000  # characters of a piece, after which a sentence that does not end is cut
LONGEST_CODE = 16 * LONGEST  # the same for code and tables
HUGE = 1_000_000
UNENDING = {
    "letters": "a",
    "white space": " ",
    "line breaks": "\n",
    "closing brackets": ")",
    "quotes": '"',
    "lone surrogates": "\ud800",
    "NUL": "\x00",
    "CRLF": "\r\n",
    "emoji": "👩\u200d👧\u200d👦",
    "combining": "e\u0301",
    "right to left": "\u202eشمس ",
    "backticks": "`",
    "bars": " |",
    "hashes": "#",
    "opening marks": "##Question",
}


def bounded() -> Aligner:
    """An aligner that changes nothing and whose context is a model's, so that its prompts stay short."""
    endless = instant("sentence")
    return Aligner(endless.backend, endless.tokenizer, replace(endless.config, max_length=4096))


ALIGNER = bounded()


def one_by_one(text: str) -> tuple[str, int]:
    """Stream `text` character by character; return what came out, and the most that was held back."""
    shown, out, held = list[str](), 0, 0
    with ALIGNER.stream("Q") as stream:
        for count, character in enumerate(text, 1):
            for segment in stream.push(character):
                shown.append(segment.text)
                out += len(segment.text)
            held = max(held, count - out)
        shown += [segment.text for segment in stream.close()]
    return "".join(shown), held


def test_t16_a_million_chunks_of_one_character() -> None:
    text = "a" * HUGE
    shown, held = one_by_one(text)
    assert shown == text
    assert held <= LONGEST


@pytest.mark.parametrize("unit", UNENDING.values(), ids=UNENDING.keys())
def test_t16_what_never_ends_is_let_go_in_pieces(unit: str) -> None:
    text = (unit * 40_000)[:40_000]
    shown, held = one_by_one(text)
    assert shown == text
    assert held <= (LONGEST_CODE if unit == "`" else LONGEST) + 4 * len(unit)  # characters stay whole


@pytest.mark.parametrize("unit", UNENDING.values(), ids=UNENDING.keys())
def test_t16_a_hundred_kilobytes_in_one_chunk_are_the_same(unit: str) -> None:
    text = (unit * 100_000)[:100_000]
    assert ALIGNER.correct("Q", text).text == text
    assert "".join(segment.text for segment in ALIGNER.correct_stream("Q", ["", text, ""])) == text


def test_t16_a_megabyte_without_a_terminator_through_every_kind_of_surface() -> None:
    text = "a" * HUGE
    assert ALIGNER.correct("Q", text).text == text
    assert "".join(segment.text for segment in ALIGNER.correct_stream("Q", [text])) == text
    text = text[:300_000]
    runnable = AlignerRunnable(ALIGNER)
    given_ = {"question": "Q", "answer": text}
    assert runnable.invoke(given_)["answer"] == text
    assert "".join(part.get("answer", "") for part in runnable.transform(iter([given_]))) == text
    llm = AlignedLLM(ReplayLLM(answer=text, chunk_size=10_000), ALIGNER)
    assert "".join(part.delta or "" for part in llm.stream_chat([ChatMessage("Q")])) == text
    node = NodeWithScore(node=TextNode(text=text), score=1.0)
    (found,) = AlignerPostprocessor(ALIGNER).postprocess_nodes([node], query_str="Q")
    assert found.node.get_content() == text


async def test_t16_an_async_stream_of_tiny_chunks_loses_nothing() -> None:
    text = "Hello there. " * 200

    async def chunks() -> AsyncIterator[Any]:
        yield {"question": "Q", "answer": ""}
        for character in text:
            yield {"answer": character}
            yield {"answer": ""}

    shown = [part.get("answer", "") async for part in AlignerRunnable(ALIGNER).atransform(chunks())]
    assert "".join(shown) == text
    await asyncio.sleep(0)


def test_t16_memory_of_a_stream_does_not_grow_with_its_length() -> None:
    def peak(length: int) -> int:
        tracemalloc.start()
        with ALIGNER.stream("Q") as stream:
            for _ in range(length):
                stream.push("abcdefgh" * 5)
            _, most = tracemalloc.get_traced_memory()
            stream.close()
        tracemalloc.stop()
        return most

    peak(500)
    assert peak(4_000) <= 1.5 * peak(1_000)


def calls_of(text: str) -> int:
    """How many Python calls a stream of `text`, character by character, takes in the core."""
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call" and "aligner_integrations" in frame.f_code.co_filename

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        one_by_one(text)
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("unit", [*UNENDING.values(), "Hello there. "], ids=[*UNENDING.keys(), "sentences"])
def test_t16_twice_the_text_is_twice_the_calls(unit: str) -> None:
    text = (unit * 4000)[:4000]
    assert calls_of(text * 2) <= 2.2 * calls_of(text)


def test_t16_defusing_reads_a_megabyte_in_one_go() -> None:
    """No mark makes the search start over: the marks have no part that repeats but white space."""
    defuser = Defuser(CorrectionTemplate.named("stream-aligner").plain_markers(()))
    for unit in ("#", "##Question", "BEGINNING ", "BEGINNING OF ", " ", "＃"):
        text = (unit * HUGE)[:HUGE]
        assert defuser(text).replace("\u2060", "") == text


def chunked(text: str, borders: list[int]) -> Iterator[str]:
    edges = [0, *sorted(min(border, len(text)) for border in borders), len(text)]
    yield from (text[start:end] for start, end in itertools.pairwise(edges))


odd = st.lists(st.sampled_from(["It is so. ", *UNENDING.values(), "好。", "- ", "```\n"]), max_size=30).map(
    "".join
)


@given(text=odd, borders=st.lists(st.integers(0, 200), max_size=50))
def test_t3_any_chunking_gives_the_same_sentences(text: str, borders: list[int]) -> None:
    def pieces(chunks: Iterator[str]) -> list[str]:
        buffer = SentenceBuffer()
        return [*(str(piece) for chunk in chunks for piece in buffer.push(chunk)), *map(str, buffer.flush())]

    whole = pieces(iter([text]))
    assert pieces(chunked(text, borders)) == pieces(iter(text)) == whole
    segments = [segment.text for segment in ALIGNER.correct_stream("Q", chunked(text, borders))]
    assert segments == whole
