"""Where a text breaks off: an end that no writer would choose, or fewer items than were asked for."""

from __future__ import annotations

import re

from aligner_integrations.safeguards.held import code_blocks
from aligner_integrations.safeguards.wording import ends_sentence, language_of, words

# No sentence ends on these, and no text with "2." alone on its last line.
_UNFINISHED = (
    " the a an and or of from your their its my our these into is are was were be than because while such "
    "between when if but whose "
)
_SHORT_WORDS = (
    " is it of on or so to up us we an as at be by do go he if in me my no am ok oh hi tv ai pc id uk eu km "
    "cm mm kg mg ml lb oz ft pm hz vs mr ms dr st jr sr "
)
# "are included in" wants an object; "logged in" does not.
_OPEN_VERB = re.compile(
    r"\b(?!(?:logged|signed|checked|plugged|turned|moved|closed|carried|passed|hand(?:ed)?)\b)"
    r"(?:[a-z]{2,}ed|found|shown|held|kept|written|given|known) (?:in|by|with|as|at|to)\s*\Z"
)
_LAST_WORD = re.compile(r"(?<![\w'’-])([A-Za-z]+)\s*\Z")
_BARE_HEADING = re.compile(r"\s*(?:#{1,6} [^\n]*|\*\*[^*\n]*[^*\n.!?)\"”]\*\*)")
_COUNTED = re.compile(r"^[ \t#*]*(?:Day |Step |Week |Part )?(\d{1,3})[ ]?(?:[.):]|(?= [A-Z]))", re.MULTILINE)
_ASKED_COUNT = re.compile(
    r"\btop (\d{1,3})\b|(?<![\d.,])(\d{1,3})[- ](?:day|week|step|point|part|item|example|tip|idea|reason|"
    r"fact|question|thing|way|word|title|name|place|song|movie|film|book)s?\b",
    re.IGNORECASE,
)
_HEADING = re.compile(r"\s*(?:#|\*\*|[-*] |\d{1,3}[.)])")
_BARE_MARKER = re.compile(r"\n[ \t]*(?:\d{1,3}[.)]?|[-*+#>|]{1,3})[ \t]*(?:\.{3}|…)?[ \t]*\Z")
_OPEN_END = re.compile(r"[,;(\[{،，、—–-][\"”’]?\s*\Z|\s[$€£]\s*\Z")
_SHORT_CHARS = 200


def unfinished(question: str, answer: str, proposed: str) -> str | None:
    """Return why `proposed` seems to break off, unless `answer` does so itself."""
    if len(answer) < _SHORT_CHARS and not ends_sentence(answer):
        return None  # a remark without a full stop may end on any word
    reason, end = _broken_end(proposed), proposed.rstrip()
    last_line = end.rpartition("\n")[2]
    if reason is None and (_BARE_HEADING.fullmatch(last_line) or end.rstrip("*_").endswith(":")):
        heading = _HEADING.match(last_line) and not _BARE_HEADING.fullmatch(
            answer.rstrip().rpartition("\n")[2]
        )
        reason = "it announces what does not come" if heading or 2 * len(end) < len(answer) else None
    if reason is None:
        reason = _too_few(question, answer, proposed)
    if reason is None and end.endswith(("...", "…")) and "..." not in answer and "…" not in answer:
        reason = "it ends with an ellipsis"
    if reason is None and (last := _LAST_WORD.search(proposed[-200:])) and len(last[1]) == 2:
        known = f" {last[1].lower()} " in _SHORT_WORDS or last[1] in words(f"{question} {answer}")
        reason = None if known or language_of(proposed) != "en" else f"no word is {last[1]!r}"
    return reason if _broken_end(answer) is None else None


def _too_few(question: str, answer: str, proposed: str) -> str | None:
    """Return what is amiss when the answer counts to the number asked for, and the correction does not."""
    wanted = {int(match[1] or match[2]) for match in _ASKED_COUNT.finditer(question)}
    had = {int(mark) for mark in _COUNTED.findall(answer)}
    have = {int(mark) for mark in _COUNTED.findall(proposed)}
    for number in sorted(wanted & had):
        if {1, 2} <= have and max(have) < number:
            return f"it counts to {max(have)}, not to {number}"
    return None


def _broken_end(text: str) -> str | None:
    blocks = code_blocks(text)
    if blocks and blocks[-1].end == len(text) and not blocks[-1].closed:
        return "a code block is still open"
    end = text.rstrip()[-200:]
    if _BARE_MARKER.search(end):
        return "its last line is a bare list mark"
    if _OPEN_END.search(end):
        return f"it ends with {end.rstrip()[-1]!r}"
    last = _LAST_WORD.search(end)
    if last and f" {last[1]} " in _UNFINISHED:
        return f"it ends with the word {last[1]!r}"
    return "its last sentence lacks its end" if _OPEN_VERB.search(end) else None
