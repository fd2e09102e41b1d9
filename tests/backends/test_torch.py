"""The PyTorch backend on small random checkpoints of each architecture."""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from aligner_integrations.backends import torch as torch_backend
from aligner_integrations.backends.base import Backend, Batching, KVCache, Logits, Row
from aligner_integrations.backends.torch import TorchBackend
from aligner_integrations.config import DecodeConfig
from aligner_integrations.decode import draft_decode, greedy_decode
from aligner_integrations.errors import MissingDependencyError, ModelLoadError, ProviderUnavailableError
from tests.checkpoints import ARCHITECTURES, WINDOW, checkpoint, model

NEAR = 2e-4  # what a block of fp32 may differ by from single steps; seen are 2e-5
each = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing by a second thread, and on a busy machine the first waits for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def backend(architecture: str) -> TorchBackend:
    return TorchBackend.load(checkpoint(architecture), device="cpu")


def random_ids(seed: int, count: int, *, below: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(3, below) for _ in range(count)]


def run(backend: Backend, ids: list[int]) -> Logits:
    return backend.forward(ids, backend.make_cache(), last=len(ids))


def its_own(architecture: str, ids: list[int]) -> Logits:
    """What transformers gives for all of `ids` at once, without a cache, by the published arithmetic."""
    plain = AutoModelForCausalLM.from_pretrained(checkpoint(architecture), attn_implementation="eager")
    with torch.inference_mode():
        logits: Logits = plain(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    return logits


@each
def test_it_is_the_protocol(architecture: str) -> None:
    checked: Batching = backend(architecture)
    held: KVCache = checked.make_cache()
    assert isinstance(checked, Batching) and checked.batches
    assert (checked.name, checked.provider, held.length) == ("torch", "cpu", 0)
    assert backend(architecture).vocab_size == model(architecture).config.vocab_size


@each
def test_a_block_single_steps_and_a_trimmed_cache_give_what_the_model_gives_at_once(
    architecture: str,
) -> None:
    """Far beyond the sliding windows of Gemma 2 and Mistral."""
    tested = backend(architecture)
    ids = random_ids(1, 3 * WINDOW, below=tested.vocab_size)
    wanted = its_own(architecture, ids)
    assert len(set(wanted.argmax(1))) > WINDOW  # no model that always says the same
    np.testing.assert_allclose(run(tested, ids), wanted, atol=NEAR)
    held = tested.make_cache()
    steps = np.concatenate([tested.forward([id], held, last=1) for id in ids])
    assert steps.dtype == np.float32
    np.testing.assert_allclose(steps, wanted, atol=NEAR)
    assert steps.argmax(1).tolist() == wanted.argmax(1).tolist()
    for length in (2 * WINDOW + 1, WINDOW - 5, 1, 0):
        held.trim(length + 1)
        held.trim(length)
        assert held.length == length
        rest = tested.forward(ids[length:], held, last=3)
        np.testing.assert_allclose(rest, wanted[-3:], atol=NEAR)
        assert held.length == len(ids)


def test_bad_lengths_and_ids_are_named() -> None:
    tested, held = backend("llama"), backend("llama").make_cache()
    tested.forward([5, 6], held, last=1)
    for length in (-1, 3):
        with pytest.raises(ValueError, match="length must be from 0 to 2"):
            held.trim(length)
    for last in (0, 3):
        with pytest.raises(ValueError, match="last must be from 1 to 2"):
            tested.forward([5, 6], held, last=last)
    for id in (-1, tested.vocab_size):
        with pytest.raises(ValueError, match="ids must be from 0 to 479"):
            tested.score([Row([5], held, 1), Row([id], tested.make_cache(), 1)])
    assert held.length == 2
    assert tested.score([]) == []


@each
def test_guided_decoding_writes_what_plain_decoding_writes(architecture: str) -> None:
    tested = backend(architecture)
    for seed in range(6):
        prompt = random_ids(seed, 12, below=tested.vocab_size)
        plain = decode(tested, prompt, [], guided=False)
        reference = list(plain)
        if seed % 3:
            reference[4:6] = random_ids(seed + 50, seed % 5, below=tested.vocab_size)
        assert decode(tested, prompt, reference, guided=True) == plain


def decode(backend: Backend, prompt: list[int], reference: list[int], *, guided: bool) -> list[int]:
    run = draft_decode if guided else greedy_decode
    return run(backend, prompt, reference, config=DecodeConfig(), eos_id=1, max_new_tokens=WINDOW + 8).ids


Shapes = list[tuple[int, int, int]]  # of each row: tokens held, tokens run, tokens trimmed before
SHAPES = st.tuples(st.integers(0, 2 * WINDOW), st.integers(1, 2 * WINDOW), st.integers(0, 5))


@settings(max_examples=12)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=5))
@example(shapes=[(0, 3, 4), (0, 2, 1)])
@example(shapes=[(0, 2 * WINDOW, 0), (2 * WINDOW, 1, 0), (WINDOW, WINDOW, 3)])
@each
def test_ragged_rows_together_are_what_they_are_one_by_one(architecture: str, shapes: Shapes) -> None:
    tested = backend(architecture)
    alone, together = [rows_of(tested, shapes) for _ in range(2)]
    same_scores(tested, alone, together)
    # The caches that it left are as good as those of single rows.
    alone, together = [
        [Row([5 + number, 9], row.cache, 1 + number % 2) for number, row in enumerate(rows)]
        for rows in (alone, together)
    ]
    same_scores(tested, alone, together)


