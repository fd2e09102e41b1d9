"""The trained tokenizer: lossless, single digits, the frame's tokens first."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner_integrations.template import TINY_TOKENS, CorrectionTemplate
from aligner_integrations.tokenizer import Tokenizer
from aligner_integrations.training import curriculum
from aligner_integrations.training.rows import load_rows
from aligner_integrations.training.vocabulary import train_tokenizer
from tests.miniature import data_folder

SIZE = 400


@cache
def tokenizer() -> Tokenizer:
    texts = [row.sentence for row in load_rows(data_folder())]
    return Tokenizer.from_str(train_tokenizer(texts, size=SIZE).to_str())


@given(st.text())
def test_lossless_for_arbitrary_text(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode_text(text)) == text


@pytest.mark.parametrize("text", ["\0", " ", "\n\n  x\t", "<|end|> 12", "naïve 日本 🤷‍♀️ שלום", "a  1  2"])
def test_lossless_for_awkward_text(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode_text(text)) == text


@given(st.text("0123456789 .,+=-$xa", max_size=30))
def test_every_digit_is_a_token_of_its_own(text: str) -> None:
    digits = {tokenizer().token_id(digit): digit for digit in "0123456789"}
    assert None not in digits and len(digits) == 10
    found = [digits[id] for id in tokenizer().encode_text(text) if id in digits]
    assert found == [character for character in text if character.isdigit()]


def test_special_tokens_come_first_in_the_order_of_the_frame() -> None:
    assert [tokenizer().token_id(token) for token in TINY_TOKENS] == list(range(8))
    assert tokenizer().special_ids == frozenset(range(8))
    assert tokenizer().eos_id == curriculum.END
    assert tokenizer().token_id("<|keep|>") == curriculum.KEEP


def test_the_curriculum_frames_as_the_template_does() -> None:
    spans = CorrectionTemplate.named("tiny").spans(question="Why?", prefix="So.", sentence="It is.")
    encode = tokenizer().encode_text
    assert tokenizer().encode(spans) == [
        *(curriculum.QUESTION, *encode("Why?")),
        *(curriculum.PREFIX, *encode("So.")),
        *(curriculum.SENTENCE, *encode("It is.")),
        curriculum.CORRECTION,
    ]


def test_the_size_is_the_size_asked_for() -> None:
    assert tokenizer().vocab_size == SIZE


def test_training_repeats_itself() -> None:
    texts = [row.sentence for row in load_rows(data_folder())]
    assert train_tokenizer(texts, size=SIZE).to_str() == train_tokenizer(texts, size=SIZE).to_str()
