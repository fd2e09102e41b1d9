"""What a streaming handler hands on: corrected segments, and changes to text that is already shown."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from aligner_integrations.correction import Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSegment(Segment):
    """A corrected segment, and the model run whose answer it belongs to."""

    run_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class TextUpdate:
    """A change to what is shown of one model run's answer: characters `start` to `end` become `text`.

    Text that has just come from the model is appended (`start == end`, no `segment`): it is provisional.
    When its sentence has been corrected, an update with the `segment` covers the sentence; `text` is then
    what stays. Applied in order, the updates leave the corrected answer.
    """

    run_id: UUID
    start: int
    end: int
    text: str
    segment: Segment | None = None

    @property
    def settled(self) -> bool:
        """Whether this text has been corrected and stays."""
        return self.segment is not None

    def apply(self, shown: str) -> str:
        """Return what is shown after the update of what was shown before."""
        return shown[: self.start] + self.text + shown[self.end :]
