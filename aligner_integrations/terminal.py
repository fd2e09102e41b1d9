"""What the `aligner` command reads from standard input, and how it shows text and figures."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from aligner_integrations.correction import Correction, Edit, Segment


def marked(original: str, edits: Sequence[Edit], *, plain: bool = False) -> Text:
    """Return `original` with its edits shown.

    What goes is struck in red and what comes is underlined in green; with `plain`, where there is
    no colour, it reads ~~what goes~~ **what comes**.
    """
    text, position = Text(), 0
    for edit in edits:
        text.append(original[position : edit.start])
        for part, mark, style in (
            (original[edit.start : edit.end], "~~", "red strike"),
            (edit.replacement, "**", "green underline"),
        ):
            if part:
                text.append(f"{mark}{part}{mark}" if plain else part, style=style)
        position = edit.end
    return text.append(original[position:])


def show(original: str, corrected: Correction | Segment) -> None:
    """Show a correction: on a terminal with its edits marked, else the corrected text alone."""
    console = Console()
    if console.is_terminal:
        console.print(marked(original, corrected.edits), end="", soft_wrap=True, highlight=False)
    else:
        _write(corrected.text)
    sys.stdout.flush()


def _write(text: str) -> None:
    """Write text; bytes that are no UTF-8, which came in as lone surrogates, go out as they came."""
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))


def read_chunks() -> Iterator[str]:
    """Yield standard input as it arrives: what is there now, not what fills a buffer."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    while block := os.read(sys.stdin.fileno(), 65536):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def show_report(report: dict[str, dict[str, str]]) -> None:
    """Show titled rows: on a terminal as tables, else as lines with tabs."""
    console = Console()
    for title, rows in report.items():
        if console.is_terminal:
            table = Table(title=title, title_justify="left", show_header=False)
            for name, value in rows.items():
                table.add_row(name, value)
            console.print(table)
        else:
            sys.stdout.write("".join(f"{title}\t{name}\t{value}\n" for name, value in rows.items()))
