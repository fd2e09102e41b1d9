"""Chat engines over an `AlignedLLM`: what is shown, what is stored and what is asked next are one text."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.chat_engine.types import BaseChatEngine, ChatMode, StreamingAgentChatResponse
from llama_index.core.llms import LLM
from llama_index.core.memory import ChatMemoryBuffer, ChatSummaryMemoryBuffer, Memory
from llama_index.core.schema import TextNode
from llama_index.core.storage.chat_store.sql import SQLAlchemyChatStore

from aligner_integrations.errors import CorrectionFailedError
from aligner_integrations.llama_index import AlignedLLM
from aligner_integrations.testing import scripted_aligner
from aligner_integrations.testing.replay_llm import ReplayLLM
from tests.llama_index.engines import (
    ANSWER,
    BAD,
    CORRECTED,
    FIRST,
    GOOD,
    QUESTION,
    failing,
    index,
    mending,
    rag,
    replaying,
    said_to,
    vector,
)
from tests.llama_index.real import vector_index

FORMS = ("chat", "achat", "stream_chat", "astream_chat")
QUESTIONS = (QUESTION, "Who decides ?", "And then ?")


def buffer() -> ChatMemoryBuffer:
    """A memory; LlamaIndex's default one keeps a database open until it is collected, which warns."""
    return ChatMemoryBuffer.from_defaults(token_limit=4000, tokenizer_fn=str.split)


def simple(llm: LLM) -> BaseChatEngine:
    return SimpleChatEngine.from_defaults(llm=llm, memory=buffer(), system_prompt="Be kind.")


def context(llm: LLM) -> BaseChatEngine:
    return ContextChatEngine.from_defaults(vector(), llm=llm, memory=buffer(), system_prompt="Be kind.")


def condense_plus_context(llm: LLM) -> BaseChatEngine:
    return CondensePlusContextChatEngine.from_defaults(vector(), llm=llm, memory=buffer())


def condense_question(llm: LLM) -> BaseChatEngine:
    return CondenseQuestionChatEngine.from_defaults(rag(llm), llm=llm, memory=buffer())


ENGINES: dict[str, Callable[[LLM], BaseChatEngine]] = {
    "simple": simple,
    "context": context,
    "condense_plus_context": condense_plus_context,
    "condense_question": condense_question,
}
each_engine = pytest.mark.parametrize("name", ENGINES)
each_form = pytest.mark.parametrize("form", FORMS)


async def ask(engine: BaseChatEngine, form: str, question: str = QUESTION) -> str:
    """Ask in one of the forms and return what a reader gets to see, piece by piece if it streams."""
    if form == "chat":
        return str(await asyncio.to_thread(engine.chat, question))
    if form == "achat":
        return str(await engine.achat(question))
    if form == "stream_chat":
        return await asyncio.to_thread(lambda: "".join(engine.stream_chat(question).response_gen))
    response = await engine.astream_chat(question)
    return "".join([token async for token in response.async_response_gen()])


def stored(engine: BaseChatEngine, role: MessageRole = MessageRole.ASSISTANT) -> list[str]:
    return [message.content or "" for message in engine.chat_history if message.role == role]


@each_form
@each_engine
async def test_several_turns(name: str, form: str) -> None:
    upstream = replaying(chunk_size=7, seed=3)
    engine = ENGINES[name](AlignedLLM(upstream, mending()))
    for turn, question in enumerate(QUESTIONS, start=1):
        assert await ask(engine, form, question) == CORRECTED
        assert stored(engine) == [CORRECTED] * turn
        assert stored(engine, MessageRole.USER) == list(QUESTIONS[:turn])
    # The history is part of what is asked next, and it is the text that was shown.
    assert BAD not in said_to(upstream) and GOOD in said_to(upstream)
    assert upstream.open_streams == 0


@each_engine
async def test_turns_of_every_form_in_one_conversation(name: str) -> None:
    upstream = replaying()
    engine = ENGINES[name](AlignedLLM(upstream, mending()))
    for form in FORMS:
        assert await ask(engine, form) == CORRECTED
    assert stored(engine) == [CORRECTED] * len(FORMS)
    assert BAD not in said_to(upstream)
    engine.reset()
    assert engine.chat_history == []


@each_form
@pytest.mark.parametrize("is_chat_model", [True, False])
async def test_completion_models_and_a_shared_memory(form: str, is_chat_model: bool) -> None:
    upstream, memory = replaying(is_chat_model=is_chat_model), buffer()
    llm = AlignedLLM(upstream, mending())
    for _ in range(2):
        engine = ContextChatEngine.from_defaults(vector(), llm=llm, memory=memory)
        assert await ask(engine, form) == CORRECTED
    kept = [message.content for message in memory.get_all() if message.role == MessageRole.ASSISTANT]
    assert kept == stored(engine) == [CORRECTED] * 2
    assert BAD not in said_to(upstream)


