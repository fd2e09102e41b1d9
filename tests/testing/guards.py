"""Guards with one fault each, as steps of a chain: the kit has to find it, where it is and nowhere else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable

from aligner_integrations.testing.conformance import ReplayModel

CANARY = "ann.lee@example.org"
HIDDEN = "[REDACTED_EMAIL]"
ANSWER = f"You can ask her. Write to {CANARY} before noon. She answers within a day."
CLEAN = ANSWER.replace(CANARY, HIDDEN)
SENTENCES = ("You can ask her. ", f"Write to {HIDDEN} before noon. ", "She answers within a day.")
PROMPT = ChatPromptTemplate.from_messages([("human", "{question}")])


def upstream(**given: Any) -> ReplayModel:
    return ReplayModel(**{"answer": ANSWER, "seed": 1, "delay": 0.0, **given})


class Guard(RunnableSerializable[BaseMessage, str]):
    """Hides the address in a finished answer; on a stream it shows what `pieces` makes of the chunks."""

    pieces: Callable[[Iterator[str]], Iterator[str]]
    whole: Callable[[str], str] = lambda text: text.replace(CANARY, HIDDEN)
    fails_in: str = ""

    def invoke(self, input: BaseMessage, config: RunnableConfig | None = None, **kwargs: Any) -> str:
        return self._call_with_config(lambda message: self.whole(str(message.text)), input, config)

    async def ainvoke(self, input: BaseMessage, config: RunnableConfig | None = None, **kwargs: Any) -> str:
        if self.fails_in == "ainvoke":
            raise RuntimeError("no loop for me")
        return self.invoke(input, config)

    def transform(
        self, input: Iterator[BaseMessage], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[str]:
        def shown(chunks: Iterator[BaseMessage]) -> Iterator[str]:
            yield from self.pieces(str(chunk.text) for chunk in chunks)

        yield from self._transform_stream_with_config(input, shown, config)

    async def atransform(
        self, input: AsyncIterator[BaseMessage], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[str]:
        async def shown(chunks: AsyncIterator[BaseMessage]) -> AsyncIterator[str]:
            texts = [str(chunk.text) async for chunk in chunks]
            for piece in self.pieces(iter(texts)):
                yield piece

        async for piece in self._atransform_stream_with_config(input, shown, config):
            yield piece


def chain(pieces: Callable[[Iterator[str]], Iterator[str]], **given: Any) -> Runnable[Any, str]:
    return PROMPT | upstream() | Guard(pieces=pieces, **given)


def by_sentence(chunks: Iterator[str]) -> Iterator[str]:
    """The guard without a fault: a sentence leaves once it is whole."""
    text = ""
    for chunk in chunks:
        text += chunk
        while (end := text.find(". ")) >= 0:
            yield text[: end + 2].replace(CANARY, HIDDEN)
            text = text[end + 2 :]
    yield text


def raw(chunks: Iterator[str]) -> Iterator[str]:
    yield from chunks


def cut_in_two(chunks: Iterator[str]) -> Iterator[str]:
    """Looks at each piece alone: the address passes in halves."""
    text = "".join(chunks)
    middle = text.index(CANARY) + len(CANARY) // 2
    for piece in (text[:middle], text[middle:]):
        yield piece.replace(CANARY, HIDDEN)


def without_last_piece(chunks: Iterator[str]) -> Iterator[str]:
    yield from list(by_sentence(chunks))[:-1]


def without_a_space(chunks: Iterator[str]) -> Iterator[str]:
    first, *rest = by_sentence(chunks)
    yield from (first.rstrip(), *rest)


def one_sentence_twice(chunks: Iterator[str]) -> Iterator[str]:
    first, *rest = by_sentence(chunks)
    yield from (first, first, *rest)


def all_again_at_the_end(chunks: Iterator[str]) -> Iterator[str]:
    pieces = list(by_sentence(chunks))
    yield from (*pieces, "".join(pieces))


def all_at_once(chunks: Iterator[str]) -> Iterator[str]:
    yield "".join(by_sentence(chunks))


def one_word_more(chunks: Iterator[str]) -> Iterator[str]:
    yield from (*by_sentence(chunks), " Ζωή!")


class WithMetadata(ReplayModel):
    """A model that hides the address in its text, and keeps it among its metadata."""

    def _stream(self, *args: Any, **kwargs: Any) -> Any:
        for chunk in super()._stream(*args, **kwargs):
            chunk.message = AIMessageChunk(
                content=chunk.message.content, additional_kwargs={"original": [CANARY]}
            )
            yield chunk
