"""Cut a text as a stream would, for the tests of sentences."""

from __future__ import annotations

from collections.abc import Iterable

from aligner_integrations.sentences import Piece, SentenceBuffer


def cut(chunks: Iterable[str], *, max_chars: int = 2000) -> list[Piece]:
    buffer = SentenceBuffer(max_chars=max_chars)
    pieces = [piece for chunk in chunks for piece in buffer.push(chunk)]
    return pieces + buffer.flush()


def with_kinds(pieces: list[Piece]) -> list[tuple[str, str]]:
    return [(str(piece), piece.kind) for piece in pieces]
