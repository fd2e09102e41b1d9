"""Each kind of harm: found where it is, not where it is not, in any text and in linear time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner_integrations.safeguards import CHECK_NAMES, guard_correction, inspect_correction, is_kept
from aligner_integrations.safeguards.checks import CHECKS
from aligner_integrations.safeguards.policy import Action, SafeguardPolicy
from aligner_integrations.safeguards.repair import REPAIRS, restore_code, restore_links
from aligner_integrations.testing import scripted_aligner

REFUSAL = "I'm sorry, but I can't help with that."
WHOLE = SafeguardPolicy.for_granularity("answer")
REPAIRING = SafeguardPolicy().with_actions(
    {name: "repair" if name in REPAIRS else "accept" for name in CHECK_NAMES}
)
EVERYTHING = SafeguardPolicy().with_actions(dict.fromkeys(CHECK_NAMES, "accept"))
CODE = "Run this:\n\n```python\nprint(1)\n```\n\nThat is all."
TABLE = "See:\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nSo it is."
FORMULA = r"The area is \(\pi r^2\), and $E = mc^2$ holds."
PROSE = "The tides follow the moon. They rise twice a day, and the sun adds to them in spring."
GERMAN = (
    "Das ist nicht der Weg, den die Leute mit dem Hund und der Katze gehen, und es wird auch nicht besser."
)
ENGLISH = "This is not the way that the people with the dog and the cat would go, and it is not for you."

HARM = [
    ("empty", PROSE, " \n"),
    ("broken_characters", PROSE, PROSE.replace("moon", "mo\x08n")),
    ("broken_characters", PROSE, PROSE + "\udfff"),
    ("template_marker", PROSE, PROSE + " ASSISTANT: yes"),
    ("template_marker", PROSE, PROSE + "</strong>"),
    ("repetition", PROSE, PROSE + " and so on" * 9),
    ("repetition", PROSE, "- the very same line, again and again\n" * 6),
    ("truncated", PROSE, "The tides follow the moon. They rise twice a day, and the"),
    ("truncated", PROSE, "The tides follow the moon, they rise twice,"),
    ("truncated", PROSE, "They rise:\n\n1. At noon.\n2"),
    ("truncated", PROSE, "The tides follow the moon.\n\n**Why they rise:**"),
    ("truncated", PROSE, "The tides follow the moon. They rise twice a day and..."),
    ("truncated", PROSE, "The tides follow the moon. Those of spring are included in"),
    ("truncated", PROSE, "The tides follow the moon:\n\n```python\nprint(1)"),
    ("script_mixing", PROSE, PROSE.replace(". They", "。They")),
    ("script_mixing", PROSE, PROSE.replace("moon. They rise", "moon. They и rise")),
    ("script_mixing", PROSE, PROSE.replace("and", "và")),
    ("script_mixing", PROSE, PROSE.replace("a day, and", "a day،and")),
    ("words_run_together", PROSE, PROSE.replace("follow the", "followthe")),
    (
        "words_run_together",
        PROSE,
        PROSE.replace("a day, and the", "a day,and the").replace("sun", "sons,and"),
    ),
    ("words_run_together", PROSE, PROSE + " Thetidesrisetwiceadayandthesunaddstothem so."),
    ("words_run_together", PROSE, PROSE.replace("moon. They", "moon.They")),
    ("words_run_together", PROSE, PROSE.replace("the moon. They", "yourMoon. They")),
    ("language_changed", ENGLISH, GERMAN),
    ("length", PROSE, " ".join(f"Point {number} is another one." for number in range(400))),
    ("length", PROSE * 15, "They rise."),
    ("drift", PROSE, "Bananas grow in warm places, said somebody who was there."),
    ("code_changed", CODE, CODE.replace("print(1)", "print(2)")),
    ("code_changed", CODE, "That is all."),
    ("inline_code_changed", "Call `open(path)` first.", "Call it first."),
    ("table_changed", TABLE, TABLE.replace("| 2 |", "| 3 |")),
    ("formula_changed", FORMULA, FORMULA.replace("r^2", "r^3")),
    ("json_changed", '{"a": [1, 2]}', '{"a": [1, 3]}'),
    ("json_changed", '"name": "old",', '"name": "new",'),
    ("json_changed", '{"a": 1}\n{"a": 2}', "The values are 1 and 2."),
    ("citations_lost", "It is 7 [1][2].", "It is 7 [1]."),
    ("links_lost", "See https://a.example/b for it.", "See the page for it."),
    ("numbers", "It took 12, 15 and 18 days.", "It took 15 days."),
    ("quotes_lost", 'She said "never again" twice.', "She said no twice."),
    ("refusal", PROSE + " " + "It is so. " * 60, REFUSAL),
    ("refusal", CODE, REFUSAL),
]


def found(question: str, answer: str, proposed: str) -> set[str]:
    """The names of everything that is found, whatever is done about it."""
    return {f.check for f in inspect_correction(question, answer, proposed, policy=EVERYTHING)}


@pytest.mark.parametrize(("check", "answer", "proposed"), HARM)
def test_each_harm_is_found_and_only_in_the_correction(check: str, answer: str, proposed: str) -> None:
    finding = CHECKS[check]("Q", answer, proposed, EVERYTHING)
    assert finding is not None
    assert finding.check == check
    assert finding.detail
    assert CHECKS[check]("Q", answer, answer, EVERYTHING) is None
    # What the upstream model wrote so itself is not the correction's doing.
    if check not in ("empty", "length", "drift", "numbers"):
        assert CHECKS[check]("Q", proposed, proposed, EVERYTHING) is None


def test_every_check_has_its_case() -> None:
    assert {check for check, _, _ in HARM} == set(CHECK_NAMES)


@pytest.mark.parametrize(
    ("question", "answer", "proposed"),
    [
        ("Q", PROSE, PROSE.replace("moon", "moon (月)")),  # an example in brackets
        ("What is it called in Japanese?", PROSE, PROSE.replace("moon", "moon, 月,")),
        ("Q", "我喜欢苹果。", "我喜欢Python，也喜欢苹果。"),
        (
            "Q",
            PROSE,
            PROSE.replace("follow", "understand") + " Thousands breathe therein, within and without.",
        ),
        ("Q", PROSE, PROSE + " Use `a,b` or https://a.example/x,y for JavaScript and YouTube."),
        ("Q", PROSE, PROSE + " #BreakTheBias #WomenInScience"),
        ("Q", PROSE, PROSE + r" So \(a,b\) is $x,y$ at best."),
        ("Q", GERMAN, GERMAN.replace("Weg", "Geschwindigkeitsbegrenzungsweg")),
        ("Q", PROSE, "The tides follow the moon.\n\nWarm regards,\n\n[Your Name]"),
        ("Q", PROSE, PROSE + "\n\n- Basel\n- Zurich"),
        ("Q", PROSE, PROSE + "\n\n- How to stay logged in"),
        ("Q", "rt i just dropped the phone - _ - fuck", "rt i just dropped the phone - _ -"),
        ("Q", PROSE, PROSE + " Rehearse, rehearse, rehearse."),
        ("Q", PROSE, PROSE + " Count: 1, 1.1, 1.1.1, 1.1.1.1 and ⣿⣿⣿⣿⣿⣿⣿⣿⣿⣿."),
        (
            "Auf Deutsch, bitte: was ist das für ein Weg, und wie ist der, auf dem die Leute gehen?",
            ENGLISH,
            GERMAN,
        ),
        ("Q", "It costs $20 and $30 today.", "It costs $20 and $30 tomorrow."),
        ("Q", '{"a": [1, 2]}', '{\n  "a": [1, 2]\n}'),
        ("Q", CODE, CODE.replace("That is all.", "That is it.")),
        ("Q", TABLE, TABLE.replace("| 1 | 2 |", "|1|2|")),
        ("Q", FORMULA, FORMULA.replace(r"\(\pi r^2\)", r"\[ \pi r^2 \]")),
        ("Q", "The steps are [10, 9, 2] in order.", "The steps are these."),  # data, no citation
        (
            "Q",
            "Take `a[1]` and\n\n```\nb[2]\n```\n\nfor it.",
            "Take `a[1]` and\n\n```\nb[2]\n```\n\nfor that.",
        ),
    ],
)
def test_what_is_no_harm_is_not_called_so(question: str, answer: str, proposed: str) -> None:
    assert found(question, answer, proposed) <= {"drift", "numbers", "length", "quotes_lost"}


def test_counting_stops_where_it_was_asked_to() -> None:
    full = "Here you are:\n\n" + "\n".join(
        f"{number}. Place {number}, where one may stay" for number in range(1, 11)
    )
    short = "Here you are:\n\n" + "\n".join(
        f"{number}. Place {number}, where one may stay" for number in range(1, 5)
    )
    assert "truncated" in found("Name the top 10 places.", full, short)
    assert "truncated" not in found("Name some places.", full, short)
    assert "truncated" not in found("Name the top 10 places.", full, full.replace("Place", "City"))


@pytest.mark.parametrize(
    "check", ["code_changed", "table_changed", "formula_changed", "json_changed", "numbers", "citations_lost"]
)
def test_a_refusal_need_not_keep_what_the_answer_holds(check: str) -> None:
    answer = next(answer for name, answer, _ in HARM if name == check)
    assert not is_kept(inspect_correction("Q", answer, REFUSAL))


@pytest.mark.parametrize("granularity", ["sentence", "answer"])
@pytest.mark.parametrize("answer", [CODE, TABLE, FORMULA, '{"a": [1, 2]}', "It is 7 [1], so go on."])
def test_structure_is_never_altered_unless_asked(answer: str, granularity: str) -> None:
    def rule(question: str, prefix: str, sentence: str) -> str:
        return sentence.translate(str.maketrans("12", "34")).replace("r^", "s^").replace("[3]", "")

    aligner = scripted_aligner(rule, granularity=granularity, safeguards="keep_original")  # type: ignore[arg-type]
    shown = aligner.correct("Q", answer).text
    for part in ("print(1)", "| 1 | 2 |", r"\pi r^2", '{"a": [1, 2]}', "[1]"):
        assert (part in shown) == (part in answer)
    if granularity == "answer":
        free = dict.fromkeys(
            ("code_changed", "table_changed", "formula_changed", "json_changed", "citations_lost"), "accept"
        )
        changed = aligner.with_options(safeguards=free).correct("Q", answer)  # type: ignore[arg-type]
        assert changed.text == changed.proposed == rule("Q", "", answer)
        assert {finding.action for finding in changed.findings} == {"accepted"}


# --- repairs


def test_fences_are_put_back_and_closed() -> None:
    bare = "Run this:\n\nprint(1)\n\nThat is it."
    assert restore_code(CODE, bare) == CODE.replace("all", "it")
    assert restore_code(CODE, "Run this:\n\n```python\nprint(1)") == "Run this:\n\n```python\nprint(1)\n```"
    shown, findings = guard_correction("Q", CODE, bare, policy=WHOLE)
    assert shown == CODE.replace("all", "it")
    assert [(finding.check, finding.action) for finding in findings] == [("code_changed", "repaired")]
    # Twice, or not at all: there is no place that is surely right.
    for unclear in ("print(1)\n\nor\n\nprint(1)\n", "Run print(1), that is all."):
        assert restore_code(CODE, unclear) == unclear


def test_links_are_put_back_on_their_names() -> None:
    answer = "See [the manual](https://a.example/m) and [it](https://a.example/i)."
    assert restore_links(answer, "Read the manual first.") == "Read [the manual](https://a.example/m) first."
    for unclear in ("Read the manual, the manual!", "Read it all, or sit.", "Read `the manual`.", "Nothing."):
        assert "https://a.example/m" not in restore_links(answer, unclear)
    assert restore_links(answer, REFUSAL) == REFUSAL
    shown, findings = guard_correction("Q", "See [it](https://a.example/i).", "See it now.")
    assert (shown, [finding.action for finding in findings]) == (
        "See [it](https://a.example/i) now.",
        ["repaired"],
    )
    lost, findings = guard_correction("Q", "See [it](https://a.example/i).", "See the other one.")
    assert lost == "See [it](https://a.example/i)."
    assert is_kept(findings)


PIECES = st.sampled_from(
    [
        *("```\n", "```python\n", "~~~\n", "\n", "\n\n", "print(1)\n", "x = 2\n", "text ", "the manual", " "),
        *(
            "[the manual](https://a.example/m)",
            "https://a.example/m",
            "`code`",
            "[1]",
            "[2, 3]",
            "word.",
            "[",
            "](",
        ),
    ]
)


@given(answer=st.lists(PIECES, max_size=12), proposed=st.lists(PIECES, max_size=12))
@settings(max_examples=400)
def test_repairs_are_idempotent_and_take_nothing_away(answer: list[str], proposed: list[str]) -> None:
    original, text = "".join(answer), "".join(proposed)
    for restore in REPAIRS.values():
        once = restore(original, text)
        left = iter(once)
        assert all(char in left for char in text), (restore, once)
        assert restore(original, once) == once


# --- any text, in linear time

ANY = st.text(st.characters(codec=None), max_size=200)  # lone surrogates included


@given(question=ANY, answer=ANY, proposed=ANY)
@settings(max_examples=300)
def test_every_check_takes_any_text(question: str, answer: str, proposed: str) -> None:
    for granularity in ("sentence", "answer"):
        policy = SafeguardPolicy.for_granularity(granularity)
        shown, findings = guard_correction(question, answer, proposed, policy=policy)
        assert (shown == answer) or not is_kept(findings)
        assert guard_correction(question, answer, answer, policy=policy) == (answer, ())
    for name, check in CHECKS.items():
        finding = check(question, answer, proposed, EVERYTHING)
        assert finding is None or (finding.check == name and finding.detail)


UNITS = [
    *(
        "a",
        "a ",
        "ab,",
        "A",
        "aB",
        "the",
        "ing",
        ". ",
        "\n",
        "\r",
        " ",
        "\t",
        "| ",
        "|\n",
        "-|",
        "- ",
        "|-|\n",
    ),
    *(
        "```\n",
        "`",
        "`a",
        "$",
        "$a",
        "$ ",
        "$a $",
        "\\(",
        "\\(a",
        "\\[a\\]",
        "\\begin{",
        "[",
        "[1]",
        "[1, ",
        "[a](",
    ),
    *(
        "https://",
        "http://a ",
        '"',
        '"a',
        "“a",
        "{",
        '{"a":',
        "[[",
        "1",
        "1.",
        "1\n",
        "1. a\n",
        "#",
        "**",
        "**a",
        "*",
    ),
    *(
        "<",
        "</a>",
        "</",
        "<|",
        "<|a|>",
        "。",
        "漢",
        "漢a",
        "й",
        "à ",
        "и ",
        "I'm sorry. ",
        "top 1 ",
        "\udfff",
        "\0",
    ),
    *(
        "~~~\n",
        "> ",
        ">```\n",
        "...",
        "…",
        "#a ",
        "&a ",
        "of",
        "ofof ",
        "thethe",
        "a" * 30 + " ",
        "```\na\n```\n",
    ),
]


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_hostile_repetition_takes_linear_time(unit: str) -> None:
    """Backtracking would hang here."""
    text = unit * (30_000 // len(unit))
    for answer, proposed in ((PROSE, text), (text, PROSE), (text, text + "b")):
        guard_correction(text, answer, proposed, policy=REPAIRING)


@pytest.mark.parametrize("unit", ["a", "a ", "```\n", "$a", "|-|\n", "[1", "\\(", " "], ids=ascii)
def test_long_hostile_repetition_ends(unit: str) -> None:
    text = unit * (200_000 // len(unit))
    guard_correction("Q", text, text + "b", policy=REPAIRING)


def test_a_megabyte_is_inspected() -> None:
    text = PROSE * 12_000
    assert len(text) > 1_000_000
    assert is_kept(inspect_correction("Q", text, text.replace("follow the", "followthe"), policy=WHOLE))


LINES = [
    '{\n  "year": 1,\n  "list": [\n    "item 1",\n    12,\n    13\n  ]\n}\n',
    "So it is:\n\n\\[\nx = 1 + 2\n+ 2\n\\]\n\nIt is done.",
    "So it is:\n\n$$ x = 1\n+ 2 $$\n\nIt is done.",
    "\\begin{align}\nx &= 1 \\\\\ny &= 2\n\\end{align}\n",
]


@pytest.mark.parametrize("answer", LINES)
def test_structure_of_several_lines_stays_in_a_stream(answer: str) -> None:
    aligner = scripted_aligner(lambda q, p, s: s.replace("1", "7"), safeguards="keep_original")
    with aligner.stream("Q") as stream:
        segments = [*stream.push(answer + "\n\nAfter 1 comes 2.\n"), *stream.close()]
    shown = "".join(segment.text for segment in segments)
    assert shown == answer + "\n\nAfter 7 comes 2.\n"
    actions: dict[str, Action] = {"formula_changed": "accept", "json_changed": "accept", "drift": "off"}
    free = aligner.with_options(safeguards=actions)
    assert free.correct("Q", answer).text == answer.replace("1", "7")


def test_a_formula_that_never_ends_ends_at_a_blank_line() -> None:
    aligner = scripted_aligner(lambda q, p, s: s.replace("1", "7"), safeguards="keep_original")
    answer = "$$ x = 1\n\nThere is 1 more.\n"
    assert aligner.correct("Q", answer).text == "$$ x = 1\n\nThere is 7 more.\n"