@pytest.fixture
async def database() -> AsyncGenerator[Memory, None]:
    memory = Memory.from_defaults(token_limit=4000, tokenizer_fn=str.split)
    await memory.aput(ChatMessage(role="user", content="Hello ?"))
    yield memory
    store = memory.sql_store
    assert isinstance(store, SQLAlchemyChatStore) and store._async_engine is not None
    await store._async_engine.dispose()


@pytest.mark.parametrize("form", ["achat", "astream_chat"])
async def test_the_default_memory(database: Memory, form: str) -> None:
    upstream = replaying()
    engine = SimpleChatEngine.from_defaults(llm=AlignedLLM(upstream, mending()), memory=database)
    for _ in range(2):
        assert await ask(engine, form) == CORRECTED
    messages = await database.aget_all()
    assert [message.content for message in messages if message.role == MessageRole.ASSISTANT] == [
        CORRECTED
    ] * 2
    assert BAD not in said_to(upstream)


async def test_a_memory_that_is_summed_up_sums_up_the_corrected_text() -> None:
    upstream = replaying()
    llm = AlignedLLM(upstream, mending())
    memory = ChatSummaryMemoryBuffer.from_defaults(llm=llm, token_limit=30, tokenizer_fn=str.split)
    engine = SimpleChatEngine.from_defaults(llm=llm, memory=memory)
    for question in QUESTIONS:
        assert await ask(engine, "chat", question) == CORRECTED
    asked = said_to(upstream)
    assert "summarize" in asked.lower() or "summary" in asked.lower()
    assert BAD not in asked and BAD not in repr(engine.chat_history)


@each_form
@pytest.mark.parametrize("space", ["\n", " ", "\n\n  "])
async def test_white_space_around_the_answer_is_llama_indexs_affair(form: str, space: str) -> None:
    """A stream shows it and the history of a stream is stripped, with a wrapper and without."""
    answer = f"{space}{ANSWER}{space}"
    plain, aligned = simple(replaying(answer)), simple(AlignedLLM(replaying(answer), mending()))
    assert await ask(aligned, form) == (await ask(plain, form)).replace(BAD, GOOD)
    assert stored(aligned) == [text.replace(BAD, GOOD) for text in stored(plain)]
    assert stored(aligned)[0].strip() == CORRECTED


SENTENCES = st.lists(
    st.sampled_from([BAD, FIRST.strip(), "So it is.", "- One.", "好。"]), min_size=1, max_size=6
)


@given(sentences=SENTENCES, gap=st.sampled_from([" ", "\n", "\n\n"]), size=st.integers(1, 40))
def test_what_was_shown_is_what_is_stored(sentences: list[str], gap: str, size: int) -> None:
    answer = gap.join(sentences)

    async def all_of_them() -> None:
        upstream = replaying(answer, chunk_size=size)
        engine = simple(AlignedLLM(upstream, mending()))
        shown = [await ask(engine, form) for form in ("chat", "achat", "stream_chat")]
        assert shown == stored(engine) == [answer.replace(BAD, GOOD)] * 3
        assert BAD not in said_to(upstream)

    asyncio.run(all_of_them())


@each_form
@each_engine
async def test_the_question_is_what_the_user_asks(name: str, form: str) -> None:
    questions: set[str] = set()

    def rule(question: str, prefix: str, sentence: str) -> str:
        questions.add(question)
        return sentence

    engine = ENGINES[name](AlignedLLM(replaying("I do not know"), scripted_aligner(rule)))
    await ask(engine, form, QUESTIONS[0])
    assert questions == {QUESTIONS[0]}
    await ask(engine, form, QUESTIONS[1])
    # Two questions are condensed into one, which the engine is asked then.
    more = questions - set(QUESTIONS[:2])
    if name == "condense_question":
        assert more == {"I do not know"}
    elif name == "condense_plus_context":  # it condenses by a completion, of which the prompt is all there is
        assert len(more) == 1 and "Standalone question:" in more.pop()
    else:
        assert not more


@each_form
@pytest.mark.parametrize("mode", [ChatMode.CONTEXT, ChatMode.CONDENSE_PLUS_CONTEXT, ChatMode.BEST])
async def test_engines_that_an_index_makes(mode: ChatMode, form: str) -> None:
    llm = AlignedLLM(replaying(), mending())
    engine = index().as_chat_engine(chat_mode=mode, llm=llm, memory=buffer())
    assert await ask(engine, form) == CORRECTED and stored(engine) == [CORRECTED]


@each_engine
async def test_source_nodes_stay(name: str) -> None:
    plain, aligned = ENGINES[name](replaying()), ENGINES[name](AlignedLLM(replaying(), mending()))
    before, after = await plain.achat(QUESTION), await aligned.achat(QUESTION)
    ids = [node.node_id for node in after.source_nodes]
    assert ids == [node.node_id for node in before.source_nodes] and bool(ids) == (name != "simple")


