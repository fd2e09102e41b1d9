from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import LlamaForCausalLM

from aligner_integrations.aligner import BUNDLED_MODEL
from aligner_integrations.backends.onnx import OnnxBackend
from aligner_integrations.errors import ModelLoadError
from aligner_integrations.evaluation.bench import run_bench
from aligner_integrations.evaluation.bench_models import (
    Size,
    checkpoint_from_graph,
    checkpoint_of,
    write_random_model,
)
from aligner_integrations.evaluation.forced import make_patterns
from aligner_integrations.evaluation.peers import load_peers
from tests.models_for_tests import fused_model, llama, onnx_model

CPU = "CPUExecutionProvider"


@pytest.mark.parametrize("model", ["bundled", "untrained"])
def test_the_checkpoint_of_a_graph_computes_what_the_graph_does(model: str, tmp_path: Path) -> None:
    folder = BUNDLED_MODEL if model == "bundled" else fused_model(0)
    source = LlamaForCausalLM.from_pretrained(checkpoint_from_graph(folder, tmp_path / "checkpoint")).eval()
    backend = OnnxBackend.load(folder, provider="cpu", threads=2)
    ids = np.random.default_rng(0).integers(8, source.config.vocab_size, size=200).tolist()
    found = backend.forward(ids, backend.make_cache(), last=len(ids))
    with torch.no_grad():
        wanted = source(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(found - wanted).max() < 1e-3
    assert (found.argmax(1) == wanted.argmax(1)).all()
    if model == "untrained":
        told = llama(0).config
        for name in ("rope_theta", "num_key_value_heads", "intermediate_size", "max_position_embeddings"):
            assert getattr(source.config, name) == getattr(told, name)


def test_a_graph_that_is_not_ours_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"model\.onnx does not exist"):
        checkpoint_from_graph(tmp_path, tmp_path / "out")
    (tmp_path / "model.onnx").write_bytes((onnx_model(0) / "model.onnx").read_bytes())
    with pytest.raises(ModelLoadError, match=r"put the checkpoint's config\.json and model.safetensors"):
        checkpoint_of(tmp_path, tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
    lacking = onnx.load(fused_model(0) / "model.onnx")
    norm = next(weight for weight in lacking.graph.initializer if weight.name == "model.norm.weight")
    lacking.graph.initializer.remove(norm)
    onnx.save(lacking, tmp_path / "model.onnx")
    with pytest.raises(ModelLoadError, match=r"lacks the weights \['model.norm.weight'\]"):
        checkpoint_from_graph(tmp_path, tmp_path / "out")


def test_every_peer_writes_what_it_is_told_to() -> None:
    patterns = make_patterns(np.random.default_rng(0), 300, 40)
    before = torch.get_num_threads()
    with load_peers(fused_model(0), provider=CPU, threads=1) as peers:
        assert torch.get_num_threads() == peers.setting["torch_threads"] == 1
        assert peers.setting["optimum_provider"] == CPU
        for way in peers.greedy_ways(patterns[0]):
            run = way.run()
            assert (run.output, run.forwards, run.new_tokens) == (patterns[0].target, 41, 41)
            assert [tokens for tokens, _ in run.blocks] == [84, *[1] * 40]
        looked_up = {pattern.edits: peers.lookup_way(pattern).run() for pattern in patterns}
        for pattern in patterns:
            assert looked_up[pattern.edits].output == pattern.target
        # The separator before the answer occurs nowhere, so the first forward has no draft; the second
        # copies from the answer, as often as ten tokens and one more go into what is left.
        unchanged = looked_up[0]
        assert unchanged.blocks[0] == (84, 1)
        assert unchanged.blocks[1] == (11, 11)
        assert unchanged.forwards == 5
        assert unchanged.forwards <= looked_up[3].forwards < looked_up[10].forwards <= 41
        assert looked_up[None].forwards > 30
    assert torch.get_num_threads() == before


def test_the_report_sets_peers_beside_ours(tmp_path: Path) -> None:
    size = Size(hidden=64, inner=96, layers=2, heads=4, key_heads=2, vocabulary=300, context=1024)
    folder = write_random_model(tmp_path / "random", size)
    assert checkpoint_of(folder, tmp_path / "scratch") == folder
    report = run_bench(folder, rounds=1, answer_tokens=24, provider="cpu", threads=1, peers=True)
    goals = {ratio.name: ratio.goal for ratio in report.ratios}
    assert goals["transformers generate : guided, unchanged"] == 15.0
    assert {"optimum generate : guided, unchanged", "prompt lookup : guided, 3 edits"} <= goals.keys()
    assert {"torch", "transformers", "optimum", "torch_threads"} <= report.setting.keys()
    written = {timing.name: timing.new_tokens for timing in report.timings}
    for name in ("transformers generate", "optimum generate", "prompt lookup, nothing to copy"):
        assert written[name] == written["plain greedy"] == 25
