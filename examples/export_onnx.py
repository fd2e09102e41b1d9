"""Export a checkpoint to ONNX, see how near the graph is to it, and run the folder.

The checkpoint is made on the spot: a small Llama with random weights, which corrects nothing. With your
own, `export_checkpoint(Path("my-aligner"), ...)` or `aligner export my-aligner OUT` is all that is needed.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from aligner_integrations import Aligner
from aligner_integrations.export import export_checkpoint

QUESTION = "What is 6 times 7?"
ANSWER = "6 times 7 is 42."


def make_checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([QUESTION, ANSWER], special_tokens=["</s>"], show_progress=False)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def main() -> None:
    """Export in two precisions; `--scripted` changes nothing, because nothing is downloaded anyway."""
    with TemporaryDirectory() as scratch:
        checkpoint = make_checkpoint(Path(scratch) / "checkpoint")
        for dtype in ("fp32", "int8"):
            out = Path(scratch) / dtype
            report = export_checkpoint(checkpoint, out, template="aligner-v1", dtype=dtype)
            parity = report.parity
            print(
                f"{dtype}: {report.size / 1000:.0f} kB, {parity.argmax_agreement:.1%} of next tokens agree,"
            )
            print(f"  {parity.identical_texts} of {parity.texts} texts go on with the same ids")
        aligner = Aligner.from_pretrained(Path(scratch) / "fp32")
        correction = aligner.correct(QUESTION, ANSWER)
        print(f"{aligner!r} took {correction.stats.forwards} forward(s)")


if __name__ == "__main__":
    main()
