"""`AlignerRunnable`: an aligner as a step of a LangChain chain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from pydantic import ConfigDict, Field

from aligner_integrations.aligner import Aligner
from aligner_integrations.batch import shared
from aligner_integrations.correction import Segment
from aligner_integrations.langchain.answers import (
    AnswerStream,
    MappingStream,
    mapping_cure,
    open_answer,
    slices,
)
from aligner_integrations.langchain.jobs import Steps, apart, arun, inside, run
from aligner_integrations.langchain.messages import correct_message, correct_text
from aligner_integrations.langchain.question import find_question, question_text
from aligner_integrations.langchain.sources import AsyncSource, Source, aclose, close
from aligner_integrations.options import CorrectionOptions, check_aligner, load_bundled
from aligner_integrations.resilience import WITHHELD_TEXT, OnError
from aligner_integrations.stream import StreamCorrector

# What goes in is what comes out; a type checker is told `Any`, or no step that takes only text or only
# messages could follow.
Answer: TypeAlias = Any


class AlignerRunnable(RunnableSerializable[Answer, Answer]):
    """Corrects the answer of the chain before it: `prompt | model | AlignerRunnable()`.

    Takes text, a message, or a mapping with `question` and `answer` (text or a message), and gives the
    same kind back: in a mapping the `answer` is replaced and every other key passes. Streams go through
    sentence by sentence. Ids, metadata, usage, tool calls and blocks that are not text stay as they are;
    tool calls in a stream never overtake the text before them. An answer without text passes unchanged.

    The question is found without being passed along; `question.py` says how, `QuestionNotFoundError`
    what to do when it cannot be.

    Args:
        aligner: What corrects; without one the bundled model is loaded on first use.
        question_key: Under which key the chain's input holds the question, when it is none of
            `question`, `input`, `query`, `messages`. Also the key in a mapping input.
        on_error: What a failed correction does: `"raise"`, `"pass_through"` (the original is shown) or
            `"withhold"` (`withheld_text` is shown in its place).
        withheld_text: Stands for a sentence that was withheld.
        sentence_seconds: A correction that takes longer is dropped and has failed; None: no limit.
        answer_seconds: So long the corrections of one answer may take in all; None: no limit.
        feedback: Tells the aligner what to look for; can be a configurable field.
        edit_margin: Overrides the model's own margin, in logits; can be a configurable field.
        sink: Called with every segment once it is corrected, for what the corrected text does not
            say: edits, findings, stats. In async runs it is called in a worker thread.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    aligner: Aligner | None = Field(default=None, exclude=True)
    question_key: str | None = None
    on_error: OnError = "raise"
    withheld_text: str = WITHHELD_TEXT
    sentence_seconds: float | None = Field(default=None, gt=0.0)
    answer_seconds: float | None = Field(default=None, gt=0.0)
    feedback: str = ""
    edit_margin: float | None = Field(default=None, ge=0.0)
    sink: Callable[[Segment], None] | None = Field(default=None, exclude=True)

    def __init__(
        self,
        aligner: Aligner | None = None,
        *,
        question_key: str | None = None,
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
        sentence_seconds: float | None = None,
        answer_seconds: float | None = None,
        feedback: str = "",
        edit_margin: float | None = None,
        sink: Callable[[Segment], None] | None = None,
        name: str | None = None,
    ) -> None:
        check_aligner(aligner)
        # pydantic's own __init__ takes fields by name alone; the aligner may come first without one.
        super().__init__(  # type: ignore[call-arg]
            aligner=aligner,
            question_key=question_key,
            on_error=on_error,
            withheld_text=withheld_text,
            sentence_seconds=sentence_seconds,
            answer_seconds=answer_seconds,
            feedback=feedback,
            edit_margin=edit_margin,
            sink=sink,
            name=name,
        )

    @property
    def InputType(self) -> Any:
        """What it takes, for schemas."""
        return str | BaseMessage | dict[str, Any]

    @property
    def OutputType(self) -> Any:
        """What it gives, for schemas."""
        return self.InputType

    def invoke(self, input: Answer, config: RunnableConfig | None = None, **kwargs: Any) -> Answer:
        """Correct a finished answer."""
        _check(input, self._mapping_key)
        return self._call_with_config(self._correct, input, config)

    async def ainvoke(self, input: Answer, config: RunnableConfig | None = None, **kwargs: Any) -> Answer:
        """Correct a finished answer in a thread, so that the event loop goes on."""
        _check(input, self._mapping_key)
        return await self._acall_with_config(self._acorrect, input, config)

    def batch(
        self,
        inputs: list[Answer],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Answer]:
        """Correct many finished answers, in threads that share the model's forwards."""
        sharing = self._sharing() if len(inputs) > 1 else self
        return super(AlignerRunnable, sharing).batch(
            inputs, config, return_exceptions=return_exceptions, **kwargs
        )

    async def abatch(
        self,
        inputs: list[Answer],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Answer]:
        """Correct many finished answers, in threads that share the model's forwards."""
        sharing = self._sharing() if len(inputs) > 1 else self
        return await super(AlignerRunnable, sharing).abatch(
            inputs, config, return_exceptions=return_exceptions, **kwargs
        )

    def _sharing(self) -> AlignerRunnable:
        aligner = load_bundled() if self.aligner is None else self.aligner
        return self.model_copy(update={"aligner": shared(aligner)})

    def stream(self, input: Answer, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Answer]:
        """Correct a finished answer and yield it in parts."""
        _check(input, self._mapping_key)
        yield from self.transform(iter([input]), config)

    async def astream(
        self, input: Answer, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Answer]:
        """Correct a finished answer and yield it in parts, without blocking the event loop."""
        _check(input, self._mapping_key)

        async def once() -> AsyncIterator[Answer]:
            yield input

        async for part in self.atransform(once(), config):
            yield part

    def transform(
        self, input: Iterator[Answer], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Answer]:
        """Correct an answer while it comes; each sentence goes out as soon as it is corrected.

        Closing the iterator closes `input`, if that is a generator.
        """
        source = Source(input)
        parts = self._transform_stream_with_config(source, self._transform, config)
        try:
            # Not `yield from`: on an early close langchain-core would first read the input to its end
            # (for tracing), and the model would go on writing for nobody.
            for part in parts:  # noqa: UP028
                yield part
        finally:
            source.close()
            close(parts)

    async def atransform(
        self, input: AsyncIterator[Answer], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Answer]:
        """Correct an answer while it comes; the corrections run in threads."""
        source = AsyncSource(input)
        parts = self._atransform_stream_with_config(source, self._atransform, config)
        try:
            async for part in parts:
                yield part
        finally:
            await aclose(parts)
            await source.aclose()

    @property
    def _mapping_key(self) -> str:
        return self.question_key or "question"

    def _correct(
        self, input: Answer, run_manager: CallbackManagerForChainRun, config: RunnableConfig
    ) -> Answer:
        return apart(partial(self._session(run_manager, config).correct, input))

    async def _acorrect(
        self, input: Answer, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
    ) -> Answer:
        return await asyncio.to_thread(apart, partial(self._session(run_manager, config).correct, input))

    def _transform(
        self,
        input: Iterator[Answer],
        run_manager: CallbackManagerForChainRun,
        config: RunnableConfig,
    ) -> Iterator[Answer]:
        session = self._session(run_manager, config)
        for chunk in input:
            for piece in slices(chunk):
                yield from run(session.push(piece))
        yield from run(session.close())

    async def _atransform(
        self,
        input: AsyncIterator[Answer],
        run_manager: AsyncCallbackManagerForChainRun,
        config: RunnableConfig,
    ) -> AsyncIterator[Answer]:
        session = self._session(run_manager, config)
        async for chunk in input:
            for piece in slices(chunk):
                for part in await arun(session.push(piece)):
                    yield part
        for part in await arun(session.close()):
            yield part

    def _session(
        self,
        run_manager: CallbackManagerForChainRun | AsyncCallbackManagerForChainRun,
        config: RunnableConfig,
    ) -> _Session:
        return _Session(self, run_manager.run_id, run_manager.parent_run_id, tuple(run_manager.tags), config)


