"""Lower a solved network to one ONNX graph of fixed shapes, in QDQ form.

Every float value stands between QuantizeLinear and DequantizeLinear on its grid, so that an integer runtime fuses each
operator with the pairs around it, and one that computes in float gives what the integers mean:

    x ─► Q ─► DQ ─► operator ─► Q ─► DQ ─► …

    weights     `{name}.codes` int8 (int4 stored as INT4), `{name}.scales` (out,), DequantizeLinear over axis 0
    biases      `{node}.bias` int32 on (input's scale) · (weight's scale), no zero point
    constants   `{name}.codes` on a grid of their own: tables, norm weights, numbers
    grids       `{grid}.scale`, `{grid}.zero_point`: one pair for all values that share it

A linear layer over (…, in) is Gemm on (n, in), which takes an int32 bias; MatMul does not. A ReLU or clip whose grid
begins at zero and that shares it with the operator before is no node: QuantizeLinear clips.

Opset 21: its QuantizeLinear and DequantizeLinear take 16 bits, and 4 bits of weights (onnx.ai, operators).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lilliput.activation_grid import ActivationGrid
from lilliput.grid import QuantizedTensor
from lilliput.network import MATRIX_OPS, Operation, QuantizedNetwork
from lilliput.network.ties import is_clip_from_zero

OPSET = 21
IR_VERSION = 10  # of opset 21
TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
DEQUANTIZED, QUANTIZED = "/dequantized", "/quantized"


@dataclass
class Builder:
    """The graph while it grows."""

    model: QuantizedNetwork
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    grids: dict[int, str] = field(default_factory=dict)  # id of a grid → the value that names it
    read_as: dict[str, str] = field(default_factory=dict)  # value → what its readers read

    def add(self, op: str, inputs: Sequence[str], output: str, name: str = "", **attributes: Any) -> str:
        """Append a node, named after its output where it has no name of its own; the output."""
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name or output, **attributes))
        return output

    def constant(self, name: str, array: npt.NDArray[Any]) -> str:
        """An initializer of that name, made once."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array.copy(order="C"), name)
        return name

    def grid(self, name: str) -> tuple[str, str]:
        """Scale and zero point of a value's grid."""
        grid = self.model.activations[name]
        owner = self.grids.setdefault(id(grid), name)
        scale = self.constant(f"{owner}.scale", grid.scale.reshape(()))
        return scale, self.constant(f"{owner}.zero_point", grid.zero_point.astype(grid.dtype).reshape(()))

    def read(self, name: str) -> str:
        """What a reader of a value or constant takes: its dequantized form."""
        if name in self.read_as:
            return self.read_as[name]
        if name in self.model.activations:  # a constant
            codes = self.constant(f"{name}.codes", self.model.constant(name))
            self.read_as[name] = self.add("DequantizeLinear", [codes, *self.grid(name)], name + DEQUANTIZED)
            return self.read_as[name]
        if name in self.model.network.parameters:
            return self.constant(name, self.model.network.parameters[name])
        return name

    def pair(self, source: str, name: str) -> None:
        """QuantizeLinear and DequantizeLinear of value `name`, which `source` holds in float."""
        quantized = self.add("QuantizeLinear", [source, *self.grid(name)], name + QUANTIZED)
        last = name in self.model.network.outputs
        self.read_as[name] = self.add(
            "DequantizeLinear", [quantized, *self.grid(name)], name if last else name + DEQUANTIZED,
            name + DEQUANTIZED,
        )  # fmt: skip

    def weight(self, name: str) -> str:
        """A weight in its own shape, dequantized over axis 0."""
        if name not in self.read_as:
            tensor = self.model.weights[name]
            shape = self.model.network.parameters[name].shape
            codes = self._codes(f"{name}.codes", tensor, shape)
            scales = self.constant(f"{name}.scales", tensor.scales[:, 0])
            zeros = self._zeros(f"{name}.zero_points", tensor)
            self.read_as[name] = self.add("DequantizeLinear", [codes, scales, zeros], name + DEQUANTIZED, axis=0)
        return self.read_as[name]

    def _codes(self, name: str, tensor: QuantizedTensor, shape: tuple[int, ...]) -> str:
        if tensor.spec.bits > 4:
            return self.constant(name, tensor.codes.reshape(shape))
        if name not in self.initializers:
            self.initializers[name] = helper.make_tensor(name, TensorProto.INT4, shape, tensor.codes.reshape(-1))
        return name

    def _zeros(self, name: str, tensor: QuantizedTensor) -> str:
        if tensor.spec.bits > 4:
            return self.constant(name, np.zeros(len(tensor.scales), np.int8))
        rows = len(tensor.scales)
        self.initializers[name] = helper.make_tensor(name, TensorProto.INT4, (rows,), np.zeros(rows, np.int8))
        return name

    def bias(self, node: Operation) -> list[str]:
        """The bias of a node, dequantized where it is int32; nothing where it has none."""
        if node.name not in self.model.biases:
            return [self.read(name) for name in node.inputs[2:]]
        scale = self.model.bias_scale(node)
        per_channel = node.op in MATRIX_OPS
        codes = self.constant(f"{node.name}.bias", self.model.biases[node.name])
        stored = self.constant(f"{node.name}.bias_scale", scale if per_channel else scale.reshape(()))
        attributes: dict[str, Any] = {"axis": 0} if per_channel else {}
        return [self.add("DequantizeLinear", [codes, stored], f"{node.name}.bias{DEQUANTIZED}", **attributes)]

    def integers(self, name: str, values: Sequence[int]) -> str:
        return self.constant(name, np.array(values, np.int64))


