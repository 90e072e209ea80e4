"""Grids and tensors on them. The float16 and bfloat16 oracles are numpy's and ml_dtypes' own types."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from grid_cases import random_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.errors import GridError
from lilliput.grid import (
    COMMON_GRIDS,
    GGUF_GRIDS,
    Float,
    GridSpec,
    QuantizedTensor,
    concatenate_rows,
    grid,
    narrowest,
    round_scale,
    take_rows,
)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
specs = st.builds(
    GridSpec,
    bits=st.integers(2, 8),
    block_size=st.sampled_from([0, 1, 4, 32]),
    offset=st.sampled_from(["none", "zero_point", "minimum"]),
    scale_dtype=st.sampled_from(["bf16_f16", "float16", "float32"]),
)


@given(specs)
def test_a_grid_is_found_by_its_name(spec: GridSpec) -> None:
    assert grid(spec.name) == spec


@pytest.mark.parametrize("name", [*COMMON_GRIDS, *GGUF_GRIDS])
def test_common_grids_exist_and_keep_their_name(name: str) -> None:
    assert grid(name).name == name


@pytest.mark.parametrize("name", ["int4", "int4-b0", "int9-b32", "int4-b32-f32-zp", "INT4-b32", "int4-b32 ", ""])
def test_other_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(GridError, match="int4-b32"):
        grid(name)


def test_code_ranges() -> None:
    assert (grid("int4-b32").qmin, grid("int4-b32").qmax) == (-8, 7)
    assert (grid("int8-channel").qmin, grid("int8-channel").qmax) == (-127, 127)
    assert (grid("int4-b32-zp").qmin, grid("int4-b32-zp").qmax) == (0, 15)


def test_bits_per_weight_counts_scales_and_offsets() -> None:
    assert grid("int4-b32").bits_per_weight(576) == 4.5
    assert grid("int4-b32-min-f16").bits_per_weight(576) == 5.0
    assert grid("int4-b32-zp").bits_per_weight(576) == 4.625
    assert grid("int8-channel-f32").bits_per_weight(64) == 8.5
    bits = {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "iq4_nl": 4.5, "iq4_xs": 4.25}
    assert {name: grid(name).bits_per_weight(768) for name in GGUF_GRIDS} == bits
    assert grid("int4-b32").bits_per_weight(48) == 4 + 16 * 2 / 48  # the short block has a scale too


@given(finite)
def test_round_scale_to_float16_is_numpys_and_never_infinite(value: float) -> None:
    rounded = round_scale(value, "float16")
    assert rounded == np.float32(np.float16(np.clip(np.float32(value), -65504, 65504)))


@given(finite)
def test_round_scale_to_both_halves_is_a_number_of_both(value: float) -> None:
    rounded = round_scale(value, "bf16_f16")
    assert np.isfinite(rounded)
    assert rounded == rounded.astype(np.float16).astype(np.float32)
    assert rounded == rounded.astype(ml_dtypes.bfloat16).astype(np.float32)


@given(st.floats(2.0**-13, 60000, width=32))
def test_round_scale_to_both_halves_is_bfloat16_of_float16(value: float) -> None:
    half = np.float32(np.float16(value))
    assert round_scale(value, "bf16_f16") == np.float32(ml_dtypes.bfloat16(half))
    assert abs(round_scale(value, "bf16_f16") - value) <= value * (2**-8 + 2**-11)


@given(finite, st.sampled_from(["bf16_f16", "float16", "float32"]))
def test_round_scale_twice_is_once_and_odd(value: float, dtype: str) -> None:
    once = round_scale(value, dtype)  # type: ignore[arg-type]
    assert round_scale(once, dtype) == once  # type: ignore[arg-type]
    assert round_scale(-np.float32(value), dtype) == -once  # type: ignore[arg-type]


def formula(tensor: QuantizedTensor) -> Float:
    """The module's table, weight by weight."""
    out = np.empty(tensor.shape, np.float32)
    for row, col in np.ndindex(*tensor.shape):
        block = 0 if tensor.spec.block_size == 0 else col // tensor.spec.block_size
        code, scale = np.float32(tensor.codes[row, col]), tensor.scales[row, block]
        offset = np.float32(0 if tensor.offsets is None else tensor.offsets[row, block])
        out[row, col] = scale * code + offset if tensor.spec.offset == "minimum" else scale * (code - offset)
    return out


