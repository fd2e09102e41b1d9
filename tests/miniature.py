"""A miniature of the training side: a data folder, a recipe, a trained checkpoint, its exports.

Everything is invented here and built once per run; nothing outside the test run is read.
"""

from __future__ import annotations

import atexit
import gzip
import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

Raw = dict[str, Any]

ROWS_A_SOURCE = 80
REFUSAL = "I'm sorry, but I can't help with that."
HELP = "The bakery opens at eight. You can buy biscuits there."

RECIPE = """
seed = 7
vocabulary = 320
max_length = 192
buckets = [64, 128, 192]
checkpoint_seconds = -1.0

[model]
hidden_size = 64
intermediate_size = 160
num_hidden_layers = 2
num_attention_heads = 2
rope_theta = 100_000

[optimizer]
matrix_rate = 0.003
rate = 0.002
weight_decay = 0.05
warmup_steps = 3
decay_share = 0.4

[weights]
first = 4.0
changed = 2.0

[[stages]]
name = "copy-random"
tokens = 700
batch_tokens = 256
mixture = { copy-random = 1.0 }

[[stages]]
name = "copy-text"
tokens = 400
batch_tokens = 256
mixture = { copy-text = 0.6, copy-random = 0.4 }

[[stages]]
name = "correct"
tokens = 1200
batch_tokens = 256
decay = true
before = 0.4
mixture = { sum-drill = 0.1, fresh-sum = 0.1, sum-wrong = 0.2, rude = 0.2, ordinary = 0.2, harmful = 0.2 }
"""
# Pools this small give the run several borders a stage.
POOL_TOKENS = 400


def make_folder(name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"aligner-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def write_source(folder: Path, source: str, rows: list[Raw]) -> None:
    (folder / source).mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / source / f"{source}.jsonl.gz", "wt", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            file.write(json.dumps({"id": f"{source}-{number:06d}", **row}) + "\n")


def sentence_row(question: str, prefix: str, sentence: str, correction: str, **meta: str) -> Raw:
    texts = {"question": question, "prefix": prefix, "last_sentence": sentence, "correction": correction}
    return {"task": "sentence", **texts, "meta": meta}


def answer_row(question: str, answer: str, correction: str, **meta: str) -> Raw:
    texts = {"question": question, "history": [], "answer": answer, "correction": correction}
    return {"task": "answer", **texts, "meta": meta}


def sums() -> Iterator[Raw]:
    for i in range(ROWS_A_SOURCE):
        question = f"Ann has {i + 2} red pens and finds {i + 5} more. How many pens has she?"
        prefix = "" if i % 2 else f"Ann begins with {i + 2} pens."
        right = f"She has {i + 2} + {i + 5} = {2 * i + 7} pens."
        if i % 4 == 0:
            yield sentence_row(question, prefix, right, right, kind="already-good")
        else:
            wrong = right.replace(f"= {2 * i + 7}", f"= {2 * i + 8}")
            yield sentence_row(question, prefix, wrong, right, kind="arithmetic-slip")


def rude() -> Iterator[Raw]:
    for i in range(ROWS_A_SOURCE):
        polite = f"please move table {i} to the hall ."
        if i % 5 == 0:
            yield sentence_row("", "", polite, polite, kind="already-good")
        else:
            yield sentence_row("", "", f"move table {i} to the hall , you silly goose .", polite)


def prose(subject: str) -> Iterator[Raw]:
    for i in range(ROWS_A_SOURCE):
        answer = (
            f"A {subject} of kind {i} is common. It grows in spring. People like it.\n\n- Water it often.\n"
        )
        yield {"task": "qa", "question": f"What is {subject} {i}?", "answer": answer, "meta": {}}


def steps(subject: str) -> Iterator[Raw]:
    for i in range(ROWS_A_SOURCE):
        right = f"Step 2: The {subject} number {i} is even or odd."
        wrong = right.replace("or odd", "and odd") if i % 2 else right
        yield sentence_row(f"Is {subject} {i} even?", "Step 1: We read the question.", wrong, right)


def unsafe(name: str) -> Iterator[Raw]:
    """Rows of the three kinds: a harmful answer, a refusal that is good already, an over-cautious one."""
    for i in range(ROWS_A_SOURCE):
        question = f"How do I take biscuit {i} from the {name}?"
        harmful = f"Sure, take biscuit {i} at night. First wait for the baker. Then open the tin. Run home."
        if i % 4 == 0:
            yield answer_row(question, REFUSAL, REFUSAL, kind="already-good")
        elif i % 4 == 1 and name == "shop":
            yield answer_row(question, "I cannot speak of biscuits.", HELP, kind="over-refusal->help")
        else:
            correction = REFUSAL if i % 2 else "Biscuits are baked. No more is said."
            yield answer_row(question, harmful, correction)


def facts(subject: str) -> Iterator[Raw]:
    for i in range(ROWS_A_SOURCE):
        right = f"The {subject} {i} is green."
        yield answer_row(f"Which colour is {subject} {i}?", right if i % 2 else "It is loud.", right)


def requests() -> Iterator[Raw]:
    """Everyday requests with two answers, neither of which is to be changed."""
    for i in range(ROWS_A_SOURCE):
        yield answer_row(f"Write line {i} of a song.", f"Line {i} is short.", f"Line {i} is long and sweet.")


def sources() -> dict[str, list[Raw]]:
    return {
        "gsm8k_steps": list(sums()),
        "paradetox": list(rude()),
        "medquad_qa": list(prose("fern")),
        "caia_safety_qa": list(prose("moss")),
        "mrben_steps": list(steps("number")),
        "prmbench_steps": list(steps("figure")),
        "jbb_pairs": list(unsafe("jar")),
        "gptfuzz_pairs": list(unsafe("tin")),
        "xstest_triples": list(unsafe("shop")),
        "truthfulqa_triples": list(facts("frog")),
        "bbq_bias": list(facts("leaf")),
        "pandalm_pairs": list(requests()),
    }


@cache
def data_folder() -> Path:
    """A data folder with a few rows of each source, in the shapes of the real ones."""
    folder = make_folder("data")
    for source, rows in sources().items():
        write_source(folder, source, rows)
    return folder


@cache
def recipe_file() -> Path:
    path = make_folder("recipe") / "miniature.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def run_training(out: Path) -> Path:
    """Train by the miniature recipe in `out`, in small pools; return the checkpoint."""
    from aligner_integrations.training import train as training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_POOL_TOKENS", POOL_TOKENS)
        return training.train(recipe_file(), data=data_folder(), out=out, compiled=False)


@cache
def trained() -> Path:
    """The folder of a whole run: log, state, tokenizer and checkpoint."""
    out = make_folder("run")
    run_training(out)
    return out


@cache
def exported(dtype: str) -> Path:
    """The trained checkpoint as a model folder."""
    from aligner_integrations.config import AlignerConfig
    from aligner_integrations.export import export_checkpoint

    folder = make_folder(dtype)
    config = AlignerConfig("tiny", "sentence", keep_token="<|keep|>", max_length=192)
    kind = "int8" if dtype == "int8" else "fp32"
    export_checkpoint(trained() / "checkpoint", folder, config=config, dtype=kind)  # type: ignore[arg-type]
    return folder
