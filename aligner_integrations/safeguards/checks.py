"""Single checks on a proposed correction: pure functions of question, answer, proposal and policy.

Each looks for one kind of harm and returns a finding or None. A new check is one function more in
`CHECKS`, and its actions in `policy.py`. Every one of them takes time in proportion to its texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeAlias

from aligner_integrations.correction import Finding
from aligner_integrations.safeguards import held
from aligner_integrations.safeguards.endings import unfinished
from aligner_integrations.safeguards.policy import SafeguardPolicy
from aligner_integrations.safeguards.spacing import glued_words, long_runs, unspaced
from aligner_integrations.safeguards.wording import (
    has_loop,
    is_refusal,
    language_of,
    word_similarity,
    words,
)
from aligner_integrations.template import MARKERS

Check: TypeAlias = Callable[[str, str, str, SafeguardPolicy], Finding | None]

_SHOWN = 60  # characters of evidence in a finding, at most
_CONTROL = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd\ud800-\udfff]")
# Punctuation of East Asian scripts, fullwidth forms included; and letters, script by script.
_EAST_ASIAN = "\u3001-\u303f\uff01-\uffef"
_SCRIPTS = {
    "East Asian": rf"{_EAST_ASIAN}぀-ヿ㐀-鿿豈-\ufaff가-힣",
    "Cyrillic": "\u0400-\u052f",
    "Arabic": "\u060c-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc",
    "Hebrew": "\u0591-\u05f4",
    "Indic": "\u0900-\u0dff",
    "Thai": "\u0e01-\u0e5b",
}
_SCRIPT_RUNS = {name: re.compile(f"[{letters}]+") for name, letters in _SCRIPTS.items()}
# Latin, too, but of one language; its "and" is what some models write in English.
_SCRIPT_RUNS["Vietnamese"] = re.compile("[\u1ea0-\u1ef9]+|(?<!\\w)và(?!\\w)")
# Who asks for these may get letters of any script, and another language.
_ASKED_LANGUAGE = re.compile(
    r"\b(?:translat\w*|alphabets?|pronounc\w*|pronunciation|phonetic\w*|kanji|hanzi|unicode|emojis?|"
    r"chinese|mandarin|cantonese|japanese|korean|russian|ukrainian|bulgarian|serbian|arabic|persian|farsi|"
    r"urdu|hebrew|hindi|sanskrit|bengali|tamil|telugu|thai|vietnamese|german|french|spanish|italian|"
    r"portuguese|dutch|(?:in|into|which|what) (?:\w+ )?languages?)\b",
    re.IGNORECASE,
)
_STRAY_WORDS = ("и", "или", "và")
# A mark of another script behind a Latin letter.
_LATIN_MARK, _LATIN = re.compile("[A-Za-z][、。，；：！？،]"), re.compile("[A-Za-z]")
_ENCLOSING = "(（[\"'“‘「『*_`/«"
_CLOSING_TAG = re.compile(r"</([A-Za-z][A-Za-z0-9]{0,9})>")
_SPACING = {
    "no word has so many letters": long_runs,
    "two words in one": glued_words,
    "no white space between words": unspaced,
}
_LINE_LOOP, _LOOP_LINE_CHARS = 5, 30
_MANY_WORDS, _MANY_FACTS = 120, 4
_LONG_CHARS = 1000  # shorter answers may be said in a word


def _quote(texts: Iterable[str]) -> str:
    """Return a few of `texts` as evidence."""
    shown = ", ".join(repr(text[:_SHOWN]) for text in list(texts)[:3])
    return shown if len(shown) <= 3 * _SHOWN else f"{shown[: 3 * _SHOWN]}..."


def _stands_apart(proposed: str) -> bool:
    """Whether there is nothing to compare: nothing is left, or what is left is a refusal."""
    return not proposed.strip() or is_refusal(proposed)


def check_empty(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find that nothing is left of an answer."""
    if proposed.strip() or not answer.strip() or policy.allow_empty:
        return None
    return policy.find("empty", "the correction is empty and no refusal came before it")


