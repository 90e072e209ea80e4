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
)
REFUSED: tuple[tuple[str, Role, int, str], ...] = (
    ("int4-b32-zp", "linear", 64, "symmetric, int4-b32-zp has a zero point"),
    ("int4-b32-min-f16", "linear", 64, "symmetric, int4-b32-min-f16 has a minimum"),
    ("int2-b32", "linear", 64, "4 and 8 bit weights, int2-b32 has 2"),
    ("int8-b32", "linear", 64, "one scale per channel for 8-bit"),
    ("int4-b48", "linear", 96, "multiples of 32"),
    ("int4-b128", "linear", 192, "128 does not divide 192 columns"),
    ("int4-b32-f16", "linear", 64, "rounds block scales to bfloat16"),
    ("int4-channel", "linear", 63, "63 columns are odd"),
)


@pytest.mark.parametrize(("name", "role", "cols"), HELD)
def test_holds(name: str, role: Role, cols: int) -> None:
    assert Exporter().refuses(grid(name), role, (8, cols)) is None


@pytest.mark.parametrize(("name", "role", "cols", "reason"), REFUSED)
def test_refuses_with_the_reason(name: str, role: Role, cols: int, reason: str) -> None:
    assert reason in (Exporter().refuses(grid(name), role, (8, cols)) or "")


def test_first_code_lies_in_the_low_nibble() -> None:
    codes = np.array([[1, -1], [-8, 7]], dtype=np.int8)
    assert packing.pack_nibbles(codes).tolist() == [0xF1, 0x78]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_nibbles_round_trip(rows: int, pairs: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-8, 8, (rows, 2 * pairs)).astype(np.int8)
    assert np.array_equal(packing.unpack_nibbles(packing.pack_nibbles(codes), codes.shape), codes)
