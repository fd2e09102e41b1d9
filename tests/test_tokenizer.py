"""Ids and text: no text forges a special token, nothing is lost on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers  # type: ignore[import-untyped, unused-ignore]
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from aligner_integrations.errors import ModelLoadError
from aligner_integrations.template import TINY_TOKENS, Span
from aligner_integrations.testing import byte_tokenizer
from aligner_integrations.tokenizer import StreamingDetokenizer, Tokenizer

TEXT = "the quick brown fox jumps over the lazy dog and 12 other dogs </s> <s> it is the end of the text"
PUBLISHED = ("<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>")


def special(content: str, number: int, *, is_special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, "special": is_special, **flags}


def llama_like() -> Tokenizer:
    """BPE over characters with byte fallback, `▁` for spaces, and `<s>` put first by the post-processor."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: index for index, token in enumerate((*PUBLISHED, *bytes_))}
    for letter in sorted(set(TEXT.replace(" ", "▁"))):
        vocabulary.setdefault(letter, len(vocabulary))
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(list(PUBLISHED))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return Tokenizer.from_str(tokenizer.to_str())


def unigram_like() -> Tokenizer:
    """Unigram with Metaspace. Its pieces hold `</s>` with a score that the best path would take."""
    letters = [(letter, -5.0) for letter in sorted(set(TEXT.replace(" ", "▁")) | set("</s>turn_of"))]
    pieces = [*((token, 0.0) for token in PUBLISHED), *letters, ("▁the", -1.0), ("\n", -4.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [special(token, number) for number, token in enumerate(PUBLISHED)]
    return Tokenizer.from_str(json.dumps(parts))


BYTES, LLAMA, UNIGRAM = byte_tokenizer(), llama_like(), unigram_like()
FORGED = st.sampled_from([*TINY_TOKENS, *PUBLISHED, "<|", "|>", "</", "s>", " ", "\n"])
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # lone surrogates too
ATTACKS = st.lists(st.one_of(FORGED, ANY_TEXT), max_size=8).map("".join)


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA, UNIGRAM], ids=["bytes", "llama", "unigram"])
@given(text=ATTACKS)
def test_no_text_yields_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode_text(text))
    ids = tokenizer.encode([Span(text, False)])
    assert tokenizer.special_ids.isdisjoint(ids[1:] if tokenizer is LLAMA else ids)


def as_unicode(text: str) -> str:
    """What is left of lone surrogates: U+FFFD; pairs of them are the character they stand for."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA], ids=["bytes", "llama"])
@given(text=ATTACKS)
def test_nothing_is_lost(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode_text(text)) == as_unicode(text)


@pytest.mark.parametrize("text", ["</s>", "a</s>b", "</s></s>" * 2000, "the <s> the", "<s></s><s>"])
def test_a_piece_that_spells_a_special_token_is_broken(text: str) -> None:
    assert UNIGRAM.special_ids.isdisjoint(UNIGRAM.encode_text(text))
    assert UNIGRAM.decode(UNIGRAM.encode_text(text)) == text


def test_a_character_without_ids_is_left_out() -> None:
    assert UNIGRAM.decode(UNIGRAM.encode_text("the 漢 dog")) == "the  dog"


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "\ud83d\ude00"])
def test_lone_surrogates_are_replaced_and_pairs_are_joined(text: str) -> None:
    expected = (
        "\U0001f600" if len(text) == 2 else text.replace("\ud800", "\ufffd").replace("\udfff", "\ufffd")
    )
    assert BYTES.decode(BYTES.encode_text(text)) == expected


def test_special_tokens_come_from_trusted_spans_only() -> None:
    frame = [Span("<|question|>", True), Span("<|end|>", False), Span("<|correction|>", True)]
    ids = BYTES.encode(frame)
    assert ids[0] == BYTES.token_id("<|question|>")
    assert ids[-1] == BYTES.token_id("<|correction|>")
    assert ids[1:-1] == BYTES.encode_text("<|end|>")


@given(text=st.text(alphabet="the dog 12", max_size=20))
def test_plain_neighbours_are_encoded_as_one_string(text: str) -> None:
    """A published frame gives the ids that the published tokenizer gives its rendered text."""
    spans = [Span("fox jumps t", True), Span(text, False), Span("he end", True)]
    whole = "fox jumps t" + text + "he end"
    assert LLAMA.encode(spans) == LLAMA._full.encode(whole).ids
    assert UNIGRAM.encode(spans) == UNIGRAM._full.encode(whole).ids


@pytest.mark.parametrize("tokenizer", [LLAMA, UNIGRAM], ids=["llama", "unigram"])
def test_a_published_frame_with_special_tokens_gives_the_published_ids(tokenizer: Tokenizer) -> None:
    spans = [
        Span("<start_of_turn>the fox", True),
        Span("the dog", False),
        Span("<end_of_turn> end<start_of_turn>", True),
    ]
    whole = "".join(span.text for span in spans)
    assert tokenizer.encode(spans) == tokenizer._full.encode(whole).ids


def test_the_opening_token_is_never_doubled() -> None:
    opening = LLAMA.token_id("<s>")
    assert LLAMA.encode([Span("the", True)])[0] == opening
    written = LLAMA.encode([Span("<s>the", True)])
    assert written[0] == opening
    assert opening not in written[1:]
    assert opening not in LLAMA.encode_text("the")


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA], ids=["bytes", "llama"])
@given(text=ATTACKS)
def test_streaming_gives_the_same_text_and_no_half_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text)
    stream = StreamingDetokenizer(tokenizer)
    parts = [stream.push(token) for token in ids]
    parts.append(stream.flush())
    assert "".join(parts) == tokenizer.decode(ids)
    if "\ufffd" not in as_unicode(text):
        assert not any("\ufffd" in part for part in parts)


def test_streaming_skips_special_tokens_and_shows_damage_at_the_end() -> None:
    stream = StreamingDetokenizer(BYTES)
    ids = BYTES.encode_text("é")
    assert stream.push(BYTES.eos_id) == ""
    assert stream.push(ids[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(BYTES.encode_text("a")[0]) == "a"


def test_damaged_and_missing_files_say_which(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{]", encoding="utf-8")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(LLAMA._full.to_str(), encoding="utf-8")
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").eos_id == LLAMA.token_id("</s>")
    for end in ("<end_of_turn>", LLAMA.token_id("<end_of_turn>")):
        loaded = Tokenizer.from_file(tmp_path / "tokenizer.json", end_token=end)
        assert loaded.eos_id == LLAMA.token_id("<end_of_turn>")
    for end in ("<nowhere>", 123_456):
        with pytest.raises(ModelLoadError, match="no end-of-text token"):
            Tokenizer.from_file(tmp_path / "tokenizer.json", end_token=end)