def same_scores(tested: TorchBackend, alone: list[Row], together: list[Row]) -> None:
    wanted = [tested.score([row])[0] for row in alone]
    found = tested.score(together)
    for row, one, other in zip(together, wanted, found, strict=True):
        np.testing.assert_allclose(one.best_logits, other.best_logits, atol=NEAR)
        np.testing.assert_allclose(one.next_logits[:-1], other.next_logits[:-1], atol=NEAR)
        for place in range(row.last):
            np.testing.assert_allclose(one.row(place), other.row(place), atol=NEAR)
            assert other.best[place] == other.row(place).argmax()
    assert [row.cache.length for row in together] == [row.cache.length for row in alone]


def rows_of(tested: TorchBackend, shapes: Shapes) -> list[Row]:
    rows = []
    for number, (held, count, trimmed) in enumerate(shapes):
        ids = random_ids(number, held + trimmed + count, below=tested.vocab_size)
        kept = tested.make_cache()
        if held + trimmed:
            tested.forward(ids[: held + trimmed], kept, last=1)
            kept.trim(held)
        rows.append(Row(ids[-count:], kept, 1 + number * 7 % count))
    return rows


def test_rows_share_one_forward_and_its_logits_are_made_only_where_asked() -> None:
    asked: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    tested = backend("qwen2")

    def note(module: Any, arguments: Any, output: Any) -> None:
        asked.append((tuple(arguments[0].shape), tuple(output.shape)))

    hook = model_of(tested).get_output_embeddings().register_forward_hook(note)
    try:
        tested.score([Row([5] * 30, tested.make_cache(), 2), Row([6] * 30, tested.make_cache(), 3)])
        tested.forward([5] * 30, tested.make_cache(), last=4)
    finally:
        hook.remove()
    assert asked == [((2, 3, 64), (2, 3, tested.vocab_size)), ((1, 4, 64), (1, 4, tested.vocab_size))]


def model_of(tested: TorchBackend) -> Any:
    return tested._model


def test_scores_are_of_the_logits_and_the_lowest_id_wins_among_equals() -> None:
    tied = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    with torch.no_grad():  # all ids of a pair have the same logit
        tied.lm_head.weight[1::2] = tied.lm_head.weight[::2]
    tested = TorchBackend(tied)
    ids = random_ids(3, 40, below=tested.vocab_size)
    logits = run(tested, ids)
    (scores,) = tested.score([Row(ids, tested.make_cache(), 40)])
    assert scores.best == logits.argmax(1).tolist()
    assert not any(best % 2 for best in scores.best)
    assert scores.best_logits == logits.max(1).tolist()
    assert scores.next_logits[:-1] == logits[np.arange(39), ids[1:]].tolist()
    assert scores.row(7).dtype == np.float32
    np.testing.assert_array_equal(scores.row(7), logits[7])


