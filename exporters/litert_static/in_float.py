"""Nodes of a solved network that LiteRT computes in float32: those that write or read a value without a grid, and those
that no int8 operator computes well (layer norms, the cast of an integer mask).

What they read of int8 values goes through DEQUANTIZE; what they make is put on its grid by QUANTIZE where it has one.
Matrix products are never here: they are int8, or refused. No value in float32 lies as an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from exporters.litert_int8 import operators as floats
from exporters.litert_int8.flatbuffer import Array, Graph
from exporters.litert_static import operators as op
from lilliput.errors import ExportError
from lilliput.network import Network, Operation, QuantizedNetwork

ALWAYS_OPS = ("layer_norm", "cast")
UNARY: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "relu": ("RELU", {}),
    "gelu": ("GELU", {"approximate": False}),
    "gelu_tanh": ("GELU", {"approximate": True}),
    "tanh": ("TANH", {}),
    "sigmoid": ("LOGISTIC", {}),
    "hardswish": ("HARD_SWISH", {}),
}


def is_in_float(model: QuantizedNetwork, node: Operation) -> bool:
    """Whether a node is computed in float32. An integer's reshape is not, nor a matrix product."""
    if node.op in ALWAYS_OPS:
        return True
    if node.op in ("linear", "conv2d", "matmul", "embedding") or not model.network.is_float(node.name):
        return False
    return any(name not in model.activations for name in (node.name, *node.inputs))


def lower(graph: Graph, model: QuantizedNetwork, node: Operation, x: Sequence[int]) -> int:
    """Append the operators of one node to float32 tensors `x`; its float32 output. Raises ExportError for others."""
    if node.op in UNARY:
        code, options = UNARY[node.op]
        return floats.unary(graph, code, x[0], **options)
    if node.op not in LOWERED:
        raise ExportError(f"node {node.name!r}: LiteRT's file has no {node.op!r} in float32: ask for integer: all")
    return LOWERED[node.op](graph, model, node, x)


def constant(graph: Graph, network: Network, name: str) -> int:
    """A parameter in float32."""
    return graph.constant(name, network.parameters[name])


def _binary(graph: Graph, model: QuantizedNetwork, node: Operation, x: Sequence[int]) -> int:
    return floats.binary(graph, node.op.upper(), *x)


def _softmax(graph: Graph, model: QuantizedNetwork, node: Operation, x: Sequence[int]) -> int:
    if node.attributes["axis"] != len(model.network.shape(node.name)) - 1:
        raise ExportError(f"node {node.name!r}: a softmax over axis {node.attributes['axis']}, LiteRT has the last one")
    return floats.unary(graph, "SOFTMAX", x[0], beta=1.0)


def _reshape(graph: Graph, model: QuantizedNetwork, node: Operation, x: Sequence[int]) -> int:
    return floats.reshape(graph, x[0], model.network.shape(node.name))


def _transpose(graph: Graph, model: QuantizedNetwork, node: Operation, x: Sequence[int]) -> int:
    return floats.transpose(graph, x[0], node.attributes["perm"])  # type: ignore[arg-type]


def _mean(graph: Graph, model: QuantizedNetwork, node: Operation, x: Sequence[int]) -> int:
    made = graph.tensor(model.network.shape(node.name))
    axes = floats.ints(graph, node.attributes["axes"])  # type: ignore[arg-type]
    graph.operator("MEAN", [x[0], axes], [made], keepDims=bool(node.attributes["keepdims"]))
    return made


def _layer_norm(graph: Graph, model: QuantizedNetwork, node: Operation, x: Sequence[int]) -> int:
    """(x − mean) · rsqrt(variance + eps) · weight + bias, over the last axis."""
    centred = floats.binary(graph, "SUB", x[0], floats.mean(graph, x[0]))
    variance = floats.mean(graph, floats.binary(graph, "MUL", centred, centred))
    eps = floats.scalar(graph, float(node.attributes["eps"]))  # type: ignore[arg-type]
    factor = floats.unary(graph, "RSQRT", floats.binary(graph, "ADD", variance, eps))
    weight, bias = (graph.constant(f"{node.name}.{part}", array) for part, array in norm_vectors(model, node).items())
    y = floats.binary(graph, "MUL", floats.binary(graph, "MUL", centred, factor), weight)
    return floats.binary(graph, "ADD", y, bias)


def _cast(graph: Graph, model: QuantizedNetwork, node: Operation, x: Sequence[int]) -> int:
    return op.cast(graph, x[0])


def norm_vectors(model: QuantizedNetwork, node: Operation) -> dict[str, Array]:
    """Weight and bias of a layer norm, float32: as their codes stand for them where they are on grids."""
    weight, bias = (model.network.parameters[name] for name in node.inputs[1:])
    if node.inputs[1] in model.activations:
        grid = model.activations[node.inputs[1]]
        codes = model.constant(node.inputs[1]).astype("int32") - grid.zero_point[0]
        weight = codes.astype("float32") * grid.scale[0]
    if node.name in model.biases:
        bias = (model.biases[node.name].astype("float32") * model.bias_scale(node)).astype("float32")
    return {"weight": weight, "bias": bias}


LOWERED: Mapping[str, Callable[[Graph, QuantizedNetwork, Operation, Sequence[int]], int]] = {
    **dict.fromkeys(("add", "sub", "mul", "div"), _binary), "softmax": _softmax, "reshape": _reshape,
    "transpose": _transpose, "mean": _mean, "layer_norm": _layer_norm, "cast": _cast,
}  # fmt: skip
