"""How to correct: what every surface here lets its user choose, and the aligner behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from aligner_integrations.aligner import Aligner
from aligner_integrations.correction import Segment
from aligner_integrations.resilience import WITHHELD_TEXT, ErrorPolicy, OnError
from aligner_integrations.stream import StreamCorrector

# By these a caller asks a provider for structured output; what comes is data, not prose.
_STRUCTURED = (
    *("response_format", "response_schema", "response_json_schema", "response_mime_type"),
    *("output_format", "format"),
)
_HOLDS_FORMAT = ("text", "output_config")  # under `format`
_HOLDS_OPTIONS = ("model_kwargs", "extra_body", "additional_kwargs")
_PLAIN = ("text", "text/plain")

_loading = threading.Lock()
_bundled: list[Aligner] = []


def load_bundled() -> Aligner:
    """Return the bundled aligner; it is loaded on first use and shared by the whole process."""
    with _loading:
        if not _bundled:
            _bundled.append(Aligner.from_pretrained())
        return _bundled[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionOptions:
    """The aligner (None: the bundled one) and how it corrects; the surfaces' docstrings explain each."""

    aligner: Aligner | None = None
    on_error: OnError = "raise"
    withheld_text: str = WITHHELD_TEXT
    sentence_seconds: float | None = None
    answer_seconds: float | None = None
    feedback: str = ""
    edit_margin: float | None = None

    def __post_init__(self) -> None:
        check_aligner(self.aligner)
        ErrorPolicy(**self.errors())  # checks them
        if not isinstance(self.feedback, str):
            raise TypeError(f"feedback must be a str, got {type(self.feedback).__name__}")
        if self.edit_margin is not None and not self.edit_margin >= 0:
            raise ValueError(f"edit_margin must be at least 0 (logits) or None, got {self.edit_margin}")

    @classmethod
    def of(cls, surface: object) -> CorrectionOptions:
        """Return the options that a surface has as fields of its own."""
        return cls(**{each.name: getattr(surface, each.name) for each in fields(cls)})

    def by_name(self) -> dict[str, Any]:
        """Return the options by name, to hand them on."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def errors(self) -> dict[str, Any]:
        """Return by name what says how long a correction may take, and what a failed one shows."""
        names = [each.name for each in fields(ErrorPolicy) if each.init]
        return {name: getattr(self, name) for name in names}

    def load(self) -> Aligner:
        """Return the aligner with its margin; the bundled one is loaded on first use."""
        aligner = self.aligner or load_bundled()
        if self.edit_margin is None:
            return aligner
        decode = replace(aligner.decode_config, edit_margin=self.edit_margin)
        return aligner.with_options(decode=decode)

    def open(self, question: str, sink: Callable[[Segment], None] | None = None) -> StreamCorrector:
        """Return a corrector for one answer to `question`."""
        return self.load().stream(question, feedback=self.feedback, **self.errors(), sink=sink)


def check_aligner(aligner: object) -> None:
    """Refuse what is no aligner.

    Raises:
        TypeError: `aligner` is neither an `Aligner` nor None.
    """
    if aligner is not None and not isinstance(aligner, Aligner):
        raise TypeError(
            f"aligner must be an Aligner or None, got {type(aligner).__name__}; "
            "Aligner.from_pretrained(...) loads one"
        )


def is_structured(model: object, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call's options, or the model's own, ask for structured output."""
    given = {name: getattr(model, name, None) for name in _STRUCTURED}
    models = (getattr(model, name, None) for name in _HOLDS_OPTIONS)
    calls = (kwargs.get(name) for name in _HOLDS_OPTIONS)
    for more in (*models, kwargs, *calls):
        given |= more if isinstance(more, Mapping) else {}
    asked = [given.get(name) for name in _STRUCTURED]
    holders = [given.get(name) for name in _HOLDS_FORMAT]
    asked += [each.get("format") for each in holders if isinstance(each, Mapping)]
    return any(each and each not in _PLAIN and each != {"type": "text"} for each in asked)
