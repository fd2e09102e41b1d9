"""Messages: the text is corrected, everything else passes once, unchanged and in order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    BaseMessageChunk,
    HumanMessage,
    HumanMessageChunk,
    ToolMessage,
)

from aligner_integrations import Aligner
from aligner_integrations.langchain import AlignerRunnable
from aligner_integrations.testing import scripted_aligner

QUESTION: Any = {"configurable": {"question": "What of bears?"}}
USAGE: Any = {"input_tokens": 3, "output_tokens": 5, "total_tokens": 8}


def keep() -> Aligner:
    return scripted_aligner(lambda question, prefix, sentence: sentence)


def shout() -> Aligner:
    return scripted_aligner(lambda question, prefix, sentence: sentence.upper())


def streamed(chunks: list[Any], aligner: Aligner | None = None) -> list[Any]:
    return list(AlignerRunnable(aligner or shout()).transform(iter(chunks), QUESTION))


def joined(chunks: list[Any]) -> Any:
    return reduce(add, chunks)


def text(words: str, **rest: Any) -> AIMessageChunk:
    return AIMessageChunk(content=words, id="m1", **rest)


def block(kind: str, index: int, **rest: Any) -> AIMessageChunk:
    return AIMessageChunk(content=[{"type": kind, "index": index, **rest}], id="m1")


def test_t17_whole_message_keeps_everything_but_its_text() -> None:
    message = AIMessage(
        "bears are mammals. they eat.",
        id="m1",
        name="zoo",
        usage_metadata=USAGE,
        response_metadata={"model_name": "m", "finish_reason": "stop"},
        additional_kwargs={"refusal": None},
        tool_calls=[{"name": "feed", "args": {"what": "fish"}, "id": "t1"}],
    )
    before = message.model_copy(deep=True)
    corrected = AlignerRunnable(shout()).invoke(message, QUESTION)
    assert corrected == message.model_copy(update={"content": "BEARS ARE MAMMALS. THEY EAT."})
    assert message == before


def test_t17_blocks_that_are_not_text_pass_in_their_places() -> None:
    content: list[Any] = [
        {"type": "reasoning", "reasoning": "bears?"},
        {"type": "text", "text": "look at this.", "annotations": [{"type": "citation", "url": "u"}]},
        {"type": "image", "url": "https://example.org/bear.png"},
        {"type": "text", "text": "and this."},
        "plain.",
        {"type": "tool_use", "id": "t1", "name": "feed", "input": {}},
    ]
    corrected = AlignerRunnable(shout()).invoke(AIMessage(content, id="m1"), QUESTION)
    expected = [dict(each) if isinstance(each, dict) else each for each in content]
    expected[1] |= {"text": "LOOK AT THIS."}
    expected[3] |= {"text": "AND THIS."}
    expected[4] = "PLAIN."
    assert corrected.content == expected


@pytest.mark.parametrize("message", [HumanMessage("a bear."), ToolMessage("a bear.", tool_call_id="t1")])
def test_any_kind_of_message(message: BaseMessage) -> None:
    corrected = AlignerRunnable(shout()).invoke(message, QUESTION)
    assert corrected == message.model_copy(update={"content": "A BEAR."})
    assert streamed([message]) == [corrected]


def test_message_without_text_needs_no_question() -> None:
    message = AIMessage("", tool_calls=[{"name": "feed", "args": {}, "id": "t1"}])
    assert AlignerRunnable(shout()).invoke(message) == message
    assert list(AlignerRunnable(shout()).stream(message)) == [message]


def test_streamed_text_goes_out_a_sentence_a_chunk() -> None:
    words = ["one", " bear", ". ", "Two", " bears", ". ", "Three", "."]
    out = streamed([*map(text, words), text("", chunk_position="last")])
    assert [chunk.content for chunk in out] == ["ONE BEAR. ", "TWO BEARS. ", "THREE."]
    assert {chunk.id for chunk in out} == {"m1"}
    assert [chunk.chunk_position for chunk in out] == [None, None, "last"]


def test_text_is_flushed_when_no_chunk_says_that_it_is_the_last() -> None:
    out = streamed([text("one bear"), text(", two")])
    assert joined(out).content == "ONE BEAR, TWO"


def test_the_last_chunk_ends_the_text() -> None:
    out = streamed([text("one", chunk_position="last"), AIMessageChunk(content="two.", id="m2")])
    assert [(chunk.content, chunk.id) for chunk in out] == [("ONE", "m1"), ("TWO.", "m2")]


def test_a_long_chunk_gives_its_usage_once() -> None:
    chunk = text("one more bear. " * 100, usage_metadata=USAGE, response_metadata={"finish_reason": "stop"})
    out = streamed([chunk])
    assert len(out) > 1
    assert joined(out) == chunk.model_copy(update={"content": chunk.text.upper()})


@pytest.mark.parametrize("last", [None, "last"])
def test_t18_usage_is_counted_once(last: Any) -> None:
    start = text("", usage_metadata={"input_tokens": 3, "output_tokens": 0, "total_tokens": 3})
    end = text("", usage_metadata=USAGE, response_metadata={"finish_reason": "stop"}, chunk_position=last)
    chunks = [start, *map(text, ["one bear. ", "Two bears. ", "Three."]), end]
    out = streamed(chunks)
    assert joined(out).usage_metadata == joined(chunks).usage_metadata
    assert joined(out).response_metadata == {"finish_reason": "stop"}
    assert out[0] == start
    assert [chunk.usage_metadata for chunk in out if chunk.usage_metadata] == [
        start.usage_metadata,
        end.usage_metadata,
    ]


def test_metadata_repeated_on_every_chunk_gives_one_chunk_a_sentence() -> None:
    words = ["one", " bear", ". ", "Two", " bears", "."]
    chunks = [text(word, response_metadata={"model_provider": "x"}) for word in words]
    out = streamed(chunks)
    assert [chunk.content for chunk in out] == ["ONE BEAR. ", "TWO BEARS."]
    assert joined(out).response_metadata == joined(chunks).response_metadata


def test_tool_calls_follow_the_text_before_them() -> None:
    def call(args: str, **rest: Any) -> AIMessageChunk:
        return text("", tool_call_chunks=[{"name": None, "id": None, "args": args, "index": 0, **rest}])

    chunks = [
        text("i look"),
        text(" it up."),
        call("", name="search", id="t1"),
        call('{"of": '),
        call('"bears"}'),
        text("", chunk_position="last"),
    ]
    out = streamed(chunks)
    whole = joined(out)
    assert whole.content == "I LOOK IT UP."
    assert whole.tool_calls == joined(chunks).tool_calls
    assert whole.tool_calls[0]["args"] == {"of": "bears"}
    first_call = next(place for place, chunk in enumerate(out) if chunk.tool_call_chunks)
    assert "".join(chunk.content for chunk in out[: first_call + 1]) == "I LOOK IT UP."


def test_blocks_stream_by_index() -> None:
    chunks = [
        block("reasoning", 0, reasoning="hm"),
        block("text", 1, text="one be"),
        block("text", 1, text="ar. Two"),
        block("text", 1, annotations=[{"type": "citation", "url": "u"}]),
        block("tool_use", 2, id="t1", name="feed", input=""),
        block("input_json_delta", 2, partial_json="{}"),
        block("text", 3, text="three. "),
        block("text", 3, text="Four"),
        text("", usage_metadata=USAGE, chunk_position="last"),
    ]
    out = streamed(chunks)
    expected = joined(chunks)
    content = [
        {**each, "text": each["text"].upper()} if "text" in each else each for each in expected.content
    ]
    assert joined(out) == expected.model_copy(update={"content": content})
    assert out[0] == chunks[0]
    # The other block does not wait for the end: it closes the text before it.
    kinds = [each["type"] for chunk in out for each in chunk.content]
    assert kinds.index("tool_use") > kinds.index("text")
    assert out[-1].usage_metadata == USAGE


def test_blocks_without_an_index_run_on() -> None:
    chunks = [
        AIMessageChunk(content=[{"type": "text", "text": words}])
        for words in ("one be", "ar. Two b", "ears.")
    ]
    picture = AIMessageChunk(content=[{"type": "image", "url": "u"}])
    out = streamed([*chunks, picture, *chunks])
    content = [each for chunk in out for each in chunk.content]
    assert [each.get("text", "*") for each in content] == [
        "ONE BEAR. ",
        "TWO BEARS.",
        "*",
        "ONE BEAR. ",
        "TWO BEARS.",
    ]


def test_whole_message_in_a_stream_stays_whole() -> None:
    message = AIMessage("one bear. Two bears.", id="m1", usage_metadata=USAGE)
    assert streamed([message]) == [message.model_copy(update={"content": "ONE BEAR. TWO BEARS."})]


def test_other_chunk_classes() -> None:
    out = streamed([HumanMessageChunk(content="one bear. "), HumanMessageChunk(content="Two.")])
    assert [type(chunk) for chunk in out] == [HumanMessageChunk] * 2
    assert joined(out).content == "ONE BEAR. TWO."


def test_empty_chunks_are_passed_on_as_signs_of_life() -> None:
    assert streamed([text(""), text("one. "), text(""), text("Two.")])[0] == text("")


def test_withheld_and_dropped_sentences() -> None:
    drop = scripted_aligner(lambda question, prefix, sentence: "" if "two" in sentence else sentence)
    assert joined(streamed([text("One. Then two. Three.")], drop)).content == "One. Three."


def chunked(draw: st.DrawFn) -> list[BaseMessageChunk]:
    """A stream as a provider might send it: text, blocks, calls, usage, in any cut."""
    as_blocks = draw(st.booleans())
    chunks: list[BaseMessageChunk] = []
    for index in range(draw(st.integers(1, 3))):
        if as_blocks and draw(st.booleans()):
            chunks.append(block("reasoning", 2 * index, reasoning="hm"))
        for words in draw(st.lists(st.text(alphabet="ab.?! \n\u00e9\u4e2d\u3002", max_size=8), max_size=5)):
            chunks.append(block("text", 2 * index + 1, text=words) if as_blocks else text(words))
        if draw(st.booleans()):
            call: Any = {"name": f"f{index}", "args": "{}", "id": f"t{index}", "index": index}
            chunks.append(text("", tool_call_chunks=[call]))
    if draw(st.booleans()):
        chunks.append(text("", usage_metadata=USAGE, response_metadata={"finish_reason": "stop"}))
    if draw(st.booleans()):
        chunks.append(text("", chunk_position="last"))
    return chunks


@settings(max_examples=80, deadline=None)
@given(st.composite(chunked)())
def test_identity_and_same_as_whole(chunks: list[BaseMessageChunk]) -> None:
    """A copying aligner changes nothing; any aligner gives the same streamed and whole."""

    def without_empty_text(message: Any) -> Any:
        content = message.content
        if isinstance(content, list):
            content = [each for each in content if not isinstance(each, dict) or each.get("text") != ""]
        return message.model_copy(update={"content": content or ""})

    if not chunks:
        return
    whole = joined(chunks)
    copied = streamed(chunks, keep())
    assert (without_empty_text(joined(copied)) if copied else None) == (
        without_empty_text(whole) if copied else None
    )
    upper = AlignerRunnable(shout()).invoke(whole, QUESTION)
    out = streamed(chunks)
    assert (str(joined(out).text) if out else "") == str(upper.text)


def test_nothing_in_nothing_out() -> None:
    def nothing() -> Iterator[Any]:
        yield from ()

    assert list(AlignerRunnable(shout()).transform(nothing())) == []
