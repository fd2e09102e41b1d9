"""`SentenceBuffer`: lossless, chunk-blind, early, bounded, linear; where it cuts and where not."""

from __future__ import annotations

import pickle
import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aligner_integrations.sentences import Piece, SentenceBuffer, split_margins
from tests.pieces import cut, with_kinds

# Bits of answers that meet in surprising ways: markdown, marks, scripts, links, numbers, broken characters.
BITS = """
``` ```py ~~~ ` | || |---|:-:| --|-- | a | b | - * 1. 2) 10. > # ## : :: ( ) [ ] [1] ** * _ , ; :) – —
. ! ? ... … 。 ！ ？ ， 「 」 “ ” ‘ ’ « » " ' ؟ । ॥ ۔ ։ . . Dr. e.g. i.e. U.S. etc. No. Inc. a.m. J.
Fig. vs. OK. Step The Then He she Word word I A a 5 42 3.14 1,000.50 v1.2.3 $3. 100% file.py me@x.co.
https://a.b/c?d=1.2#e! www.x.org. 中文 你好 はい です कमरा है। डॉ. كيف مرحبا שלום Привет т.е. 한국어
é e\u0301 😀 👩\u200d👩\u200d👧 🇫🇷 👍🏽 \u200b \ufeff
"""
SPACES = [
    " ",
    "  ",
    "    ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\n    ",
    "\n   ",
    "\n\n    ",
    "\u2028",
    "\u3000",
    "\x85",
    "\xa0",
]
BROKEN = ["\ud83d", "\ude00", "\x00", "\x1f", "\u202e", "\u0301"]
texts = st.one_of(
    st.lists(st.sampled_from(BITS.split() + SPACES * 3 + BROKEN), max_size=60).map("".join),
    st.lists(st.sampled_from(BITS.split()), max_size=30).map(" ".join),
    st.text(st.characters(), max_size=80),
)
limits = st.sampled_from([1, 2, 3, 7, 20, 60, 2000])


# The laws


@given(texts, limits)
@example("```\ncode", 2000)
@example("| a |\n|-", 2000)
@example("Dr. ", 2000)
@example("\r\n" * 5, 1)
@example("    a\r \u2028    ```b", 5)  # an indentation longer than a piece may be
def test_t2_joining_the_pieces_gives_the_text_back(text: str, limit: int) -> None:
    pieces = cut([text], max_chars=limit)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit * (1 if piece.kind == "prose" else 16) for piece in pieces)


@given(texts, st.data(), limits)
@example("| a | b |! “؟|3.14है।~~~Word1. # 」:~~~ Thena. ):)a. > *- ", None, 50)  # and of a cell
@example("- ”！U.S.\ud83d1. ```\x00\r\n\x85」\netc.\ude00'", None, 20)  # markers of a line already handed out
def test_t3_chunks_do_not_matter(text: str, data: st.DataObject | None, limit: int) -> None:
    whole = with_kinds(cut([text], max_chars=limit))
    assert with_kinds(cut(text, max_chars=limit)) == whole
    if data is not None:
        borders = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
        edges = [0, *borders, len(text)]
        chunks = [text[a:b] for a, b in pairwise(edges)]
        assert with_kinds(cut(chunks, max_chars=limit)) == whole


@given(texts, limits)
def test_t16_what_is_held_back_is_bounded(text: str, limit: int) -> None:
    buffer, out = SentenceBuffer(max_chars=limit), 0
    bound = limit * (1 if {piece.kind for piece in cut([text], max_chars=limit)} <= {"prose"} else 16)
    for count, char in enumerate(text, 1):
        out += sum(map(len, buffer.push(char)))
        assert count - out <= bound


@given(texts, texts)
def test_flush_makes_the_buffer_new(first: str, second: str) -> None:
    buffer = SentenceBuffer()
    buffer.push(first)
    buffer.flush()
    assert with_kinds(buffer.push(second) + buffer.flush()) == with_kinds(cut([second]))


@given(texts)
def test_margins_join_to_the_piece(text: str) -> None:
    lead, core, tail = split_margins(text)
    assert lead + core + tail == text
    assert core == core.strip()
    assert tail.strip() == ""


# Where prose is cut: "¦" marks the cuts

