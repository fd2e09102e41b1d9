"""The closed loop: upstream goes on from the corrected text, not from what it wrote itself.

This is Stream Aligner's own method (AAAI 2025, section 3): sentence k is corrected, and sentence k + 1 is
written after the corrected one. Here upstream is interrupted only where a sentence did change; the paper's
scripts ask anew after every sentence.
"""

from __future__ import annotations

import re

from aligner_integrations.correction import Segment
from aligner_integrations.stream import StreamCorrector

MAX_RESTARTS = 8
_BREAK = re.compile(r"\r?\n")


class ClosedLoop:
    """One answer whose upstream is asked anew after each sentence that changed.

    Who drives it asks upstream, feeds what comes, and takes the steps that wait. Once it is `stale`, what
    upstream is still writing follows text that nobody will see: close it, call `restart`, and ask for what
    comes after the text that was shown, without the white space at its end, because most models continue
    badly after that. At the end of upstream call `end`.

    Where a sentence was dropped, upstream is not asked anew: what it is to continue is what it was. After
    `max_restarts` it is left alone, and sentences are corrected on their way out only.
    """

    def __init__(self, corrector: StreamCorrector, *, max_restarts: int = MAX_RESTARTS) -> None:
        if max_restarts < 0:
            raise ValueError(f"max_restarts must be at least 0, got {max_restarts}")
        self._corrector = corrector
        self._left = max_restarts
        self._tail = ""  # the white space at the end of the shown text
        self._lead: str | None = None  # at a seam: the white space with which upstream goes on
        self._ended = False
        self.restarts = 0
        self.stale = False

    @property
    def waiting(self) -> bool:
        """Whether there is anything for `step` to do."""
        return not self.stale and self._corrector.waiting

    def feed(self, text: str) -> bool:
        """Take text of upstream; return whether anything waits for `step`."""
        if self._lead is not None:
            rest = text.lstrip()
            self._lead += text[: len(text) - len(rest)]
            if not rest:
                return self.waiting
            text = self._join() + rest
        if text:
            self._corrector.feed(text)
        return self.waiting

    def step(self) -> Segment:
        """Correct the next sentence that waits; raises as `StreamCorrector.step` does."""
        segment = self._corrector.step()
        core = segment.text.rstrip()
        self._tail = segment.text[len(core) :] if core else self._tail + segment.text
        # After the last sentence of an answer there is nothing that could follow from it.
        is_last = self._ended and not self._corrector.waiting
        # A dropped one leaves the prefix as it was: upstream would say the same again.
        is_dropped = not segment.text.strip()
        self.stale = segment.changed and self._left > 0 and not is_last and not is_dropped
        return segment

    def restart(self) -> None:
        """Throw away what upstream wrote after the sentence that changed."""
        self._corrector.discard()
        self._lead = ""
        self._ended = self.stale = False
        self._left -= 1
        self.restarts += 1

    def release(self) -> list[Segment]:
        """End the answer; return what is left of it as it came, uncorrected."""
        return self._corrector.release()

    def end(self, *, last: bool = True) -> bool:
        """Take it that upstream has ended; return whether anything waits for `step`.

        Without `last` it has not: what it writes now is no prose, but follows from what was.
        """
        self._ended = last
        if joint := self._join():
            self._corrector.feed(joint)
        self._corrector.end()
        return self.waiting

    def _join(self) -> str:
        """Return what is still to be shown of the white space that upstream wrote at a seam.

        A space more or less is nothing; a new line, and how far it is indented, is.
        """
        lead, self._lead = self._lead or "", None
        breaks = [found.start() for found in _BREAK.finditer(lead)]
        shown = self._tail.count("\n")
        if not self._tail or (breaks and lead.startswith(self._tail)):
            return lead[len(self._tail) :]
        return lead[breaks[shown] :] if len(breaks) > shown else ""
