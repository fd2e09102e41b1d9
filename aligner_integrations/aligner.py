"""`Aligner`: template, tokenizer, backend, decoding and safeguards put together."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from aligner_integrations.backends import load_backend
from aligner_integrations.backends.base import Backend, Ids
from aligner_integrations.config import AlignerConfig, DecodeConfig, Granularity
from aligner_integrations.correction import Correction, DecodeStats, Finding, make_edits
from aligner_integrations.decode import Decoded, PromptCache, draft_decode, greedy_decode
from aligner_integrations.errors import AlignerError, CorrectionFailedError, ModelLoadError, TemplateError
from aligner_integrations.resilience import WITHHELD_TEXT, ErrorPolicy, OnError
from aligner_integrations.safeguards import SafeguardPolicy, inspect_correction, is_kept, restore_citations
from aligner_integrations.sentences import SentenceBuffer
from aligner_integrations.template import CorrectionTemplate
from aligner_integrations.tokenizer import Tokenizer

if TYPE_CHECKING:
    from aligner_integrations.correction import Segment
    from aligner_integrations.stream import StreamCorrector

SafeguardMode: TypeAlias = Literal["keep_original", "off"]

BUNDLED_MODEL = Path(__file__).parent / "models" / "tiny"
# Within a rewrite the margin counts up to here, in logits: enough that copying does not stray, and not so
# much that it undoes the edit.
REWRITE_MARGIN = 2.0
_objects = itertools.count()
_WORD = re.compile(r"\w")


class Aligner:
    """Corrects answers. One instance serves any number of threads and streams."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        config: AlignerConfig,
        *,
        template: CorrectionTemplate | None = None,
        decode: DecodeConfig | None = None,
        safeguards: SafeguardMode = "keep_original",
        source: str = "",
    ) -> None:
        self.source = source or f"object-{next(_objects)}"  # tells models apart, in the key of a cache
        self.template = template or CorrectionTemplate.named(config.template)
        if config.granularity == "sentence" and self.template.granularity == "answer":
            raise TemplateError(
                f"template {self.template.name!r} frames whole answers, but the model is sentence-level"
            )
        if safeguards not in get_args(SafeguardMode):
            raise ValueError(f"safeguards must be 'keep_original' or 'off', got {safeguards!r}")
        if decode is not None and not isinstance(decode, DecodeConfig):
            raise TypeError(f"decode must be a DecodeConfig, got {type(decode).__name__}")
        self.backend = backend
        self.tokenizer = tokenizer
        self.config = config
        self.decode_config = decode or DecodeConfig(edit_margin=config.edit_margin)
        self.safeguards: SafeguardMode = safeguards
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
        safeguards: SafeguardMode = "keep_original",
    ) -> Aligner:
        """Load a model folder, or the bundled model when none is given.

        Args:
            model: A folder with `model.onnx`, `tokenizer.json` and `aligner.json`.
            backend: `"auto"` or `"onnx"`.
            provider: `"auto"`, `"tensorrt"`, `"cuda"` or `"cpu"`.
            template: The frame, for a folder without `aligner.json`.
            decode: How to decode; without it the folder's `edit_margin` holds.
            safeguards: `"keep_original"` puts a harmful correction back to the answer, `"off"` does not.

        Raises:
            ModelLoadError: the folder or a file in it is missing or damaged.
        """
        if model is not None and not isinstance(model, str | Path):
            raise TypeError(f"model must be a str or Path, got {type(model).__name__}")
        folder = BUNDLED_MODEL if model is None else Path(model)
        if not folder.is_dir():
            raise ModelLoadError(
                f"model folder {folder} does not exist; give a folder that holds model.onnx, tokenizer.json "
                "and aligner.json (hub names cannot be loaded yet: download the checkpoint and export it)"
            )
        if isinstance(template, CorrectionTemplate | None):
            frame = template
        else:
            frame = CorrectionTemplate.named(template)
        config = _load_config(folder, frame)
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
        name = "onnx" if backend == "auto" else backend
        runner = load_backend(name, folder, provider=provider)
        files = [(each.name, each.stat()) for each in sorted(folder.iterdir())]
        stamps = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
        source = sha256(repr((folder.resolve(), stamps)).encode()).hexdigest()[:16]
        return cls(
            runner, tokenizer, config, template=frame, decode=decode, safeguards=safeguards, source=source
        )

    def with_options(
        self, *, decode: DecodeConfig | None = None, safeguards: SafeguardMode | None = None
    ) -> Aligner:
        """Return an aligner that shares this one's loaded model and differs in these options."""
        return Aligner(
            self.backend,
            self.tokenizer,
            self.config,
            template=self.template,
            decode=self.decode_config if decode is None else decode,
            safeguards=self.safeguards if safeguards is None else safeguards,
            source=self.source,
        )

    def __deepcopy__(self, memo: object) -> Aligner:
        """Return the aligner itself: it has no state that a copy would want apart."""
        return self

    @property
    def granularity(self) -> Granularity:
        """Whether the model corrects whole answers or one sentence at a time."""
        return self.config.granularity

    def __repr__(self) -> str:
        return (
            f"Aligner(template={self.template.name!r}, granularity={self.granularity!r}, "
            f"backend={self.backend.name!r}, provider={self.backend.provider!r}, "
            f"safeguards={self.safeguards!r})"
        )

    def correct(
        self,
        question: str,
        answer: str,
        *,
        feedback: str = "",
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
    ) -> Correction:
        """Correct a finished answer.

        A sentence-level model corrects it sentence by sentence, each after the corrected ones before
        it. A piece that does not fit the context stays as it is, with a finding. `on_error` and
        `withheld_text` are those of a stream.

        Raises:
            CorrectionFailedError: the model failed and `on_error` is `"raise"`.
            InputTooLongError: likewise, when an answer-level model's context cannot hold the answer.
        """
        check_texts(question=question, answer=answer, feedback=feedback)
        from aligner_integrations.finished import correct_finished  # finished answers stand above this file

        errors = ErrorPolicy(on_error, withheld_text)
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
    ) -> list[Correction]:
        """Correct (question, answer) pairs; the same as one by one, in the same order, but faster.

        A question that many pairs share is run once, and a small model corrects as many texts at a time
        as there are cores. With `on_error="raise"` the first pair that fails raises.
        """
        from aligner_integrations.batch import correct_batch  # batches stand above this file

        return correct_batch(self, pairs, feedback=feedback, on_error=on_error, withheld_text=withheld_text)

    async def acorrect(
        self,
        question: str,
        answer: str,
        *,
        feedback: str = "",
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
    ) -> Correction:
        """Correct a finished answer as `correct` does, in a thread of its own."""
        import asyncio  # a fifth of the time that importing this package takes; few need it

        return await asyncio.to_thread(
            self.correct, question, answer, feedback=feedback, on_error=on_error, withheld_text=withheld_text
        )

    def stream(
        self,
        question: str,
        *,
        feedback: str = "",
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
        sink: Callable[[Segment], None] | None = None,
    ) -> StreamCorrector:
        """Return a corrector for one answer that is still coming; see `StreamCorrector`."""
        from aligner_integrations.stream import StreamCorrector  # streams stand above this file

        return StreamCorrector(
            self, question, feedback=feedback, on_error=on_error, withheld_text=withheld_text, sink=sink
        )

    def correct_stream(
        self,
        question: str,
        chunks: Iterable[str],
        *,
        feedback: str = "",
        on_error: OnError = "raise",
        withheld_text: str = WITHHELD_TEXT,
    ) -> Iterator[Segment]:
        """Yield corrected segments of the answer that `chunks` brings, each as soon as it is done.

        Closing the iterator early closes `chunks` too, when it is a generator.
        """
        stream = self.stream(question, feedback=feedback, on_error=on_error, withheld_text=withheld_text)
        return stream.correct_chunks(chunks)

    # What follows is for `stream.py`, which keeps the state of one answer.

    def encode_prompt(self, question: str, prefix: str, text: str, feedback: str) -> Ids:
        """Return the ids of the prompt for `text`: a sentence, or a whole answer without prefix."""
        if self.template.granularity == "answer":
            spans = self.template.spans(question=question, answer=text, feedback=feedback)
        else:
            spans = self.template.spans(question=question, prefix=prefix, sentence=text, feedback=feedback)
        return self.tokenizer.encode(spans)

    def run(
        self, prompt: Ids, reference: Ids, max_new_tokens: int, cache: PromptCache | None = None
    ) -> Decoded:
        """Decode a correction; whatever the backend raises becomes a `CorrectionFailedError`."""
        decode = draft_decode if self.decode_config.draft else greedy_decode
        margin = self.decode_config.edit_margin
        try:
            return decode(
                self.backend,
                prompt,
                reference,
                config=self.decode_config,
                eos_id=self.tokenizer.eos_id,
                max_new_tokens=max_new_tokens,
                keep_id=self.keep_id,
                cache=cache,
                # With a keep token the margin is mostly spent on that one decision: once the model means
                # to edit, holding it to the copy at any price would undo the edit.
                draft_margin=None if self.keep_id is None else min(margin, REWRITE_MARGIN),
            )
        except AlignerError:
            raise
        except Exception as error:  # backends share no base class of errors
            raise CorrectionFailedError(
                f"the model failed while correcting: {type(error).__name__}: {error}"
            ) from error

    def finish(
        self,
        question: str,
        margins: tuple[str, str, str],
        reference: Ids,
        decoded: Decoded,
        policy: SafeguardPolicy,
        findings: tuple[Finding, ...] = (),
    ) -> Correction:
        """Turn what was decoded into a correction, past the safeguards.

        `margins` is what was corrected as (lead, core, tail); only the core was shown to the model.
        """
        core = margins[1]
        # The same ids mean the same text: never through decoding, which could lose what ids cannot hold.
        same = decoded.kept or decoded.ids == reference
        proposed = core if same else self.tokenizer.decode(decoded.ids).strip()
        if decoded.stats.finish_reason != "eos" and not same:
            action = "kept_original" if self.safeguards == "keep_original" else "accepted"
            findings += (Finding("truncated", "the correction ended before it was complete", action),)
        shown = proposed
        if self.safeguards == "keep_original":
            shown = restore_citations(core, proposed)
            policy = replace(policy, special_tokens=self.tokenizer.special_tokens_in(proposed))
            findings += inspect_correction(question, core, shown, policy=policy)
            if shown != proposed and not is_kept(findings):
                findings += (Finding("citations_lost", "missing citations were put back", "repaired"),)
        answer = "".join(margins)
        text = answer if is_kept(findings) else _put_back(margins, shown)
        return Correction(
            question=question,
            answer=answer,
            text=text,
            proposed=_put_back(margins, proposed),
            edits=make_edits(answer, text),
            findings=findings,
            stats=decoded.stats,
        )

    def untouched(self, question: str, answer: str, *findings: Finding) -> Correction:
        """Return `answer` as its own correction, at no cost."""
        stats = DecodeStats(backend=self.backend.name, provider=self.backend.provider)
        return Correction(question, answer, answer, answer, findings=findings, stats=stats)


def has_words(text: str) -> bool:
    """Return whether there is anything to correct: a letter or a digit."""
    return _WORD.search(text) is not None


def check_texts(**texts: object) -> None:
    """Raise a `TypeError` that names the first argument that is not a string."""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a str, got {type(text).__name__}")


def _put_back(margins: tuple[str, str, str], text: str) -> str:
    """Return `text` between its margins; of a dropped sentence only a line break stays."""
    lead, _, tail = margins
    if not text:
        return tail if "\n" in tail else ""
    return lead + text + tail


def _load_config(folder: Path, template: CorrectionTemplate | None) -> AlignerConfig:
    """Return the folder's `aligner.json`, or for a plain checkpoint what `template` and its config say."""
    if template is None or (folder / "aligner.json").is_file():
        return AlignerConfig.load(folder)
    path = folder / "config.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        config = AlignerConfig(template.name, template.granularity)
        length = said.get("max_position_embeddings")
        return config if length is None else replace(config, max_length=int(length))
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ModelLoadError(f"{path} is not a valid config.json: {error}") from error