class _Session:
    """One run of the runnable: its question, once found, and the answer that is coming."""

    def __init__(
        self,
        runnable: AlignerRunnable,
        run_id: UUID,
        parent_run_id: UUID | None,
        tags: tuple[str, ...],
        config: RunnableConfig,
    ) -> None:
        self._runnable = runnable
        self._run_id = run_id
        self._parent_run_id = parent_run_id
        self._tags = tags
        self._config = config
        self._question: str | None = None
        self._stream: AnswerStream | None = None
        self._sink = inside(runnable.sink)

    def correct(self, answer: Answer) -> Answer:
        """Correct a finished answer."""
        if isinstance(answer, str):
            return correct_text(answer, self._open)
        if isinstance(answer, BaseMessage):
            return correct_message(answer, self._open)
        self._take_question(answer[self._runnable._mapping_key])
        return {**answer, "answer": self.correct(answer["answer"])}

    def push(self, chunk: Answer) -> Steps[list[Answer]]:
        """Take a chunk of an answer; what can be sent comes of it."""
        if self._stream is None:
            if isinstance(chunk, Mapping):
                key = self._runnable._mapping_key
                self._stream = MappingStream(self._open, question_key=key, found=self._take_question)
            else:
                self._stream = open_answer(chunk, self._open)
        return (yield from self._stream.push(chunk))

    def close(self) -> Steps[list[Answer]]:
        """End the answer; what is left of it comes of it."""
        return (yield from self._stream.close()) if self._stream is not None else []

    def _take_question(self, value: object) -> None:
        """Take the question that the input itself holds."""
        self._question = question_text(value) or None  # an empty one is none

    def _open(self, text: str, message_id: str | None) -> StreamCorrector:
        runnable = self._runnable
        if self._question is None:
            self._question = find_question(
                text,
                run_id=self._run_id,
                parent_run_id=self._parent_run_id,
                tags=self._tags,
                config=self._config,
                question_key=runnable.question_key,
                message_id=message_id,
            )
        return CorrectionOptions.of(runnable).open(self._question, self._sink)


def _check(answer: object, key: str) -> None:
    """Refuse early what no correction can be made of."""
    if isinstance(answer, Mapping):
        if key not in answer or "answer" not in answer:
            raise TypeError(mapping_cure(key))
        answer = answer["answer"]
    if not isinstance(answer, (str, BaseMessage)):
        raise TypeError(
            f"AlignerRunnable takes a str, a message or a mapping with {key!r} and 'answer', got "
            f"{type(answer).__name__}; put a step before it that gives one, for example StrOutputParser()"
        )
