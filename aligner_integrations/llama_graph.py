"""A Llama-like checkpoint as an ONNX graph with fused attention and a cache that is written in place.

The general exporter writes attention out: every forward masks, copies the whole cache and returns it, so
late sentences of a stream grow dear. ONNX Runtime's GroupQueryAttention does all of it in one node, and
where past and present are one buffer it copies nothing. Inputs and outputs keep optimum's names.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto, helper, numpy_helper

from aligner_integrations.backends.onnx import SHARED_CACHE

ROTATIONS = ("cos", "sin")  # the weights that hold the positions' angles
_FUSED = ("llama", "mistral", "qwen2")  # the same layers; Qwen2 adds biases to query, key and value
_MICROSOFT = "com.microsoft"


def can_fuse(config: Any) -> bool:
    """Whether `write_llama_graph` covers a transformers config: a Llama-like model without a twist.

    That is: plain rotary positions, no attention window within the context, and, as the fused attention
    asks, a head size that is a multiple of 16.
    """
    rope = _rope(config)
    plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    plain = plain and getattr(config, "partial_rotary_factor", 1.0) in (None, 1.0)
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    whole = window >= config.max_position_embeddings or not getattr(config, "use_sliding_window", True)
    fits = _head_size(config) % 16 == 0
    return bool(config.model_type in _FUSED and plain and whole and fits and config.hidden_act == "silu")


def build_llama_graph(model: Any) -> Any:
    """Return the ONNX model (fp32), weights included, of a transformers model that `can_fuse` covers."""
    state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    graph, weights = write_llama_graph(model.config, state.keys())
    for name, transposed in weights.items():
        array = np.ascontiguousarray(state[name].T if transposed else state[name])
        graph.graph.initializer.append(numpy_helper.from_array(array, name))
    return graph


def write_llama_graph(
    config: Any, names: Collection[str], *, half: bool = False, opset: int = 18
) -> tuple[Any, dict[str, bool]]:
    """Return the ONNX model of a config that `can_fuse` covers, and the weights that are still to be added.

    Inputs: `input_ids` (batch, length), `attention_mask` (batch, past + length), `position_ids`
    (batch, length; positions are those of the cache, so it is not read), `past_key_values.N.key/value`
    (batch, key heads, past, head size). Outputs: `logits` (batch, length, vocabulary) and
    `present.N.key/value`. The weights are named as in the checkpoint; each is said to be wanted
    transposed, or not.

    Args:
        config: the model's transformers config.
        names: the names of the checkpoint's tensors; they tell which projections have a bias.
        half: whether weights and cache are fp16 in place of fp32.
        opset: the version of ONNX's operators.
    """
    graph = _Graph(config, names, half=half)
    hidden = graph.node("Gather", [graph.weight("model.embed_tokens.weight"), "input_ids"])
    normed = graph.norm(hidden, "model.layers.0.input_layernorm.weight")
    layers = config.num_hidden_layers
    for layer in range(layers):
        name = f"model.layers.{layer}"
        mixed = graph.attention(layer, normed)
        normed, hidden = graph.add_and_norm(hidden, mixed, f"{name}.post_attention_layernorm.weight")
        gate = graph.linear(f"{name}.mlp.gate_proj", normed)
        lifted = graph.linear(f"{name}.mlp.up_proj", normed)
        active = graph.node("Mul", [gate, graph.node("Sigmoid", [gate])])
        written = graph.linear(f"{name}.mlp.down_proj", graph.node("Mul", [active, lifted]))
        after = (
            f"model.layers.{layer + 1}.input_layernorm.weight" if layer + 1 < layers else "model.norm.weight"
        )
        normed, hidden = graph.add_and_norm(hidden, written, after)
    head = graph.weight("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight")
    graph.node("MatMul", [normed, graph.node("Transpose", [head], perm=[1, 0])], output="logits")
    return graph.finish(opset), graph.weights


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> dict[str, Any]:
    """Return what a config says of its rotary positions; transformers 5 has it all in `rope_parameters`."""
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def _angles(config: Any) -> torch.Tensor:
    """Return the angles of each position, of shape (positions, head size / 2), as transformers has them."""
    size = _head_size(config)
    base = _rope(config).get("rope_theta") or config.rope_theta
    slower: torch.Tensor = 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))
    return torch.arange(config.max_position_embeddings)[:, None].float() * slower[None]


class _Graph:
    """Nodes, weights and values of the graph that is being written."""

    def __init__(self, config: Any, names: Collection[str], *, half: bool) -> None:
        self._config, self._names = config, names
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._size = _head_size(config)
        self._floats = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self._nodes: list[Any] = []
        self._count = 0
        self.weights: dict[str, bool] = {}
        angles = _angles(config)
        kind = np.float16 if half else np.float32
        turns = (angles.cos().numpy().astype(kind), angles.sin().numpy().astype(kind))
        self._constants: dict[str, npt.NDArray[Any]] = dict(zip(ROTATIONS, turns, strict=True))
        self._add_lengths()

    def _add_lengths(self) -> None:
        """What the attention node asks for: each row's last place, and the length of cache and input."""
        self._constants["one"] = np.array(1, dtype=np.int64)
        self._constants["rows"] = np.array([1], dtype=np.int64)
        used = self.node("ReduceSum", ["attention_mask", "rows"], keepdims=0)
        last = self.node("Sub", [used, "one"])
        self.node("Cast", [last], output="last_place", to=TensorProto.INT32)
        width = self.node("Gather", [self.node("Shape", ["attention_mask"]), "one"])
        self.node("Cast", [width], output="total_length", to=TensorProto.INT32)

    def node(self, kind: str, inputs: list[str], *, output: str = "", domain: str = "", **given: Any) -> str:
        """Add a node with one output and return the output's name."""
        self._count += 1
        output = output or f"{kind}.{self._count}"
        self._nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **given))
        return output

    def weight(self, name: str, *, transposed: bool = False) -> str:
        """Ask for a weight of the checkpoint and return its name."""
        self.weights[name] = transposed
        return name

    def norm(self, value: str, weight: str) -> str:
        """Add a root-mean-square norm, computed in fp32."""
        given = {"axis": -1, "epsilon": self._config.rms_norm_eps, "stash_type": 1}
        return self.node("SimplifiedLayerNormalization", [value, self.weight(weight)], **given)

    def linear(self, name: str, value: str) -> str:
        """Add `value` times a projection's matrix, plus its bias if it has one."""
        product = self.node("MatMul", [value, self.weight(f"{name}.weight", transposed=True)])
        bias = f"{name}.bias"
        return self.node("Add", [product, self.weight(bias)]) if bias in self._names else product

    def add_and_norm(self, hidden: str, change: str, weight: str) -> tuple[str, str]:
        """Add `change` to the residual; return it normed and as it is."""
        total = self.node("Add", [hidden, change])
        return self.norm(total, weight), total

    def attention(self, layer: int, value: str) -> str:
        """Add one layer's attention, from the normed residual to what is added to it."""
        name = f"model.layers.{layer}.self_attn"
        projected = [self.linear(f"{name}.{which}_proj", value) for which in "qkv"]
        mixed = f"attention.{layer}"
        past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        present = [f"present.{layer}.key", f"present.{layer}.value"]
        self._nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [*projected, *past, "last_place", "total_length", *ROTATIONS],
                [mixed, *present],
                domain=_MICROSOFT,
                num_heads=self._heads,
                kv_num_heads=self._key_heads,
                do_rotary=1,
            )
        )
        return self.linear(f"{name}.o_proj", mixed)

    def finish(self, opset: int) -> Any:
        """Return the model."""
        config = self._config
        wide, floats = TensorProto.INT64, self._floats

        def cache(prefix: str, length: str) -> list[Any]:
            shape = ["batch", self._key_heads, length, self._size]
            return [
                helper.make_tensor_value_info(f"{prefix}.{layer}.{part}", floats, shape)
                for layer in range(config.num_hidden_layers)
                for part in ("key", "value")
            ]

        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self._nodes,
            "aligner",
            inputs=[
                info("input_ids", wide, ["batch", "length"]),
                info("attention_mask", wide, ["batch", "total"]),
                info("position_ids", wide, ["batch", "length"]),
                *cache("past_key_values", "past"),
            ],
            outputs=[
                info("logits", floats, ["batch", "length", config.vocab_size]),
                *cache("present", "present"),
            ],
            initializer=[numpy_helper.from_array(array, name) for name, array in self._constants.items()],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(_MICROSOFT, 1)],
            producer_name="aligner-integrations",
            ir_version=9,
        )
        helper.set_model_props(model, {SHARED_CACHE: "1"})
        return model
