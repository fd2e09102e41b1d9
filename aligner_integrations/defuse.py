"""The template's own marks inside what users wrote, broken so that they say nothing.

Published frames are plain text: an answer that holds `Correction:` behind two hashes would speak for the
aligner. In what the model is shown such a mark gets an invisible character after its first one. The reader
sees the same text, the tokenizer another one.
"""

from __future__ import annotations

import logging
import re
import unicodedata

from aligner_integrations.correction import Finding
from aligner_integrations.template import CorrectionTemplate
from aligner_integrations.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# U+2060 WORD JOINER has no width and forbids no more than a line break inside the mark. U+200B, a space of no
# width, becomes a real space in some normalizers of tokenizers.
JOINER = "\u2060"


class Defuser:
    """Defuses the marks that `pattern` finds; does nothing when it is None or `active` is False."""

    def __init__(self, pattern: re.Pattern[str] | None, *, active: bool = True) -> None:
        if not isinstance(active, bool):
            raise TypeError(f"defuse_markers must be a bool, got {type(active).__name__}")
        self._pattern = pattern
        self.active = active

    @classmethod
    def of(cls, template: CorrectionTemplate, tokenizer: Tokenizer, *, active: bool) -> Defuser:
        """Return the one for a template's marks, without those that are control tokens of the tokenizer."""
        pattern = template.plain_markers(tokenizer.special_tokens_in(template.frame))
        if active and pattern and tokenizer.encode_text(f"a{JOINER}s") == tokenizer.encode_text("as"):
            logger.warning(
                "the tokenizer drops U+2060, so a text can pose as the frame of template %r: marks are "
                "reported, but not defused",
                template.name,
            )
        return cls(pattern, active=active)

    def __call__(self, text: str) -> str:
        """Return `text` with its marks broken. What is defused already stays as it is."""
        if not self.active or self._pattern is None:
            return text
        parts: list[str] = []
        position = 0
        for match in self._pattern.finditer(_folded(text)):
            # A bar is a mark with the space before it, so its first character is that space.
            place = match.start() + (len(match[0]) > 1)
            parts += (text[position:place], JOINER)
            position = place
        return "".join((*parts, text[position:]))

    def undo(self, proposed: str, original: str) -> str:
        """Return what the model made of `original` with its marks whole again, as safeguards compare them.

        Where the original has such characters of its own, only an unchanged text can be told for sure.
        """
        if not self.active or self._pattern is None:
            return proposed
        if JOINER in original:
            return original if proposed == self(original) else proposed
        return proposed.replace(JOINER, "")

    def report(self, **texts: str) -> tuple[Finding, ...]:
        """Return a finding for each of the named texts that holds a mark."""
        if self._pattern is None:
            return ()
        check, action = ("marker_defused", "repaired") if self.active else ("template_marker", "accepted")
        marks = {name: sorted(set(self._pattern.findall(_folded(text)))) for name, text in texts.items()}
        return tuple(
            Finding(check, f"the {name} holds {', '.join(found)}", action)
            for name, found in marks.items()
            if found
        )


class _Folds(dict[int, int]):
    """What a character looks like to a tokenizer that normalizes (NFKC), where that is one character."""

    def __missing__(self, code: int) -> int:
        plain = unicodedata.normalize("NFKC", chr(code))
        self[code] = ord(plain) if len(plain) == 1 else code
        return self[code]


# Tokenizers of the SentencePiece family write a space as U+2581 and read it so.
_FOLDS = _Folds({0x2581: 0x20})


def _folded(text: str) -> str:
    """Return `text` with full-width and other look-alikes as ASCII, each in its place."""
    return text if text.isascii() else text.translate(_FOLDS)
