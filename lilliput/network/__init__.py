"""A model that is no decoder, as a static graph: encoders and CNNs, traced as they are.

Every shape is fixed. A node has one output, a value of the node's own name; its inputs name graph inputs, other nodes
or parameters. Images are (N, C, H, W), as torch has them; a linear weight is (out, in).

    op            inputs                                   attributes
    embedding     table (rows, width), indices int32
    linear        x, weight (out, in)[, bias (out,)]
    conv2d        x, weight (out, in/groups, kh, kw)[, bias]   stride, padding, dilation (each a pair), groups
    matmul        a, b                                     batched as numpy's
    layer_norm    x, weight, bias                          eps; over the last axis
    softmax       x                                        axis
    add, sub, mul, div   a, b                              broadcast as numpy's
    relu, gelu, gelu_tanh, tanh, sigmoid, hardswish   x    gelu is exact (erf)
    clip          x                                        low, high
    reshape       x                                        (to the node's shape)
    transpose     x                                        perm
    slice         x                                        axis, start, end, step
    concat        a, b, …                                  axis
    mean          x                                        axes (a tuple), keepdims (0 or 1)
    max_pool2d, avg_pool2d   x                             kernel, stride, padding (pairs); padded zeros count in a mean
    cast          x int32                                  (to float32)

A QuantizedNetwork is the same graph, solved for static integer arithmetic:

    weights       of linear and conv2d, per output channel; a convolution's matrix is (out, in/groups · kh · kw)
    activations   one grid for each float value and each float parameter that is an operand (tables, constants, norm
                  weights): x ≈ scale · (code − zero_point). One that is not there stays in float32
    biases        by node, int32, on the scale (input's scale) · (weight's scale of the channel), zero point 0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lilliput.activation_grid import ActivationGrid, Integer
from lilliput.grid import Float, QuantizedTensor
from lilliput.model import TensorInfo
from lilliput.network.encoder import TextEncoder

Attribute = int | float | tuple[int, ...]

MATRIX_OPS = ("linear", "conv2d")  # whose second input is a weight on a grid
PRODUCT_OPS = (*MATRIX_OPS, "matmul")
BIASED_OPS = (*MATRIX_OPS, "layer_norm")  # whose third input is an int32 bias
SHAPE_OPS = ("reshape", "transpose", "slice")  # which move values and change none
OPS = (
    *BIASED_OPS, *SHAPE_OPS, "embedding", "matmul", "softmax", "add", "sub", "mul", "div", "relu", "gelu", "gelu_tanh",
    "tanh", "sigmoid", "hardswish", "clip", "concat", "mean", "max_pool2d", "avg_pool2d", "cast",
)  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One node. `name` is its module's path in the source model and its operator, and the name of its output."""

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]

    def pair(self, attribute: str) -> tuple[int, int]:
        """An attribute that is (vertical, horizontal)."""
        found = self.attributes[attribute]
        assert isinstance(found, tuple)
        return found[0], found[1]


@dataclass(frozen=True, eq=False)
class Network:
    """The float graph, nodes in the order of computation."""

    name: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[str, ...]  # names of values
    nodes: tuple[Operation, ...]
    values: Mapping[str, TensorInfo]  # inputs and nodes' outputs
    parameters: Mapping[str, Float]
    mask: str | None = None  # the input (1, positions) int32 that is 1 at real tokens, where there is one
    notes: tuple[str, ...] = ()  # what tracing changed beside names, for the report
    encoder: TextEncoder | None = None  # what it is beside its graph, where it is a text encoder of a known kind

    def consumers(self, value: str) -> tuple[Operation, ...]:
        return tuple(node for node in self.nodes if value in node.inputs)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a value or parameter."""
        return self.values[name].shape if name in self.values else self.parameters[name].shape

    def is_float(self, name: str) -> bool:
        return name in self.parameters or self.values[name].dtype == "float32"

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the parameters that go on weight grids, in the order of computation."""
        return tuple(dict.fromkeys(node.inputs[1] for node in self.nodes if node.op in MATRIX_OPS))

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the parameters whose rows are looked up."""
        looked_up = (node.inputs[0] for node in self.nodes if node.op == "embedding")
        return tuple(dict.fromkeys(name for name in looked_up if name in self.parameters))

    def matrix(self, weight: str) -> Float:
        """A weight as (out, in · kernel)."""
        array = self.parameters[weight]
        return array.reshape(len(array), -1)


@dataclass(frozen=True, eq=False)
class QuantizedNetwork:
    """A solved network. Nothing downstream chooses numbers again."""

    network: Network
    weights: Mapping[str, QuantizedTensor]
    activations: Mapping[str, ActivationGrid]
    biases: Mapping[str, npt.NDArray[np.int32]]
    provenance: Mapping[str, str]

    def constant(self, name: str) -> Integer:
        """The codes of a parameter that is an operand, on its grid, in its own shape."""
        return self.activations[name].codes(self.network.parameters[name])

    @property
    def in_float(self) -> tuple[str, ...]:
        """The nodes whose output stays in float32."""
        return tuple(
            n.name for n in self.network.nodes if self.network.is_float(n.name) and n.name not in self.activations
        )

    def weight_scales(self, node: Operation) -> Float:
        """The scales of a node's weight: (out,) of a matrix, (1,) of a norm's vector."""
        if node.op in MATRIX_OPS:
            return self.weights[node.inputs[1]].scales[:, 0]
        return self.activations[node.inputs[1]].scale

    def bias_scale(self, node: Operation) -> Float:
        """float32, (out,) or (1,): what a code of the node's bias stands for."""
        scale: Float = self.activations[node.inputs[0]].scale * self.weight_scales(node)
        return scale
