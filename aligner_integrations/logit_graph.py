"""The graph step that makes logits only where they are wanted, and says what decoding asks about them.

A decoder that is exported as it stands gives logits for every place of its input: with a large vocabulary
most of a prefill's memory and much of its time, while decoding looks at the last places alone, and there
mostly at the best id and the draft's. This step slices the hidden states in front of the output projection
and adds three outputs of a few numbers a place. It looks at structure alone: weights need not be loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aligner_integrations.backends.onnx_graph import LOGITS_FROM, SCORES
from aligner_integrations.errors import ModelLoadError

# Between the projection and the logits: each works place by place. Gemma 2 caps its logits by Div, Tanh, Mul.
_ELEMENT_WISE = {"Add", "Cast", "Div", "Identity", "Mul", "Tanh"}
_PROJECTIONS = {"FusedMatMul", "Gemm", "MatMul", "MatMulInteger", "MatMulNBits"}
# "To the end", for a Slice; more does not fit the 32 bits in which some runtimes count.
_END = 2**31 - 1
_LEAST_OPSET = 13  # from here on Squeeze and Unsqueeze take their axes as an input


def narrow_logits(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let a decoder make logits only from a place on, and say the best and the next id's logit; in place.

    Added are an optional input `logits_from`, int64 of shape (1,), from 0 to length - 1: the first place of
    `input_ids` whose logits are made (without it 0, so all of them), and three outputs of shape (batch,
    kept): `best_ids`, int64, the id with the best logit, the lowest among equals; `best_logits`, float32;
    `next_logits`, float32, the logit of the id that stands at the next place of `input_ids`, without
    meaning after the last place. `logits` becomes (batch, kept, vocabulary). A graph that has all this is
    returned as it is.

    Args:
        model: a decoder with `input_ids` (batch, length) and `logits` (batch, length, vocabulary).

    Raises:
        ModelLoadError: it is no such graph, or its output projection is not found.
    """
    graph = model.graph
    if LOGITS_FROM in {value.name for value in graph.input}:
        return model
    logits = next((value for value in graph.output if value.name == "logits"), None)
    if logits is None or "input_ids" not in {value.name for value in graph.input}:
        raise ModelLoadError("the graph is no decoder: it lacks the input input_ids or the output logits")
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < _LEAST_OPSET:
        raise ModelLoadError(f"the graph has opset {opset}, needed is {_LEAST_OPSET}; export it again")
    model.ir_version = max(model.ir_version, 4)  # before that every initializer was an input
    step = _Step(graph)
    step.narrow()
    step.score(logits)
    return model


