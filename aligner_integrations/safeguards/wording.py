"""What a text is, as far as its words tell: a refusal, a loop, a language, near to another one."""

from __future__ import annotations

import difflib
import re

_REFUSAL_OPENING = re.compile(
    r"""\s*["'“‘]?(?:(?:but|however|no|well|and|so),?\s+)?(?:
        i(?:'m|\s+am)\s+(?:really\s+|very\s+|so\s+|truly\s+|deeply\s+)?sorry
      | (?:i\s+)?(?:sincerely\s+|deeply\s+)?apologi[sz]e
      | (?:my\s+apologies|sorry)\b[,.!]?
      | (?:unfortunately|regrettably),?\s+i\s+(?:can|am|will|must|do|won|don|cann)
      | i\s+(?:really\s+|simply\s+|just\s+|must\s+respectfully\s+)?
            (?:can't|cannot|can\s+not|won't|will\s+not|couldn't|could\s+not)\b
      | i(?:'m|\s+am)\s+(?:unable|not\s+(?:able|comfortable|willing|going\s+to|programmed|designed))\b
      | i\s+(?:must|have\s+to|need\s+to)\s+(?:respectfully\s+)?(?:decline|refuse|refrain)
      | i\s+(?:do\s+not|don't)\s+(?:feel\s+comfortable|support|condone|endorse|provide|assist|engage|promote)
      | i\s+(?:strongly\s+)?(?:refuse|decline)\b
      | as\s+an?\s+(?:ai|artificial|language|responsible|ethical|helpful)\b
      | (?:it|that|this)(?:'s|\s+is)\s+
            (?:not|never)\b.{0,40}?\b(?:appropriate|ethical|legal|acceptable|okay|ok|right)\b
      | (?:it|that|this)(?:'s|\s+is)\s+(?:illegal|unethical|inappropriate|wrong|against\s+the\s+law)\b
    )""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_MAX_REFUSAL_WORDS = 60
_TERMINATED = re.compile(r"[.!?…。！？।؟](?:[\"'”’)\]*_]|\s)*$")
# The same stretch of words three times or more, one word four times, or one character over and over.
# Counting ("1, 1.1") and drawings are no such thing.
_BETWEEN = r"[\s.,;:!?…\"'’-]{1,4}"
_WORD_LOOP = re.compile(
    rf"(?<!\w)(?:([^\W\d_]\w*)(?:{_BETWEEN}\1(?!\w)){{3,}}"
    rf"|([^\W\d_]\w*(?:[^\w]+\w+){{1,7}}?)(?:{_BETWEEN}\2(?!\w)){{2,}})",
    re.IGNORECASE,
)
_LETTER_LOOP = re.compile(r"([^\W\d_])\1{7,}|([^\w\s.\-=*#~+|/\\\u2190-\u2bff])\2{7,}")
# Words, or single characters of scripts that are written without spaces.
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힣]|[^\W぀-ヿ㐀-鿿가-힣]+(?:['’]\w+)*")
# Past this many words similarity is measured on word counts alone; difflib is quadratic.
_MAX_ALIGNED_WORDS = 600
# Repetition is looked for in this much of the end; loops run on to the end.
_MAX_LOOP_CHARS = 2000

# Words that hold a sentence together and tell its language; a word stands in one list only.
_LANGUAGE_WORDS = {
    "en": "the and of to is that with for was are this from have not you your they which would their but "
    "been about into when there what",
    "de": "der die das und ist nicht ein eine mit auf für sich dem den von zu werden auch sind oder wird "
    "einen einer durch bei",
    "fr": "le les des et est une dans pour que qui sur avec pas sont au ce cette vous nous mais ou leur être",
    "es": "el los las y una es por para con que del se como más pero su está son muy puede",
    "it": "il gli della di che è non per sono una nel con anche più alla questo come essere",
    "pt": "os uma não para com é em do da dos das mais ao você são pelo muito também",
    "nl": "het een van en niet voor zijn dat op te aan ook worden wordt deze naar bij maar",
    "vi": "và của là không được các cho với một những trong để người",
}
_LANGUAGES: dict[str, tuple[str, ...]] = {}
for _language, _list in _LANGUAGE_WORDS.items():
    for _each in _list.split():
        _LANGUAGES[_each] = (*_LANGUAGES.get(_each, ()), _language)
_LEAST_LANGUAGE_WORDS = 5


def words(text: str) -> list[str]:
    """Return the lower-cased words of `text`; of scripts without spaces, the characters."""
    return _WORD.findall(text.replace("’", "'").lower())


def ends_sentence(text: str) -> bool:
    """Return whether `text` ends with a full stop or another mark that ends a sentence."""
    return _TERMINATED.search(text[-_MAX_LOOP_CHARS:]) is not None


def has_loop(text: str) -> bool:
    """Return whether `text` ends in the same words, or the same character, over and over."""
    end = text[-_MAX_LOOP_CHARS:]
    return bool(_LETTER_LOOP.search(end) or _WORD_LOOP.search(end))


def is_refusal(text: str) -> bool:
    """Return whether `text` is a clean refusal: it opens as one, ends, and does not loop."""
    return bool(
        _REFUSAL_OPENING.match(text.replace("’", "'"))
        and ends_sentence(text)
        and len(words(text)) <= _MAX_REFUSAL_WORDS
        and "\ufffd" not in text
        and not has_loop(text)
    )


def language_of(text: str) -> str | None:
    """Return the code of the language that most of the telling words of `text` belong to, if many do."""
    counts: dict[str, int] = {}
    for word in words(text):
        for language in _LANGUAGES.get(word, ()):
            counts[language] = counts.get(language, 0) + 1
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    if not ranked or ranked[0][1] < _LEAST_LANGUAGE_WORDS:
        return None
    # Related languages share words: the first must stand out.
    clear = len(ranked) == 1 or 2 * ranked[0][1] >= 3 * ranked[1][1]
    return ranked[0][0] if clear else None


def word_similarity(answer: str, proposed: str) -> float:
    """Return how near two texts are, from 0 to 1, by their lower-cased words.

    The larger of the aligned share of both (difflib's ratio) and the share of the proposal's words
    that come from the answer, the latter only for proposals that keep at least a third of it.
    """
    old, new = words(answer), words(proposed)
    if not old or not new:
        return 1.0 if old == new else 0.0
    left = list(old)
    common = 0
    counts: dict[str, int] = {}
    for word in left:
        counts[word] = counts.get(word, 0) + 1
    for word in new:
        if counts.get(word, 0) > 0:
            counts[word] -= 1
            common += 1
    share = common / len(new) if 3 * common >= len(old) else 0.0
    if len(old) + len(new) > _MAX_ALIGNED_WORDS:
        return max(share, 2 * common / (len(old) + len(new)))
    return max(share, difflib.SequenceMatcher(a=old, b=new, autojunk=False).ratio())
