"""What a model folder says about itself, and how to decode."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

from aligner_integrations.errors import ModelLoadError

Granularity = Literal["answer", "sentence"]


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How a correction is decoded.

    `edit_margin` is in logits: the draft token (or the keep token) stays while the best token
    beats it by no more than this; 0 is plain greedy decoding. `max_new_tokens` and
    `max_draft_tokens` count tokens; `None` for `max_new_tokens` means as far as the context
    allows. `draft=False` decodes token by token, with the same result.

    `temperature` above 0 asks for sampling: where the margin does not let a token of the original stay,
    one is drawn, from the `top_k` best (0 for all) and of those the fewest whose chances reach `top_p`.
    The same `seed` draws the same each time, for each text by itself; `None` never the same twice. At
    temperature 0 the three have no effect. With an `edit_margin` of 0 this is plain sampling.
    """

    max_new_tokens: int | None = None
    draft: bool = True
    max_draft_tokens: int = 32
    edit_margin: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.max_draft_tokens < 1:
            raise ValueError(f"max_draft_tokens must be at least 1, got {self.max_draft_tokens}")
        if not self.edit_margin >= 0.0:
            raise ValueError(f"edit_margin is in logits and must be >= 0, got {self.edit_margin}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be 0 (greedy) or a finite number above, got {self.temperature}"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1 (all tokens), got {self.top_p}")
        for name, value in (("top_k", self.top_k), ("seed", 0 if self.seed is None else self.seed)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number from 0, got {value!r}")


@dataclass(frozen=True, slots=True)
class AlignerConfig:
    """The contents of `aligner.json` in a model folder.

    `max_length` is the context in tokens; `keep_token` is a first token that means "leave the
    sentence as it is"; `edit_margin` is the folder's calibrated default, in logits.
    """

    template: str
    granularity: Granularity = "answer"
    edit_margin: float = 0.0
    keep_token: str | None = None
    max_length: int = 2048
    languages: tuple[str, ...] = ()
    licence: str = ""
    description: str = ""
    data: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.template, str):
            raise TypeError(f"template must be a template's name, got {self.template!r}")
        if not isinstance(self.keep_token, str | None):
            raise TypeError(f"keep_token must be a token's text or null, got {self.keep_token!r}")
        if not self.edit_margin >= 0.0:
            raise ValueError(f"edit_margin is in logits and must be >= 0, got {self.edit_margin}")
        if self.granularity not in ("answer", "sentence"):
            raise ValueError(f"granularity must be 'answer' or 'sentence', got {self.granularity!r}")
        if self.max_length < 16:
            raise ValueError(f"max_length must be at least 16 tokens, got {self.max_length}")

    @classmethod
    def load(cls, folder: Path) -> AlignerConfig:
        """Read `aligner.json` from `folder`.

        Raises:
            ModelLoadError: the file is missing, not JSON, or lacks what it must say.
        """
        path = folder / "aligner.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            known = {field.name for field in fields(cls)}
            values = {key: value for key, value in cast(dict[str, Any], raw).items() if key in known}
            if "languages" in values:
                values["languages"] = tuple(values["languages"])
            return cls(**values)
        except FileNotFoundError as error:
            raise ModelLoadError(
                f"{path} does not exist; pass template='...' for a checkpoint without it"
            ) from error
        except (ValueError, TypeError, AttributeError, OSError) as error:
            raise ModelLoadError(f"{path} is not a valid aligner.json: {error}") from error
