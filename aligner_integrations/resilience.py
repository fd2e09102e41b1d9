"""What is shown when a correction fails: the caller's choice, never a silent swallow."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from aligner_integrations.correction import Finding
from aligner_integrations.errors import AlignerError

OnError: TypeAlias = Literal["raise", "pass_through", "withhold"]

WITHHELD_TEXT = "[This part of the answer could not be checked.]"

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ErrorPolicy:
    """Decides for one answer, or one batch, what a failed correction shows. Logs the first failure only."""

    on_error: OnError = "raise"
    withheld_text: str = WITHHELD_TEXT
    _logged: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.on_error not in get_args(OnError):
            raise ValueError(f"on_error must be one of {', '.join(get_args(OnError))}; got {self.on_error!r}")
        if not isinstance(self.withheld_text, str):
            raise TypeError(f"withheld_text must be a str, got {type(self.withheld_text).__name__}")

    def recover(self, error: AlignerError, original: str) -> tuple[str, Finding]:
        """Return the text to show in place of a correction, and the finding that says so.

        Raises:
            AlignerError: `error` itself, when `on_error` is `"raise"`.
        """
        if self.on_error == "raise":
            raise error
        if not self._logged:
            self._logged = True
            shown = "the original is shown" if self.on_error == "pass_through" else "the text is withheld"
            _log.warning("a correction failed with %s; %s", type(error).__name__, shown)
        if self.on_error == "pass_through":
            return original, Finding("correction_failed", str(error), "kept_original")
        return self.withheld_text, Finding("correction_failed", str(error), "withheld")
