"""Put back what a correction lost, where it is clear where it stood. Nothing is ever taken away."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from aligner_integrations.safeguards.held import (
    citation_marks,
    citations,
    code_blocks,
    named_links,
    without_code,
)
from aligner_integrations.safeguards.wording import is_refusal

_STOPS, _CLOSERS = ".!?…。！？।؟:;", "\"'”’)*_"
# So much is put back at most; each is looked for in the whole text.
_MOST = 100


def restore_code(original: str, proposed: str) -> str:
    """Return `proposed` with the fences of code that stands there word for word without them.

    A fence that is still open at the end is closed, if all of the original's are.
    """
    blocks = code_blocks(original)
    if not blocks or not all(block.closed for block in blocks) or is_refusal(proposed):
        return proposed
    there = code_blocks(proposed)
    if there and not there[-1].closed:
        fence = there[-1].opening.split("`")[0].split("~")[0] + _fence(there[-1].opening)
        proposed += ("" if proposed.endswith("\n") else "\n") + fence
        there = code_blocks(proposed)
    known = {block.code for block in there}
    for block in blocks[:_MOST]:
        body = block.body if block.body.endswith("\n") else block.body + "\n"
        if block.code in known or not block.code:
            continue
        padded = f"\n{proposed}\n"
        at = padded.find(f"\n{body}")
        if at < 0 or padded.find(f"\n{body}", at + 1) >= 0:
            continue
        if any(other.start < at + len(body) and at < other.end for other in there):
            continue
        closing = original[block.start : block.end].rstrip().rpartition("\n")[2]
        after = proposed[at + len(body) - 1 :]
        proposed = f"{proposed[:at]}{block.opening}\n{body}{closing}" + (after or "")
        there = code_blocks(proposed)
    return proposed


def restore_links(original: str, proposed: str) -> str:
    """Return `proposed` with the addresses of links whose names stand there once, without them."""
    if is_refusal(proposed):
        return proposed
    for name, address in named_links(original)[:_MOST]:
        alone = proposed.count(name) == 1 and without_code(proposed).count(name) == 1
        if address in proposed or not alone or any(name in other for other, _ in named_links(proposed)):
            continue
        if re.search(rf"(?<![\w\[]){re.escape(name)}(?![\w\]])", proposed):
            proposed = proposed.replace(name, f"[{name}]({address})")
    return proposed


def restore_citations(original: str, proposed: str) -> str:
    """Return `proposed` with the citation marks that `original` has and it lacks, such as `[1]`.

    They stand at its end, before the closing stop or after it as they did in the original; what opened
    the original opens it again. A sentence that was dropped, and a refusal, gets none.
    """
    marks = citations(original)
    if not marks or not proposed.strip() or is_refusal(proposed):
        return proposed
    left = Counter(mark[0] for mark in citation_marks(proposed))
    opening = inner = outer = ""
    opens, read = True, 0
    stop, _ = _closing(original)
    for mark in marks:
        opens = opens and not original[read : mark.start()].strip()
        read = mark.end()
        if left[mark[0]] > 0:
            left[mark[0]] -= 1
        elif opens:
            opening += f"{mark[0]} "
        else:
            spaced = f" {mark[0]}" if original[mark.start() - 1].isspace() else mark[0]
            inner, outer = (inner + spaced, outer) if mark.start() < stop else (inner, outer + spaced)
    stop, end = _closing(proposed)
    return opening + proposed[:stop] + inner + proposed[stop:end] + outer + proposed[end:]


def _closing(text: str) -> tuple[int, int]:
    """Return where the closing stop of `text` begins, and where text ends; both the same without a stop."""
    end = body = len(text.rstrip())
    for mark in reversed(citation_marks(text)):
        if text[mark.end() : body].strip():
            break
        body = mark.start()
    bare = text[:body].rstrip().rstrip(_CLOSERS)
    stem = len(bare.rstrip(_STOPS))
    return (stem if stem < len(bare) else end), end


def _fence(opening: str) -> str:
    match = re.search(r"`{3,}|~{3,}", opening)
    return match[0] if match else ""


# Check -> what puts back the things that it looks for.
REPAIRS: dict[str, Callable[[str, str], str]] = {
    "code_changed": restore_code,
    "links_lost": restore_links,
    "citations_lost": restore_citations,
}
