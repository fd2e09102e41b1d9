"""`SentenceBuffer` at length: its work grows with the text, and whole answers stay whole."""

from __future__ import annotations

import re
import sys
from types import FrameType
from typing import Any

import pytest
from sentencex import segment

from aligner_integrations import sentences
from aligner_integrations.sentences import SentenceBuffer
from tests.pieces import cut, with_kinds

# Work grows with the text, not faster: counted, not timed

HARD = {
    "no terminator": "a",
    "white space": " ",
    "line breaks": "\n",
    "closing brackets": ")",
    "full stops": ".",
    "spaced full stops": ". ",
    "initials": "A. ",
    "acronyms": "U.S. Army ",
    "backticks": "`",
    "fences": "```\n",
    "unclosed code span": "`a. A. ",
    "stars": "*",
    "quotes": '"',
    "chinese": "好。",
    "pipes": "|\n",
    "delimiters": "a|\n-|\n",
    "list markers": "- ",
    "quote marks": "> ",
    "combining": "\u0301",
    "sentences": "Hello there, my friend. How are you? ",
}


def work_of(text: str) -> int:
    """How many lines of Python run while `text` is cut, character by character."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename == sentences.__file__:
            lines += event == "line"
            return trace
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        cut(text, max_chars=200)
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("unit", HARD.values(), ids=HARD.keys())
def test_t16_twice_the_text_is_twice_the_work(unit: str) -> None:
    text = unit * (600 // len(unit))
    once, twice = work_of(text), work_of(text * 2)
    assert twice <= 2.2 * once
    assert once <= 80 * len(text)


@pytest.mark.parametrize("unit", HARD.values(), ids=HARD.keys())
def test_the_segmenter_reads_no_more_than_a_multiple_of_the_text(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counting(language: str, text: str) -> Any:
        read.append(len(text))
        return segment(language, text)

    monkeypatch.setattr(sentences, "segment", counting)
    text = unit * (3000 // len(unit))
    cut(text)
    assert sum(read) <= 10 * len(text)
    assert max(read, default=0) <= 80


def test_t16_a_megabyte_without_a_terminator_is_held_back_by_one_piece_at_most() -> None:
    assert {len(piece) for piece in cut(["a" * 1_000_000])} == {2000}
    buffer, out = SentenceBuffer(), 0
    for count in range(1, 100_001):
        for piece in buffer.push("a"):
            out += len(piece)
        assert count - out <= 2000
    assert out + sum(map(len, buffer.flush())) == 100_000


# Whole answers

ANSWERS = [
    """Sure! Here's how to fetch a page, e.g. with `requests` (v2.31.0):

1. Install it. Run `pip install requests==2.31.0`. See https://docs.python-requests.org/en/latest/index.html#user.
2. Write the code:

   ```python
   import requests

   # Get it. Then print it.
   r = requests.get("https://example.com/a.b?c=1.5&d=2.")
   print(r.text[:3.0.__int__()])
   ```

3. Run it:
```sh
python fetch.py > out.txt
```
That's all! It takes approx. 1.5 s, i.e. under 2,000.50 ms. Questions? Mail me@example.co.uk.
""",
    """| Model | Params (B) | Score. Avg |
|:------|-----------:|-----------:|
| A. One | 1.5 | 62.25 |
| No. 2 | 7.0 | 71.10 |

The best is No. 2. It has 7.0 B parameters. Dr. Lee said: "It works." We agree.

Price | Tax
--- | ---
$3.50 | 0.35

    total = 3.50 + 0.35  # i.e. 3.85. Done

So pay $3.85. Thanks!""",
    """Natalia sold 48/2 = 24 clips in May.
Natalia sold 48+24 = 72 clips altogether in April and May.
#### 72""",
    """你好！圆周率是3.14159。请看https://a.b/c?d=1.2 的说明。Then in English: see U.S. law. It is 5 p.m. now.
- यह पहला वाक्य है। डॉ. शर्मा ने 3.5 किलो कहा। क्या यह ठीक है?
- مرحبا بالعالم. السعر 12.50 دولار. كيف حالك؟ بخير.
- 「はい。」と言った。バージョン1.2.3です。終わり。
""",
    """> "Quoted." He said so.
> ```
> raw. Text 1.2
> ```

~~~text
never closed. 3.14 and https://x.y/z. The end
""",
]
WHOLE = re.compile(
    r"^[ >]*(?P<fence>```|~~~)[^\n]*\n.*?(?:^[ >]*(?P=fence)[ \t\r]*$|\Z)|(?:https?://|www\.)[!-~]+"
    r"|[\w.+-]+@[\w-]+(?:\.\w+)+|\d[\d.,:/]*\d",
    re.MULTILINE | re.DOTALL,
)


def check_answer(text: str) -> int:
    """Check one answer in all the ways that need no expected pieces; return how many wholes it held."""
    pieces = cut([text])
    assert "".join(pieces) == text
    for size in (1, 2, 3, 7, 50):
        chunks = [text[i : i + size] for i in range(0, len(text), size)]
        assert with_kinds(cut(chunks)) == with_kinds(pieces)
    cuts, end = set(), 0
    for piece in pieces[:-1]:
        end += len(piece)
        cuts.add(end)
    wholes = list(WHOLE.finditer(text))
    for whole in wholes:
        assert cuts.isdisjoint(range(whole.start() + 1, whole.end())), whole[0]
    return len(wholes)


@pytest.mark.parametrize("answer", ANSWERS)
def test_whole_answers(answer: str) -> None:
    assert check_answer(answer) > 0
    assert check_answer(answer.replace("\n", "\r\n")) > 0


def test_kinds_of_a_whole_answer() -> None:
    kinds = [piece.kind for piece in cut([ANSWERS[1]])]
    assert kinds.count("table") == 2
    assert kinds.count("code") == 1
    assert kinds[0] == "table"
    assert kinds[-1] == "prose"
