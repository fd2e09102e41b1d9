"""How to correct: what every surface here lets its user choose, and the aligner behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from aligner_integrations.aligner import Aligner
from aligner_integrations.correction import Segment
from aligner_integrations.resilience import WITHHELD_TEXT, ErrorPolicy, OnError
from aligner_integrations.stream import StreamCorrector

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
    feedback: str = ""
    edit_margin: float | None = None

    def __post_init__(self) -> None:
        check_aligner(self.aligner)
        ErrorPolicy(self.on_error, self.withheld_text)  # checks both
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

    def open(self, question: str, sink: Callable[[Segment], None] | None = None) -> StreamCorrector:
        """Return a corrector for one answer to `question`."""
        aligner = self.aligner or load_bundled()
        if self.edit_margin is not None:
            decode = replace(aligner.decode_config, edit_margin=self.edit_margin)
            aligner = aligner.with_options(decode=decode)
        return aligner.stream(
            question,
            feedback=self.feedback,
            on_error=self.on_error,
            withheld_text=self.withheld_text,
            sink=sink,
        )


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
