"""What a `.tflite` holds and refuses, and its packing of codes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.litert_int8 import Exporter, packing
from lilliput.grid import grid
from lilliput.model import Role

HELD: tuple[tuple[str, Role, int], ...] = (
    ("int4-b32", "linear", 64),
    ("int4-b64", "linear", 128),
    ("int4-b128", "linear", 128),
    ("int4-channel", "linear", 64),
    ("int4-channel-f32", "linear", 64),
    ("int8-channel", "linear", 63),
    ("int8-channel-f16", "head", 64),
    ("int8-channel", "embedding", 64),
    ("int4-b32", "embedding", 64),
    ("int4-channel", "embedding", 64),
    ("int2-channel", "linear", 64),
    ("int2-channel-f32", "embedding", 60),
)
REFUSED: tuple[tuple[str, Role, int, str], ...] = (
    ("int4-b32-zp", "linear", 64, "symmetric, int4-b32-zp has a zero point"),
    ("int4-b32-min-f16", "linear", 64, "symmetric, int4-b32-min-f16 has a minimum"),
    ("int2-b32", "linear", 64, "one scale per channel for 2-bit weights, int2-b32 has blocks: choose int2-channel"),
    ("int3-b32", "linear", 64, "2, 4 and 8 bit weights, int3-b32 has 3"),
    ("int2-channel", "linear", 62, "packs 4 codes in a byte, 62 columns"),
    ("int8-b32", "linear", 64, "one scale per channel for 8-bit"),
    ("int4-b48", "linear", 96, "multiples of 32"),
    ("int4-b128", "linear", 192, "128 does not divide 192 columns"),
    ("int4-b32-f16", "linear", 64, "rounds block scales to bfloat16"),
    ("int4-channel", "linear", 63, "packs 2 codes in a byte, 63 columns"),
)


@pytest.mark.parametrize(("name", "role", "cols"), HELD)
def test_holds(name: str, role: Role, cols: int) -> None:
    assert Exporter().refuses(grid(name), role, (8, cols)) is None


@pytest.mark.parametrize(("name", "role", "cols", "reason"), REFUSED)
def test_refuses_with_the_reason(name: str, role: Role, cols: int, reason: str) -> None:
    assert reason in (Exporter().refuses(grid(name), role, (8, cols)) or "")


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    codes = np.array([[1, -1], [-8, 7]], dtype=np.int8)
    assert packing.pack(codes, 4).tolist() == [0xF1, 0x78]
    assert packing.pack(np.array([[1, -1, -2, 0]], dtype=np.int8), 2).tolist() == [0b00_10_11_01]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_packing_round_trips(bits: int, rows: int, columns: int, seed: int) -> None:
    most = 1 << (bits - 1)
    codes = np.random.default_rng(seed).integers(-most, most, (rows, 4 * columns)).astype(np.int8)
    packed = packing.pack(codes, bits)
    assert packed.nbytes * 8 == codes.size * bits
    assert np.array_equal(packing.unpack(packed, bits, (rows, 4 * columns)), codes)
