"""Bytes of MatMulNBits: golden, there and back on every grid, and against ONNX Runtime's own kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from grid_cases import random_tensor as any_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_cases import GRIDS, random_tensor

from exporters.onnx_int4 import Exporter, graph, packing
from lilliput.errors import ExportError
from lilliput.grid import GridSpec, QuantizedTensor, grid
from lilliput.model import Node

COLS = (32, 64, 70, 576)  # 70: no block size divides it


def run(
    name: str, op: str, tensor: QuantizedTensor, feeds: np.ndarray, *, exact: bool = False, level: int = 0
) -> np.ndarray:
    """One `linear` or `embedding` node over `tensor`, lowered by the exporter and run by ONNX Runtime."""
    half = frozenset({name} if tensor.spec.scale_dtype != "float32" else ())
    builder = graph.Builder(graph.Parameters({name: packing.pack(tensor)}, {}, half), accuracy_level=level, exact=exact)
    inputs = (name, "tokens") if op == "embedding" else ("x", name)
    graph.LOWERED[op](builder, Node(op, inputs, ("y",), {}), "y")
    fed = "input_ids" if op == "embedding" else "/x"
    kind = TensorProto.INT64 if op == "embedding" else TensorProto.FLOAT
    made = helper.make_graph(
        builder.nodes,
        "one",
        [helper.make_tensor_value_info(fed, kind, feeds.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        list(builder.initializers.values()),
    )
    opsets = [helper.make_opsetid("", graph.OPSET), helper.make_opsetid(graph.MICROSOFT, 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=graph.IR_VERSION)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {fed: feeds})[0])


def test_bytes_are_onnx_runtimes() -> None:
    codes = np.arange(-8, 8, dtype=np.int8)[None].repeat(2, axis=1)  # (1, 32)
    packed = packing.pack(QuantizedTensor(grid("int4-b32"), codes, np.ones((1, 1), np.float32)))
    assert packed.codes.tobytes().hex() == "00112233445566778899aabbccddeeff"
    assert packing.pack_bits(np.array([1, 2, 3], np.uint8), 2).tolist() == [0b111001]
    assert packing.pack_bits(np.array([1, 2, 15], np.uint8), 4).tolist() == [0x21, 0x0F]


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("name", GRIDS)
def test_unpack_inverts_pack(name: str, cols: int) -> None:
    tensor = random_tensor(name, 6, cols)
    again = packing.unpack(packing.pack(tensor), tensor.spec, name)
    assert again.spec == tensor.spec
    assert again.same_as(tensor)


@given(
    st.sampled_from(packing.BITS), st.sampled_from(packing.BLOCK_SIZES), st.booleans(), st.integers(1, 700),
    st.integers(0, 2**32),
)  # fmt: skip
@settings(deadline=None)
def test_any_tensor_is_given_back(bits: int, block: int, zero_points: bool, cols: int, seed: int) -> None:
    spec = GridSpec(bits, block, "zero_point" if zero_points else "none", "float16")
    tensor = any_tensor(spec, 3, cols, seed)
    packed = packing.pack(tensor)
    assert packing.unpack(packed, spec, "w").same_as(tensor)
    assert packed.codes.shape == (3, spec.blocks(cols), block * bits // 8)


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("name", GRIDS)
def test_matmul_computes_the_dequantized_product(name: str, cols: int) -> None:
    tensor = random_tensor(name, 40, cols)
    x = np.random.default_rng(1).standard_normal((1, 5, cols)).astype(np.float32)
    wanted = x.astype(np.float64) @ tensor.dequantize().T.astype(np.float64)
    for exact in (False, True):
        seen = run("w", "linear", tensor, x, exact=exact)
        assert np.abs(seen - wanted).max() <= 2e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["int4-b32-f16", "int4-b128-f16", "int2-b64-f16", "int8-b32-f16"])
def test_negative_scales_compute_what_positive_ones_do(name: str) -> None:
    """Solvers try them on these grids by default: with every other scale negated, half the terms change sign."""
    tensor = any_tensor(grid(name), 40, 576, seed=0)
    signs = np.where(np.arange(tensor.scales.shape[1]) % 2, -1, 1).astype(np.float32)
    turned = replace(tensor, scales=tensor.scales * signs)
    x = np.random.default_rng(1).standard_normal((1, 5, 576)).astype(np.float32)
    wide = np.repeat(signs, tensor.spec.block_size)[:576]
    for level in (0, 4):
        seen, wanted = run("w", "linear", turned, x, level=level), run("w", "linear", tensor, x * wide, level=level)
        assert np.abs(seen - wanted).max() <= 2e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("name", GRIDS)
def test_embedding_gathers_the_dequantized_rows(name: str, cols: int) -> None:
    tensor = random_tensor(name, 40, cols)
    tokens = np.array([[0, 39, 7, 7]], np.int64)
    assert np.array_equal(run("table", "embedding", tensor, tokens), tensor.dequantize()[tokens])


def test_the_default_embedding_takes_blocks_that_divide_its_rows() -> None:
    assert [packing.stored_block(grid("int8-channel"), cols) for cols in (576, 768, 960, 1000)] == [64, 128, 64, 128]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("int5-b32", "2, 4 or 8 bits, not 5"),
        ("int4-b32-min-f16", "not minima"),
        ("int4-b512", "not 512"),
        ("int4-b48", "not 48"),
    ],
)
def test_refuses_what_the_format_cannot_hold(name: str, reason: str) -> None:
    assert reason in (Exporter().refuses(grid(name), "linear", (64, 1024)) or "")


@pytest.mark.parametrize("name", GRIDS)
def test_accepts_what_it_can_hold(name: str) -> None:
    assert Exporter().refuses(grid(name), "linear", (64, 70)) is None


def test_a_row_with_two_scales_is_no_per_channel_matrix() -> None:
    packed = packing.pack(random_tensor("int8-channel", 4, 576))
    packed.scales[2, 5] *= 2
    with pytest.raises(ExportError, match="head: the blocks of a row differ in scale"):
        packing.unpack(packed, grid("int8-channel"), "head")