PROSE = """
Hello there.¦ How are you?¦ Fine!
Hello!!¦ Really?!¦ Yes.
Dr. Smith met Mrs. Jones.¦ They spoke, e.g. about i.e. and etc. as usual.¦ Then they left.
In the U.S. Army he served.¦ He lives in the U.S.¦ He likes it.
J. R. R. Tolkien wrote it.¦ We chose plan B.¦ It worked.
It was Prof. Li vs. Mr. Ho.¦ See Fig. 3 and No. 5.¦ No.¦ I won't.
Apple Inc. is big.¦ She has a Ph.D. in art.¦ Ask me.¦ OK.¦ Then we go.
We meet at 5 p.m.¦ We leave at 6 a.m. on Jan. 5.¦ Bring pens, paper, etc.¦ That is all.
Smith et al. (2020) say so.¦ See Smith et al. for more.
Pi is 3.14 and e is 2.7.¦ It costs $3.50.¦ That was in 1999.¦ He paid 1,000.50 dollars.
The answer is 42.¦ Version 2.0.1 is out.¦ Use v1.2.3.¦ It works.
Open file.py and a.tar.gz.¦ See https://a.b/c.d?e=1.2!f.¦ Then write to me@x.co.¦ Go to www.x.org.¦ Done.
Wait... what?¦ No...¦ Yes.¦ Hmm… ok.¦ Hmm…¦ So.
He said "Stop."¦ Then he left.¦ "Why?" he asked.¦ “Go!”¦ She went.¦ ‘Oh.’¦ And then.
He left (it was late.)¦ Then (see above).¦ She stayed [as said].¦ They slept.
**Bold.**¦ Next *thing.*¦ Then __this.__¦ And `a. B` there.¦ More `x.y` text.¦ End.
It is blue.[1]¦ The sky is blue [2].¦ It is.[^3]¦ Yes.
Great! 😊¦ Next one! :)¦ Then :) he left.
It depends on: - How large it is.¦ - Where it is.¦ - 5 things.¦ Add -5. -6 is not it - no.¦ End.
1. First item.¦ 2. Second item.¦ 3. Third.
Step 1. Do it.¦ Step 2. Do that.
- **1. Bold title.**¦ Text
A. Option one.¦ b) Option two.
no capitals here.¦ but this is a new sentence.¦ ok?¦ yes.
Approx. 5 people came.¦ It took 3 hrs. or so.
Bonjour ! ¦Ça va ? ¦Oui.
»Halt.«¦ Dann „Los.“¦ Und, z.B. so.
你好。¦我是“他。”¦然后！¦好吗？¦圆周率是3.14。¦你好!¦你是谁?¦我。
他说。¦"你好。"¦然后。¦**好。**¦再见
他问：“好吗？”，然后走了。
こんにちは。¦「はい。」と言った。¦「いいえ。」¦行く？¦はい
यह है। ¦वह डॉ. शर्मा था। ¦क्या? ¦हाँ।¦है
مرحبا. ¦كيف حالك؟ ¦أنا بخير. ¦د. أحمد هنا.
Это т.е. он.¦ Да.
Բարեւ։ ¦Ինչպես ես։ ¦Լավ։
안녕하세요. ¦반갑습니다. ¦네!
你好。¦Hello there.¦ यह है। ¦مرحبا؟ ¦はい。¦End.
No terminator at all
""".strip().splitlines()


@pytest.mark.parametrize("line", PROSE)
def test_sentences(line: str) -> None:
    marked = re.sub(r"¦( *)", r"\1¦", line)  # white space goes with the sentence before it
    assert cut([marked.replace("¦", "")]) == [part for part in marked.split("¦") if part]


# "¦" marks the cuts; a piece that begins with "c:" is code, with "t:" a table
BLOCKS = [
    # Line breaks end a piece, whatever stands before them; blank lines go with the piece before.
    "48/2 = 24 clips\n¦Natalia sold 48+24 = 72\n¦#### 72",
    "Step 1: Do this.\n¦Step 2: Do that.\r\n\r\n¦Done",
    "# Title\n\n¦Text. ¦More text\n¦## 1. Part\n¦End",
    "- one. ¦Two\n¦- two\n  ¦- three\n\n¦1. four\n¦10) five",
    "> quoted. ¦Text\n¦> more\n",
    "   \n\n  Hello. ¦World   \n \n",
    "- a\n\n    ¦still the item\n\n¦text",
    "    ¦\n",
    # Fences
    "See:\n¦c:```py\nx = 1. Then\n\n\ny = `2`\n```\n\n¦After. ¦End",
    "c:~~~ a `b`\n```\nNot. The end\n~~~~  \n¦x",
    "c:````\n```\n````\n¦x",
    "1. Do:\n¦c:   ```sh\n   ls. A\n   ```\n¦2. Next",
    "- a\n¦c:- ```\n  code. A\n  ```\n¦b",
    "1. Do:\n¦c:   ```sh\nnot indented. A\n```\n¦2. Next",
    "c:```\n    ```\nstill. Code\n```\n¦x",
    "c:> ```\n> a. B\n> ```\n¦x",
    "c:> ```\n> a. B\n¦x",
    "Open:\n¦c:```\nnever closed. A\n\n| a |\n|---|\n",
    "c:```",
    "```inline. Code``` is not a fence. ¦Next",
    "``two`` ticks. ¦Next",
    "Text ```\n¦no fence. ¦Next",
    # Indented code
    "Text:\n\n¦c:    x = 1. Then\n\n    y\n¦After",
    "c:\tx = 1\n¦After",
    "Text\n    ¦goes on. ¦Next",
    "    1) You could. ¦Or\n\n    ¦2) Not.",
    # Tables
    "Text:\n¦t:| A. B | c |\n|---|:-:|\n| No. X | d. E |\n\n¦After. ¦End",
    "t:| a |\n| - |\n| b. C |\n¦After",
    "t:a | b\n--|--\n1. X | 2\n\n¦After",
    "t:> | a |\n> |---|\n> | b. C |\n\n¦After",
    "t:| a |\n|---|",
    "t:| State | Max. Temp. In C |\n|---|---|\n| A | 5 |\n\n¦After",
    "|x| is a value. ¦It is\n¦- not a table",
    "P(A|B) is\n¦---\n¦so",
    "a | b\n¦| c | d |\n¦e",
    "a|b\n¦--|x\n¦c",
]
KINDS = {"c:": "code", "t:": "table"}