def _linear(b: Builder, node: Operation, out: str) -> None:
    x, shape = node.inputs[0], b.model.network.shape(node.inputs[0])
    operands = [b.weight(node.inputs[1]), *b.bias(node)]
    if len(shape) == 2:
        b.add("Gemm", [b.read(x), *operands], out, node.name, transB=1)
        return
    flat = f"{node.name}/rows"
    b.add("Reshape", [b.read(x), b.integers(f"{flat}.shape", (prod(shape[:-1]), shape[-1]))], flat)
    product = f"{node.name}/product"
    b.add("Gemm", [_copy_on_grid(b, x, flat), *operands], product, node.name, transB=1)
    wide = b.integers(f"{node.name}.shape", b.model.network.values[node.name].shape)
    b.add("Reshape", [_copy_on_grid(b, node.name, product), wide], out, f"{node.name}/reshape")


def _copy_on_grid(b: Builder, name: str, source: str) -> str:
    """A value in another shape, quantized and dequantized on its grid where it has one."""
    if name not in b.model.activations:
        return source
    coded = b.add("QuantizeLinear", [source, *b.grid(name)], source + QUANTIZED)
    return b.add("DequantizeLinear", [coded, *b.grid(name)], source + DEQUANTIZED)


def _conv2d(b: Builder, node: Operation, out: str) -> None:
    pads = (*node.pair("padding"), *node.pair("padding"))
    kernel = b.model.network.shape(node.inputs[1])[2:]
    attributes = {
        "strides": node.pair("stride"),
        "dilations": node.pair("dilation"),
        "group": node.attributes["groups"],
    }
    inputs = [b.read(node.inputs[0]), b.weight(node.inputs[1]), *b.bias(node)]
    b.add("Conv", inputs, out, node.name, pads=pads, kernel_shape=kernel, **attributes)


def _layer_norm(b: Builder, node: Operation, out: str) -> None:
    inputs = [b.read(node.inputs[0]), b.read(node.inputs[1]), *b.bias(node)]
    b.add("LayerNormalization", inputs, out, node.name, axis=-1, epsilon=node.attributes["eps"])


def _embedding(b: Builder, node: Operation, out: str) -> None:
    b.add("Gather", [b.read(node.inputs[0]), node.inputs[1]], out, node.name, axis=0)


def _plain(b: Builder, node: Operation, out: str, op: str, **attributes: Any) -> None:
    b.add(op, [b.read(name) for name in node.inputs], out, node.name, **attributes)


def _softmax(b: Builder, node: Operation, out: str) -> None:
    _plain(b, node, out, "Softmax", axis=node.attributes["axis"])


def _clip(b: Builder, node: Operation, out: str) -> None:
    bounds = [b.constant(f"{node.name}.{key}", np.array(node.attributes[key], np.float32)) for key in ("low", "high")]
    b.add("Clip", [b.read(node.inputs[0]), *bounds], out, node.name)


