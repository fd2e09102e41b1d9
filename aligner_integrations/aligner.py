"""`Aligner`: template, tokenizer, backend, decoding and safeguards put together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner_integrations.backends.base import Backend
from aligner_integrations.backends.gathering import micro_batched
from aligner_integrations.config import AlignerConfig, DecodeConfig, Granularity
from aligner_integrations.correction import Correction
from aligner_integrations.defuse import Defuser
from aligner_integrations.errors import ModelLoadError, TemplateError
from aligner_integrations.errors import check_texts as check_texts
from aligner_integrations.model_folder import HubOptions, RunOptions, load_model
from aligner_integrations.resilience import (
    WITHHELD_TEXT,
    CircuitBreaker,
    ErrorPolicy,
    OnError,
)
from aligner_integrations.safeguards.policy import Safeguards, resolve_safeguards
from aligner_integrations.sentences import SentenceBuffer
from aligner_integrations.sentences import has_words as has_words
from aligner_integrations.template import CorrectionTemplate
from aligner_integrations.text_corrector import REWRITE_MARGIN as REWRITE_MARGIN
from aligner_integrations.text_corrector import TextCorrector
from aligner_integrations.tokenizer import Tokenizer

if TYPE_CHECKING:
    from aligner_integrations.correction import Segment
    from aligner_integrations.stream import StreamCorrector

BUNDLED_MODEL = Path(__file__).parent / "models" / "tiny"
_objects = itertools.count()


class Aligner(TextCorrector):
    """Corrects answers. One instance serves any number of threads and streams."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        config: AlignerConfig,
        *,
        template: CorrectionTemplate | None = None,
        decode: DecodeConfig | None = None,
        safeguards: Safeguards = "keep_original",
        defuse_markers: bool = True,
        source: str = "",
        max_batch_tokens: int = 8192,
        micro_batch_ms: float = 0.0,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self.source = source or f"object-{next(_objects)}"  # tells models apart, in the key of a cache
        self.template = template or CorrectionTemplate.named(config.template)
        if config.granularity == "sentence" and self.template.granularity == "answer":
            raise TemplateError(
                f"template {self.template.name!r} frames whole answers, but the model is sentence-level"
            )
        self.safeguard_policy = resolve_safeguards(safeguards, config.granularity)
        if decode is not None and not isinstance(decode, DecodeConfig):
            raise TypeError(f"decode must be a DecodeConfig, got {type(decode).__name__}")
        if not isinstance(max_batch_tokens, int) or max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens must be a whole number from 1 on, got {max_batch_tokens!r}")
        if not isinstance(micro_batch_ms, int | float) or not 0 <= micro_batch_ms < math.inf:
            raise ValueError(f"micro_batch_ms must be a number of milliseconds >= 0, got {micro_batch_ms!r}")
        if breaker is not None and not isinstance(breaker, CircuitBreaker):
            raise TypeError(f"breaker must be a CircuitBreaker or None, got {type(breaker).__name__}")
        self.breaker = breaker
        self.backend = micro_batched(backend, wait_ms=micro_batch_ms, max_tokens=max_batch_tokens)
        self.tokenizer = tokenizer
        self.config = config
        self.decode_config = decode or DecodeConfig(edit_margin=config.edit_margin)
        self.safeguards = safeguards
        self._defuser = Defuser.of(self.template, tokenizer, active=defuse_markers)
        self.max_batch_tokens = max_batch_tokens
        self.micro_batch_ms = micro_batch_ms
        self.keep_id = None if config.keep_token is None else tokenizer.token_id(config.keep_token)
        if config.keep_token is not None and self.keep_id is None:
            raise ModelLoadError(
                f"aligner.json names keep_token {config.keep_token!r}; the tokenizer lacks it"
            )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        backend: str = "auto",
        provider: str = "auto",
        template: str | CorrectionTemplate | None = None,
        decode: DecodeConfig | None = None,
        safeguards: Safeguards = "keep_original",
        defuse_markers: bool = True,
        device: str | None = None,
        dtype: str = "auto",
        threads: int | None = None,
        provider_options: dict[str, Any] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        max_batch_tokens: int = 8192,
        micro_batch_ms: float = 0.0,
        breaker: CircuitBreaker | None = None,
    ) -> Aligner:
        """Load a model folder, a repository of the hub, or the bundled model when none is given.

        Args:
            model: A folder, or a hub name `owner/name` where there is no folder of that name.
            backend: `"auto"` (ONNX where there is a `model.onnx`, else PyTorch), `"onnx"` or `"torch"`.
            provider: `"auto"`, `"tensorrt"`, `"cuda"` or `"cpu"`, for ONNX Runtime.
            template: The frame; without it that of `aligner.json` or of a known hub name holds.
            decode: How to decode; without it the folder's `edit_margin` holds.
            safeguards: `"keep_original"`, `"off"`, `{check: action}` or a `SafeguardPolicy` (its docstring).
            defuse_markers: Break the template's plain-text marks inside questions and answers, invisibly.
            device: `"cpu"`, `"cuda"`, ..., for PyTorch.
            dtype: `"auto"`, `"fp32"`, `"bf16"` or `"fp16"`, or PyTorch's names of these, for PyTorch.
            threads: Threads of one forward; all physical cores without it.
            provider_options: Handed to ONNX Runtime's provider as they are.
            revision: A commit, tag or branch of the hub's repository; a commit pins what is run.
            token: A token of the hub; the one that is saved without it.
            cache_dir: Where the hub's files are kept.
            local_files_only: Take what was fetched before, without a connection.
            max_batch_tokens: So many tokens share a forward, at most.
            micro_batch_ms: So long a stream waits for others to share a forward with.
            breaker: Stops asking a model that keeps failing; see `CircuitBreaker`.

        Raises:
            ModelLoadError: the model or a file of it is missing, damaged or refused.
        """
        run = RunOptions(backend, provider, provider_options, device, dtype, threads)
        hub = HubOptions(revision, token, cache_dir, local_files_only)
        parts = load_model(BUNDLED_MODEL if model is None else model, template=template, run=run, hub=hub)
        return cls(
            *(parts.backend, parts.tokenizer, parts.config),
            template=parts.template,
            decode=decode,
            safeguards=safeguards,
            defuse_markers=defuse_markers,
            source=parts.source,
            max_batch_tokens=max_batch_tokens,
            micro_batch_ms=micro_batch_ms,
            breaker=breaker,
        )

    def with_options(
        self, *, decode: DecodeConfig | None = None, safeguards: Safeguards | None = None
    ) -> Aligner:
        """Return an aligner that shares this one's loaded model and breaker and differs in these options."""
        return Aligner(
            self.backend,
            self.tokenizer,
            self.config,
            template=self.template,
            decode=self.decode_config if decode is None else decode,
            safeguards=self.safeguards if safeguards is None else safeguards,
            defuse_markers=self._defuser.active,
            source=self.source,
            max_batch_tokens=self.max_batch_tokens,
            micro_batch_ms=self.micro_batch_ms,
            breaker=self.breaker,
        )

    def __deepcopy__(self, memo: object) -> Aligner:
        """Return the aligner itself: it has no state that a copy would want apart."""
        return self

    @property
    def granularity(self) -> Granularity:
        """Whether the model corrects whole answers or one sentence at a time."""
        return self.config.granularity

    def __repr__(self) -> str:
        breaker = "" if self.breaker is None else f", breaker={self.breaker!r}"
        return (
            f"Aligner(template={self.template.name!r}, granularity={self.granularity!r}, "
            f"backend={self.backend.name!r}, provider={self.backend.provider!r}, "
            f"safeguards={self.safeguards!r}{breaker})"
        )

    def correct(
        self,
        question: str,
        answer: str,
        *,
        feedback: str = "",
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
        sentence_seconds: float | None = None,
        answer_seconds: float | None = None,
    ) -> Correction:
        """Correct a finished answer.

        A sentence-level model corrects it sentence by sentence, each after the corrected ones before
        it. A piece that does not fit the context stays as it is, with a finding. `on_error` to
        `answer_seconds` are those of a stream, see `StreamCorrector`.

        Raises:
            CorrectionFailedError: the model failed and `on_error` is `"raise"`.
            CorrectionTimeoutError: likewise, when a correction was late.
            InputTooLongError: likewise, when an answer-level model's context cannot hold the answer.
        """
        check_texts(question=question, answer=answer, feedback=feedback)
        from aligner_integrations.finished import correct_finished  # finished answers stand above this file

        errors = ErrorPolicy(on_error, withheld_text, sentence_seconds, answer_seconds)
        return correct_finished(self, question, answer, feedback=feedback, errors=errors)

    def correct_sentence(
        self, question: str, prefix: str, sentence: str, *, feedback: str = ""
    ) -> Correction:
        """Correct one sentence, given what the reader has already seen of the answer.

        Raises:
            CorrectionFailedError: the model failed.
            InputTooLongError: the sentence and its correction alone exceed the model's context.
            TemplateError: the model corrects whole answers only.
        """
        check_texts(question=question, prefix=prefix, sentence=sentence, feedback=feedback)
        if self.granularity != "sentence":
            raise TemplateError(
                f"template {self.template.name!r} corrects whole answers; use correct(question, answer)"
            )
        from aligner_integrations.stream import SentenceSession  # streams stand above this file

        session = SentenceSession(self, question, feedback)
        buffer = SentenceBuffer()
        for piece in (*buffer.push(prefix), *buffer.flush()):
            session.accept(piece)
        return session.correct(sentence)

    def correct_batch(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        feedback: str = "",
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
        sentence_seconds: float | None = None,
        answer_seconds: float | None = None,
    ) -> list[Correction]:
        """Correct (question, answer) pairs; the same as one by one, in the same order, but faster.

        A question that many pairs share is run once, and a small model corrects as many texts at a time
        as there are cores. With `on_error="raise"` the first pair that fails raises. `answer_seconds` is for
        each pair.
        """
        from aligner_integrations.batch import correct_batch  # batches stand above this file

        errors = ErrorPolicy(on_error, withheld_text, sentence_seconds, answer_seconds)
        return correct_batch(self, pairs, feedback=feedback, errors=errors)

    async def acorrect(
        self,
        question: str,
        answer: str,
        *,
        feedback: str = "",
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
        sentence_seconds: float | None = None,
        answer_seconds: float | None = None,
    ) -> Correction:
        """Correct a finished answer as `correct` does, in a thread of its own."""
        import asyncio  # a fifth of the time that importing this package takes; few need it

        return await asyncio.to_thread(
            self.correct,
            question,
            answer,
            feedback=feedback,
            on_error=on_error,
            withheld_text=withheld_text,
            sentence_seconds=sentence_seconds,
            answer_seconds=answer_seconds,
        )

    def stream(
        self,
        question: str,
        *,
        feedback: str = "",
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
        sentence_seconds: float | None = None,
        answer_seconds: float | None = None,
        sink: Callable[[Segment], None] | None = None,
    ) -> StreamCorrector:
        """Return a corrector for one answer that is still coming; see `StreamCorrector`."""
        from aligner_integrations.stream import StreamCorrector  # streams stand above this file

        return StreamCorrector(
            self,
            question,
            feedback=feedback,
            on_error=on_error,
            withheld_text=withheld_text,
            sentence_seconds=sentence_seconds,
            answer_seconds=answer_seconds,
            sink=sink,
        )

    def correct_stream(
        self,
        question: str,
        chunks: Iterable[str],
        *,
        feedback: str = "",
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
        sentence_seconds: float | None = None,
        answer_seconds: float | None = None,
    ) -> Iterator[Segment]:
        """Yield corrected segments of the answer that `chunks` brings, each as soon as it is done.

        Closing the iterator early closes `chunks` too, when it is a generator.
        """
        stream = self.stream(
            question,
            feedback=feedback,
            on_error=on_error,
            withheld_text=withheld_text,
            sentence_seconds=sentence_seconds,
            answer_seconds=answer_seconds,
        )
        return stream.correct_chunks(chunks)
