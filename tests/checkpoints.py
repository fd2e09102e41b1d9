"""Small random checkpoints of the architectures that aligners are made of, each with a real tokenizer type.

Everything is built here, once per run; nothing is fetched. The best token is seldom near another one and
the models magnify rounding little, so that two exact runtimes choose the same ids.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers  # type: ignore[import-untyped, unused-ignore]
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.miniature import make_folder

ARCHITECTURES: tuple[str, ...] = ("llama", "gemma", "gemma2", "qwen2", "mistral")
# Small, so that short prompts go beyond it. Mistral has it in all layers, Gemma 2 in every other one.
WINDOW = 24
CONTEXT = 512
HIDDEN = 64
HEAD_SIZE = 16

SENTENCES = (
    "The bakery opens at eight, and you can buy biscuits, bread and rolls there until noon.",
    "She has 12 + 15 = 27 pens; 27 - 9 = 18 of them are red. Is that right?",
    "Edit the following Question-Answer pair to make it more helpful and harmless: What is a fern?",
    "BEGINNING OF CONVERSATION: USER: the question is about water, ASSISTANT: water boils at 100 degrees.",
    "I'm sorry, but I can't help with that. Please ask the baker whether the tin may be opened.",
    "##Question: How do plants grow? | ##Answer_Prefix: They need light. | ##Your_Revision: And water!",
    "user\nWrite a short song.\nmodel\nThe song is short and sweet, with two lines.\n\n- One.\n- Two.\n",
)
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# As Qwen cuts text before its byte pairs are merged.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def checkpoint(architecture: str, *, sharded: bool = False) -> Path:
    """The folder of a checkpoint as `save_pretrained` leaves it, with its tokenizer's two files."""
    folder = make_folder(f"{architecture}-shards" if sharded else architecture)
    model(architecture).save_pretrained(folder, max_shard_size="100KB" if sharded else "1GB")
    source, named = TOKENIZERS[architecture]()
    (folder / "tokenizer.json").write_text(source, encoding="utf-8")
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2), encoding="utf-8")
    return folder


@cache
def plain_onnx(architecture: str) -> Path:
    """The folder of the checkpoint as optimum exports it: logits at all places."""
    from optimum.exporters.onnx import onnx_export_from_model
    from transformers import AutoModelForCausalLM

    folder, source = make_folder(f"{architecture}-onnx"), checkpoint(architecture)
    loaded = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        onnx_export_from_model(
            loaded, folder, task="text-generation-with-past", opset=18, do_validation=False
        )
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder


@cache
def model(architecture: str) -> Any:
    """The model itself, in fp32. It is shared: change nothing in it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source, named = TOKENIZERS[architecture]()
    ids = tokenizers.Tokenizer.from_str(source)
    # Published vocabularies of Qwen end before the model's matrix does.
    padding = 24 if architecture == "qwen2" else 0
    config = AutoConfig.for_model(
        architecture,
        vocab_size=ids.get_vocab_size() + padding,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=HEAD_SIZE,
        max_position_embeddings=CONTEXT,
        initializer_range=0.25 if architecture == "gemma" else 0.2,  # below that Gemma repeats its input
        bos_token_id=ids.token_to_id(named["bos_token"]) if "bos_token" in named else None,
        eos_token_id=ids.token_to_id(named["eos_token"]),
        pad_token_id=0,
        **SHAPES[architecture],
    )
    torch.manual_seed(ARCHITECTURES.index(architecture))
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # What transformers starts with zeros or ones would hide a mistake; trained weights are neither. Gemma 2
    # scales what a layer adds: were it not more than the token itself, each token would foretell itself.
    added = ("post_attention_layernorm", "post_feedforward_layernorm") if architecture == "gemma2" else ()
    with torch.no_grad():
        for name, weights in made.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weights += torch.randn_like(weights) * 0.2 + (5.0 if any(a in name for a in added) else 0.0)
    return made


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "gemma": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma2": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": HEAD_SIZE,
        "attn_logit_softcapping": 5.0,  # published: 50, for scores that are larger
    },
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 2, "tie_word_embeddings": False, "sliding_window": WINDOW},
}


@cache
def byte_fallback_pairs() -> tuple[str, dict[str, str]]:
    """BPE as in Llama and Mistral: `▁` before the text and for spaces, unknown as bytes, `<s>` first."""
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for the training alone
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=[*specials, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    parts = json.loads(tokenizer.to_str())
    parts["pre_tokenizer"] = None
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _with_added(parts, specials), named


@cache
def byte_fallback_unigram() -> tuple[str, dict[str, str]]:
    """Unigram as in Gemma: `▁` for spaces alone, unknown as bytes, `<bos>` first."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for the training alone
    trainer = trainers.UnigramTrainer(
        vocab_size=520,
        special_tokens=[*specials, *BYTES],
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(0x21, 0x7F)] + ["▁", "\n"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    parts = json.loads(tokenizer.to_str())
    parts["pre_tokenizer"] = None
    parts["model"]["byte_fallback"] = True
    # A byte stands for an unknown character; the text `<0x41>` is six characters.
    parts["model"]["vocab"] = [
        [piece, -1000.0 if piece in BYTES else score] for piece, score in parts["model"]["vocab"]
    ]
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _with_added(parts, specials), named


@cache
def byte_level_pairs() -> tuple[str, dict[str, str]]:
    """BPE over bytes as in Qwen2: no unknown token, nothing before the text, special tokens at the end."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(specials)
    return tokenizer.to_str(), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def _with_added(parts: dict[str, Any], specials: list[str]) -> str:
    """A trainer makes all that it is told to put first special; of these only `specials` are."""
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in specials]
    return json.dumps(parts, ensure_ascii=False)


TOKENIZERS: dict[str, Callable[[], tuple[str, dict[str, str]]]] = {
    "llama": byte_fallback_pairs,
    "gemma": byte_fallback_unigram,
    "gemma2": byte_fallback_unigram,
    "qwen2": byte_level_pairs,
    "mistral": byte_fallback_pairs,
}
