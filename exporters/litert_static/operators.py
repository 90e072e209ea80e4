"""Typed calls for the int8 operators: each appends one to a graph and gives its output tensor, on the grid asked for.

A grid is (scale float32, zero point) of an int8 tensor, −128 to 127. What each operator asks of its grids is in
LiteRT's quantization specification (ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec):

    SOFTMAX, LOGISTIC      output 1/256, zero point −128
    TANH                   output 1/128, zero point 0
    operators that move    input and output on one grid: RESHAPE, TRANSPOSE, STRIDED_SLICE, MAX_POOL_2D,
                           GATHER, PAD, CONCATENATION
    weights                −127 to 127, zero point 0, a scale per output channel
    biases                 int32 on (input's scale) · (weight's scale)

Where a network's grid is another, QUANTIZE takes the codes from one to the other: `requantized`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from exporters.litert_int8.flatbuffer import Graph
from exporters.litert_int8.operators import ints

VALID = schema.Padding.VALID
RELU, RELU6, NO_ACTIVATION = (
    schema.ActivationFunctionType.RELU,
    schema.ActivationFunctionType.RELU6,
    schema.ActivationFunctionType.NONE,
)


@dataclass(frozen=True)
class Int8:
    """The grid of an int8 tensor. `scale` is a float32's value."""

    scale: float
    zero_point: int


SHARES = Int8(1 / 256, -128)  # of SOFTMAX and LOGISTIC
SIGNED_SHARES = Int8(1 / 128, 0)  # of TANH


def tensor(graph: Graph, shape: Sequence[int], grid: Int8, name: str | None = None) -> int:
    """A new int8 tensor."""
    made = graph.tensor(shape, "int8", name)
    graph.place(made, np.array([grid.scale], np.float32), np.array([grid.zero_point]))
    return made


def apply(graph: Graph, code: str, inputs: Sequence[int], shape: Sequence[int], grid: Int8, name: str | None = None,
          /, **options: object) -> int:  # fmt: skip
    """One operator with an int8 output."""
    made = tensor(graph, shape, grid, name)
    graph.operator(code, inputs, [made], **options)
    return made


def requantized(graph: Graph, x: int, before: Int8, after: Int8) -> int:
    """x on another grid; x itself where that is its own."""
    return x if before == after else apply(graph, "QUANTIZE", [x], graph.shapes[x], after)


def quantized(graph: Graph, x: int, grid: Int8, name: str | None = None) -> int:
    """A float32 tensor's codes."""
    return apply(graph, "QUANTIZE", [x], graph.shapes[x], grid, name)


def dequantized(graph: Graph, x: int, name: str | None = None) -> int:
    """float32 of an int8 tensor."""
    made = graph.tensor(graph.shapes[x], "float32", name)
    graph.operator("DEQUANTIZE", [x], [made])
    return made


def transpose(graph: Graph, x: int, order: Sequence[int], grid: Int8) -> int:
    shape = [graph.shapes[x][axis] for axis in order]
    return apply(graph, "TRANSPOSE", [x, ints(graph, order)], shape, grid)


def padded(graph: Graph, x: int, padding: tuple[int, int], grid: Int8) -> int:
    """x (N, H, W, C) with (vertical, horizontal) zeros on either side; itself where there are none."""
    vertical, horizontal = padding
    if not vertical and not horizontal:
        return x
    n, height, width, channels = graph.shapes[x]
    sides = np.array([[0, 0], [vertical, vertical], [horizontal, horizontal], [0, 0]], np.int32)
    amounts = graph.constant(f"int32:{sides.tolist()}", sides)
    shape = (n, height + 2 * vertical, width + 2 * horizontal, channels)
    return apply(graph, "PAD", [x, amounts], shape, grid)


def cast(graph: Graph, x: int, name: str | None = None) -> int:
    """int32 → float32."""
    made = graph.tensor(graph.shapes[x], "float32", name)
    kinds = {"inDataType": schema.TensorType.INT32, "outDataType": schema.TensorType.FLOAT32}
    graph.operator("CAST", [x], [made], **kinds)
    return made
