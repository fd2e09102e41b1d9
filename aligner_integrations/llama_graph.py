"""A Llama checkpoint as an ONNX graph with fused attention and a cache that is written in place.

The general exporter writes attention out: every forward masks, copies the whole cache and returns it, so
late sentences of a stream grow dear. ONNX Runtime's GroupQueryAttention does all of it in one node, and
where past and present are one buffer it copies nothing. Inputs and outputs keep optimum's names.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto, helper, numpy_helper

from aligner_integrations.backends.onnx import SHARED_CACHE

ROTATIONS = ("cos", "sin")  # the weights that hold the positions' angles
_OPSET = 18
_MICROSOFT = "com.microsoft"


def is_plain_llama(model: Any) -> bool:
    """Whether `build_llama_graph` covers this transformers model: Llama, no scaled positions.

    The fused attention asks for head sizes that are multiples of 16.
    """
    config = model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    fits = _head_size(config) % 16 == 0
    return bool(config.model_type == "llama" and plain and fits and config.hidden_act == "silu")


def build_llama_graph(model: Any) -> Any:
    """Return the ONNX model (fp32) of a `LlamaForCausalLM`.

    Inputs: `input_ids` (batch, length), `attention_mask` (batch, past + length), `position_ids`
    (batch, length; positions are those of the cache, so it is not read), `past_key_values.N.key/value`
    (batch, key heads, past, head size). Outputs: `logits` (batch, length, vocabulary) and
    `present.N.key/value`.
    """
    graph = _Graph(model)
    hidden = graph.node("Gather", ["model.embed_tokens.weight", "input_ids"])
    normed = graph.node("SimplifiedLayerNormalization", [hidden, "model.layers.0.input_layernorm.weight"])
    layers = model.config.num_hidden_layers
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
    tied = model.config.tie_word_embeddings
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    graph.node("MatMul", [normed, graph.node("Transpose", [head], perm=[1, 0])], output="logits")
    return graph.finish()


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


class _Graph:
    """Nodes, weights and values of the graph that is being written."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self._config = config
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._size = _head_size(config)
        self._nodes: list[Any] = []
        self._count = 0
        self._weights: dict[str, npt.NDArray[Any]] = {}
        self._state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
        for name, weight in self._state.items():
            if weight.ndim == 1 or name.endswith("embed_tokens.weight"):
                self._weights[name] = weight
        if not config.tie_word_embeddings:
            self._weights["lm_head.weight"] = self._state["lm_head.weight"]
        positions = torch.arange(config.max_position_embeddings)[:, None].float()
        angles = positions * model.model.rotary_emb.inv_freq.float()[None]
        self._weights |= zip(ROTATIONS, (angles.cos().numpy(), angles.sin().numpy()), strict=True)
        self._add_lengths()

    def _add_lengths(self) -> None:
        """What the attention node asks for: each row's last place, and the length of cache and input."""
        self._weights["one"] = np.array(1, dtype=np.int64)
        self._weights["rows"] = np.array([1], dtype=np.int64)
        used = self.node("ReduceSum", ["attention_mask", "rows"], keepdims=0)
        last = self.node("Sub", [used, "one"])
        self.node("Cast", [last], output="last_place", to=TensorProto.INT32)
        width = self.node("Gather", [self.node("Shape", ["attention_mask"]), "one"])
        self.node("Cast", [width], output="total_length", to=TensorProto.INT32)

    def node(self, kind: str, inputs: list[str], *, output: str = "", domain: str = "", **given: Any) -> str:
        """Add a node with one output and return the output's name."""
        self._count += 1
        output = output or f"{kind}.{self._count}"
        if kind == "SimplifiedLayerNormalization":
            given |= {"axis": -1, "epsilon": self._config.rms_norm_eps, "stash_type": 1}
        self._nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **given))
        return output

    def linear(self, name: str, value: str) -> str:
        """Add `value` times a projection's matrix, plus its bias if it has one."""
        self._weights[f"{name}.weight"] = np.ascontiguousarray(self._state[f"{name}.weight"].T)
        product = self.node("MatMul", [value, f"{name}.weight"])
        return self.node("Add", [product, f"{name}.bias"]) if f"{name}.bias" in self._state else product

    def add_and_norm(self, hidden: str, change: str, weight: str) -> tuple[str, str]:
        """Add `change` to the residual; return it normed and as it is."""
        total = self.node("Add", [hidden, change])
        return self.node("SimplifiedLayerNormalization", [total, weight]), total

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

    def finish(self) -> Any:
        """Return the model."""
        config = self._config
        wide, floats = TensorProto.INT64, TensorProto.FLOAT

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
            initializer=[numpy_helper.from_array(array, name) for name, array in self._weights.items()],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid(_MICROSOFT, 1)],
            producer_name="aligner-integrations",
            ir_version=9,
        )
        helper.set_model_props(model, {SHARED_CACHE: "1"})
        return model
