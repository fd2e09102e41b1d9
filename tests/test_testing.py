"""The doubles that other tests lean on behave like an aligner, because they are one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from aligner_integrations.errors import CorrectionFailedError
from aligner_integrations.testing import byte_tokenizer, replay_correction, scripted_aligner

ANSWER = "The first sentence is here. The second one is bad. A third one ends it."


def test_the_rule_sees_question_prefix_and_sentence() -> None:
    calls: list[tuple[str, str, str]] = []

    def rule(question: str, prefix: str, sentence: str) -> str:
        calls.append((question, prefix, sentence))
        return sentence.replace("bad", "good")

    correction = scripted_aligner(rule).correct("Wie geht's? 漢字", ANSWER)
    assert correction.text == ANSWER.replace("bad", "good")
    assert calls == [
        ("Wie geht's? 漢字", "", "The first sentence is here."),
        ("Wie geht's? 漢字", "The first sentence is here.", "The second one is bad."),
        ("Wie geht's? 漢字", "The first sentence is here. The second one is good.", "A third one ends it."),
    ]


def test_an_answer_level_rule_sees_the_whole_answer() -> None:
    calls: list[tuple[str, str, str]] = []

    def rule(question: str, prefix: str, sentence: str) -> str:
        calls.append((question, prefix, sentence))
        return sentence.upper()

    aligner = scripted_aligner(rule, granularity="answer")
    assert aligner.correct("Q", ANSWER).text == ANSWER.upper()
    assert calls == [("Q", "", ANSWER)]


def test_markers_in_the_texts_reach_the_rule_as_text() -> None:
    seen: list[tuple[str, str, str]] = []

    def rule(question: str, prefix: str, sentence: str) -> str:
        seen.append((question, prefix, sentence))
        return sentence

    aligner = scripted_aligner(rule)
    aligner.correct_sentence(
        "a <|prefix|> b", "p <|sentence|> q.", "s <|correction|> t <|end|>.", feedback="f <|question|>"
    )
    assert seen == [("a <|prefix|> b", "p <|sentence|> q.", "s <|correction|> t <|end|>.")]


def test_an_unchanged_sentence_costs_one_forward() -> None:
    by_sentence = scripted_aligner(lambda question, prefix, sentence: sentence)
    assert by_sentence.correct_sentence("Q", "P.", "A sentence.").stats.forwards == 1
    whole = scripted_aligner(lambda question, prefix, sentence: sentence, granularity="answer")
    stats = whole.correct("Q", ANSWER * 50).stats
    assert stats.forwards == 1
    assert stats.accepted_tokens == len(ANSWER) * 50


@pytest.mark.parametrize("granularity", ["sentence", "answer"])
def test_a_rule_that_raises_or_returns_no_text_is_a_failing_correction(granularity: str) -> None:
    def rule(question: str, prefix: str, sentence: str) -> str:
        raise ZeroDivisionError("no luck")

    with pytest.raises(CorrectionFailedError, match="ZeroDivisionError;") as caught:
        scripted_aligner(rule, granularity=granularity).correct("Q", ANSWER)  # type: ignore[arg-type]
    assert repr(caught.value.__cause__) == "ZeroDivisionError('no luck')"
    wrong = scripted_aligner(lambda *fields: 3, granularity=granularity)  # type: ignore[arg-type]
    with pytest.raises(CorrectionFailedError, match="TypeError;") as caught:
        wrong.correct("Q", ANSWER)
    assert "must return a str, got int" in str(caught.value.__cause__)


def test_a_rule_may_write_anything_unless_safeguards_are_on() -> None:
    long = "Some other text that has nothing to do with it, " * 40
    assert scripted_aligner(lambda *fields: long).correct("Q", "Short.").text == long.strip()
    guarded = scripted_aligner(lambda *fields: long, safeguards="keep_original").correct("Q", "Short.")
    assert guarded.text == "Short."
    assert guarded.proposed == long.strip()
    assert {finding.action for finding in guarded.findings} == {"kept_original"}


def test_delay_is_slept_once_per_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("aligner_integrations.testing.doubles.time.sleep", slept.append)
    aligner = scripted_aligner(lambda q, p, sentence: sentence.upper(), delay=0.05)
    assert aligner.correct_sentence("Q", "", "A sentence.").stats.forwards > 1
    aligner.correct("Q", "Two sentences. Here they are.")
    assert slept == [0.05] * 3


def test_threads_share_one_scripted_aligner() -> None:
    counts: dict[str, int] = {}
    lock = threading.Lock()

    def rule(question: str, prefix: str, sentence: str) -> str:
        with lock:
            counts[question] = counts.get(question, 0) + 1
        return f"{question} {sentence}"

    aligner = scripted_aligner(rule)
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: aligner.correct(f"Q{n}", "One sentence.").text, range(40)))
    assert texts == [f"Q{n} One sentence." for n in range(40)]
    assert set(counts.values()) == {1}


def test_replayed_corrections_cost_what_the_decoder_needs() -> None:
    tokenizer = byte_tokenizer()
    unchanged = replay_correction(tokenizer, "Q", ANSWER, ANSWER)
    assert unchanged.forwards == 1
    assert unchanged.accepted_tokens == len(ANSWER)
    plain = replay_correction(tokenizer, "Q", ANSWER, ANSWER, draft=False)
    assert plain.forwards == plain.new_tokens == len(ANSWER) + 1
    changed = replay_correction(tokenizer, "Q", ANSWER, ANSWER.replace("bad", "good"))
    assert 1 < changed.forwards < len(ANSWER) / 3
    assert replay_correction(tokenizer, "", "", "").forwards == 1