@settings(deadline=None, max_examples=60)
@given(specs, st.integers(1, 3), st.integers(1, 70), st.integers(0, 99))
def test_dequantize_is_the_formula_also_with_a_short_last_block(
    spec: GridSpec, rows: int, cols: int, seed: int
) -> None:
    tensor = random_tensor(spec, rows, cols, seed)
    tensor.check("t")
    assert np.array_equal(tensor.dequantize(), formula(tensor))


@settings(deadline=None)
@given(specs, st.integers(0, 99))
def test_rows_taken_and_stacked_dequantize_alike(spec: GridSpec, seed: int) -> None:
    a, b = random_tensor(spec, 3, 40, seed), random_tensor(spec, 2, 40, seed + 100)
    both = concatenate_rows([a, b])
    assert np.array_equal(both.dequantize(), np.concatenate([a.dequantize(), b.dequantize()]))
    order = np.random.default_rng(seed).permutation(5)
    assert np.array_equal(take_rows(both, order).dequantize(), both.dequantize()[order])
    assert take_rows(take_rows(both, order), np.argsort(order)).same_as(both)


def test_stacking_different_grids_or_widths_is_refused() -> None:
    a = random_tensor(grid("int4-b32"), 2, 64, 0)
    with pytest.raises(GridError, match="int8-b32"):
        concatenate_rows([a, random_tensor(grid("int8-b32"), 2, 64, 0)])
    with pytest.raises(GridError, match="shapes"):
        concatenate_rows([a, random_tensor(grid("int4-b32"), 2, 32, 0)])


def test_parts_that_do_not_fit_are_refused() -> None:
    spec, codes = grid("int4-b32"), np.zeros((2, 64), np.int8)
    with pytest.raises(GridError, match=r"scales are \(2, 1\), wanted \(2, 2\)"):
        QuantizedTensor(spec, codes, np.ones((2, 1), np.float32))
    with pytest.raises(GridError, match="codes are uint8"):
        QuantizedTensor(spec, codes.astype(np.uint8), np.ones((2, 2), np.float32))
    with pytest.raises(GridError, match="wants no offsets"):
        QuantizedTensor(spec, codes, np.ones((2, 2), np.float32), np.ones((2, 2), np.float32))
    with pytest.raises(GridError, match="offsets are"):
        QuantizedTensor(
            grid("int4-b32-zp"), codes.astype(np.uint8), np.ones((2, 2), np.float32), np.zeros((2, 1), np.uint8)
        )


def test_check_finds_codes_and_scales_off_the_grid() -> None:
    spec, scales = grid("int4-b32"), np.ones((1, 1), np.float32)
    with pytest.raises(GridError, match=r"w: codes leave \[-8, 7\]"):
        QuantizedTensor(spec, np.full((1, 32), 8, np.int8), scales).check("w")
    codes = np.zeros((1, 32), np.int8)
    for scale in (np.float32(1 + 2**-9), np.float32(np.inf), np.float32(np.nan)):
        with pytest.raises(GridError, match="w: scales are not all bf16_f16 numbers"):
            QuantizedTensor(spec, codes, scales * scale).check("w")
    minima = np.full((1, 1), 0.1, np.float32)
    with pytest.raises(GridError, match="float16 numbers"):
        QuantizedTensor(grid("int4-b32-min-f16"), codes.astype(np.uint8), scales, minima).check("w")


def test_same_as_sees_every_part() -> None:
    tensor = random_tensor(grid("int4-b32-zp"), 2, 64, 0)
    assert tensor.same_as(random_tensor(grid("int4-b32-zp-f32"), 2, 64, 0)) is False
    assert tensor.same_as(QuantizedTensor(tensor.spec, tensor.codes, tensor.scales, tensor.offsets))
    for part in ("codes", "scales", "offsets"):
        changed = {name: getattr(tensor, name).copy() for name in ("codes", "scales", "offsets")}
        changed[part][0, 0] = 15 - changed[part][0, 0]
        assert not tensor.same_as(QuantizedTensor(tensor.spec, **changed))


