"""Each grid in LiteRT's own kernels: one FULLY_CONNECTED or one EMBEDDING_LOOKUP, against numpy.

LiteRT computes a linear with 8-bit weights or less on activations that it quantizes itself, per row, to
codes in [-128, 127] with a scale of (max - min) / 255. Integer activations that span exactly
[-128, 127] lose nothing in that: then the kernel's result is the dot product of our codes and scales.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from exporters.litert_int8 import operators as op
from exporters.litert_int8.flatbuffer import Model
from exporters.litert_int8.weights import Stored, store
from lilliput.grid import Float, QuantizedTensor, grid, round_scale

ROWS, COLS, TOKENS = 48, 256, 5
LINEAR_GRIDS = (
    "int8-channel", "int8-channel-f32", "int4-channel", "int4-b32", "int4-b64", "int4-b128", "int4-b256",
    "int2-channel",
)  # fmt: skip


def random_tensor(name: str, rows: int = ROWS, cols: int = COLS) -> QuantizedTensor:
    """Every code of the grid, and scales over three orders of magnitude."""
    spec, rng = grid(name), np.random.default_rng(11)
    codes = rng.integers(spec.qmin, spec.qmax + 1, (rows, cols)).astype(np.int8)
    scales = round_scale(10 ** rng.uniform(-4, -1, (rows, spec.blocks(cols))), spec.scale_dtype)
    return QuantizedTensor(spec, codes, scales)


def linear(path: Path, stored: Stored) -> Interpreter:
    model = Model()
    graph = model.graph("linear")
    weight = graph.constant("weight", stored.data, stored.dtype, stored.shape)
    if stored.scales is not None:
        graph.quantize(weight, stored.scales)
    graph.output("y", op.fully_connected(graph, graph.input("x", [1, TOKENS, COLS]), weight, -1))
    model.write(path)
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    return interpreter


def delegated(interpreter: Interpreter) -> bool:
    return "DELEGATE" in {o["op_name"] for o in interpreter._get_ops_details()}


def run(interpreter: Interpreter, x: Float) -> Float:
    result: Float = interpreter.get_signature_runner("linear")(x=x[None])["y"][0]
    return result


def error_in_units_of_the_terms(seen: Float, x: Float, weight: Float) -> float:
    """The largest error of x @ weight.T relative to the sum of its terms' sizes, as float32 sums are bounded."""
    x64, w64 = x.astype(np.float64), weight.astype(np.float64)
    return float((np.abs(seen - x64 @ w64.T) / (np.abs(x64) @ np.abs(w64).T)).max())


@pytest.mark.parametrize("name", LINEAR_GRIDS)
def test_codes_and_scales_reach_the_kernel_unchanged(tmp_path: Path, name: str) -> None:
    tensor = random_tensor(name)
    interpreter = linear(tmp_path / "m.tflite", store(tensor))
    assert delegated(interpreter)
    x = np.random.default_rng(1).integers(-128, 128, (TOKENS, COLS)).astype(np.float32)
    x[:, 0], x[:, 1] = -128, 127
    assert error_in_units_of_the_terms(run(interpreter, x), x, tensor.dequantize()) <= 1e-6


@pytest.mark.parametrize("name", ["int8-channel", "int4-b32"])
def test_other_activations_cost_their_own_rounding_and_no_more(tmp_path: Path, name: str) -> None:
    tensor = random_tensor(name)
    x = np.random.default_rng(2).normal(size=(TOKENS, COLS)).astype(np.float32)
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    step = (high - low) / np.float32(255)
    zero = np.rint(-128 - low / step)
    rounded = (np.clip(np.rint(x / step) + zero, -128, 127) - zero) * step
    weight = tensor.dequantize().astype(np.float64)
    seen = run(linear(tmp_path / "m.tflite", store(tensor)), x)
    assert np.abs(seen - rounded @ weight.T).max() <= 0.02 * np.abs(seen - x @ weight.T).max()


def test_float_linear_is_float32(tmp_path: Path) -> None:
    weight = random_tensor("int4-b32").dequantize()
    x = np.random.default_rng(3).normal(size=(TOKENS, COLS)).astype(np.float32)
    seen = run(linear(tmp_path / "m.tflite", Stored(weight, "float32", weight.shape)), x)
    assert error_in_units_of_the_terms(seen, x, weight) <= 1e-6


@pytest.mark.parametrize(
    "name", ["int8-channel", "int8-channel-f32", "int4-channel", "int4-b32", "int4-b128", "int2-channel"]
)
def test_lookup_gives_the_dequantized_rows(tmp_path: Path, name: str) -> None:
    tensor = random_tensor(name)
    stored, model = store(tensor), Model()
    graph = model.graph("lookup")
    table = graph.constant("table", stored.data, stored.dtype, stored.shape)
    assert stored.scales is not None
    graph.quantize(table, stored.scales)
    graph.output("y", op.lookup(graph, graph.input("i", [3], "int32"), table))
    model.write(tmp_path / "m.tflite")
    interpreter = Interpreter(str(tmp_path / "m.tflite"))
    rows = np.array([0, 17, ROWS - 1], dtype=np.int32)
    seen = interpreter.get_signature_runner("lookup")(i=rows)["y"]
    assert np.array_equal(seen, tensor.dequantize()[rows])
