"""Models that the tests build for themselves: a table of random logits, and small Llamas as ONNX."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from aligner_integrations.backends.base import Ids, KVCache, Logits

EOS = 1
KEEP = 2


class TableCache:
    """Holds the ids themselves, so that every token depends on all that the cache should hold."""

    def __init__(self) -> None:
        self.ids: Ids = []

    @property
    def length(self) -> int:
        return len(self.ids)

    def trim(self, length: int) -> None:
        assert 0 <= length <= len(self.ids)
        del self.ids[length:]


class TableBackend:
    """A deterministic model: the logits are a row of a random table, chosen by a hash of all ids so far.

    Logits are multiples of a half, so ties occur and are exact.
    """

    name = "table"
    provider = "none"

    def __init__(self, seed: int, *, vocabulary: int = 12, history: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        self._rows = (rng.integers(0, 16, size=(97, vocabulary)) / 2).astype(np.float32)
        self._history = history

    def make_cache(self) -> TableCache:
        return TableCache()

    def forward(self, ids: Ids, cache: KVCache, *, last: int) -> Logits:
        assert isinstance(cache, TableCache)
        assert 1 <= last <= len(ids)
        cache.ids.extend(ids)
        end = len(cache.ids)
        return np.stack([self._row(cache.ids[:stop]) for stop in range(end - last + 1, end + 1)])

    def _row(self, ids: Ids) -> Logits:
        value = len(ids)
        for id in ids if self._history is None else ids[-self._history :]:
            value = (value * 31 + id + 7) % 1_000_003
        row: Logits = self._rows[value % 97]
        return row


@cache
def llama(seed: int) -> Any:
    """A two-layer Llama with random weights, as transformers has it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@cache
def onnx_model(seed: int) -> Path:
    """The Llama as the general exporter writes it, in fp32: its folder; once per run."""
    from optimum.exporters.onnx import onnx_export_from_model

    folder = _make_folder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        onnx_export_from_model(
            llama(seed), folder, task="text-generation-with-past", opset=18, do_validation=False
        )
    return folder


@cache
def fused_model(seed: int) -> Path:
    """The same Llama with fused attention and a shared cache, as `aligner export` writes it."""
    import onnx

    from aligner_integrations.llama_graph import build_llama_graph

    folder = _make_folder()
    onnx.save(build_llama_graph(llama(seed)), folder / "model.onnx")
    return folder


def _make_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="aligner-test-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