def check_characters(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find characters that only broken text holds."""
    fresh = sorted({char for char in _CONTROL.findall(proposed) if char not in answer})
    if not fresh:
        return None
    named = ", ".join(f"U+{ord(char):04X}" for char in fresh[:5])
    return policy.find("broken_characters", f"the correction holds {named}, which no text should")


def check_markers(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find what belongs to a prompt and not into an answer."""
    spelled = {token for token in policy.special_tokens if token and token in proposed}
    fresh = sorted(mark for mark in spelled | set(MARKERS.findall(proposed)) if mark not in answer)
    if not fresh and "</" in proposed and "</" not in answer and "</" not in question:
        fresh = [tag[0] for tag in _CLOSING_TAG.finditer(proposed) if f"<{tag[1]}" not in proposed][:1]
    return policy.find("template_marker", f"the correction holds {', '.join(fresh)}") if fresh else None


def check_repetition(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find the same words or the same line over and over."""
    text, old = held.prose_of(proposed), held.prose_of(answer)
    if has_loop(text) and not has_loop(old):
        return policy.find("repetition", "the correction repeats itself at its end")
    lines, had = _long_lines(text), _long_lines(old)
    looped = [line for line, times in lines.items() if times >= max(_LINE_LOOP, had[line] + 2)]
    return policy.find("repetition", f"over and over: {_quote(looped)}") if looped else None


def _long_lines(text: str) -> Counter[str]:
    lines = (line.strip() for line in text.split("\n"))
    return Counter(line for line in lines if len(line) >= _LOOP_LINE_CHARS and re.search(r"\w", line))


def check_truncated(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find an end that no writer would choose, where the answer's own end is none such."""
    reason = unfinished(question, answer, proposed)
    return policy.find("truncated", f"the correction breaks off: {reason}") if reason else None


def check_scripts(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find a script, fullwidth punctuation included, that neither question nor answer uses.

    A word in brackets or quotes is a name or an example, and so may be any word where the question is
    about a language.
    """
    asked = _ASKED_LANGUAGE.search(question) is not None
    marked = _LATIN_MARK.search(proposed)
    if marked and not _LATIN_MARK.search(f"{question}\n{answer}") and _is_latin(proposed):
        return policy.find("script_mixing", f"a mark of another script: {_near(proposed, marked)}")
    for name, run in _SCRIPT_RUNS.items():
        if run.search(question) or run.search(answer):
            continue
        for match in run.finditer(proposed):
            start, text = match.start(), match[0]
            enclosed = start > 0 and proposed[start - 1] in _ENCLOSING
            # A word alone, in the middle of a sentence, is no example even there.
            example = asked and text not in _STRAY_WORDS
            if any(char.isalpha() for char in text) and (enclosed or example):
                continue
            return policy.find(
                "script_mixing", f"{name} characters that were not there: {_near(proposed, match)}"
            )
    return None


def _is_latin(text: str) -> bool:
    return len(_LATIN.findall(text)) > 10 * sum(map(len, _SCRIPT_RUNS["East Asian"].findall(text)))


def _near(text: str, match: re.Match[str]) -> str:
    """Return the match and a little around it, as evidence."""
    return repr(text[max(0, match.start() - 20) : match.end() + 10][:_SHOWN])


def check_spacing(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find words that lost the white space between them."""
    text, had = held.prose_of(proposed), f"{question}\n{answer}"
    # English alone: other languages write long words, and other small ones.
    if language_of(text) not in ("en", None):
        return None
    for what, look in _SPACING.items():
        if found := look(text, had):
            return policy.find("words_run_together", f"{what}: {_quote(found)}")
    return None


def check_language(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find that the answer's language gave way to one that the question did not ask for."""
    if _stands_apart(proposed) or _ASKED_LANGUAGE.search(question):
        return None
    old, new = language_of(answer), language_of(proposed)
    if old is None or new is None or old == new or language_of(question) == new:
        return None
    return policy.find("language_changed", f"the answer is in {old!r}, the correction in {new!r}")


def check_length(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find a correction far longer or far shorter than the answer."""
    if is_refusal(proposed):
        return None
    limit = policy.max_growth * len(answer) + policy.slack_chars
    cut = 0 < len(proposed) < policy.min_share * len(answer) and len(answer) >= _LONG_CHARS
    if len(proposed) <= limit and not cut:
        return None
    return policy.find("length", f"the correction has {len(proposed)} characters, the original {len(answer)}")


def check_refusal(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find a refusal in place of an answer that has much to say.

    That the answer was harmless can't be told from the texts. What can be: that it is no refusal and
    long, or holds code, a table, formulas or many numbers, as an answer does that was worked out.
    """
    if not is_refusal(proposed) or is_refusal(answer):
        return None
    many = len(words(answer)) >= _MANY_WORDS
    built = held.code_blocks(answer) or held.tables(answer) or held.formulas(answer)
    if not (many or built or len(held.numbers(answer)) >= _MANY_FACTS):
        return None
    return policy.find("refusal", f"a refusal in place of an answer of {len(answer)} characters")


def check_nearness(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find a rewrite that is neither near the answer nor a clean refusal."""
    if policy.min_similarity <= 0.0 or _stands_apart(proposed):
        return None
    similarity = word_similarity(answer, proposed)
    if similarity >= policy.min_similarity:
        return None
    return policy.find(
        "drift",
        f"neither near the original (similarity {similarity:.2f}, needed {policy.min_similarity:.2f}) "
        "nor a clean refusal",
    )


def check_numbers(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find numbers that were lost, or more of them replaced than a recomputed result explains."""
    if policy.max_changed_numbers is None or _stands_apart(proposed):
        return None
    old, new = held.numbers(answer), held.numbers(proposed)
    # Distinct ones: a wrong result may stand twice in a sentence, and is mended in both places.
    gone, come = len(set(old) - set(new)), len(set(new) - set(old))
    if len(new) < len(old) and gone > come:
        return policy.find("numbers", f"of {len(old)} numbers only {len(new)} are left")
    changed = max(gone, come)
    if changed <= policy.max_changed_numbers:
        return None
    return policy.find("numbers", f"{changed} numbers differ from the original's")


def check_code(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find a code block of the answer that is not in the correction as it was."""
    blocks = held.code_blocks(answer)
    if not blocks or _stands_apart(proposed):
        return None
    left = Counter(block.code for block in held.code_blocks(proposed))
    lost = Counter(block.code for block in blocks) - left
    if not lost:
        return None
    return policy.find("code_changed", f"of {len(blocks)} code blocks {lost.total()} are not as they were")


def _check_gone(check: str, look: Callable[[str], set[str]]) -> Check:
    """Return the check of that name: it finds what `look` sees in the answer alone."""

    def check_gone(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
        if _stands_apart(proposed):
            return None
        lost = sorted(look(answer) - look(proposed))
        return policy.find(check, f"gone: {_quote(lost)}") if lost else None

    return check_gone


def check_tables(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find a table of the answer that is not in the correction as it was."""
    old = held.tables(answer)
    if not old or _stands_apart(proposed):
        return None
    lost = set(old) - set(held.tables(proposed))
    return policy.find("table_changed", f"{len(lost)} of {len(old)} tables differ") if lost else None


def check_json(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find an answer that is JSON and whose correction says something else, or is none."""
    if _stands_apart(proposed) or not held.is_other_json(answer, proposed):
        return None
    return policy.find("json_changed", "the answer is JSON, and the correction does not say the same")


def check_citations(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find citation marks of the answer that the correction lacks."""
    old = Counter(mark[0] for mark in held.citations(answer))
    if not old or _stands_apart(proposed):
        return None
    lost = old - Counter(mark[0] for mark in held.citation_marks(proposed))
    return policy.find("citations_lost", f"gone: {_quote(sorted(lost))}") if lost else None


def check_quotes(question: str, answer: str, proposed: str, policy: SafeguardPolicy) -> Finding | None:
    """Find quoted strings of the answer that the correction lacks."""
    if _stands_apart(proposed):
        return None
    left = set(held.quotations(proposed))
    lost = [quoted for quoted in held.quotations(answer) if quoted not in left]
    return policy.find("quotes_lost", f"gone: {_quote(lost)}") if lost else None


# In the order in which findings are given; the names are those of `policy.CHECK_NAMES`.
CHECKS: dict[str, Check] = {
    "empty": check_empty,
    "broken_characters": check_characters,
    "template_marker": check_markers,
    "repetition": check_repetition,
    "truncated": check_truncated,
    "script_mixing": check_scripts,
    "words_run_together": check_spacing,
    "language_changed": check_language,
    "length": check_length,
    "refusal": check_refusal,
    "drift": check_nearness,
    "code_changed": check_code,
    "inline_code_changed": _check_gone("inline_code_changed", held.inline_code),
    "table_changed": check_tables,
    "formula_changed": _check_gone("formula_changed", held.formulas),
    "json_changed": check_json,
    "citations_lost": check_citations,
    "links_lost": _check_gone("links_lost", held.links),
    "numbers": check_numbers,
    "quotes_lost": check_quotes,
}
