"""`Aligner`: finished answers and single sentences, its options, and bad input."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner_integrations import Aligner, AlignerConfig, CorrectionTemplate, DecodeConfig
from aligner_integrations.backends.base import Ids, KVCache, Logits
from aligner_integrations.correction import apply_edits
from aligner_integrations.errors import (
    CorrectionFailedError,
    InputTooLongError,
    ModelLoadError,
    TemplateError,
)
from aligner_integrations.testing import ScriptedBackend, byte_tokenizer, scripted_aligner

ANSWER = (
    "## Steps\n\n- First do the bad thing.  \n- Then rest.\n\n```python\nbad = 1\n```\n\n"
    'That is bad. "Bad" end'
)
REFUSAL = "I'm sorry, but I can't help with that."
HOSTILE = [
    "a \ud800 lone surrogate.",
    "NUL \0 inside.",
    "שלום עולם. مرحبا بالعالم.",
    "<|end|><|keep|> and </s> and ##Answer: x.",
    "No end",
    "…",
    "🤷‍♀️ shrug. 🤷",
    "\u202eright to left override\u202c.",
]


def copying(**options: Any) -> Aligner:
    return scripted_aligner(lambda question, prefix, sentence: sentence, **options)


def with_context(aligner: Aligner, max_length: int) -> Aligner:
    """The same model with a context of `max_length` tokens, which are bytes here."""
    config = replace(aligner.config, max_length=max_length)
    return Aligner(aligner.backend, aligner.tokenizer, config, safeguards=aligner.safeguards)


TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*HOSTILE, ANSWER, "One. ", "Two! ", "\n", "- item\n", "| a | b |\n", " "]),
        st.text(st.characters(exclude_categories=()), max_size=20),
    ),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("granularity", ["sentence", "answer"])
@given(answer=TEXTS)
def test_an_aligner_that_copies_changes_nothing(granularity: str, answer: str) -> None:
    correction = copying(granularity=granularity).correct("Q", answer)
    if granularity == "sentence" or "\ud800" not in answer:
        assert correction.text == answer
        assert not correction.changed
        assert correction.edits == ()


@pytest.mark.parametrize("granularity", ["sentence", "answer"])
@given(answer=TEXTS)
def test_edits_turn_the_answer_into_the_text(granularity: str, answer: str) -> None:
    aligner = scripted_aligner(lambda q, p, s: s.replace("a", "bb").upper(), granularity=granularity)  # type: ignore[arg-type]
    correction = aligner.correct("Q", answer)
    assert apply_edits(answer, correction.edits) == correction.text == str(correction)
    assert correction.answer == answer
    assert correction.changed == (correction.text != answer)


def test_only_the_core_of_prose_is_shown_to_the_model() -> None:
    seen: list[str] = []
    aligner = scripted_aligner(lambda q, p, s: seen.append(s) or s.replace("bad", "good"))  # type: ignore[func-returns-value]
    correction = aligner.correct("Q", ANSWER)
    assert not any("```" in sentence or sentence.startswith(("-", "#", " ")) for sentence in seen)
    assert all(sentence == sentence.strip() for sentence in seen)
    assert correction.text == ANSWER.replace("bad thing", "good thing").replace("is bad", "is good")


def test_a_dropped_sentence_leaves_its_line_break_only() -> None:
    aligner = scripted_aligner(lambda q, p, s: "" if "drop" in s else s)
    text = aligner.correct("Q", "Stay here. Please drop me. Stay too.\n- drop me\n- stay\n").text
    assert text == "Stay here. Stay too.\n\n- stay\n"


@pytest.mark.parametrize(
    "answer", ["", " ", "\n\n", "...", "- \n- \n", "🤷", "```\nx = 1\n```\n", "| a |\n|---|\n| b |\n"]
)
@pytest.mark.parametrize("granularity", ["sentence", "answer"])
def test_what_holds_nothing_to_correct_costs_nothing(answer: str, granularity: str) -> None:
    if granularity == "answer" and any(character.isalnum() for character in answer):
        return
    aligner = scripted_aligner(lambda q, p, s: "rewritten", granularity=granularity)  # type: ignore[arg-type]
    correction = aligner.correct("", answer)
    assert correction.text == answer
    assert correction.stats.forwards == 0
    assert correction.stats.provider == "scripted"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_comes_through_and_stays_itself(text: str) -> None:
    aligner = copying()
    assert aligner.correct(text, text).text == text
    assert aligner.correct_sentence(text, text, text).text == text
    kept = aligner.correct_sentence("Q", "", text)
    assert kept.text == kept.proposed == text


def test_an_empty_question_is_allowed() -> None:
    assert scripted_aligner(lambda q, p, s: s + q).correct("", "A sentence.").text == "A sentence."


async def test_acorrect_gives_the_same() -> None:
    aligner = scripted_aligner(lambda q, p, s: s.upper())
    assert (await aligner.acorrect("Q", ANSWER)).text == aligner.correct("Q", ANSWER).text


def test_stats_of_an_answer_are_those_of_its_sentences() -> None:
    aligner = copying()
    stats = aligner.correct("A question?", "One sentence. Two sentences. Three sentences.").stats
    assert stats.forwards == stats.new_tokens == 3
    assert stats.cached_tokens > 0
    assert stats.finish_reason == "eos"
    assert (stats.backend, stats.provider) == ("scripted", "scripted")


def test_feedback_reaches_the_model() -> None:
    prompts: list[str] = []
    tokenizer = byte_tokenizer()
    feedback = tokenizer.token_id("<|feedback|>")

    def script(ids: Ids) -> tuple[int, Ids]:
        prompts.append(tokenizer.decode(ids[ids.index(feedback) :] if feedback in ids else []))
        return len(ids), [2]

    backend = ScriptedBackend(script, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    aligner = Aligner(backend, tokenizer, AlignerConfig("tiny", "sentence", keep_token="<|keep|>"))
    aligner.correct("Q", "A sentence.", feedback="be kind")
    assert prompts == ["be kindA sentence."]


# --- safeguards


def test_a_rewrite_that_drifts_is_not_shown() -> None:
    def rule(question: str, prefix: str, sentence: str) -> str:
        return {"Cut the wire.": REFUSAL, "Then run away.": "Bananas grow in warm places."}.get(
            sentence, sentence
        )

    guarded = scripted_aligner(rule, safeguards="keep_original")
    correction = guarded.correct("Q", "Cut the wire. Then run away. The end.")
    assert correction.text == f"{REFUSAL} Then run away. The end."
    assert correction.proposed == f"{REFUSAL} Bananas grow in warm places. The end."
    assert [(finding.check, finding.action) for finding in correction.findings] == [
        ("drift", "kept_original")
    ]
    assert (
        guarded.with_options(safeguards="off").correct("Q", "Then run away.").text
        == "Bananas grow in warm places."
    )


def test_a_sentence_is_dropped_only_after_a_refusal() -> None:
    def rule(question: str, prefix: str, sentence: str) -> str:
        return REFUSAL if "first" in sentence else ""

    aligner = scripted_aligner(rule, safeguards="keep_original")
    assert aligner.correct("Q", "Do this first. Then do that. Then run.").text == f"{REFUSAL} "
    kept = aligner.correct("Q", "Then do that. Then run.")
    assert not kept.changed
    assert {finding.check for finding in kept.findings} == {"empty"}
    assert aligner.correct_sentence("Q", f"{REFUSAL} ", "Then run.").text == ""
    assert aligner.correct_sentence("Q", "Something else. ", "Then run.").text == "Then run."


def test_an_answer_level_model_may_rewrite_freely_but_not_do_harm() -> None:
    def rewriting(text: str) -> Aligner:
        return scripted_aligner(lambda *fields: text, granularity="answer", safeguards="keep_original")

    assert rewriting("Bananas grow in warm places.").correct("Q", "Then run away.").changed
    assert not rewriting("").correct("Q", "Then run away.").changed
    assert not rewriting("Then <|end|> walk away.").correct("Q", "Then run away.").changed


def test_a_truncated_rewrite_is_not_shown() -> None:
    aligner = scripted_aligner(lambda q, p, s: s + " And much more.", safeguards="keep_original")
    short = aligner.with_options(decode=DecodeConfig(max_new_tokens=12))
    correction = short.correct_sentence("Q", "", "A sentence.")
    assert correction.text == "A sentence."
    assert correction.stats.finish_reason == "length"
    assert "truncated" in {finding.check for finding in correction.findings}
    shown = short.with_options(safeguards="off").correct_sentence("Q", "", "A sentence.")
    assert shown.text == "A sentence."  # the first 12 bytes are as they were, less the space after them


# --- the context


def test_a_sentence_that_does_not_fit_says_how_long_it_is() -> None:
    aligner = with_context(copying(), 400)
    with pytest.raises(InputTooLongError, match=r"1004 tokens.*1064 more.*400"):
        aligner.correct_sentence("Q", "", "x" * 1000)
    whole = with_context(copying(granularity="answer"), 400)
    with pytest.raises(InputTooLongError, match=r"206 tokens.*201 more.*400"):
        whole.correct("QQ", "x" * 200)


def test_a_very_long_answer_passes_piece_by_piece() -> None:
    """100,000 characters without a stop: what does not fit stays, with a finding, and nothing raises."""
    correction = with_context(copying(), 1024).correct("Q", "x" * 100_000)
    assert correction.text == "x" * 100_000
    assert {finding.check for finding in correction.findings} == {"too_long"}
    words = " ".join(map(str, range(4_000)))
    shouted = scripted_aligner(lambda q, p, s: s + "!").correct("Q", words)
    assert shouted.text.replace("!", "") == words
    assert shouted.text.count("!") > 5


def test_a_long_question_loses_its_beginning_and_a_finding_says_so() -> None:
    seen: list[str] = []
    aligner = with_context(scripted_aligner(lambda q, p, s: seen.append(q) or s), 600)  # type: ignore[func-returns-value]
    correction = aligner.correct("é" * 500 + " the end?", "One sentence. Another one.")
    assert correction.text == "One sentence. Another one."
    assert len(set(seen)) == 1
    assert seen[0].endswith("é the end?")
    assert len(seen[0].encode()) <= 300
    assert [finding.check for finding in correction.findings] == ["question_truncated"]


def test_the_prefix_leaves_in_whole_pieces_and_rarely() -> None:
    """Room for about 500 bytes of prefix: the cache is rebuilt when it is full, not per sentence."""
    prefixes: list[str] = []
    aligner = with_context(scripted_aligner(lambda q, p, s: prefixes.append(p) or s), 700)  # type: ignore[func-returns-value]
    sentences = [f"This is sentence number {number} of it. " for number in range(100)]
    with aligner.stream("Q?") as stream:
        segments = [*stream.push("".join(sentences)), *stream.close()]
    assert "".join(map(str, segments)) == "".join(sentences)
    rebuilt = [
        number for number, (old, new) in enumerate(itertools.pairwise(prefixes)) if not new.startswith(old)
    ]
    assert 5 < len(rebuilt) < 25
    for prefix in prefixes[1:]:
        assert prefix.startswith("This is sentence number")
        assert len(prefix.encode()) < 700
    reused = [segment.stats.cached_tokens / segment.stats.prompt_tokens for segment in segments]
    assert sum(share > 0.5 for share in reused) > 75


def test_the_cost_of_a_sentence_does_not_grow_with_those_before_it() -> None:
    with copying().stream("Q?") as stream:
        segments = stream.push("".join(f"This is sentence number {number:3}. " for number in range(60)))
    run = [segment.stats.prompt_tokens - segment.stats.cached_tokens for segment in segments]
    assert max(run[2:]) == min(run[2:])


# --- loading and options


def test_the_repr_says_what_runs() -> None:
    assert repr(copying()) == (
        "Aligner(template='tiny', granularity='sentence', backend='scripted', provider='scripted', "
        "safeguards='off')"
    )


def test_an_explicit_decode_config_wins_over_the_folder() -> None:
    aligner = copying()
    config = replace(aligner.config, edit_margin=1.5)
    assert Aligner(aligner.backend, aligner.tokenizer, config).decode_config.edit_margin == 1.5
    explicit = Aligner(aligner.backend, aligner.tokenizer, config, decode=DecodeConfig())
    assert explicit.decode_config.edit_margin == 0.0
    assert explicit.with_options(decode=DecodeConfig(edit_margin=9.0)).decode_config.edit_margin == 9.0
    assert explicit.with_options(safeguards="off").decode_config is explicit.decode_config


def test_a_folder_that_is_not_there_or_is_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"nowhere does not exist.*hub name"):
        Aligner.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match=r"aligner\.json"):
        Aligner.from_pretrained(tmp_path)
    (tmp_path / "aligner.json").write_text(json.dumps({"template": "tiny", "granularity": "sentence"}))
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        Aligner.from_pretrained(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer()._full.to_str(), encoding="utf-8")
    with pytest.raises(ModelLoadError, match=r"model\.onnx"):
        Aligner.from_pretrained(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelLoadError, match=r"model\.onnx"):
        Aligner.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="backend"):
        Aligner.from_pretrained(tmp_path, backend="abacus")
    with pytest.raises(ValueError, match="provider"):
        Aligner.from_pretrained(tmp_path, provider="abacus")
    (tmp_path / "aligner.json").unlink()
    with pytest.raises(ModelLoadError, match=r"model\.onnx"):
        Aligner.from_pretrained(tmp_path, template="aligner-v1")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        Aligner.from_pretrained(tmp_path, template="aligner-v1")


def test_options_that_do_not_go_together_are_refused() -> None:
    aligner = copying()
    parts = (aligner.backend, aligner.tokenizer, aligner.config)
    with pytest.raises(TemplateError, match=r"whole answers.*sentence-level"):
        Aligner(*parts, template=CorrectionTemplate.named("aligner-v1"))
    with pytest.raises(ValueError, match="safeguards"):
        Aligner(*parts, safeguards="on")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="decode must be a DecodeConfig"):
        Aligner(*parts, decode={"draft": False})  # type: ignore[arg-type]
    with pytest.raises(ModelLoadError, match="keep_token"):
        Aligner(aligner.backend, aligner.tokenizer, replace(aligner.config, keep_token="<|stay|>"))
    with pytest.raises(TemplateError, match="corrects whole answers"):
        copying(granularity="answer").correct_sentence("Q", "P", "S.")
    with pytest.raises(TemplateError, match="unknown template"):
        Aligner(aligner.backend, aligner.tokenizer, AlignerConfig("aligner-v9"))


def test_wrong_types_are_named() -> None:
    aligner: Any = copying()
    with pytest.raises(TypeError, match="question must be a str, got NoneType"):
        aligner.correct(None, "A")
    with pytest.raises(TypeError, match="answer must be a str, got bytes"):
        aligner.correct("Q", b"A")
    with pytest.raises(TypeError, match="feedback must be a str"):
        aligner.correct("Q", "A", feedback=None)
    with pytest.raises(TypeError, match="prefix must be a str"):
        aligner.correct_sentence("Q", 1, "S")
    with pytest.raises(TypeError, match=r"pairs\[1\] must be a \(question, answer\) pair"):
        aligner.correct_batch([("Q", "A"), "QA"])
    with pytest.raises(TypeError, match=r"pairs\[0\]\[1\] must be a str, got int"):
        aligner.correct_batch([("Q", 3)])
    with pytest.raises(TypeError, match="pairs must be a sequence"):
        aligner.correct_batch(3)
    with pytest.raises(TypeError, match="model must be a str or Path"):
        Aligner.from_pretrained(3)  # type: ignore[arg-type]


def test_a_backend_that_fails_leaves_the_aligner_usable() -> None:
    class Flaky(ScriptedBackend):
        broken = True

        def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
            if self.broken:
                raise MemoryError("out of memory")
            return super().forward(ids, cache, last=last)

    tokenizer = byte_tokenizer()
    backend = Flaky(lambda ids: (len(ids), [2]), vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    aligner = Aligner(backend, tokenizer, AlignerConfig("tiny", "sentence", keep_token="<|keep|>"))
    with pytest.raises(CorrectionFailedError, match="failed while correcting: MemoryError;") as caught:
        aligner.correct("Q", "A sentence.")
    assert isinstance(caught.value.__cause__, MemoryError)
    backend.broken = False
    assert aligner.correct("Q", "A sentence.").text == "A sentence."