@pytest.mark.parametrize("expected", BLOCKS, ids=repr)
def test_blocks(expected: str) -> None:
    wanted = [(p[2:], KINDS[p[:2]]) if p[:2] in KINDS else (p, "prose") for p in expected.split("¦")]
    text = "".join(piece for piece, _ in wanted)
    if text.isspace():
        wanted = [(text, "prose")]
    assert with_kinds(cut([text])) == wanted


# Long pieces


def test_long_prose_is_cut_at_white_space() -> None:
    text = "word " * 30
    pieces = cut([text], max_chars=48)
    assert {str(piece) for piece in pieces} == {"word " * 9, "word " * 3}


def test_code_longer_than_prose_may_be_stays_whole() -> None:
    code = "```\n" + "line. Then\n" * 400 + "```\n"
    assert with_kinds(cut([code + "End."])) == [(code, "code"), ("End.", "prose")]


def test_long_code_and_tables_are_cut_between_lines_and_keep_their_kind() -> None:
    code = "```\n" + "".join(f"line {n}. Then\n" for n in range(40)) + "```\n"
    table = "| a |\n|---|\n" + "| b. C |\n" * 40
    pieces = cut([code + table + "\nEnd. Then."], max_chars=20)
    assert len(pieces) > 4
    assert {piece.kind for piece in pieces[:-2]} == {"code", "table"}
    assert all(piece.endswith("\n") for piece in pieces[:-2])
    assert [str(p) for p in pieces[-2:]] == ["End. ", "Then."]


@pytest.mark.parametrize("unit", ["e\u0301", "👍🏽", "👩\u200d👩\u200d👧", "\ud83d\ude00", "☎\ufe0f"])
def test_a_forced_cut_keeps_characters_whole(unit: str) -> None:
    # The Python string "\ud83d\ude00" is a pair of lone surrogates, as a careless decoder leaves them.
    pieces = cut([unit * 50], max_chars=20)
    assert len(pieces) > 2
    assert all(len(piece) % len(unit) == 0 for piece in pieces)


# Early


@pytest.mark.parametrize("line", PROSE)
def test_t5_a_sentence_leaves_before_the_next_word_has_ended(line: str) -> None:
    text = line.replace("¦", "")
    late: list[str] = []
    buffer, end = SentenceBuffer(), 0
    for count, char in enumerate(text, 1):
        for piece in buffer.push(char):
            end += len(piece)
            # The text after the piece may hold one word, and the one character that shows it is whole.
            if len(text[end:count].split()) > 1 or count - end > 25:
                late.append(piece)
    assert late == []


def test_most_sentences_leave_with_the_first_character_of_the_next_word() -> None:
    buffer = SentenceBuffer()
    assert buffer.push("Hello there, my friend. ") == []
    assert buffer.push("H") == ["Hello there, my friend. "]
    assert buffer.push("ow are you?\n") == []
    assert buffer.push("\n") == []
    assert buffer.push("-") == ["How are you?\n\n"]
    assert buffer.push(" 你好。") == []
    assert buffer.push("我") == ["- 你好。"]


# Margins, pieces, bad input


@pytest.mark.parametrize(
    ("piece", "lead", "tail"),
    [
        ("Hello. ", "", " "),
        ("  - one\n", "  - ", "\n"),
        ("1. First item. ", "1. ", " "),
        ("2) b\r\n", "2) ", "\r\n"),
        ("## Title\n\n", "## ", "\n\n"),
        ("> > quoted", "> > ", ""),
        (">quoted", ">", ""),
        ("- [ ] task", "- [ ] ", ""),
        ("* **Bold** x", "* ", ""),
        ("**Bold** x", "", ""),
        ("-5 degrees", "", ""),
        ("2024. It was", "", ""),
        ("42.\n", "", "\n"),
        ("#tag", "", ""),
        (" \n ", " \n ", ""),
        ("", "", ""),
    ],
)
def test_margins(piece: str, lead: str, tail: str) -> None:
    assert split_margins(piece) == (lead, piece[len(lead) : len(piece) - len(tail)], tail)


def test_a_piece_is_a_string_that_knows_its_kind() -> None:
    piece = Piece("a\n", "code")
    assert piece == "a\n"
    assert Piece("a").kind == "prose"
    assert pickle.loads(pickle.dumps(piece)).kind == "code"


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(TypeError, match="text"):
        SentenceBuffer().push(b"bytes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_chars"):
        SentenceBuffer(max_chars=0)


def test_nothing_in_nothing_out() -> None:
    buffer = SentenceBuffer()
    assert buffer.push("") == []
    assert buffer.flush() == []
