"""A small causal model, trained here in seconds, that reckons badly and then keeps to what it reckoned.

Asked how many pens somebody has, it says a sum, wrong for some numbers, and what follows from it. It can go
on from another sum than its own, and then says what follows from that.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # type: ignore[import-untyped, unused-ignore]

from aligner_integrations.template import GO_ON
from tests.miniature import make_folder

WRONG = ((2, 3), (3, 4), (4, 5))
RIGHT = ((2, 2), (3, 3))
ROLES = ("<|user|>", "<|assistant|>", "<|user|>")
STEPS = 160

# Content is text, or blocks with text. An answer that stands last is left open where `open` says so.
TEMPLATE = """
{%- for message in messages -%}
<|{{ message['role'] }}|>
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for block in message['content'] -%}{{ block['text'] }}{%- endfor -%}{%- endif -%}
{%- if not (loop.last and OPEN) -%}<|end|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not (OPEN) -%}<|assistant|>{%- endif -%}
"""
OPEN = "messages[-1]['role'] == 'assistant' and add_generation_prompt"
TEMPLATES = {
    # As many chat templates do it, ...
    "prefill": TEMPLATE.replace("OPEN", OPEN),
    # ... as those do it that have Mistral's and DeepSeek's mark, ...
    "prefix": TEMPLATE.replace("OPEN", f"{OPEN} and messages[-1]['prefix']"),
    # ... and as most do it.
    "closed": TEMPLATE.replace("OPEN", "false"),
}


def question(one: int, other: int) -> str:
    return f"Ann has {one} pens and gets {other} more?"


def sentences(one: int, other: int, total: int) -> list[str]:
    return [
        f"She had {one} and got {other}.",
        f" {one} + {other} = {total}.",
        f" So she has {total} pens.",
        f" And {total} pens are many.",
    ]


def answer(one: int, other: int, total: int) -> str:
    """What the model says when it reckons `total`."""
    return "".join(sentences(one, other, total))


@cache
def pens_model(template: str = "prefill") -> Path:
    """The folder of the trained model with one of `TEMPLATES`."""
    from transformers import PreTrainedTokenizerFast

    folder = make_folder(f"pens-{template}")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(),
        eos_token="<|end|>",
        pad_token="<|end|>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=512,
    )
    tokenizer.chat_template = TEMPLATES[template]
    tokenizer.save_pretrained(folder)
    _trained().save_pretrained(folder)
    return folder


def _rows() -> Iterator[tuple[list[str], str, str]]:
    """Turns so far, how the answer has begun, and what the model is to write then."""
    for one, other in WRONG + RIGHT:
        asked, own = question(one, other), one + other + ((one, other) in WRONG)
        yield [asked], "", answer(one, other, own)
        for total in {one + other, own}:
            first, second, *rest = sentences(one, other, total)
            yield [asked], first + second, "".join(rest)
            yield [asked, first + second, GO_ON], "", "".join(rest)


@cache
def _tokenizer() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", *ROLES[:2]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for turns, begun, rest in _rows() for text in (*turns, begun + rest)]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _batch(turn_count: int) -> tuple[Any, Any]:
    """Ids and labels, each of shape (rows, length), of the rows with so many turns."""
    import torch

    rows = []
    for turns, begun, rest in _rows():
        if len(turns) == turn_count:
            framed = "".join(f"{role}{turn}<|end|>" for role, turn in zip(ROLES, turns, strict=False))
            given = _tokenizer().encode(f"{framed}<|assistant|>{begun}").ids
            rows.append((given, _tokenizer().encode(f"{rest}<|end|>").ids))
    length = max(len(given) + len(written) for given, written in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    for row, (given, written) in enumerate(rows):
        end = len(given) + len(written)
        ids[row, :end] = torch.tensor(given + written)
        labels[row, len(given) : end] = torch.tensor(written)
    return ids, labels


@cache
def _trained() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=_tokenizer().get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS)
    batches = [_batch(1), _batch(3)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small for more
    for _ in range(STEPS):
        optimizer.zero_grad()
        for ids, labels in batches:
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
    return model.eval()