@pytest.mark.parametrize("name", GGUF_GRIDS)
def test_stacking_and_ordering_rows_keeps_the_values_of_gguf_grids(name: str) -> None:
    tensors = [random_tensor(grid(name), 3, 300, seed) for seed in range(2)]  # a short block and super-block
    stacked = concatenate_rows(tensors)
    stacked.check("stacked")
    assert np.array_equal(stacked.dequantize(), np.concatenate([t.dequantize() for t in tensors]))
    order = np.array([5, 0, 3])
    taken = take_rows(stacked, order)
    taken.check("taken")
    assert np.array_equal(taken.dequantize(), stacked.dequantize()[order])


@given(st.sampled_from([n for n, spec in GGUF_GRIDS.items() if spec.super_blocks]), st.integers(0, 2**32))
def test_integers_times_factors_are_the_scales(name: str, seed: int) -> None:
    tensor = random_tensor(grid(name), 2, 512, seed)
    assert tensor.supers is not None
    scales, minima = tensor.integers()
    assert np.array_equal(scales * tensor.per_block(tensor.supers[:, :, 0]), tensor.scales)
    assert (minima is None) == (tensor.offsets is None)
    if minima is not None:
        assert np.array_equal(-minima * tensor.per_block(tensor.supers[:, :, 1]), tensor.offsets)
    changed = {"codes": tensor.codes, "scales": tensor.scales, "offsets": tensor.offsets, "supers": tensor.supers * 2}
    assert not tensor.same_as(QuantizedTensor(tensor.spec, **changed))


def test_parts_that_leave_a_super_block_are_refused() -> None:
    tensor = random_tensor(grid("q4_k"), 2, 512, 0)
    assert tensor.supers is not None
    parts = {"codes": tensor.codes, "scales": tensor.scales, "offsets": tensor.offsets, "supers": tensor.supers}
    with pytest.raises(GridError, match="factors are none, wanted"):
        QuantizedTensor(tensor.spec, **(parts | {"supers": None}))
    with pytest.raises(GridError, match=r"factors are \(.*\), wanted none"):
        QuantizedTensor(grid("int4-b32-min-f16"), **parts)
    for part, factor, what in (("scales", 1.5, "scales"), ("scales", 64, "scales"), ("offsets", -1, "minima")):
        with pytest.raises(GridError, match=f"w: {what} are not integers in"):
            QuantizedTensor(tensor.spec, **(parts | {part: parts[part] * np.float32(factor)})).check("w")
    scales, minima = (np.asarray(part) for part in tensor.integers())
    off = np.full_like(tensor.supers, 70000)  # no float16
    stretched = QuantizedTensor(tensor.spec, tensor.codes, scales * off[0, 0, 0], -minima * off[0, 0, 0], off)
    with pytest.raises(GridError, match="float16"):
        stretched.check("w")
    zeros = QuantizedTensor(grid("iq4_nl"), np.zeros((1, 32), np.int8), np.ones((1, 1), np.float32))
    with pytest.raises(GridError, match="codebook"):
        zeros.check("w")


@pytest.mark.parametrize(
    ("value", "dtype"), [(0.5, "bf16_f16"), (1 + 2**-9, "float16"), (0.1, "float32"), (1e-30, "float32")]
)
def test_the_narrowest_scale_dtype_is_named(value: float, dtype: str) -> None:
    assert narrowest(np.full((2, 1), value, dtype=np.float32)) == dtype


@pytest.mark.parametrize(
    ("ours", "theirs", "cols", "holds"),
    [
        ("int4-b32", "int4-b32", 64, True), ("int4-b32-f16", "int4-b32", 64, True),
        ("int4-b32", "int4-b32-f16", 64, False), ("int4-b64", "int4-b32", 64, False),
        ("int4-b64", "int4-channel", 64, True), ("int4-b64", "int4-channel", 128, False),
        ("int4-channel-f32", "int4-b64-f16", 64, True), ("int4-b32-zp", "int4-b32", 64, False),
        ("int5-b32", "int4-b32", 64, False), ("q4_k", "q4_k", 256, True), ("q4_k", "q5_k", 256, False),
    ],
)  # fmt: skip
def test_a_grid_holds_another_of_the_same_codes_and_blocks(ours: str, theirs: str, cols: int, holds: bool) -> None:
    assert grid(ours).holds(grid(theirs), cols) is holds
