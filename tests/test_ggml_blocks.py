"""GGUF blocks: bytes against the format's table, values against gguf's and ggml's own dequantization, bit for bit."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as BlockType
from grid_cases import random_codes, with_super_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.errors import ArtifactError
from lilliput.ggml import blocks
from lilliput.ggml.planes import Bytes, pack_scales, unpack_scales
from lilliput.grid import GGUF_GRIDS, Float, GridSpec, QuantizedTensor, grid, round_scale

GRIDS = (
    "int4-b32", "int4-b64", "int4-b128", "int4-channel", "int4-b32-f16", "int3-b32", "int2-b32", "int8-channel",
    "int8-b32", "int8-b64-f16", "int5-b32", "int5-channel", "int6-channel", "int4-b32-min", "int4-b32-min-f16",
    "int4-b64-min-f16", "int3-channel-min-f16", "int5-b32-min-f16", "int5-b64-min", *GGUF_GRIDS,
)  # fmt: skip
ROWS, COLS = 5, 192  # 192 is no multiple of 128: the last block of int4-b128 is short


def random_tensor(spec: GridSpec, seed: int = 0, rows: int = ROWS) -> QuantizedTensor:
    """Codes of the whole range, both ends included; scales of all sizes and signs, subnormal float16 among them."""
    random = np.random.default_rng(seed)
    cols = 768 if spec.super_blocks else COLS
    codes = random_codes(spec, rows, cols, random)
    if spec.super_blocks:
        return with_super_blocks(spec, codes, random)
    shape = (rows, spec.blocks(cols))
    scales = round_scale(random.normal(size=shape) * 10.0 ** random.integers(-6, 3, shape), spec.scale_dtype)
    minima = round_scale(random.normal(size=shape), spec.scale_dtype) if spec.offset == "minimum" else None
    tensor = QuantizedTensor(spec, codes, scales, minima)
    tensor.check("random")
    return tensor


@pytest.mark.parametrize("name", GRIDS)
def test_packed_values_are_the_grids_in_every_reader(name: str) -> None:
    tensor = random_tensor(grid(name))
    assert blocks.refusal(tensor.spec, tensor.shape[1]) is None
    packed, kind = blocks.pack(tensor), blocks.block_type(tensor.spec)
    assert packed.shape == (ROWS, tensor.shape[1] * gguf.GGML_QUANT_SIZES[kind][1] // gguf.GGML_QUANT_SIZES[kind][0])
    wanted = tensor.dequantize().view(np.uint32)
    readers = (gguf.quants.dequantize, libgguf.dequantize_rows, in_llama_cpp)
    for reader in readers:
        found = np.ascontiguousarray(reader(packed, kind), np.float32).reshape(tensor.shape).view(np.uint32)
        assert np.array_equal(found, wanted), reader


def in_llama_cpp(packed: Bytes, kind: BlockType) -> Float:
    """By the dequantizer of the ggml library that the runtime itself loads."""
    import llama_cpp

    library = Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"
    name = kind.name.lower().replace("_k", "_K")
    dequantize = getattr(ctypes.CDLL(str(library)), f"dequantize_row_{name}")
    dequantize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    dequantize.restype = None
    width, size = gguf.GGML_QUANT_SIZES[kind]
    values = np.empty(packed.size // size * width, np.float32)
    dequantize(packed.ctypes.data, values.ctypes.data, values.size)
    return values


@pytest.mark.parametrize("name", GRIDS)
def test_unpack_gives_codes_and_scales_back(name: str) -> None:
    tensor = random_tensor(grid(name), seed=1)
    assert blocks.unpack(blocks.pack(tensor), tensor.spec, "x").same_as(tensor)


@given(st.sampled_from(GRIDS), st.integers(0, 2**32), st.integers(1, 4))
@settings(deadline=None)
def test_any_tensor_is_given_back(name: str, seed: int, rows: int) -> None:
    tensor = random_tensor(grid(name), seed, rows)
    packed = blocks.pack(tensor)
    assert blocks.unpack(packed, tensor.spec, "x").same_as(tensor)
    assert packed.nbytes == tensor.size_bytes or not_of_the_grid_alone(tensor.spec)


def not_of_the_grid_alone(spec: GridSpec) -> bool:
    """Whether the file spends more than the grid: a scale repeated, or a wider type."""
    return spec.name not in GGUF_GRIDS and (spec.block_size != 32 or spec.bits not in (4, 5, 8))


@given(st.sampled_from([kind for kind, layout in blocks.LAYOUTS.items()]), st.integers(0, 2**32))
@settings(deadline=None)
def test_planes_and_integer_scales_lose_no_bit(kind: BlockType, seed: int) -> None:
    """Whatever stands in the bytes of codes and integers comes back from the values read there."""
    layout, width = blocks.LAYOUTS[kind], gguf.GGML_QUANT_SIZES[kind][0]
    packed = np.random.default_rng(seed).integers(0, 256, (3, sum(p.size(width) for p in layout.codes)), np.uint8)
    values = blocks.join(packed, layout.codes)
    assert values.shape == (3, width)
    assert np.array_equal(np.concatenate([plane.pack(values) for plane in layout.codes], axis=-1), packed)
    scales = np.random.default_rng(seed).integers(0, 256, (3, 12), np.uint8)
    assert np.array_equal(pack_scales(unpack_scales(scales)), scales)


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


@pytest.mark.parametrize("name", ["int4-b32-f16", "int5-b32-f16", "int5-b32-min-f16", "int8-b32-f16", *GGUF_GRIDS])
def test_what_libgguf_quantizes_comes_back_in_the_same_bytes(name: str) -> None:
    """ggml's own blocks of a matrix, read as codes and scales and packed again."""
    spec = grid(name)
    values = np.random.default_rng(2).normal(size=(4, 512)).astype(np.float32)
    theirs = np.frombuffer(bytes(libgguf.quantize_rows(values, blocks.block_type(spec))), np.uint8).reshape(4, -1)
    tensor = blocks.unpack(theirs, spec, "x")
    assert np.array_equal(blocks.pack(tensor), theirs)
    tensor.check("theirs")


@pytest.mark.parametrize(
    ("name", "cols", "why"),
    [
        ("int4-b32-zp-f16", 64, "no zero points"),
        ("int8-b32-min-f16", 64, "5 bits at most"),
        ("q4_k", 576, "super-blocks of 256 and rows of 576 columns do not divide: choose .*int5-b32"),
        ("iq4_nl", 100, "do not divide"),
        ("int4-b32-f32", 64, "float16"),
        ("int4-b16", 64, "multiple of it"),
        ("int8-channel", 100, "do not divide"),
    ],
)
def test_refuses_what_no_block_holds(name: str, cols: int, why: str) -> None:
    assert re.search(why, blocks.refusal(grid(name), cols) or "")


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
