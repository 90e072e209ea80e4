"""GGUF blocks: bytes against the format's table, values against gguf's and ggml's own dequantization, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import gguf
import libgguf
import numpy as np
import pytest

from exporters.gguf_llamacpp import blocks
from lilliput.errors import ArtifactError
from lilliput.grid import GridSpec, QuantizedTensor, grid, round_scale

GRIDS = (
    "int4-b32", "int4-b64", "int4-b128", "int4-channel", "int4-b32-f16", "int3-b32", "int2-b32", "int8-channel",
    "int8-b32", "int8-b64-f16", "int5-b32", "int6-channel", "int4-b32-min", "int4-b32-min-f16", "int4-b64-min-f16",
    "int3-channel-min-f16",
)  # fmt: skip
ROWS, COLS = 5, 192  # 192 is no multiple of 128: the last block of int4-b128 is short


def random_tensor(spec: GridSpec, seed: int = 0) -> QuantizedTensor:
    """Codes of the whole range, both ends included; scales of all sizes and signs, subnormal float16 among them."""
    random = np.random.default_rng(seed)
    codes = random.integers(spec.qmin, spec.qmax + 1, (ROWS, COLS)).astype(spec.code_dtype)
    codes[0, :2] = spec.qmin, spec.qmax
    shape = (ROWS, spec.blocks(COLS))
    scales = round_scale(random.normal(size=shape) * 10.0 ** random.integers(-6, 3, shape), spec.scale_dtype)
    minima = round_scale(random.normal(size=shape), spec.scale_dtype) if spec.offset == "minimum" else None
    tensor = QuantizedTensor(spec, codes, scales, minima)
    tensor.check("random")
    return tensor


@pytest.mark.parametrize("name", GRIDS)
def test_packed_values_are_the_grids_in_both_readers(name: str) -> None:
    tensor = random_tensor(grid(name))
    assert blocks.refusal(tensor.spec, COLS) is None
    packed, kind = blocks.pack(tensor), blocks.block_type(tensor.spec)
    wanted = tensor.dequantize().view(np.uint32)
    in_python = np.asarray(gguf.quants.dequantize(packed, kind), np.float32)
    in_c = np.asarray(libgguf.dequantize_rows(packed, kind), np.float32).reshape(ROWS, COLS)
    zero = tensor.dequantize() == 0  # only the sign of a zero may differ: code 0 times a negative scale
    assert np.array_equal(np.where(zero, 0, in_python.view(np.uint32)), np.where(zero, 0, wanted))
    assert np.array_equal(np.where(zero, 0, in_c.view(np.uint32)), np.where(zero, 0, wanted))


@pytest.mark.parametrize("name", GRIDS)
def test_unpack_gives_codes_and_scales_back(name: str) -> None:
    tensor = random_tensor(grid(name), seed=1)
    assert blocks.unpack(blocks.pack(tensor), tensor.spec, "x").same_as(tensor)


def test_bytes_of_one_block_of_each_type() -> None:
    codes = np.arange(32)
    four = QuantizedTensor(grid("int4-b32"), ((codes % 16) - 8).astype(np.int8)[None], np.float32([[1.0]]))
    low_high = bytes(i | i << 4 for i in range(16))  # weight i low, weight i + 16 high; both have the nibble i
    assert blocks.pack(four).tobytes() == b"\x00\x3c" + low_high
    spec = grid("int4-b32-min-f16")
    minimum = QuantizedTensor(spec, (codes % 16).astype(np.uint8)[None], np.float32([[1.0]]), np.float32([[-2.0]]))
    assert blocks.pack(minimum).tobytes() == b"\x00\x3c" + b"\x00\xc0" + low_high
    eight = QuantizedTensor(grid("int8-b32"), (codes - 16).astype(np.int8)[None], np.float32([[0.5]]))
    assert blocks.pack(eight).tobytes() == b"\x00\x38" + bytes((i - 16) % 256 for i in range(32))


def test_libgguf_quantizes_to_the_same_bytes() -> None:
    """ggml's own Q4_0 of a matrix, read as codes and scales and packed again, is the same bytes."""
    values = np.random.default_rng(2).normal(size=(4, 64)).astype(np.float32)
    theirs = np.frombuffer(bytes(libgguf.quantize_rows(values, blocks.BlockType.Q4_0)), np.uint8).reshape(4, -1)
    tensor = blocks.unpack(theirs, grid("int4-b32-f16"), "x")
    assert np.array_equal(blocks.pack(tensor), theirs)


@pytest.mark.parametrize(
    ("name", "cols", "why"),
    [
        ("int4-b32-zp-f16", 64, "no zero points"),
        ("int8-b32-min-f16", 64, "4 bits at most"),
        ("int4-b32-f32", 64, "float16"),
        ("int4-b16", 64, "multiple of it"),
        ("int8-channel", 100, "do not divide"),
    ],
)
def test_refuses_what_no_block_holds(name: str, cols: int, why: str) -> None:
    assert why in (blocks.refusal(grid(name), cols) or "")


def test_unpack_refuses_scales_that_differ_within_a_channel() -> None:
    packed = blocks.pack(random_tensor(grid("int8-b32")))
    with pytest.raises(ArtifactError, match="scales differ within blocks of int8-channel"):
        blocks.unpack(packed, grid("int8-channel"), "token_embd.weight")


def test_pack_refuses_scales_off_the_grid() -> None:
    tensor = random_tensor(grid("int4-b32"))
    with pytest.raises(AssertionError, match="left the grid"):
        blocks.pack(replace(tensor, scales=tensor.scales + np.float32(2.0**-20)))


def test_floats_are_halved_only_where_that_is_exact() -> None:
    half = np.float32([[1.0, 2.0**-24, 65504.0]])
    assert blocks.pack_float(half).dtype == np.float16
    for value in (1.0001, 2.0**-25, 70000.0):
        kept = blocks.pack_float(np.float32([[1.0, value]]))
        assert kept.dtype == np.float32
        assert kept[0, 1] == np.float32(value)
    assert blocks.pack_float(half[0]).dtype == np.float32  # vectors always