class _Step:
    """The graph that is being changed."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._makers: dict[str, onnx.NodeProto] = {
            output: node for node in graph.node for output in node.output
        }
        self._taken = {tensor.name for tensor in graph.initializer} | self._makers.keys()

    def narrow(self) -> None:
        """Slice the hidden states that go into the output projection."""
        path = _path_to_projection("logits", self._makers)
        if path is None:
            raise ModelLoadError(
                "no output projection (a MatMul or Gemm) was found before `logits`; "
                "export the checkpoint with `aligner export`, or run this graph as it is"
            )
        graph = self._graph
        reader, projection = path[-1], path[-1]
        reshaped = [node for node in path if node.op_type == "Reshape"]
        if reshaped:  # a projection of flat rows: cut before the places are flattened
            reader = self._flattening(projection)
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, dtype=np.int64), LOGITS_FROM))
        graph.input.append(helper.make_tensor_value_info(LOGITS_FROM, TensorProto.INT64, [1]))
        constants = [self._constant("end", [_END]), self._constant("axis", [1])]
        kept = self._name("kept")
        at = list(graph.node).index(reader)
        added = [helper.make_node("Slice", [reader.input[0], LOGITS_FROM, *constants], [kept], name=kept)]
        reader.input[0] = kept
        for node in reshaped:
            shape, flat = self._name("kept_shape"), self._constant("flat", [-1])
            added.append(helper.make_node("Shape", [kept], [f"{shape}.whole"], name=f"{shape}.whole"))
            ends = [self._constant("start", [0]), self._constant("stop", [2])]
            rows = f"{shape}.rows"
            added.append(helper.make_node("Slice", [f"{shape}.whole", *ends], [rows], name=rows))
            added.append(helper.make_node("Concat", [rows, flat], [shape], name=shape, axis=0))
            node.input[1] = shape
        self._insert(at, added)
        # What was inferred about lengths on the way is no longer true.
        stale = {output for node in path for output in node.output}
        fresh = [value for value in graph.value_info if value.name not in stale]
        del graph.value_info[:]
        graph.value_info.extend(fresh)

    def _flattening(self, projection: onnx.NodeProto) -> onnx.NodeProto:
        """Return the node that makes rows of the places which `projection` takes."""
        node = self._makers.get(projection.input[0])
        while node is not None and node.op_type in ("Cast", "Identity"):
            node = self._makers.get(node.input[0])
        if node is None or node.op_type not in ("Flatten", "Reshape"):
            raise ModelLoadError(
                "the logits are reshaped, but not from hidden states made flat: unknown graph"
            )
        return node

    def score(self, logits: onnx.ValueInfoProto) -> None:
        """Add the outputs that sum up each kept place."""
        best_ids, best_logits, next_logits = SCORES
        last, second = self._constant("vocabulary_axis", [2]), self._constant("place_axis", [1])
        first, one = self._constant("first", [0]), self._constant("one", [1])
        end = self._constant("ids_end", [_END])
        after, later, head, following = map(self._name, ("after", "later_ids", "first_id", "next_ids"))
        best, index = self._name("best"), self._name("next_index")
        kept, found = self._name("best_found"), self._name("next_found")
        added = [
            helper.make_node("ArgMax", ["logits"], [best], axis=2, keepdims=1),
            helper.make_node("Squeeze", [best, last], [best_ids]),
            helper.make_node("GatherElements", ["logits", best], [kept], axis=2),
            helper.make_node("Add", [LOGITS_FROM, one], [after]),
            helper.make_node("Slice", ["input_ids", after, end, second], [later]),
            # After the last place there is no id: the first one stands in for it.
            helper.make_node("Slice", ["input_ids", first, one, second], [head]),
            helper.make_node("Concat", [later, head], [following], axis=1),
            helper.make_node("Unsqueeze", [following, last], [index]),
            helper.make_node("GatherElements", ["logits", index], [found], axis=2),
        ]
        for source, name in ((kept, best_logits), (found, next_logits)):
            flat = self._name(f"{name}_flat")
            added.append(helper.make_node("Squeeze", [source, last], [flat]))
            added.append(helper.make_node("Cast", [flat], [name], to=TensorProto.FLOAT))
        for node in added:
            node.name = f"{node.op_type}.{node.output[0]}"
        self._graph.node.extend(added)
        # Named as the logits' places are: without `logits_from` they are as many as those of the input.
        places = [dim.dim_param or dim.dim_value for dim in logits.type.tensor_type.shape.dim][:2]
        kinds = (TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT)
        self._graph.output.extend(map(helper.make_tensor_value_info, SCORES, kinds, [places] * 3))

    def _name(self, wanted: str) -> str:
        """Return a name that nothing in the graph has yet."""
        name = f"narrow.{wanted}"
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def _constant(self, wanted: str, values: list[int]) -> str:
        name = self._name(wanted)
        self._graph.initializer.append(numpy_helper.from_array(np.array(values, dtype=np.int64), name))
        return name

    def _insert(self, at: int, nodes: Iterable[onnx.NodeProto]) -> None:
        for offset, node in enumerate(nodes):
            self._graph.node.insert(at + offset, node)


def _path_to_projection(value: str, makers: dict[str, Any]) -> list[onnx.NodeProto] | None:
    """Return the nodes from what makes `value` back to the output projection, or None where there is none."""
    node = makers.get(value)
    if node is None:
        return None
    if node.op_type in _PROJECTIONS:
        return [node]
    sources = node.input if node.op_type in _ELEMENT_WISE else node.input[:1]
    if node.op_type not in _ELEMENT_WISE | {"Reshape"}:
        return None
    for source in sources:
        path = _path_to_projection(source, makers)
        if path is not None:
            return [node, *path]
    return None