def _reshape(b: Builder, node: Operation, out: str) -> None:
    shape = b.integers(f"{node.name}.shape", b.model.network.values[node.name].shape)
    b.add("Reshape", [b.read(node.inputs[0]), shape], out, node.name)


def _transpose(b: Builder, node: Operation, out: str) -> None:
    _plain(b, node, out, "Transpose", perm=node.attributes["perm"])


def _slice(b: Builder, node: Operation, out: str) -> None:
    bounds = [(key, node.attributes[key]) for key in ("start", "end", "axis", "step")]
    inputs = [b.integers(f"{node.name}.{key}", (value,)) for key, value in bounds]  # type: ignore[arg-type]
    b.add("Slice", [b.read(node.inputs[0]), *inputs], out, node.name)


def _concat(b: Builder, node: Operation, out: str) -> None:
    _plain(b, node, out, "Concat", axis=node.attributes["axis"])


def _mean(b: Builder, node: Operation, out: str) -> None:
    axes = b.integers(f"{node.name}.axes", node.attributes["axes"])  # type: ignore[arg-type]
    b.add("ReduceMean", [b.read(node.inputs[0]), axes], out, node.name, keepdims=node.attributes["keepdims"])


def _pool(b: Builder, node: Operation, out: str, op: str, **attributes: Any) -> None:
    pads = (*node.pair("padding"), *node.pair("padding"))
    attributes |= {"kernel_shape": node.pair("kernel"), "strides": node.pair("stride"), "pads": pads}
    _plain(b, node, out, op, **attributes)


LOWERED: Mapping[str, Callable[[Builder, Operation, str], None]] = {
    "embedding": _embedding,
    "linear": _linear,
    "conv2d": _conv2d,
    "layer_norm": _layer_norm,
    "matmul": partial(_plain, op="MatMul"),
    "softmax": _softmax,
    "add": partial(_plain, op="Add"),
    "sub": partial(_plain, op="Sub"),
    "mul": partial(_plain, op="Mul"),
    "div": partial(_plain, op="Div"),
    "relu": partial(_plain, op="Relu"),
    "gelu": partial(_plain, op="Gelu"),
    "gelu_tanh": partial(_plain, op="Gelu", approximate="tanh"),
    "tanh": partial(_plain, op="Tanh"),
    "sigmoid": partial(_plain, op="Sigmoid"),
    "hardswish": partial(_plain, op="HardSwish"),
    "clip": _clip,
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "concat": _concat,
    "mean": _mean,
    "max_pool2d": partial(_pool, op="MaxPool"),
    "avg_pool2d": partial(_pool, op="AveragePool", count_include_pad=1),
    "cast": partial(_plain, op="Cast", to=TensorProto.FLOAT),
}


def clips_by_grid(model: QuantizedNetwork, node: Operation) -> bool:
    """Whether a node changes no code: the operator before it has its grid, which begins at zero."""
    if not is_clip_from_zero(node) or model.activations.get(node.inputs[0]) is not model.activations[node.name]:
        return False
    grid = model.activations[node.name]
    high = node.attributes.get("high")
    return begins_at_zero(grid) and (high is None or top(grid) <= float(high) + float(grid.scale[0]) / 2)  # type: ignore[arg-type]


def begins_at_zero(grid: ActivationGrid) -> bool:
    return int(grid.zero_point[0]) == grid.qmin


def top(grid: ActivationGrid) -> float:
    """The greatest number on the grid."""
    return float(grid.scale[0]) * (grid.qmax - int(grid.zero_point[0]))


def build(model: QuantizedNetwork) -> ModelProto:
    """The model, without metadata."""
    network, builder = model.network, Builder(model)
    for info in network.inputs:
        if info.name in model.activations:
            builder.pair(info.name, info.name)
    for node in network.nodes:
        if node.name not in model.activations:
            LOWERED[node.op](builder, node, node.name)
        elif clips_by_grid(model, node) and node.name not in network.outputs:
            builder.read_as[node.name] = builder.read(node.inputs[0])
        else:
            LOWERED[node.op](builder, node, f"{node.name}/float")
            builder.pair(f"{node.name}/float", node.name)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        builder.nodes,
        network.name,
        [info(i.name, TYPES[i.dtype], i.shape) for i in network.inputs],
        [info(name, TYPES[network.values[name].dtype], network.shape(name)) for name in network.outputs],
        list(builder.initializers.values()),
    )
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="lilliput")
