"""Typed calls for the operators in use: each appends one operator to a graph and gives its output tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from exporters.litert_int8.flatbuffer import Graph


def ints(graph: Graph, values: Sequence[int]) -> int:
    """A constant vector of int32: a shape, a permutation, the begin of a slice."""
    return graph.constant(f"int32:{','.join(map(str, values))}", np.asarray(values, dtype=np.int32))


def scalar(graph: Graph, value: float) -> int:
    """A constant float32 of shape (1,), which broadcasts."""
    return graph.constant(f"float32:{value!r}", np.asarray([value], dtype=np.float32))


def reshape(graph: Graph, x: int, shape: Sequence[int], dtype: str = "float32") -> int:
    if graph.shapes[x] == tuple(shape):
        return x
    assert math.prod(graph.shapes[x]) == math.prod(shape), (graph.shapes[x], shape)
    y = graph.tensor(shape, dtype)
    graph.operator("RESHAPE", [x, ints(graph, shape)], [y])
    return y


def transpose(graph: Graph, x: int, order: Sequence[int]) -> int:
    """Permute the axes; a reshape where no axis longer than 1 changes its place among the others."""
    shape = graph.shapes[x]
    out = [shape[axis] for axis in order]
    moved = [axis for axis in order if shape[axis] > 1]
    if moved == sorted(moved):
        return reshape(graph, x, out)
    y = graph.tensor(out)
    graph.operator("TRANSPOSE", [x, ints(graph, order)], [y])
    return y


def cut(graph: Graph, x: int, axis: int, begin: int, size: int, dtype: str = "float32") -> int:
    """Elements begin to begin + size of one axis."""
    shape = graph.shapes[x]
    if (begin, size) == (0, shape[axis]):
        return x
    out = [*shape[:axis], size, *shape[axis + 1 :]]
    y = graph.tensor(out, dtype)
    start = [begin if i == axis else 0 for i in range(len(shape))]
    graph.operator("SLICE", [x, ints(graph, start), ints(graph, out)], [y])
    return y


def concatenate(graph: Graph, parts: Sequence[int], axis: int, dtype: str = "float32") -> int:
    shapes = [graph.shapes[p] for p in parts]
    out = [*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :]]
    y = graph.tensor(out, dtype)
    graph.operator("CONCATENATION", parts, [y], axis=axis)
    return y


def binary(graph: Graph, code: str, a: int, b: int) -> int:
    """ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM or SQUARED_DIFFERENCE, broadcasting."""
    y = graph.tensor(np.broadcast_shapes(graph.shapes[a], graph.shapes[b]))
    options = {"fusedActivationFunction": 0} if code in ("ADD", "SUB", "MUL", "DIV") else {}
    graph.operator(code, [a, b], [y], **options)
    return y


def unary(graph: Graph, code: str, x: int, **options: object) -> int:
    """LOGISTIC, RSQRT, TANH, GELU or SOFTMAX (over the last axis)."""
    y = graph.tensor(graph.shapes[x])
    graph.operator(code, [x], [y], **options)
    return y


def cast(graph: Graph, x: int) -> int:
    """int32 → float32."""
    y = graph.tensor(graph.shapes[x])
    graph.operator("CAST", [x], [y])
    return y


def mean(graph: Graph, x: int) -> int:
    """Mean over the last axis, which stays as 1."""
    y = graph.tensor([*graph.shapes[x][:-1], 1])
    graph.operator("MEAN", [x, ints(graph, [len(graph.shapes[x]) - 1])], [y], keepDims=True)
    return y


def fully_connected(graph: Graph, x: int, weight: int, bias: int) -> int:
    """x (1, T, in) @ weight (out, in)^T + bias (out,); bias -1 is none."""
    y = graph.tensor([*graph.shapes[x][:-1], graph.shapes[weight][0]])
    graph.operator("FULLY_CONNECTED", [x, weight, bias], [y], keepNumDims=True, asymmetricQuantizeInputs=False)
    return y


def matmul(graph: Graph, a: int, b: int, transposed: bool) -> int:
    """a (1, K, M, N) @ b (1, K, N, P), or @ b^T with b (1, K, P, N) → (1, K, M, P)."""
    y = graph.tensor([*graph.shapes[a][:3], graph.shapes[b][2 if transposed else 3]])
    graph.operator("BATCH_MATMUL", [a, b], [y], adjX=False, adjY=transposed)
    return y


def lookup(graph: Graph, indices: int, table: int) -> int:
    """Rows of table (rows, cols) at indices (T,) int32 → (T, cols) float32, dequantized."""
    y = graph.tensor([*graph.shapes[indices], graph.shapes[table][1]])
    graph.operator("EMBEDDING_LOOKUP", [indices, table], [y])
    return y


def update_slice(graph: Graph, x: int, update: int, start: int) -> int:
    """x with `update` written at index vector `start` (int32)."""
    y = graph.tensor(graph.shapes[x])
    graph.operator("DYNAMIC_UPDATE_SLICE", [x, update, start], [y])
    return y
