"""Cut an answer that arrives in chunks into sentences, code blocks and tables.

`SentenceBuffer` reads one character at a time and decides every cut from what the current piece holds so
far, never from where a chunk ended: the same text gives the same pieces for any chunking. Each character
goes into exactly one piece, so joining the pieces gives the text back.

Prose is cut at every line break (a step, list item or heading is a piece even without a full stop) and after
a sentence, as soon as the next word begins. White space belongs to the piece before it; only the indentation
of code, of a fence and of a table row stays with its line. A full stop may belong to an abbreviation:
sentencex knows those of many languages. It is asked about the last word and the next one alone, since on
longer text it misses cuts after brackets and quotes. What it gets wrong is listed below.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import accumulate
from typing import Literal

from sentencex import segment

PieceKind = Literal["prose", "code", "table"]
_KINDS: dict[str, PieceKind] = {"prose": "prose", "delimiter": "prose", "table": "table"}  # other modes: code

# Marks that end a sentence without white space after them; the ASCII ones need it.
_STRONG = "。！？．｡।॥۔؟።፧။៕։‼⁇⁈⁉"
_MARKS = _STRONG + ".!?…"
_QUOTES = "\"'”’“‘»«›‹」』＂＇"
_CLOSERS = _QUOTES + ")]}*_~】〉》〕｝］）"
_OPENERS = _QUOTES + "([{*_~<¿¡「『【〈《〔｛［（$`#"
_SEAMS = frozenset(_STRONG + _CLOSERS + "!?")
_NEVER_STARTS = ",;:.!?…|=+-–—/%&)]}”’»›」』】〉》〕｝］），、；：。！？"  # they do not begin a sentence
_EMOJI = "[\u2190-\u21ff\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff\u200d\u20e3\ufe0f]"
# What may stand between a sentence's mark and the next sentence: a citation, an emoji, a smiley.
_TRAILER = re.compile(rf"(?:\[[\w^, –-]{{1,12}}\]|\s+{_EMOJI}+|\s+[:;]-?[()DP])+\Z")
_GLUED = re.compile("\u200d.|.[\u200d\ufe0e\ufe0f\u20e3🏻-🏿]|[\ud800-\udbff][\udc00-\udfff]|\r\n")

# Words before a full stop. No sentence ends after these ...
_NEVER_END = (
    " dr mr mrs ms mx prof st mt gen col sgt capt lt rev hon pres gov sen rep fr sra hr e.g eg i.e ie vs v "
    "cf viz avg approx fig figs eq eqs resp incl excl z.b d.h u.a bzw т.е т.к डॉ श्री प्रो "
)
# ... nor after these before a number; after these it does if the next word says so ...
_BEFORE_NUMBER = (
    " no nos nr p pp vol vols sec sect ch chap art ca c est par para ex ln pg op tel ext max min "
    "jan feb mar apr may jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun "
)
_MAY_END = " al inc ltd co corp llc dept univ assn ave blvd rd jr sr esq oz lb hr hrs tbsp tsp etc am pm "
# ... and after these before a capital, although sentencex takes them for abbreviations.
_PLAIN = " ok okay no me art arts may sun mon sat sec min max mar etc a.m p.m "
_ACRONYM = re.compile(r"[^\W\d_]|(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,3}")
# A list marker or a step's number at the start of a piece: "1.", "2.3.", "**4.", "- a.", "Step 1.".
_ITEM = re.compile(
    r"[\s>#*_+\-•–(]*(?:(?:step|part|chapter|section|question|example|figure|table|day|case|rule|tip|option)"
    r"\s+\d{1,3}|\d{1,3}(?:\.\d{1,3})*|[^\W\d_]|[ivxl]{1,5})[.)]+[*_)]*\s*",
    re.IGNORECASE,
)
_CONTAINERS = re.compile(r"(?:>[ \t]*|[-*+][ \t]+|\d{1,9}[.)][ \t]+)*")
_FENCE = re.compile(r"([ \t>]*)(`{3,}|~{3,})[ \t]*")
_DELIMITER = re.compile(r"[ \t>]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*")
_LEAD = re.compile(
    r"\s*(?:>[ \t]*(?=\S)|(?:[-*+•–]|\d{1,3}[.)]|\(?[A-Za-z]\)|\(\d{1,3}\)|#{1,6}|\[[ xX]\])[ \t]+(?=\S))*"
)
# Language codes with the letters that give them away; all else is asked about as English.
_SCRIPTS = "elͰ-Ͽ ruЀ-ӿ hy԰-֏ he֐-׿ ar؀-ۿ hiऀ-ॿ bnঀ-৿ ta஀-௿ teఀ-౿ myက-႟ amሀ-፿ ja぀-ヿ zh㐀-鿿 ko가-힯"
_LANGUAGES = [(script[2], script[4], script[:2]) for script in _SCRIPTS.split()]
_TAIL, _WORD = 80, 24  # characters looked at before a boundary, and of the word after it
_BLOCK = 16  # how many times longer than prose code and tables may be: they are whole or of no use


class Piece(str):
    """A sentence, or a block that is not prose. `kind` says which; only prose is corrected."""

    __slots__ = ("kind",)
    kind: PieceKind

    def __new__(cls, text: str, kind: PieceKind = "prose") -> Piece:
        piece = super().__new__(cls, text)
        piece.kind = kind
        return piece


def split_margins(piece: str) -> tuple[str, str, str]:
    """Split into lead (white space, list markers, hashes, quote marks), core, and trailing white space."""
    rest = _LEAD.sub("", piece, count=1)
    core = rest.rstrip()
    return piece[: len(piece) - len(rest)], core, rest[len(core) :]


def has_words(text: str) -> bool:
    """Return whether there is anything to correct: a letter or a digit."""
    return re.search(r"\w", text) is not None


def _knows_sentence_end(token: str, word: str) -> bool:
    """Ask sentencex whether a sentence ends between `token` + full stop and `word`."""
    found = (name for low, high, name in _LANGUAGES for char in token if low <= char <= high)
    before = f"It is {token}. "
    text = (before + word).encode(errors="replace").decode()  # lone surrogates have no UTF-8
    return len(before) in accumulate(map(len, segment(next(found, "en"), text)))


def _ends_at_stop(token: str, word: str, whole: bool) -> bool | None:
    """Whether one full stop after `token` ends a sentence; None: ask again when `word` is whole."""
    key, core = f" {token.casefold()} ", word.lstrip(_OPENERS)
    first = core[:1] or "X"
    if key in _NEVER_END or (key in _BEFORE_NUMBER and first.isdigit()):
        return False
    risky = key in _MAY_END or _ACRONYM.fullmatch(token) is not None
    if first.islower() and (risky or (token.isdigit() and len(token) <= 2)):
        return False
    if first.isupper() and key in _PLAIN:
        return True
    # A URL, path or address is no abbreviation. "q" keeps a first letter from being a word: sentencex
    # knows "A" and "I" as words that begin sentences.
    if not risky and (not {"/", "@", "_"}.isdisjoint(token) or _knows_sentence_end(token, first + "q")):
        return True
    # The next word decides: "the U.S. This" ends a sentence, "the U.S. Army" does not.
    return first.isupper() and _knows_sentence_end(token, core) if whole else None


def _ends_sentence(before: str, word: str, whole: bool) -> bool | None:
    """Whether a sentence ends between `before` and `word`, with white space between (None: not known yet)."""
    body = before.rstrip()
    listed = word == "-"  # a hyphen alone is the marker of a list whose line breaks were lost
    if body[-1:].isalnum() or (word[0] in _NEVER_STARTS and not listed) or re.match(_EMOJI, word):
        return False
    body = _TRAILER.sub("", body)
    bare = body.rstrip(_CLOSERS)
    stem = bare.rstrip(_MARKS)
    marks, closers, small = bare[len(stem) :], body[len(bare) :], word[0].islower()
    if not marks or not stem:
        return False
    if listed and not whole:
        return None
    if any(mark in _STRONG for mark in marks):
        return True
    if "!" in marks or "?" in marks:
        return not (small and any(closer in _QUOTES for closer in closers))
    if marks != "." or stem[-1].isspace():  # "..." trails off before a small letter, ". . ." before any
        return marks != "." and not small
    token = stem.split()[-1].strip(_OPENERS + _CLOSERS)[-32:]
    if not token or (small and closers.strip("*_~")):
        return not small
    return _ends_at_stop(token, word, whole)


def _ends_unspaced(text: str, start: int, end: int) -> bool:
    """Whether a sentence that begins at `start` ends at `end` with no white space there (CJK, danda)."""
    char, tail = text[end], text[max(start, end - 16) : end]
    if char in _STRONG or char in _NEVER_STARTS or (char in _CLOSERS and char not in '"*“‘«'):
        return False
    if (char == '"' and text.count(char, start, end) % 2) or (
        char == "*" and text.count(char, start, end) & 2
    ):
        return False  # it closes what the sentence opened
    bare = tail.rstrip(_CLOSERS)
    stem, mark = bare.rstrip(_MARKS), bare[-1:]
    if mark in ("!", "?"):  # between CJK letters alone: elsewhere they may stand in a URL
        return all("\u3040" <= letter <= "\u9fff" for letter in (stem[-1:], char))
    if not mark or mark not in _STRONG or (mark in "．।॥" and char.isdigit()):
        return False
    return not (tail[-1] in "」』" and "ぁ" <= char <= "ゟ")  # a quotation that goes on: 「はい。」と言った。


class SentenceBuffer:
    """Turns chunks of an answer into pieces: sentences of prose, whole code blocks, whole tables.

    A sentence is handed out when the next word begins, or when that word is complete if it decides
    ("Dr. Smith"). A code block or table is handed out when the first line after it begins. No prose is longer
    than `max_chars`, no code or table than 16 times that: longer prose is cut at its last white space, longer
    code and tables at their last line break, into parts of the same kind. `flush` makes the buffer new.
    """

    def __init__(self, *, max_chars: int = 2000) -> None:
        if max_chars < 1:
            raise ValueError(f"max_chars must be at least 1, not {max_chars}")
        self._max_chars = max_chars
        self._reset()

    def _reset(self) -> None:
        self._text, self._last = (
            "",
            "",
        )  # what is not handed out yet, for the positions below; the last character
        self._start = self._at = 0  # where the piece begins; the character read next
        self._line = self._first = 0  # where the line begins; its first character that is not white
        self._waiting = -1  # a word that is read to its end, to decide whether to cut before it
        self._mode = "prose"  # or delimiter, table; opening, fence, closed; indented
        self._breaks = 2  # line breaks in the white space being read; an answer begins as after a blank line
        self._in_head = False  # so far this line holds only list markers and quote marks
        self._indent = self._list_indent = 0  # columns: of this line; where the text of the list item begins
        self._fence, self._in_info, self._quoted = "", False, False
        self._table_cut, self._row_mark = 0, ""
        self._out: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        """Take the next chunk; return the pieces that are now complete."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}")
        self._text += text
        while self._at < len(self._text):
            char = self._text[self._at]
            if self._at - self._start >= self._max_chars:
                self._keep_short()
            if char.isspace():
                self._read_space(char)
            elif not (
                self._mode == "prose" and self._waiting < 0 and char.isalnum() and self._last.isalnum()
            ):
                self._read_mark(char)
                self._breaks = 0
            self._last = char
            self._at += 1
        # Drop what was handed out, so that a push costs no more than its own text and one piece.
        gone, self._start, self._text = self._start, 0, self._text[self._start :]
        self._at, self._line, self._first = self._at - gone, self._line - gone, self._first - gone
        self._table_cut, self._waiting = self._table_cut - gone, max(-1, self._waiting - gone)
        pieces, self._out = self._out, []
        return pieces

    def flush(self) -> list[Piece]:
        """End the answer; return what is left of it."""
        self._settle()
        if not self._breaks:
            self._end_line()
        if self._start < len(self._text):
            self._hand_out(len(self._text))
        pieces = self._out
        self._reset()
        return pieces

    def _hand_out(self, end: int) -> None:
        self._out.append(Piece(self._text[self._start : end], _KINDS.get(self._mode, "code")))
        self._start = end
        self._in_head = self._in_head and self._first >= end

    def _cut(self, end: int) -> None:
        """Hand out the piece up to `end`, unless it is a little white space (the start of an answer)."""
        if end - self._start > self._max_chars or self._text[self._start : end].strip():
            self._hand_out(end)

    def _keep_short(self) -> None:
        """Cut a piece that has reached its limit."""
        if self._mode == "opening":  # too long a line for inline code
            self._mode = "fence"
        if _KINDS.get(self._mode) != "prose" and self._at - self._start < _BLOCK * self._max_chars:
            return
        self._waiting = -1
        if self._mode == "delimiter":
            return self._refuse_table()
        piece = self._text[self._start : self._at]
        size = piece.rfind("\n") + 1 if self._mode != "prose" else 0
        size = size or len(piece) - (0 if piece[-1].isspace() else len(piece.rsplit(None, 1)[-1]))
        end = self._start + (size or len(piece))
        for _ in range(min(32, end - self._start - 1)):  # not inside what a reader sees as one character
            pair = self._text[end - 1 : end + 1]
            if not _GLUED.fullmatch(pair) and unicodedata.category(pair[1])[0] != "M":
                break
            end -= 1
        self._hand_out(end)

    def _read_space(self, char: str) -> None:
        self._settle()
        if char in "\r\n":
            if not (char == "\n" and self._last == "\r"):  # CRLF is one line break
                if not self._breaks:
                    self._end_line()
                self._breaks += 1
            self._line = self._at + 1

    def _read_mark(self, char: str) -> None:
        """Read a character that is not white space."""
        if self._mode == "delimiter" and not self._breaks and char not in "|:->":
            self._refuse_table()
        if self._breaks:
            self._begin_line(char)
        elif self._last.isspace():
            self._begin_word(char)
        else:
            self._inside_word(char)
        if self._mode == "opening" or (self._in_head and char in "`~"):
            self._read_fence(char)

    def _begin_line(self, char: str) -> None:
        margin = self._text[max(self._line, self._start) : self._at]
        indent = len(margin[: len(margin) - len(margin.lstrip(" \t"))].expandtabs(4))
        after_blank = self._breaks > 1
        if self._goes_on(char, indent, after_blank):
            return
        indented = after_blank and indent - self._list_indent >= 4
        keeps = (indented or char in "`~|") and len(margin) < self._max_chars
        cut = self._at - len(margin) if keeps else self._at
        # A whole line with a pipe, then a line that may be a delimiter row: wait for the end of that one.
        whole = self._mode == "prose" and self._start <= self._first and not after_blank
        header = self._text[self._first : self._at] if whole and char in "|:->" else ""
        self._first, self._indent, self._in_head = self._at, indent, True
        if "|" in header:
            self._mode, self._table_cut, self._row_mark = "delimiter", cut, header[0]
            return
        self._cut(cut)
        self._mode = "indented" if indented else "prose"
        self._list_indent = self._list_indent if indented else min(self._list_indent, indent)

    def _goes_on(self, char: str, indent: int, after_blank: bool) -> bool:
        """Whether the line that begins with `char` belongs to the block being read."""
        if self._mode == "fence":
            return not self._quoted or char == ">"
        if self._mode == "table":
            return not after_blank and (self._row_mark not in "|>" or char == self._row_mark)
        return self._mode == "indented" and indent - self._list_indent >= 4

    def _end_line(self) -> None:
        """Decide what only a whole line can tell."""
        line = self._text[max(self._line, self._start) : self._at]
        if self._mode == "opening":
            self._mode = "fence"
        elif self._mode == "delimiter":
            if "|" in line and _DELIMITER.fullmatch(line):
                self._mode = "table"
            else:
                self._refuse_table()
        elif self._mode == "fence" and self._line >= self._start:
            match = _FENCE.fullmatch(line)
            if match and match[2].startswith(self._fence):
                margin = match[1].rpartition(">")[2] if self._quoted else match[1]
                # Deeper than that it is a line of the code itself (CommonMark 4.5).
                if ">" not in margin and len(margin.expandtabs(4)) <= self._indent + 3:
                    self._mode = "closed"

    def _refuse_table(self) -> None:
        """The line under a possible table head is no delimiter row: both lines are prose."""
        self._cut(self._table_cut)
        self._mode = "prose"
        self._list_indent = min(self._list_indent, self._indent)

    def _read_fence(self, char: str) -> None:
        """Open a fence if the line holds only markers and three of `char`; then read its opening line."""
        if self._mode != "opening":
            head = self._text[self._first : self._at + 1]
            if len(head) <= 64 and head.endswith(char * 3) and _CONTAINERS.fullmatch(head[:-3]):
                self._mode, self._fence, self._in_info, self._quoted = "opening", char * 3, False, ">" in head
                self._indent += len(head) - 3
        elif char == self._fence[0] and not self._in_info:
            self._fence += char
        elif char == "`" == self._fence[0]:  # a backtick after the run: inline code, not a fence
            self._mode, self._in_head = "prose", False
        else:
            self._in_info = True

    def _begin_word(self, char: str) -> None:
        """Decide on a cut before the word that begins here, after white space on the same line."""
        if self._in_head:
            head = self._text[self._first : self._at]
            self._in_head = len(head) <= 64 and _CONTAINERS.fullmatch(head) is not None
            if self._in_head:
                if head[0] != ">" and self._at - self._start <= self._max_chars:
                    # A list item, even where it is indented like code.
                    self._mode, self._list_indent = "prose", self._indent + len(head)
                return
        if self._mode == "prose":
            self._decide(self._at, char, whole=False)

    def _inside_word(self, char: str) -> None:
        if self._waiting >= 0:
            word = self._text[self._waiting : self._at]
            opening = len(word) < 4 and not word.strip(_OPENERS)
            if opening or (len(word) < _WORD and (char.isalnum() or char in "'’")):
                return
            self._settle()
        seam = self._mode == "prose" and self._last in _SEAMS
        if seam and _ends_unspaced(self._text, self._start, self._at) and not self._in_code_span(self._at):
            self._cut(self._at)

    def _settle(self) -> None:
        """Decide on the cut before the word that was waited for; it is complete now."""
        if self._waiting >= 0:
            at, self._waiting = self._waiting, -1
            self._decide(at, self._text[at : self._at], whole=True)

    def _decide(self, at: int, word: str, *, whole: bool) -> None:
        verdict = _ends_sentence(self._text[max(self._start, at - _TAIL) : at], word, whole)
        if verdict is False or self._in_code_span(at):
            return
        if self._start <= self._first and self._text.startswith("| ", self._first):
            return  # this begins a table's head, although the line that shows it is not here yet
        if at - self._start <= 40 and _ITEM.fullmatch(self._text[self._start : at]):
            return
        if verdict is None:
            self._waiting = at
        else:
            self._cut(at)

    def _in_code_span(self, at: int) -> bool:
        """Whether `at` lies inside inline code; a backtick that nothing closes counts for 200 characters."""
        begin = max(self._start, self._line)
        return self._text.count("`", begin, at) % 2 == 1 and at - self._text.rfind("`", begin, at) <= 200
