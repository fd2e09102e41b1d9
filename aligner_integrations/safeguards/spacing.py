"""Words that lost the white space between them, as a starved model writes them: "drivesthe", "levels,and".

No dictionary is needed. A word counts as two when question and answer do not have it, and it is a small word
glued to one that stands alone elsewhere, or ends as no word of its length does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# More small letters than an English word has.
_LONG_RUN = re.compile(r"[a-z]{21,}")
_WORD = re.compile(r"(?<![#@A-Za-z])[A-Za-z]+")  # a tag is meant to be one word
_BEFORE = ("the", "and", "that", "with", "from", "your", "this", "of")
_BEHIND = (*_BEFORE, "for", "to")
# These glued to "the" or "you".
_TINY = frozenset(
    ("of", "in", "on", "to", "by", "or", "as", "is", "at", "if", "be", "do", "are", "can", "when")
)
_WHOLE = (
    " into onto unto without within withdraw withdrawn withdrawal withhold withstand withheld yourself "
    "yourselves thereof hereof whereof thereto hereto hitherto therefor therefrom herewith therewith "
    "breathe rebreathe sheathe unsheathe wreathe bequeathe absinthe unclothe andthen often "
)
_WITH_A = " isa asa ofa wasa hasa fora witha bya thata "
# Long words in "the" are few; "-land", "-stand", "-hand", "-band", "-mand" and "-sand" are left alone.
_ODD_END = re.compile(
    r"[A-Z][a-z]{5,}the|[a-z]{4,}the|[a-z]{4,}[aeouydnk]and|[a-z]{3,}ly(?:to|of|and|for|with|that|from)"
)
# Words with these endings form no compounds, and two long words seldom do, but for such beginnings.
_LONG_STEM = re.compile(r"(?:ing|tion|ness|ment|able|ally|ous|ized)(?!less|like|wise|ful|able)(?=[a-z]{3})")
_FORMING = (
    *("counter", "inter", "under", "over", "micro", "multi", "super", "trans", "electro", "photo", "hydro"),
    *("water", "thunder", "grand", "spring", "thermo", "bio"),
)
_CAPITAL = re.compile(
    r"(?<![A-Za-z])(?:the|and|of|to|in|for|with|from|by|as|on|at|that|or|your|their|our|its|is|are|was|were)"
    r"([A-Z][a-z]{2,})"
)
# No white space after a comma, or between two sentences.
_NO_SPACE = re.compile(
    r"[a-z]{2}\.? ?[,;]{1,2}[\"”]?[A-Za-z]{2}| &[a-z]+(?= )|(?<![A-Za-z])[a-z]{3,}[.!?][A-Z][a-z]+(?=[ ,'’])"
    r"|[a-z]{2}[.!?][\"”](?:[A-Z][a-z]|\d)|[a-z]{3}\d{1,2}\.\*{0,2}[A-Z]"
)
_TWO_LONG = 16  # letters of two long words; shorter compounds exist
_LONGEST = 40  # letters; longer ones are runs
_CONTEXT = 8


def long_runs(text: str, had: str) -> list[str]:
    """Return the runs of small letters that are too long for a word and not in `had`."""
    return [run for run in _LONG_RUN.findall(text) if run not in had]


def glued_words(text: str, had: str) -> list[str]:
    """Return the words of `text` that are two, and that `had` has not."""
    old = set(map(str.lower, _WORD.findall(had)))
    own = dict.fromkeys(_WORD.findall(text))
    known = old.union(map(str.lower, own))
    fresh = (word for word in own if len(word) <= _LONGEST and word.lower() not in old)
    capitals = (match for match in _CAPITAL.finditer(text) if match[1].lower() in known)
    return [
        *(word for word in fresh if _is_glued(word, known)),
        *(match[0] for match in capitals if match[0].lower() not in old),
    ]


def unspaced(text: str, had: str) -> list[str]:
    """Return the words of `text` that only a mark holds apart, unless `had` writes so, too."""
    found = [
        text[max(0, match.start() - _CONTEXT) : match.end() + _CONTEXT]
        for match in _NO_SPACE.finditer(text)
        if match[0] not in had
    ]
    usual = sum(1 for _ in _NO_SPACE.finditer(had))
    return found if len(found) > 3 * usual else []


def _is_glued(word: str, known: set[str]) -> bool:
    lower = word.lower()
    if f" {word} " in _WITH_A:
        return True
    if len(word) < 5 or f" {lower} " in _WHOLE:
        return False
    if word[1:] != lower[1:]:  # a name, such as those of many programs
        return False
    if any(part in known and len(part) >= 3 for part in _others(lower)) or _has_middle(lower, known):
        return True
    if (lower[-3:] in ("the", "you") and lower[:-3] in _TINY) or (word[-2:] == "sa" and word[:-1] in known):
        return True
    if any(
        end.end() >= 7 and lower[: end.end()] in known and lower[end.end() :] in known
        for end in _LONG_STEM.finditer(lower)
    ):
        return True
    if (
        len(lower) >= _TWO_LONG
        and not lower.startswith(_FORMING)
        and any(lower[:at] in known and lower[at:] in known for at in range(6, min(len(lower) - 5, 20)))
    ):
        return True
    return _ODD_END.fullmatch(word) is not None


def _others(word: str) -> Iterator[str]:
    """Yield what is left of `word` without a small word at its end or beginning."""
    yield from (word.removesuffix(small) for small in _BEHIND if word.endswith(small))
    yield from (word.removeprefix(small) for small in _BEFORE if word.startswith(small))


def _has_middle(word: str, known: set[str]) -> bool:
    """Whether `word` is two that stand alone elsewhere with "the" or "and" between them."""
    cuts = (word.partition(small) for small in ("the", "and"))
    return any(left in known and right in known for left, _, right in cuts if min(len(left), len(right)) >= 3)