class Plain(torch.nn.Module):
    """Older models, and many outside of transformers, give logits for all places."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config, self.device = inner, inner.config, inner.device

    def forward(self, input_ids: Any, cache: Any, **named: Any) -> Any:
        takes_cache = "cache" in inspect.signature(self.inner.forward).parameters
        return self.inner(input_ids, **named, **{"cache" if takes_cache else "past_key_values": cache})


def test_a_model_without_logits_to_keep_serves_too() -> None:
    full = backend("gemma")
    tested = TorchBackend(Plain(model_of(full)))
    ids = random_ids(4, 20, below=400)
    wanted = run(full, ids)
    np.testing.assert_allclose(tested.forward(ids, tested.make_cache(), last=3), wanted[-3:], atol=NEAR)
    rows = [Row(ids, tested.make_cache(), 2), Row(ids[:9], tested.make_cache(), 4)]
    for scores, own in zip(tested.score(rows), (wanted[-2:], wanted[5:9]), strict=True):
        np.testing.assert_allclose(scores.best_logits, own.max(1), atol=NEAR)


def test_many_threads_share_it() -> None:
    tested = backend("gemma2")
    blocks = [random_ids(seed, 5 + seed * 3, below=tested.vocab_size) for seed in range(12)]
    wanted = [run(tested, ids) for ids in blocks]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for found, alone in zip(pool.map(lambda ids: run(tested, ids), blocks), wanted, strict=True):
                np.testing.assert_allclose(found, alone, atol=NEAR)


def test_shards_are_one_checkpoint() -> None:
    folder = checkpoint("llama", sharded=True)
    assert len(list(folder.glob("*.safetensors"))) > 2
    ids = random_ids(5, 10, below=480)
    np.testing.assert_array_equal(
        run(TorchBackend.load(folder, device="cpu"), ids), run(backend("llama"), ids)
    )


def test_half_precision_on_request_only(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    ids = random_ids(6, 12, below=480)
    kinds = {"auto": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16, "fp32": torch.float32}
    for dtype, kind in kinds.items():
        tested = TorchBackend.load(tmp_path, device="cpu", dtype=dtype)
        assert model_of(tested).dtype == kind
        logits = run(tested, ids)
        assert logits.dtype == np.float32
        (scores,) = tested.score([Row(ids, tested.make_cache(), 12)])
        assert scores.best == logits.argmax(1).tolist()


# --- what cannot be loaded


def test_options_that_there_are_not() -> None:
    folder = checkpoint("llama")
    with pytest.raises(ValueError, match=r"dtype must be one of auto, fp32.*bfloat16; got 'int4'"):
        TorchBackend.load(folder, dtype="int4")
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        TorchBackend.load(folder, threads=0)
    with pytest.raises(ValueError, match=r"device must be .*got 'gpu'"):
        TorchBackend.load(folder, device="gpu")
    for device in ("cuda:99", "meta"):
        with pytest.raises(ProviderUnavailableError, match=f"'{device}' was asked.*use device='cpu'"):
            TorchBackend.load(folder, device=device)


def test_where_cuda_is_listed_but_does_not_work_the_cpu_serves_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.cuda.is_available():
        assert TorchBackend.load(checkpoint("llama")).provider == "cuda:0"
        return
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level(logging.WARNING, "aligner_integrations"):
        assert TorchBackend.load(checkpoint("llama")).provider == "cpu"
    assert ["'cpu' is used, because cuda" in record.getMessage() for record in caplog.records] == [True]


def test_threads_are_set_for_the_process_when_asked_for() -> None:
    before = torch.get_num_threads()
    try:
        TorchBackend.load(checkpoint("llama"), threads=before + 1)
        assert torch.get_num_threads() == before + 1
        TorchBackend.load(checkpoint("llama"))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def copied(folder: Path, *, sharded: bool = False) -> Path:
    shutil.copytree(checkpoint("llama", sharded=sharded), folder)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        TorchBackend.load(folder, device="cpu")
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    folder = copied(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    canary = tmp_path / "opened"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    assert re.search("pytorch_model.bin, a pickle.*save_pretrained", refused(folder))
    assert not canary.exists()


class Canary:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_damaged_and_incomplete_checkpoints_are_refused(tmp_path: Path) -> None:
    assert "give the folder that holds its config.json" in refused(tmp_path)
    empty = copied(tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    refused(empty)
    cut = copied(tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(cut)
    shards = copied(tmp_path / "shards", sharded=True)
    min(shards.glob("*.safetensors")).unlink()
    refused(shards)
    lacking = copied(tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of the model's weights, first model.layers.1.mlp.up_proj" in refused(lacking)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "unheard-of"},
        {"hidden_size": 32},
        {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}},
    ],
)
def test_a_config_that_does_not_fit_is_refused_and_no_code_of_the_folder_is_run(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = copied(tmp_path / "model")
    canary = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(canary)!r}, 'w').close()")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | change))
    refused(folder)
    assert not canary.exists()


@pytest.mark.parametrize("hidden", ["torch", "transformers"])
def test_without_its_extra_the_cure_is_named(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(MissingDependencyError, match=rf"needs {hidden}.*integrations\[torch\]") as caught:
        import_anew()
    assert caught.value.name == hidden


def test_a_broken_install_is_not_called_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.utils.rnn", None)
    with pytest.raises(ModuleNotFoundError, match=r"torch\.nn\.utils\.rnn") as caught:
        import_anew()
    assert not isinstance(caught.value, MissingDependencyError)


def import_anew() -> None:
    spec = importlib.util.spec_from_file_location("anew", torch_backend.__file__)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
