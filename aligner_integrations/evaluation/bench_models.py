"""The models that `aligner bench` runs: random ones of a size, and checkpoints made back from a graph."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import tokenizers
import torch
from onnx import numpy_helper
from transformers import LlamaConfig, LlamaForCausalLM

from aligner_integrations.config import AlignerConfig
from aligner_integrations.errors import ModelLoadError
from aligner_integrations.export import export_checkpoint
from aligner_integrations.llama_graph import ROTATIONS
from aligner_integrations.tokenizer import Tokenizer

Weights: TypeAlias = dict[str, npt.NDArray[Any]]

_EOS = "</s>"
_UNKNOWN = "<unk>"
_FIRST_WORD = 8  # ids below are special tokens, as in the bundled model


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a random Llama; embeddings and output share their weights."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    context: int


SIZES = {
    "100m": Size(hidden=768, inner=2048, layers=12, heads=12, key_heads=4, vocabulary=32_000, context=8192),
}


@contextmanager
def random_model(size: str, *, attention: Literal["fused", "plain"] = "fused") -> Iterator[Path]:
    """Make the model folder of `write_random_model` in a temporary place; it goes at the end.

    Raises:
        ValueError: there is no size of this name.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}; got {size!r}")
    with TemporaryDirectory(prefix="aligner-bench-") as scratch:
        yield write_random_model(Path(scratch) / f"{size}-{attention}", SIZES[size], attention=attention)


def write_random_model(
    folder: Path, size: Size, *, attention: Literal["fused", "plain"] = "fused", seed: int = 0
) -> Path:
    """Write a model folder with random weights, its checkpoint beside the graph, and return it.

    Text is words `w8`, `w9`, ..., one token each, so that any ids can be had as text. Rows share a forward
    with `attention="plain"` alone; one sequence is faster with `"fused"`.
    """
    with TemporaryDirectory(prefix="aligner-bench-") as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        _write_checkpoint(checkpoint, size, seed=seed)
        config = AlignerConfig("aligner-v1", max_length=size.context)
        export_checkpoint(checkpoint, folder, config=config, attention=attention)
        shutil.move(checkpoint / "model.safetensors", folder)
    return folder


def _write_checkpoint(folder: Path, size: Size, *, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = ["<pad>", _EOS, _UNKNOWN, *(f"<{place}>" for place in range(3, _FIRST_WORD))]
    words += [word(place) for place in range(_FIRST_WORD, size.vocabulary)]
    known = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({text: place for place, text in enumerate(words)}, unk_token=_UNKNOWN)
    )
    known.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    known.add_special_tokens([_EOS])
    known.save(str(folder / "tokenizer.json"))


def word(place: int) -> str:
    """Return the text of an id of a random model."""
    return f"w{place}"


def checkpoint_from_graph(folder: Path, out: Path) -> Path:
    """Make the transformers checkpoint of a graph that `aligner export` wrote, and return `out`.

    Raises:
        ModelLoadError: `folder/model.onnx` is missing, or not such a graph.
    """
    path = folder / "model.onnx"
    if not path.is_file():
        raise ModelLoadError(f"{path} does not exist; give a model folder")
    graph = onnx.load(path).graph
    weights = _unfolded(graph)
    try:
        config = _config_of(graph, weights)
    except (KeyError, StopIteration) as error:
        raise ModelLoadError(
            f"{path} is no graph with fused attention of `aligner export` (it lacks {error}); "
            "put the checkpoint's config.json and model.safetensors beside it"
        ) from error
    if (folder / "tokenizer.json").is_file():
        config.eos_token_id = Tokenizer.from_file(folder / "tokenizer.json").eos_id
    model = LlamaForCausalLM(config)
    state = {
        name: torch.from_numpy(_as_linear(name, weights)) for name in model.state_dict() if name in weights
    }
    missing = (
        model.state_dict().keys()
        - state.keys()
        - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    )
    if missing:
        raise ModelLoadError(f"{path} lacks the weights {sorted(missing)}")
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.save_pretrained(out)
    if (folder / "tokenizer.json").is_file():
        shutil.copyfile(folder / "tokenizer.json", out / "tokenizer.json")
    return out


def _unfolded(graph: Any) -> Weights:
    """Return the graph's weights by name, those stored as int8 x scale in fp32."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name in [name for name in stored if name.endswith(".int8")]:
        base = name.removesuffix(".int8")
        stored[base] = stored.pop(name).astype(np.float32) * stored.pop(f"{base}.scale")
    return stored


def _as_linear(name: str, weights: Weights) -> npt.NDArray[Any]:
    """Return a weight as transformers holds it: the graph has the projections' matrices transposed."""
    weight = weights[name]
    return np.array(weight.T if name.endswith("_proj.weight") else weight, dtype=np.float32, order="C")


def _config_of(graph: Any, weights: Weights) -> LlamaConfig:
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    said = {field.name: field.i for field in next(iter(attention)).attribute}
    norm = next(node for node in graph.node if node.op_type == "SimplifiedLayerNormalization")
    first = "model.layers.0"
    vocabulary, hidden = weights["model.embed_tokens.weight"].shape
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=weights[f"{first}.mlp.gate_proj.weight"].shape[1],
        num_hidden_layers=len(attention),
        num_attention_heads=said["num_heads"],
        num_key_value_heads=said["kv_num_heads"],
        head_dim=weights[f"{first}.self_attn.q_proj.weight"].shape[1] // said["num_heads"],
        rms_norm_eps=next(field.f for field in norm.attribute if field.name == "epsilon"),
        rope_theta=_theta(*(weights[name] for name in ROTATIONS)),
        max_position_embeddings=len(weights[ROTATIONS[0]]),
        attention_bias=f"{first}.self_attn.q_proj.bias" in weights,
        mlp_bias=f"{first}.mlp.gate_proj.bias" in weights,
        tie_word_embeddings="lm_head.weight" not in weights,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _theta(cos: npt.NDArray[Any], sin: npt.NDArray[Any]) -> float:
    """Return the base of the positions' angles, from their tables of shape (positions, pairs)."""
    slowest = cos.shape[1] - 1
    turn = float(np.arctan2(sin[1, slowest], cos[1, slowest]))  # theta ** (-slowest / pairs)
    return round(float(turn ** (-cos.shape[1] / slowest)), 1)


def checkpoint_of(folder: Path, scratch: Path) -> Path:
    """Return the checkpoint of a model folder: the one in it, or one made from its graph in `scratch`."""
    has_one = (folder / "config.json").is_file() and list(folder.glob("*.safetensors"))
    return folder if has_one else checkpoint_from_graph(folder, scratch / "checkpoint")
