"""The model in the package, as a user gets it: what it keeps, what it changes, what it costs."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aligner_integrations import Aligner, DecodeConfig
from aligner_integrations.aligner import BUNDLED_MODEL, REWRITE_MARGIN
from aligner_integrations.decode import draft_decode

RECORDED = Path(__file__).parent / "data" / "recorded_answers.jsonl.gz"


@pytest.fixture(scope="module")
def aligner() -> Aligner:
    return Aligner.from_pretrained()


@pytest.fixture(scope="module")
def answers() -> list[tuple[str, str]]:
    with gzip.open(RECORDED, "rt", encoding="utf-8") as lines:
        return [(row["question"], row["answer"]) for row in map(json.loads, lines)]


def test_it_runs_without_torch_and_transformers() -> None:
    program = (
        "import sys; from aligner_integrations import Aligner; "
        "Aligner.from_pretrained().correct('What is a week?', 'A week has seven days.'); "
        "print([m for m in ('torch', 'transformers', 'langchain_core', 'optimum') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_its_folder_says_what_it_is(aligner: Aligner) -> None:
    config = aligner.config
    assert (config.template, config.granularity, config.keep_token) == ("tiny", "sentence", "<|keep|>")
    assert config.licence and config.description and config.data
    assert config.edit_margin == aligner.decode_config.edit_margin > 0
    assert sum(file.stat().st_size for file in BUNDLED_MODEL.iterdir()) < 25e6


def test_ordinary_answers_stay_at_one_forward_a_sentence(
    aligner: Aligner, answers: list[tuple[str, str]]
) -> None:
    sentences = kept = 0
    for question, answer in answers[:60]:
        for segment in aligner.correct_stream(question, [answer]):
            if segment.stats.forwards:
                sentences += 1
                kept += not segment.changed
                assert segment.changed or segment.text is segment.original or segment.text == segment.original
                if segment.stats.new_tokens == 1:
                    assert segment.stats.forwards == 1
    assert sentences > 200
    assert kept / sentences >= 0.97


@pytest.mark.parametrize(
    ("sentence", "mended"),
    [
        ("The farmer now has 56-14 = 420 cows.", "The farmer now has 56-14 = 42 cows."),
        (
            "His mother can bake 8 x 7 = 46 pies for 7 days.",
            "His mother can bake 8 x 7 = 56 pies for 7 days.",
        ),
        ("The farmer now has 56-14 = 42 cows.", "The farmer now has 56-14 = 42 cows."),
        (
            "this happens every fucking time a new gta game comes out .",
            "this happens every time a new gta game comes out .",
        ),
    ],
)
def test_it_mends_wrong_sums_and_rude_words(aligner: Aligner, sentence: str, mended: str) -> None:
    assert aligner.correct_sentence("", "", sentence).text == mended


def test_a_rewrite_is_held_to_the_copy_by_the_margin_up_to_its_limit(aligner: Aligner) -> None:
    sentence = "The farmer now has 56-14 = 420 cows."
    prompt = aligner.encode_prompt("", "", sentence, "")
    reference = aligner.tokenizer.encode_text(sentence)
    for margin in (0.0, 1.5, 4.0):
        decode = DecodeConfig(edit_margin=margin)
        wanted = draft_decode(
            aligner.backend,
            prompt,
            reference,
            config=decode,
            eos_id=aligner.tokenizer.eos_id,
            max_new_tokens=64,
            keep_id=aligner.keep_id,
            draft_margin=min(margin, REWRITE_MARGIN),
        )
        assert aligner.with_options(decode=decode).run(prompt, reference, 64).ids == wanted.ids


def test_drafted_and_plain_decoding_write_the_same(aligner: Aligner, answers: list[tuple[str, str]]) -> None:
    # The margin is switched off, so that the model rewrites as often as it can.
    drafted = aligner.with_options(decode=DecodeConfig(), safeguards="off")
    plain = aligner.with_options(decode=DecodeConfig(draft=False), safeguards="off")
    rewritten = 0
    for question, answer in answers[::10]:
        first, second = drafted.correct(question, answer), plain.correct(question, answer)
        assert first.proposed == second.proposed
        rewritten += first.changed
        assert first.stats.forwards <= second.stats.forwards
    sentence = "this is a fucking stupid idea ."
    rude = [each.correct_sentence("", "", sentence) for each in (drafted, plain)]
    assert rude[0].proposed == rude[1].proposed


def test_one_forward_over_many_tokens_is_forwards_over_one(aligner: Aligner) -> None:
    ids = aligner.tokenizer.encode_text("The clinic opens at 9 in the morning, and 5 x 12 = 60 people come.")
    block = aligner.backend.forward(ids, aligner.backend.make_cache(), last=len(ids))
    cache = aligner.backend.make_cache()
    steps = np.concatenate([aligner.backend.forward([token], cache, last=1) for token in ids])
    assert (block.argmax(-1) == steps.argmax(-1)).all()
    assert np.abs(block - steps).max() < 1e-3


def test_a_sentence_runs_only_its_own_tokens(aligner: Aligner) -> None:
    text = "The clinic opens at nine in the morning and closes when the last patient has been seen. "
    with aligner.stream("When does the clinic open?") as stream:
        segments = [*stream.push(text * 20), *stream.close()]
    fresh = [segment.stats.prompt_tokens - segment.stats.cached_tokens for segment in segments]
    assert max(fresh[2:]) <= fresh[1] + 1
    assert segments[-1].stats.cached_tokens > segments[1].stats.cached_tokens


def test_a_long_stream_rebuilds_its_cache_rarely(aligner: Aligner) -> None:
    text = "The clinic opens at nine in the morning and closes when the last patient has been seen. "
    with aligner.stream("When does the clinic open?") as stream:
        segments = [*stream.push(text * 150), *stream.close()]
    rebuilt = [segment for segment in segments if segment.stats.cached_tokens < 20 and segment.index]
    assert 0 < len(rebuilt) <= 8
    assert all(segment.stats.prompt_tokens <= aligner.config.max_length for segment in segments)