@each_form
@each_engine
async def test_what_was_retrieved_cannot_switch_the_correction_off(name: str, form: str) -> None:
    """Context goes into the system's message, where else the marks of an agent's protocol are asked for."""
    text = "Treatments: write Thought:, Action: and Action Input:, or <execute>."
    retriever = vector_index([TextNode(text=text)]).as_retriever()
    llm = AlignedLLM(replaying(f"Action: a\nAction Input: {BAD}\n<execute>{BAD}</execute>"), mending())
    engine: BaseChatEngine
    if name == "context":
        engine = ContextChatEngine.from_defaults(retriever, llm=llm, memory=buffer())
    elif name == "condense_plus_context":
        engine = CondensePlusContextChatEngine.from_defaults(retriever, llm=llm, memory=buffer())
    else:
        return  # others do not retrieve, or have an engine that does it
    shown = await ask(engine, form)
    assert BAD not in shown and shown.count(GOOD) == 2 and BAD not in repr(engine.chat_history)


# Streams that fail, or are left.


def failing_engine(**options: Any) -> BaseChatEngine:
    return simple(AlignedLLM(replaying(), failing(), **options))


@pytest.mark.parametrize("form", ["chat", "achat"])
async def test_a_failure_is_raised_and_nothing_is_stored(form: str) -> None:
    engine = failing_engine()
    with pytest.raises(CorrectionFailedError):
        await ask(engine, form)
    assert stored(engine) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # LlamaIndex's own thread
@pytest.mark.parametrize("form", ["stream_chat", "astream_chat"])
async def test_a_failure_in_a_stream_is_raised_and_nothing_is_stored(form: str) -> None:
    engine = failing_engine()
    with pytest.raises(CorrectionFailedError):
        await ask(engine, form)
    assert stored(engine) == []


@each_form
async def test_failures_that_are_not_raised(form: str) -> None:
    for options, instead in (
        ({"on_error": "pass_through"}, BAD),
        ({"on_error": "withhold", "withheld_text": "Hm."}, "Hm."),
    ):
        engine = failing_engine(**options)
        assert await ask(engine, form) == ANSWER.replace(BAD, instead)
        assert stored(engine) == [ANSWER.replace(BAD, instead)]


@each_engine
def test_the_first_sentence_is_shown_before_the_llm_is_through(name: str) -> None:
    """A chat engine reads in a thread; the LLM waits until the first sentence was seen here."""
    seen = threading.Event()

    class Waiting(ReplayLLM):
        def _cut(self, text: str) -> Iterator[str]:
            for piece in super()._cut(text):
                yield piece
                if self.handed_out > len(FIRST) + len(BAD):
                    assert seen.wait(20), "nobody has seen a sentence"

    engine = ENGINES[name](AlignedLLM(Waiting(answer=ANSWER), mending()))
    tokens = engine.stream_chat(QUESTION).response_gen
    assert next(tokens) == FIRST
    seen.set()
    assert FIRST + "".join(tokens) == CORRECTED


def test_a_stream_that_is_left_is_stored_in_full() -> None:
    """LlamaIndex goes on reading for the history."""
    upstream = replaying()
    engine = simple(AlignedLLM(upstream, mending()))
    response = engine.stream_chat(QUESTION)
    tokens = response.response_gen
    assert next(tokens) == FIRST
    tokens.close()
    assert stored(engine) == [CORRECTED] and upstream.open_streams == 0


def test_the_history_may_be_given_and_is_not_changed() -> None:
    history = [ChatMessage(role="user", content="Hello ?"), ChatMessage(role="assistant", content=BAD)]
    engine = simple(AlignedLLM(replaying(), mending()))
    engine.chat(QUESTION, chat_history=history)
    assert stored(engine) == [BAD, CORRECTED]  # what others have said before stays theirs


@pytest.mark.parametrize("form", FORMS)
async def test_many_conversations_on_one_llm(form: str) -> None:
    def rule(question: str, prefix: str, sentence: str) -> str:
        return sentence.replace(BAD, f"Asked by {question}.")

    llm = AlignedLLM(
        replaying(lambda question: f"I know {question}. {BAD} So says {question}.", seed=1),
        scripted_aligner(rule),
    )

    async def talk(name: str) -> list[str]:
        engine = simple(llm)
        shown = [await ask(engine, form, name) for _ in range(2)]
        assert shown == stored(engine)
        return shown

    names = [f"canary-{number}-end" for number in range(25)]
    talks = await asyncio.gather(*map(talk, names))
    assert talks == [[f"I know {name}. Asked by {name}. So says {name}."] * 2 for name in names]


def test_a_streamed_response_is_its_text() -> None:
    engine = simple(AlignedLLM(replaying(), mending()))
    response = engine.stream_chat(QUESTION)
    assert isinstance(response, StreamingAgentChatResponse)
    assert "".join(response.response_gen) == str(response) == response.response == CORRECTED
