"""Text to ids and back, so that no text can forge a special token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import tokenizers  # type: ignore[import-untyped, unused-ignore]

from aligner_integrations.backends.base import Ids
from aligner_integrations.errors import ModelLoadError
from aligner_integrations.template import Span

# tokenizer.json does not say which token ends a text: the first of these, unless told otherwise.
_END_TOKENS = ("<|end|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>")
# No character takes more tokens than this; so many unfinished ones in a row are damage.
_LONGEST = 4


class Tokenizer:
    """A Hugging Face `tokenizer.json`, split in two.

    Special tokens come from trusted spans alone. All other text goes through a plain copy of the
    tokenizer that knows no added tokens, so `</s>` inside a question is four ordinary characters.
    """

    def __init__(self, source: str, *, end_token: str | int | None = None) -> None:
        try:
            parts: dict[str, Any] = json.loads(source)
            self._full = tokenizers.Tokenizer.from_str(source)
            self._plain = tokenizers.Tokenizer.from_str(_plain_source(source, inner=False))
            self._inner = tokenizers.Tokenizer.from_str(_plain_source(source, inner=True))
            added = [token for token in parts.get("added_tokens") or () if not _is_blank(token["content"])]
        except Exception as error:  # tokenizers raises bare Exception for what it cannot read
            raise ModelLoadError(f"not a valid tokenizer.json: {error}") from error
        self._full.no_truncation()
        self._full.no_padding()
        self._special = {str(token["content"]): int(token["id"]) for token in added}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._opens_once = any(
            step.get("prepend_scheme") == "first" for step in _steps(parts, "pre_tokenizer")
        )
        self.special_ids: frozenset[int] = frozenset(self._special.values())
        # One more than the highest id: ids may have gaps.
        self.vocab_size: int = 1 + max(self._full.get_vocab(with_added_tokens=True).values(), default=-1)
        if isinstance(end_token, int):
            end_token = self._full.id_to_token(end_token) or f"token {end_token}"
        names = _END_TOKENS if end_token is None else (end_token,)
        ends = [end for end in map(self.token_id, names) if end is not None]
        if not ends:
            raise ModelLoadError(f"the tokenizer has no end-of-text token; looked for {', '.join(names)}")
        self.eos_id: int = ends[0]
        self._start = self._find_start()

    @classmethod
    def from_file(cls, path: Path, *, end_token: str | int | None = None) -> Tokenizer:
        """Load a `tokenizer.json`; `end_token` is the end-of-text token or its id."""
        try:
            return cls(path.read_text(encoding="utf-8"), end_token=end_token)
        except (OSError, ValueError, ModelLoadError) as error:
            raise ModelLoadError(f"cannot load {path}: {error}") from error

    @classmethod
    def from_str(cls, source: str) -> Tokenizer:
        """Load from the text of a `tokenizer.json`."""
        return cls(source)

    def encode(self, spans: Sequence[Span]) -> Ids:
        """Return the ids of a prompt; only trusted spans may hold special tokens.

        Neighbouring plain text is encoded as one string, trusted or not, as the published weights saw
        it. What the post-processor puts before a text (`<s>` for Llama) comes first.
        """
        runs: list[int | str] = []
        for span in spans:
            for part in self._split(span.text) if span.trusted else (span.text,):
                if isinstance(part, str) and runs and isinstance(runs[-1], str):
                    runs[-1] += part
                elif part != "":
                    runs.append(part)
        ids: Ids = [] if runs[:1] == self._start[:1] else list(self._start)  # never twice
        for index, run in enumerate(runs):
            ids += [run] if isinstance(run, int) else self._encode(run, self._opens_once and index > 0)
        return ids

    def encode_text(self, text: str) -> Ids:
        """Return the ids of untrusted text: never a special or added token, whatever it holds."""
        return self._encode(text, False)

    def decode(self, ids: Ids) -> str:
        """Return the text of `ids`, special tokens left out."""
        return cast(str, self._full.decode(ids, skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        """Return the id of `token`, or None when there is no such token."""
        return cast(int | None, self._full.token_to_id(token))

    def special_tokens_in(self, text: str) -> frozenset[str]:
        """Return the special tokens that `text` spells out."""
        return frozenset(self._special_text.findall(text))

    def _split(self, text: str) -> Iterator[int | str]:
        position = 0
        for match in self._special_text.finditer(text):
            yield text[position : match.start()]
            yield self._special[match[0]]
            position = match.end()
        yield text[position:]

    def _encode(self, text: str, inner: bool) -> Ids:
        if not text:
            return []
        # A lone surrogate has no UTF-8 form, and the tokenizer would raise; it becomes U+FFFD.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        encoding = (self._inner if inner else self._plain).encode(text, add_special_tokens=False)
        ids: Ids = encoding.ids
        if self.special_ids.isdisjoint(ids):
            return ids
        # A unigram model may hold "</s>" as an ordinary piece. Break the text inside each and go on.
        pieces: list[str] = []
        position = 0
        for token, (start, end) in zip(ids, encoding.offsets, strict=True):
            if token in self.special_ids:
                # A single character here is one that the vocabulary lacks: it has no ids of its own.
                pieces.append(text[position : start + 1 if end - start > 1 else start])
                position = start + 1
        first, *rest = (*pieces, text[position:])
        return self._encode(first, inner) + [token for piece in rest for token in self._encode(piece, True)]

    def _find_start(self) -> Ids:
        bare: Ids = self._full.encode("a", add_special_tokens=False).ids
        dressed: Ids = self._full.encode("a", add_special_tokens=True).ids
        places = (at for at in range(len(dressed)) if dressed[at : at + len(bare)] == bare)
        return dressed[: next(places, 0)]


class StreamingDetokenizer:
    """Ids in, text out, never half a character. Time is linear in the number of ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: Ids = []
        self._shown = 0  # how many of the window's ids are on screen already

    def push(self, token_id: int) -> str:
        """Take one id; return the text that it completes."""
        if token_id in self._tokenizer.special_ids:
            return ""
        self._window.append(token_id)
        text = self._fresh()
        if text.endswith("\ufffd") and len(self._window) - self._shown < _LONGEST:
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text

    def flush(self) -> str:
        """Return what is left; an unfinished character shows as U+FFFD."""
        text, self._window, self._shown = self._fresh(), [], 0
        return text

    def _fresh(self) -> str:
        # Whether a token opens with a space depends on the one before it: decode that too, cut it off.
        shown = self._tokenizer.decode(self._window[: self._shown])
        return self._tokenizer.decode(self._window)[len(shown) :]


def _is_blank(token: str) -> bool:
    return token.replace("▁", " ").isspace()


def _steps(parts: dict[str, Any], stage: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a tokenizer.json's stage, which is one step or a sequence of them."""
    step = parts.get(stage) or {}
    yield step
    yield from step.get(f"{stage.replace('_', '')}s", ())


def _plain_source(source: str, *, inner: bool) -> str:
    """Return a tokenizer.json without added tokens; runs of white space stay, they forge nothing.

    `inner` leaves out the mark that opens a text, for a piece that goes on in the middle of one.
    """
    parts: dict[str, Any] = json.loads(source)
    blank = [token for token in parts.get("added_tokens") or () if _is_blank(token["content"])]
    parts |= {"added_tokens": blank, "post_processor": None, "truncation": None, "padding": None}
    if inner:
        for step in _steps(parts, "pre_tokenizer"):
            if step.get("type") == "Metaspace":
                step["prepend_scheme"] = "never"
        for step in _steps(parts, "normalizer"):
            if step.get("type") == "Prepend":
                step["prepend"] = ""
    return json.dumps(parts)
