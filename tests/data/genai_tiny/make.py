"""Make this folder anew: a small random Llama, exported and run by onnxruntime-genai; see README.md.

Run in an environment of its own, because the builder needs transformers 5. What is written beside this file
is the builder's output (`model/`) and what onnxruntime-genai itself decodes with it (`expected.json`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEXTS = (
    ("What is a fern?", "A fern is a plant that grows in the shade."),
    ("Is 12 + 15 = 27?", "She has 12 + 15 = 28 pens."),
    ("How do plants grow?", "They need light.\n\n- Water them often.\n- Keep them warm, 20 °C."),
    ("When does it open?", "The bakery opens at eight: bread, rolls & biscuits (until noon)."),
    ("", "Water boils at 100 degrees. 🥐"),
)
FRAME = (
    "BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more helpful and "
    "harmless: {question} | {answer} ASSISTANT:"
)
NEW_TOKENS = 40


def make_tokenizer(folder: Path) -> Any:
    """BPE with byte fallback, as in Llama: its file, loaded."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for the training alone
    specials = ["<unk>", "<s>", "</s>"]
    special_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=352, special_tokens=[*specials, *special_bytes], show_progress=False
    )
    tokenizer.train_from_iterator([FRAME, *(" ".join(pair) for pair in TEXTS)], trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    parts = json.loads(tokenizer.to_str())
    parts["pre_tokenizer"] = None
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in specials]
    (folder / "tokenizer.json").write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2), encoding="utf-8")
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def make_checkpoint(folder: Path, vocabulary: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.4,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def decode(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return what onnxruntime-genai writes after each prompt, greedily."""
    import onnxruntime_genai as genai  # type: ignore[import-not-found]

    model, continuations = genai.Model(str(folder)), []
    for prompt in prompts:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + NEW_TOKENS, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        continuations.append([int(token) for token in generator.get_sequence(0)][len(prompt) :])
    return continuations


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        source = Path(name)
        tokenizer = make_tokenizer(source)
        model = make_checkpoint(source, tokenizer.get_vocab_size())
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        subprocess.run(
            [*command, "-i", str(source), "-o", str(HERE / "model"), "-p", "fp32", "-e", "cpu"], check=True
        )
        prompts = [tokenizer.encode(FRAME.format(question=q, answer=a)).ids for q, a in TEXTS]
        continuations = decode(HERE / "model", prompts)
        import torch

        for prompt, ids in zip(prompts, continuations, strict=True):
            asked = torch.tensor([prompt])
            again = model.generate(asked, max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :]
            assert again.tolist() == ids, "transformers decodes something else"
    rows = [
        {"question": question, "answer": answer, "prompt": prompt, "continuation": ids}
        for (question, answer), prompt, ids in zip(TEXTS, prompts, continuations, strict=True)
    ]
    (HERE / "expected.json").write_text(json.dumps(rows, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
