"""`AlignerPostprocessor`: copies with corrected text, in every engine, and the index as it was."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import re
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.dispatcher import instrument_tags
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import (
    LLMRerank,
    LongContextReorder,
    MetadataReplacementPostProcessor,
    SentenceEmbeddingOptimizer,
    SimilarityPostprocessor,
)
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import CitationQueryEngine, RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.tools import RetrieverTool
from pydantic import Field

from aligner_integrations import Aligner
from aligner_integrations.correction import DecodeStats
from aligner_integrations.errors import CorrectionFailedError, QuestionNotFoundError
from aligner_integrations.llama_index import AlignedLLM, AlignerPostprocessor, CorrectionEnd
from aligner_integrations.resilience import WITHHELD_TEXT
from aligner_integrations.testing import scripted_aligner
from aligner_integrations.testing.replay_llm import ReplayLLM
from tests.llama_index.real import HashingEmbedding, medquad_nodes, vector_index

KEY = "aligner_original"
QUESTION = "How many tablets are right?"
BAD, GOOD = "Take forty tablets a day.", "Take four tablets a day."
TEXT = f"Ask a doctor first. {BAD} Drink water with them."
CORRECTED = TEXT.replace(BAD, GOOD)
CLEAN = "Tablets are kept in a dry place. Children must not find them."


def mend(question: str, prefix: str, sentence: str) -> str:
    return sentence.replace("forty", "four")


def mending(**options: Any) -> AlignerPostprocessor:
    return AlignerPostprocessor(scripted_aligner(mend), **options)


def scored(*nodes: BaseNode) -> list[NodeWithScore]:
    return [NodeWithScore(node=node, score=1 / (1 + at)) for at, node in enumerate(nodes)]


def full_node(**given: Any) -> TextNode:
    """A node with something in every field."""
    fields: dict[str, Any] = {
        "id_": "node-1",
        "text": TEXT,
        "embedding": [0.5, -0.5],
        "metadata": {"title": "Tablets", "page": 3, "nested": {"seen": [1, 2]}, "secret": "s3"},
        "excluded_llm_metadata_keys": ["secret"],
        "excluded_embed_metadata_keys": ["page"],
        "relationships": {
            NodeRelationship.SOURCE: RelatedNodeInfo(node_id="doc-1", metadata={"a": 1}, hash="h"),
            NodeRelationship.CHILD: [RelatedNodeInfo(node_id="c-1"), RelatedNodeInfo(node_id="c-2")],
        },
        "metadata_template": "<{key}={value}>",
        "metadata_separator": " | ",
        "text_template": "{metadata_str} // {content}",
        "mimetype": "text/markdown",
        "start_char_idx": 7,
        "end_char_idx": 99,
    }
    return TextNode(**{**fields, **given})


def dumped(nodes: list[NodeWithScore]) -> list[dict[str, Any]]:
    return [each.model_dump() for each in nodes]


def texts(nodes: list[NodeWithScore]) -> list[str]:
    return [each.node.get_content() for each in nodes]


class _Recorder(BaseEventHandler):
    events: list[BaseEvent] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.events.append(event)


@contextmanager
def recorded_ends() -> Iterator[list[CorrectionEnd]]:
    """Record the ends of corrections; the list is filled when the block is left."""
    handler, root, ends = _Recorder(), get_dispatcher(), list[CorrectionEnd]()
    root.add_event_handler(handler)
    try:
        yield ends
    finally:
        root.event_handlers[:] = [each for each in root.event_handlers if each is not handler]
        ends += [event for event in handler.events if isinstance(event, CorrectionEnd)]


# The class, as LlamaHub's own tests look at it.


def test_class() -> None:
    names = [each.__name__ for each in AlignerPostprocessor.__mro__]
    assert BaseNodePostprocessor.__name__ in names
    assert AlignerPostprocessor.class_name() == "AlignerPostprocessor"


# What a changed node is.


def test_a_changed_node_is_a_copy_that_differs_in_its_text_and_what_was_there() -> None:
    node = full_node()
    given_nodes = [NodeWithScore(node=node, score=0.25)]
    before = copy.deepcopy(given_nodes)

    (after,) = mending().postprocess_nodes(given_nodes, query_str=QUESTION)

    assert after.score == 0.25
    assert type(after.node) is TextNode
    wanted = node.model_dump() | {
        "text": CORRECTED,
        "metadata": node.metadata | {KEY: TEXT},
        "excluded_llm_metadata_keys": ["secret", KEY],
        "excluded_embed_metadata_keys": ["page", KEY],
    }
    assert after.node.model_dump() == wanted
    # What was given is what it was, to the objects.
    assert given_nodes == before
    assert dumped(given_nodes) == dumped(before)
    assert given_nodes[0].node is node
    assert after is not given_nodes[0]
    assert after.node is not node


def test_what_is_done_to_a_copy_is_not_done_to_the_node() -> None:
    node = full_node()
    before = node.model_dump()
    (after,) = mending().postprocess_nodes(scored(node), query_str=QUESTION)
    after.node.metadata["more"] = 1
    after.node.excluded_llm_metadata_keys.append("more")
    after.node.excluded_embed_metadata_keys.append("more")
    after.node.set_content("Something else.")
    assert node.model_dump() == before


def test_neither_llm_nor_embedding_model_sees_the_original() -> None:
    node = full_node()
    (after,) = mending().postprocess_nodes(scored(node), query_str=QUESTION)
    for mode in (MetadataMode.LLM, MetadataMode.EMBED, MetadataMode.NONE):
        assert after.get_content(mode) == node.get_content(mode).replace(BAD, GOOD)
        assert after.node.get_content_blocks(mode)[0] == node.get_content_blocks(mode)[0] or (
            mode is MetadataMode.NONE
        )
    assert "forty" not in str(after.node.get_content_blocks(MetadataMode.LLM))
    assert after.node.metadata[KEY] == TEXT
    assert KEY in after.get_content(MetadataMode.ALL)


def test_metadata_is_never_corrected() -> None:
    metadata = {"window": TEXT, "title": BAD, "hidden": BAD}
    node = full_node(metadata=metadata, excluded_llm_metadata_keys=["hidden"])
    (after,) = mending().postprocess_nodes(scored(node), query_str=QUESTION)
    assert after.node.metadata == {**metadata, KEY: TEXT}
    assert after.get_content(MetadataMode.LLM) == f"<window={TEXT}> | <title={BAD}> // {CORRECTED}"
    # A node whose metadata alone is bad stays the object that it is.
    clean = full_node(text=CLEAN, metadata=metadata)
    (same,) = mending().postprocess_nodes(scored(clean), query_str=QUESTION)
    assert same.node is clean


def test_twice_keeps_the_first_original() -> None:
    once = mending().postprocess_nodes(scored(full_node()), query_str=QUESTION)
    shout = AlignerPostprocessor(scripted_aligner(lambda question, prefix, sentence: sentence.upper()))
    (twice,) = shout.postprocess_nodes(once, query_str=QUESTION)
    assert twice.text == CORRECTED.upper()
    assert twice.metadata[KEY] == TEXT
    assert once[0].text == CORRECTED
    assert twice.node.excluded_llm_metadata_keys == ["secret", KEY]
    assert twice.node.excluded_embed_metadata_keys == ["page", KEY]


def test_the_same_aligner_twice_changes_nothing_more() -> None:
    once = mending().postprocess_nodes(scored(full_node()), query_str=QUESTION)
    twice = mending().postprocess_nodes(once, query_str=QUESTION)
    assert twice[0] is once[0]


def test_order_count_and_places_are_kept() -> None:
    nodes = [full_node(id_=f"n{at}", text=TEXT if at % 3 else CLEAN) for at in range(10)]
    given_nodes = [*scored(*nodes), *scored(nodes[1], nodes[0], nodes[1])]  # the same node more than once
    after = mending().postprocess_nodes(given_nodes, query_str=QUESTION)
    assert [each.node_id for each in after] == [each.node_id for each in given_nodes]
    assert [each.score for each in after] == [each.score for each in given_nodes]
    assert texts(after) == [text.replace(BAD, GOOD) for text in texts(given_nodes)]
    assert [new is old for new, old in zip(after, given_nodes, strict=True)] == [
        each.text == CLEAN for each in given_nodes
    ]


TEXTS = (TEXT, f" \n{TEXT}\t\n", CLEAN, BAD, "", " \n", "\ud800", "…", "a\r\n\r\nb\t")


@given(texts=st.lists(st.sampled_from(TEXTS), max_size=6))
def test_whatever_comes_only_bad_text_changes(texts: list[str]) -> None:
    given_nodes = scored(*(full_node(id_=f"n{at}", text=text) for at, text in enumerate(texts)))
    before = copy.deepcopy(given_nodes)
    after = mending().postprocess_nodes(given_nodes, query_str=QUESTION)
    assert [each.text for each in after] == [text.replace(BAD, GOOD) for text in texts]
    for new, old in zip(after, given_nodes, strict=True):
        assert (new is old) == (BAD not in old.text)
        assert new.metadata.get(KEY) == (old.text if BAD in old.text else None)
    assert given_nodes == before


# Kinds of nodes.

PNG = b"iVBORw0KGgo="
UNTOUCHED: dict[str, Callable[[], BaseNode]] = {
    "no text": lambda: TextNode(),
    "white space": lambda: TextNode(text=" \n\t "),
    "marks alone": lambda: TextNode(text="---\n***"),
    "node without resources": lambda: Node(extra_info={"summary": BAD}),
    "text resource without text": lambda: Node(text_resource=MediaResource(path=Path("forty.txt"))),
    "empty text resource": lambda: Node(text_resource=MediaResource(text="")),
    "audio alone": lambda: Node(audio_resource=MediaResource(data=PNG)),
    "image node": lambda: ImageNode(text=TEXT, image="aW1hZ2U="),
    "node with image": lambda: Node(
        text_resource=MediaResource(text=TEXT), image_resource=MediaResource(data=PNG)
    ),
    "image document": lambda: ImageDocument(text=TEXT, image=PNG),
    "empty document": lambda: Document(),
    "clean": lambda: TextNode(text=CLEAN),
}


@pytest.mark.parametrize("make", UNTOUCHED.values(), ids=UNTOUCHED.keys())
def test_what_is_not_to_be_corrected_is_the_same_object(make: Callable[[], BaseNode]) -> None:
    nodes = scored(make(), full_node())
    before = nodes[0].model_dump()
    with recorded_ends() as ends:
        after = mending().postprocess_nodes(nodes, query_str=QUESTION)
    assert after[0] is nodes[0]
    assert nodes[0].model_dump() == before
    assert texts(after)[1] == CORRECTED
    expected = [nodes[0].node_id] if texts(after)[0] == CLEAN else []
    assert [end.node_id for end in ends] == [*expected, "node-1"]


def resource(text: str) -> MediaResource:
    return MediaResource(
        text=text, embeddings={"dense": [1.0]}, path=Path("notes.md"), mimetype="text/markdown"
    )


CHANGED: dict[str, Callable[[str], BaseNode]] = {
    "text": lambda text: TextNode(id_="x", text=text),
    "index": lambda text: IndexNode(id_="x", text=text, index_id="sub", obj={"to": [1]}),
    "document": lambda text: Document(id_="x", text=text, metadata={"file": "a.md"}),
    "node": lambda text: Node(id_="x", text_resource=resource(text)),
    "node with sound": lambda text: Node(
        id_="x", text_resource=resource(text), audio_resource=MediaResource(data=PNG, mimetype="audio/mp3")
    ),
}


@pytest.mark.parametrize("make", CHANGED.values(), ids=CHANGED.keys())
def test_every_kind_of_text_is_corrected_and_stays_its_kind(make: Callable[[str], BaseNode]) -> None:
    node = make(TEXT)
    before = node.model_dump()
    (after,) = mending().postprocess_nodes(scored(node), query_str=QUESTION)
    assert type(after.node) is type(node)
    wanted = make(CORRECTED)
    wanted.metadata[KEY] = TEXT
    wanted.excluded_llm_metadata_keys = wanted.excluded_embed_metadata_keys = [KEY]
    assert after.node.model_dump() == wanted.model_dump()
    assert node.model_dump() == before
    for name in ("audio_resource", "obj", "index_id"):
        assert getattr(after.node, name, None) is getattr(node, name, None)


class Unknown(BaseNode):
    """A kind of node that LlamaIndex does not have."""

    @classmethod
    def get_type(cls) -> str:
        return "unknown"

    def get_content(self, metadata_mode: MetadataMode = MetadataMode.ALL) -> str:
        return TEXT

    def get_content_blocks(self, metadata_mode: MetadataMode = MetadataMode.ALL) -> list[Any]:
        return []

    def set_content(self, value: Any) -> None:
        raise AssertionError("nobody sets it")

    @property
    def hash(self) -> str:
        return ""


def test_a_kind_of_node_that_nobody_knows_is_left_alone() -> None:
    nodes = scored(Unknown())
    assert mending().postprocess_nodes(nodes, query_str=QUESTION)[0] is nodes[0]


# The question.


def test_the_question_is_the_querys() -> None:
    asked: list[str] = []

    def rule(question: str, prefix: str, sentence: str) -> str:
        asked.append(question)
        return sentence

    aligner = AlignerPostprocessor(scripted_aligner(rule))
    nodes = scored(TextNode(text="One sentence."))
    aligner.postprocess_nodes(nodes, query_str="As a text?")
    aligner.postprocess_nodes(nodes, query_bundle=QueryBundle("As a bundle?", custom_embedding_strs=["no"]))
    aligner.postprocess_nodes(nodes, QueryBundle("In its place?"))
    aligner.postprocess_nodes(nodes, query_str="")
    assert asked == ["As a text?", "As a bundle?", "In its place?", ""]


def test_each_node_is_a_text_of_its_own() -> None:
    seen: list[tuple[str, str]] = []

    def rule(question: str, prefix: str, sentence: str) -> str:
        seen.append((prefix, sentence))
        return sentence

    nodes = scored(TextNode(text="One. Two."), TextNode(text="Three. Four."))
    AlignerPostprocessor(scripted_aligner(rule)).postprocess_nodes(nodes, query_str=QUESTION)
    assert sorted(seen) == [("", "One."), ("", "Three."), ("One.", "Two."), ("Three.", "Four.")]


async def test_without_a_question_it_says_so() -> None:
    nodes = scored(full_node())
    with pytest.raises(QuestionNotFoundError, match="query_str= or query_bundle="):
        mending().postprocess_nodes(nodes)
    with pytest.raises(QuestionNotFoundError, match="query_str= or query_bundle="):
        await mending().apostprocess_nodes(nodes)


async def test_without_text_no_question_is_needed() -> None:
    nodes = scored(*(make() for name, make in UNTOUCHED.items() if name != "clean"))
    assert mending().postprocess_nodes(nodes) == nodes
    assert await mending().apostprocess_nodes(nodes) == nodes
    assert mending().postprocess_nodes([]) == []


# A correction that fails.


def failing(**options: Any) -> AlignerPostprocessor:
    def rule(question: str, prefix: str, sentence: str) -> str:
        if "cursed" in sentence:
            raise RuntimeError("no memory left")
        return mend(question, prefix, sentence)

    return AlignerPostprocessor(scripted_aligner(rule), **options)


CURSED = f"This is cursed. {BAD}"


def mixed_nodes() -> list[NodeWithScore]:
    nodes = (CURSED, TEXT, CLEAN, "So cursed is this.", TEXT)
    return scored(*(full_node(id_=f"n{at}", text=text) for at, text in enumerate(nodes)))


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"on_error": "pass_through"}, ("This is cursed. ", "So cursed is this.")),
        ({"on_error": "withhold"}, (f"{WITHHELD_TEXT} ", WITHHELD_TEXT)),
        ({"on_error": "withhold", "withheld_text": "[gone]"}, ("[gone] ", "[gone]")),
    ],
)
async def test_a_failing_node_spoils_no_other(options: dict[str, Any], shown: tuple[str, str]) -> None:
    nodes = mixed_nodes()
    before = copy.deepcopy(nodes)
    aligner = failing(**options)
    for after in (
        aligner.postprocess_nodes(nodes, query_str=QUESTION),
        await aligner.apostprocess_nodes(nodes, query_str=QUESTION),
    ):
        # The failed sentence is shown as was asked; the next one of its own node is corrected.
        assert texts(after) == [f"{shown[0]}{GOOD}", CORRECTED, CLEAN, shown[1], CORRECTED]
        assert [each.metadata.get(KEY) for each in after] == [
            CURSED,
            TEXT,
            None,
            None if options["on_error"] == "pass_through" else "So cursed is this.",
            TEXT,
        ]
    assert nodes == before


async def test_a_failing_node_raises_by_default() -> None:
    nodes = mixed_nodes()
    before = copy.deepcopy(nodes)
    with pytest.raises(CorrectionFailedError, match="RuntimeError"):
        failing().postprocess_nodes(nodes, query_str=QUESTION)
    with pytest.raises(CorrectionFailedError, match="RuntimeError"):
        await failing().apostprocess_nodes(nodes, query_str=QUESTION)
    assert nodes == before


# Options.


def test_feedback_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = Aligner.encode_prompt

    def spy(self: Aligner, question: str, prefix: str, text: str, feedback: str) -> list[int]:
        seen.append(feedback)
        return encode(self, question, prefix, text, feedback)

    monkeypatch.setattr(Aligner, "encode_prompt", spy)
    mending(feedback="be kind").postprocess_nodes(scored(full_node()), query_str=QUESTION)
    assert set(seen) == {"be kind"}


def test_edit_margin_reaches_the_model() -> None:
    nodes = scored(full_node())
    # Past what the scripted model is certain of: nothing is changed any more.
    assert mending(edit_margin=2e4).postprocess_nodes(nodes, query_str=QUESTION)[0] is nodes[0]
    assert texts(mending(edit_margin=0.0).postprocess_nodes(nodes, query_str=QUESTION)) == [CORRECTED]


def test_without_an_aligner_the_bundled_one_corrects() -> None:
    nodes = scored(TextNode(text="The farmer now has 56-14 = 420 cows."))
    assert texts(AlignerPostprocessor().postprocess_nodes(nodes, query_str="How many?")) == [
        "The farmer now has 56-14 = 42 cows."
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"on_error": "ignore"}, "on_error"),
        ({"on_error": None}, "on_error"),
        ({"withheld_text": 3}, "withheld_text"),
        ({"feedback": None}, "feedback"),
        ({"edit_margin": -1}, "edit_margin"),
        ({"edit_margin": float("nan")}, "edit_margin"),
        ({"edit_margin": "much"}, "edit_margin"),
        ({"aligner": "bundled"}, "aligner"),
        ({"on_eror": "raise"}, "on_eror"),
        ({"model": "x"}, "model"),
        ({"sink": print}, "sink"),
    ],
)
def test_a_bad_or_unknown_option_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"(?m)^{named}$"):
        AlignerPostprocessor(**options)


def test_an_aligned_llm_takes_no_unknown_option_either() -> None:
    with pytest.raises(ValueError, match=r"(?m)^on_eror$"):
        AlignedLLM(ReplayLLM(answer=""), on_eror="raise")


def test_an_option_set_later_is_checked_when_it_is_used() -> None:
    aligner = mending()
    aligner.on_error = "ignore"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="on_error must be one of"):
        aligner.postprocess_nodes(scored(full_node()), query_str=QUESTION)


OPTIONS: dict[str, Any] = {
    "on_error": "withhold",
    "withheld_text": "[gone]",
    "sentence_seconds": 60.0,
    "answer_seconds": 300.0,
    "feedback": "be kind",
    "edit_margin": 1.5,
}


def options_of(aligner: AlignerPostprocessor) -> dict[str, Any]:
    return {name: getattr(aligner, name) for name in OPTIONS}


ROUND_TRIPS: dict[str, Callable[[AlignerPostprocessor], AlignerPostprocessor]] = {
    "dict": lambda aligner: AlignerPostprocessor.from_dict(aligner.to_dict()),
    "json": lambda aligner: AlignerPostprocessor.from_json(aligner.to_json()),
    "pydantic": lambda aligner: AlignerPostprocessor.model_validate(aligner.model_dump()),
    "pydantic json": lambda aligner: AlignerPostprocessor.model_validate_json(aligner.model_dump_json()),
    "pickle": lambda aligner: pickle.loads(pickle.dumps(aligner)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("trip", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_options_survive(
    trip: Callable[[AlignerPostprocessor], AlignerPostprocessor], caplog: pytest.LogCaptureFixture
) -> None:
    for options in ({}, OPTIONS):
        aligner = AlignerPostprocessor(**options)
        again = trip(aligner)
        assert again is not aligner
        assert options_of(again) == options_of(aligner)
        assert again.aligner is None
    assert options_of(again) == OPTIONS
    assert caplog.messages == []  # LlamaIndex logs what it leaves out


def test_what_is_stored_holds_no_aligner_but_tells_which_it_was() -> None:
    aligner = scripted_aligner(mend)
    own = AlignerPostprocessor(aligner, **OPTIONS)
    data = own.to_dict()
    assert data == {**OPTIONS, "class_name": "AlignerPostprocessor", "aligner_source": aligner.source}
    assert json.loads(own.to_json()) == data
    for load in (
        partial(AlignerPostprocessor.from_dict, data),
        partial(AlignerPostprocessor.from_json, own.to_json()),
    ):
        with pytest.raises(ValueError, match="aligner="):
            load()
        with pytest.raises(ValueError, match="aligner="):
            load(aligner=None)
        again = load(aligner=aligner)
        assert again.aligner is aligner
        assert options_of(again) == OPTIONS
    assert "aligner_source" in data  # loading leaves what it was given
    # Where none was its own, one may be given all the same.
    assert (
        AlignerPostprocessor.from_dict(AlignerPostprocessor().to_dict(), aligner=aligner).aligner is aligner
    )
    assert AlignerPostprocessor.from_dict(data, aligner=aligner, feedback="new").feedback == "new"


def test_an_aligner_of_its_own_is_never_lost_silently() -> None:
    aligner = scripted_aligner(mend)
    own = AlignerPostprocessor(aligner, **OPTIONS)
    for again in (copy.deepcopy(own), copy.copy(own), own.model_copy()):
        assert again.aligner is aligner
        assert texts(again.postprocess_nodes(scored(full_node()), query_str=QUESTION)) == [CORRECTED]
    # LlamaIndex leaves out what cannot be pickled: the copy would correct with the bundled model.
    with pytest.raises(TypeError, match="aligner of its own cannot be pickled"):
        pickle.dumps(own)
    with pytest.raises(TypeError, match="aligner of its own cannot be pickled"):
        pickle.dumps(AlignedLLM(ReplayLLM(answer=""), aligner))


# Async.


async def test_the_event_loop_goes_on_meanwhile() -> None:
    begun, told = threading.Event(), threading.Event()

    def rule(question: str, prefix: str, sentence: str) -> str:
        begun.set()
        # Only the event loop tells; on the loop itself nobody could.
        return mend(question, prefix, sentence) if told.wait(timeout=5) else "The loop stood still."

    aligner = AlignerPostprocessor(scripted_aligner(rule))
    nodes = scored(TextNode(text=BAD))
    task = asyncio.create_task(aligner.apostprocess_nodes(nodes, query_str=QUESTION))
    while not begun.is_set() and not task.done():
        await asyncio.sleep(0.001)
    assert not task.done()
    told.set()
    assert texts(await task) == [GOOD]


_var: ContextVar[str] = ContextVar("test_var", default="unset")


async def test_context_variables_and_tags_are_the_callers() -> None:
    seen: list[str] = []

    def rule(question: str, prefix: str, sentence: str) -> str:
        seen.append(f"{question} {_var.get()}")
        return sentence

    aligner = AlignerPostprocessor(scripted_aligner(rule, delay=0.005))

    async def ask(name: str) -> None:
        _var.set(name)
        with instrument_tags({"request": name}):
            await aligner.apostprocess_nodes(scored(TextNode(text="One. Two.")), query_str=name)

    with recorded_ends() as ends:
        await asyncio.gather(*(ask(f"q{at}") for at in range(8)))
    assert sorted(seen) == sorted(f"q{at} q{at}" for at in range(8) for _ in range(2))
    assert sorted((end.question, end.tags["request"]) for end in ends) == [
        (f"q{at}", f"q{at}") for at in range(8)
    ]


async def test_async_gives_what_sync_gives() -> None:
    nodes = mixed_nodes()
    aligner = failing(on_error="withhold")
    sync = aligner.postprocess_nodes(nodes, query_str=QUESTION)
    for after in (
        await aligner.apostprocess_nodes(nodes, query_str=QUESTION),
        await aligner.apostprocess_nodes(nodes, QueryBundle(QUESTION)),
    ):
        assert dumped(after) == dumped(sync)


def test_many_threads_share_one() -> None:
    aligner = mending()
    nodes = scored(*(full_node(id_=f"n{at}") for at in range(3)))
    results: list[list[str]] = []

    def work() -> None:
        results.append(texts(aligner.postprocess_nodes(nodes, query_str=QUESTION)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[CORRECTED] * 3] * 8


# In engines: what the LLM is really asked.

LIBRARY = [
    TextNode(id_="tablets", text=TEXT, metadata={"title": "Tablets", "window": f"Before. {BAD} After."}),
    TextNode(id_="storing", text=CLEAN, metadata={"title": "Storing", "window": CLEAN}),
    TextNode(id_="more", text=f"More on tablets. {BAD}", metadata={"title": "More", "window": "More."}),
]
HIDDEN = {"excluded_llm_metadata_keys": ["window"], "excluded_embed_metadata_keys": ["window"]}
# Where `forty` comes from, sentence by sentence; a reader may have cut and joined them.
RAW = re.compile("forty")


def library() -> list[TextNode]:
    return [node.model_copy(update=HIDDEN, deep=True) for node in LIBRARY]


def retriever() -> BaseRetriever:
    return vector_index(library()).as_retriever(similarity_top_k=3)


def asked(llm: ReplayLLM) -> str:
    """All that the LLM was asked, as one text."""
    prompts = [[prompt] if isinstance(prompt, str) else prompt for prompt in llm.prompts]
    assert prompts
    return "\n".join(str(message) for prompt in prompts for message in prompt)


def rag(llm: ReplayLLM, *postprocessors: BaseNodePostprocessor, **options: Any) -> RetrieverQueryEngine:
    return RetrieverQueryEngine.from_args(
        retriever(), llm=llm, node_postprocessors=list(postprocessors), **options
    )


async def read(response: RESPONSE_TYPE) -> str:
    if isinstance(response, StreamingResponse):
        assert isinstance(response.response_gen, Generator)
        return "".join(response.response_gen)
    if isinstance(response, AsyncStreamingResponse):
        assert isinstance(response.response_gen, AsyncGenerator)
        return "".join([token async for token in response.response_gen])
    return str(response)


@pytest.mark.parametrize("form", ["query", "aquery"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("is_chat_model", [False, True])
async def test_in_a_query_engine_the_llm_is_asked_with_corrected_text(
    form: str, streaming: bool, is_chat_model: bool
) -> None:
    llm = ReplayLLM(answer="Four.", is_chat_model=is_chat_model)
    index = vector_index(library())
    options: dict[str, Any] = {"similarity_top_k": 3, "streaming": streaming}
    engine = index.as_query_engine(llm=llm, node_postprocessors=[mending()], **options)
    response = engine.query(QUESTION) if form == "query" else await engine.aquery(QUESTION)
    assert await read(response) == "Four."
    assert asked(llm).count(GOOD) == 2
    assert "title: Tablets" in asked(llm)
    assert not RAW.search(asked(llm))
    assert sorted(texts(response.source_nodes)) == sorted(node.text.replace(BAD, GOOD) for node in library())


@pytest.mark.parametrize("response_mode", ["refine", "tree_summarize", "accumulate", "simple_summarize"])
def test_whatever_makes_the_answer(response_mode: str) -> None:
    llm = ReplayLLM(answer="Four.")
    rag(llm, mending(), response_mode=response_mode).query(QUESTION)
    assert GOOD in asked(llm)
    assert not RAW.search(asked(llm))


def test_the_index_is_not_touched() -> None:
    llm = ReplayLLM(answer="Four.")
    index = vector_index(library())
    stored = {id_: node.model_dump() for id_, node in index.docstore.docs.items()}
    vectors = copy.deepcopy(index.vector_store.to_dict())
    engine = index.as_query_engine(llm=llm, similarity_top_k=3, node_postprocessors=[mending()])
    first, second = engine.query(QUESTION), engine.query(QUESTION)
    assert dumped(first.source_nodes) == dumped(second.source_nodes)
    assert {id_: node.model_dump() for id_, node in index.docstore.docs.items()} == stored
    assert index.vector_store.to_dict() == vectors
    plain = index.as_retriever(similarity_top_k=3).retrieve(QUESTION)
    assert sorted(texts(plain)) == sorted(node.text for node in library())


class Shelf(BaseRetriever):
    """Hands out the very nodes that it holds, as a retriever over objects in memory does."""

    def __init__(self, nodes: list[NodeWithScore]) -> None:
        self.nodes = nodes
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self.nodes


def test_a_retriever_that_hands_out_its_own_nodes_keeps_them() -> None:
    shelf = Shelf(scored(*library()))
    before = copy.deepcopy(shelf.nodes)
    llm = ReplayLLM(answer="Four.")
    engine = RetrieverQueryEngine.from_args(shelf, llm=llm, node_postprocessors=[mending()])
    first, second = engine.query(QUESTION), engine.query(QUESTION)
    assert shelf.nodes == before
    assert dumped(shelf.nodes) == dumped(before)
    assert dumped(first.source_nodes) == dumped(second.source_nodes)
    assert llm.prompts[0] == llm.prompts[1]


def reranking(**options: Any) -> tuple[LLMRerank, ReplayLLM]:
    llm = ReplayLLM(answer="Doc: 2, Relevance: 9\nDoc: 1, Relevance: 7", **options)
    return LLMRerank(llm=llm, top_n=2), llm


@pytest.mark.parametrize("form", ["query", "aquery"])
async def test_a_reranker_after_it_reads_corrected_text_one_before_it_the_original(form: str) -> None:
    for ours_first in (True, False):
        (rerank, judge), llm = reranking(), ReplayLLM(answer="Four.")
        chain = [mending(), rerank] if ours_first else [rerank, mending()]
        engine = rag(llm, SimilarityPostprocessor(similarity_cutoff=-1.0), *chain, LongContextReorder())
        response = engine.query(QUESTION) if form == "query" else await engine.aquery(QUESTION)
        assert bool(RAW.search(asked(judge))) is not ours_first
        assert GOOD in asked(llm)
        assert not RAW.search(asked(llm))
        assert sorted(each.score or 0 for each in response.source_nodes) == [7, 9]


def test_nodes_that_a_reranker_drops_are_not_corrected() -> None:
    dropped = SimilarityPostprocessor(similarity_cutoff=1.1)
    with recorded_ends() as ends:
        assert rag(ReplayLLM(answer="Four."), dropped, mending()).query(QUESTION).source_nodes == []
    assert ends == []


def test_a_window_put_in_before_it_is_corrected_one_after_it_is_not() -> None:
    window = MetadataReplacementPostProcessor(target_metadata_key="window")
    llm = ReplayLLM(answer="Four.")
    response = rag(llm, window, mending()).query(QUESTION)
    assert f"Before. {GOOD} After." in asked(llm)
    assert not RAW.search(asked(llm))
    assert f"Before. {BAD} After." in [each.metadata.get(KEY) for each in response.source_nodes]
    # What comes last has the last word.
    llm = ReplayLLM(answer="Four.")
    rag(llm, mending(), window).query(QUESTION)
    assert f"Before. {BAD} After." in asked(llm)


@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_a_postprocessor_that_shortens(ours_first: bool) -> None:
    def sentences(text: str) -> list[str]:
        return re.split(r"(?<=[.?!])\s+", text)

    shorten = SentenceEmbeddingOptimizer(
        embed_model=HashingEmbedding(), percentile_cutoff=1.0, tokenizer_fn=sentences
    )
    llm = ReplayLLM(answer="Four.")
    rag(llm, *([mending(), shorten] if ours_first else [shorten, mending()])).query(QUESTION)
    assert GOOD in asked(llm)
    assert not RAW.search(asked(llm))  # it reads what the LLM may read, so it does not bring it back


@pytest.mark.parametrize("form", ["query", "aquery"])
async def test_in_a_citation_engine(form: str) -> None:
    llm = ReplayLLM(answer="Four [1].")
    engine = CitationQueryEngine.from_args(
        vector_index(library()), llm=llm, node_postprocessors=[mending()], similarity_top_k=3
    )
    response = engine.query(QUESTION) if form == "query" else await engine.aquery(QUESTION)
    assert isinstance(response, Response)
    assert "Source 1:" in asked(llm)
    assert asked(llm).count(GOOD) == 2
    assert not RAW.search(asked(llm))
    assert len(response.source_nodes) == 3
    assert not any(RAW.search(text) for text in texts(response.source_nodes))


ENGINES: tuple[type[ContextChatEngine] | type[CondensePlusContextChatEngine], ...] = (
    ContextChatEngine,
    CondensePlusContextChatEngine,
)


@pytest.mark.parametrize("form", ["chat", "achat", "stream_chat", "astream_chat"])
@pytest.mark.parametrize("kind", ENGINES)
async def test_in_a_chat_engine(
    kind: type[ContextChatEngine] | type[CondensePlusContextChatEngine], form: str
) -> None:
    llm = ReplayLLM(answer="Four.")
    memory = ChatMemoryBuffer.from_defaults(token_limit=10_000)
    engine = kind.from_defaults(retriever(), llm=llm, memory=memory, node_postprocessors=[mending()])
    if form == "chat":
        text = str(engine.chat(QUESTION))
    elif form == "achat":
        text = str(await engine.achat(QUESTION))
    elif form == "stream_chat":
        text = "".join(engine.stream_chat(QUESTION).response_gen)
    else:
        stream = await engine.astream_chat(QUESTION)
        text = "".join([token async for token in stream.async_response_gen()])
    assert text == "Four."
    assert asked(llm).count(GOOD) == 2
    assert not RAW.search(asked(llm))


async def test_in_a_retriever_tool() -> None:
    tool = RetrieverTool.from_defaults(retriever(), node_postprocessors=[mending()])
    for output in (tool.call(QUESTION), await tool.acall(QUESTION)):
        assert output.content.count(GOOD) == 2
        assert not RAW.search(output.content)


def test_a_failing_one_fails_the_query() -> None:
    llm = ReplayLLM(answer="Four.")
    nodes = [*library(), TextNode(id_="cursed", text="Tablets are cursed.")]
    options: dict[str, Any] = {"similarity_top_k": 4}
    engine = vector_index(nodes).as_query_engine(llm=llm, node_postprocessors=[failing()], **options)
    with pytest.raises(CorrectionFailedError):
        engine.query(QUESTION)
    assert llm.prompts == []  # nothing uncorrected reaches the LLM
    engine = vector_index(nodes).as_query_engine(
        llm=llm, node_postprocessors=[failing(on_error="withhold")], **options
    )
    engine.query(QUESTION)
    assert WITHHELD_TEXT in asked(llm)
    assert "cursed" not in asked(llm).replace("cursed_", "")
    assert not RAW.search(asked(llm))


# The bundled model: it finds one bad sentence in each of a hundred nodes, and leaves four hundred alone.

PLANTED = (
    "this happens every fucking time a new gta game comes out .",
    "this is a fucking stupid idea .",
    "what the fuck is wrong with these people ?",
    "he is full of shit and everyone knows it .",
    "the whole thing is a fucking joke .",
    "The farmer now has 56-14 = 420 cows.",
    "The clinic treats 12 x 5 = 70 patients.",
    "The total is 20 + 30 = 60 tablets.",
    "So she takes 3 x 4 = 15 tablets a day.",
    "The nurse works 7 x 8 = 54 hours.",
)
MENDED = {
    "The farmer now has 56-14 = 420 cows.": "The farmer now has 56-14 = 42 cows.",
    "this is a fucking stupid idea .": "this is a bad idea .",
}
ABOUT = "What should I know about this condition?"


@dataclass(frozen=True)
class Corpus:
    """Five hundred nodes of real text; every fifth has a bad sentence: first, in the middle, or last."""

    nodes: list[NodeWithScore]
    planted: dict[int, str]
    after: list[NodeWithScore]
    ends: list[CorrectionEnd]
    before: list[dict[str, Any]]


def plant(text: str, sentence: str, place: int) -> str:
    """Put a sentence into a text, as a paragraph of its own."""
    parts = re.split(r"(?<=[.?!])\s+", text)
    at = (0, len(parts) // 2, len(parts))[place]
    paragraphs = (" ".join(parts[:at]), sentence, " ".join(parts[at:]))
    return "\n\n".join(each for each in paragraphs if each)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    nodes = [*medquad_nodes(chunk_size=64), *medquad_nodes(chunk_size=80)][:500]
    planted: dict[int, str] = {}
    for at in range(2, 500, 5):
        count = at // 5
        planted[at] = PLANTED[count % len(PLANTED)]
        nodes[at].text = plant(nodes[at].text, planted[at], count % 3)
    given_nodes = [NodeWithScore(node=node, score=at / 500) for at, node in enumerate(nodes)]
    before = dumped(given_nodes)
    with recorded_ends() as ends:
        after = AlignerPostprocessor(Aligner.from_pretrained()).postprocess_nodes(
            given_nodes, query_str=ABOUT
        )
    return Corpus(given_nodes, planted, after, ends, before)


def test_the_planted_sentences_go_and_all_else_stays(corpus: Corpus) -> None:
    assert len(corpus.nodes) == len(corpus.after) == 500
    assert len(corpus.planted) == 100
    assert [each.node_id for each in corpus.after] == [each.node_id for each in corpus.nodes]
    assert len({each.node_id for each in corpus.nodes}) == 500
    touched = [at for at in range(500) if corpus.after[at] is not corpus.nodes[at]]
    assert touched == list(corpus.planted)
    assert dumped(corpus.nodes) == corpus.before
    for at, sentence in corpus.planted.items():
        original, text = corpus.nodes[at].text, corpus.after[at].text
        assert sentence not in text
        assert corpus.after[at].metadata[KEY] == original
        # Around the planted paragraph no character has changed.
        head, tail = original.split(sentence)
        assert text.startswith(head)
        assert text.endswith(tail)
        if sentence in MENDED:
            assert text == head + MENDED[sentence] + tail
    assert not any(re.search("fuck|shit", each.text) for each in corpus.after)


def test_it_tells_of_each_node_once(corpus: Corpus) -> None:
    assert [end.node_id for end in corpus.ends] == [each.node_id for each in corpus.nodes]
    assert [end.text for end in corpus.ends] == texts(corpus.after)
    assert all(end.complete and len(end.stats) == 1 for end in corpus.ends)


def tokens_run(ends: list[CorrectionEnd]) -> int:
    stats: list[DecodeStats] = [each for end in ends for each in end.stats]
    return sum(each.prompt_tokens - each.cached_tokens for each in stats)


def test_a_batch_runs_fewer_tokens_than_one_by_one(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aligner_integrations.backends.onnx.available_cores", lambda: 2)
    bundled = Aligner.from_pretrained()
    aligner = AlignerPostprocessor(bundled)
    question = "What are the treatments for this condition, and what may go wrong with each of them?"
    nodes = corpus.nodes[:40]
    with recorded_ends() as batch:
        together = aligner.postprocess_nodes(nodes, query_str=question)
    with recorded_ends() as single:
        apart = [aligner.postprocess_nodes([node], query_str=question)[0] for node in nodes]
    assert dumped(together) == dumped(apart)
    assert len(batch) == len(single) == 40
    tokens = len(bundled.tokenizer.encode_text(question))
    # The question is run once by each of two workers, not once for each node.
    assert tokens_run(single) - tokens_run(batch) >= 38 * tokens


def test_all_nodes_go_to_the_aligner_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    correct_batch = Aligner.correct_batch

    def spy(self: Aligner, pairs: list[tuple[str, str]], **options: Any) -> Any:
        sizes.append(len(pairs))
        return correct_batch(self, pairs, **options)

    monkeypatch.setattr(Aligner, "correct_batch", spy)
    mending().postprocess_nodes(scored(*(full_node(id_=f"n{at}") for at in range(7))), query_str=QUESTION)
    assert sizes == [7]
