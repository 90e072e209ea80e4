"""Fake quantization against the grid's own numbers, finite differences and torchao."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from calibration import fake_quant, rtn
from calibration.fake_quant import FakeQuant
from lilliput import grid as grids
from lilliput.errors import CalibrationError
from lilliput.grid import Float, QuantizedTensor, ScaleDtype, grid

GRIDS = ["int4-b32", "int3-b32", "int2-b16", "int4-b32-zp-f16", "int2-b32-min-f16", "int8-channel", "int4-b32-f32"]


def matrix(rows: int = 6, cols: int = 80, seed: int = 0) -> Float:
    return (np.random.default_rng(seed).standard_t(4, size=(rows, cols)) * 0.05).astype(np.float32)


def solved(name: str, weight: Float) -> QuantizedTensor:
    return rtn.Solver().solve(weight, grid(name), None, rtn.Options())


def moved(name: str, seed: int = 1) -> FakeQuant:
    """Somewhere on the way: every parameter has moved, some positions off the grid and back."""
    fake = FakeQuant(solved(name, matrix()))
    generator = torch.Generator().manual_seed(seed)
    for kind, tensor in fake.parameters.items():
        tensor += torch.randn(tensor.shape, generator=generator) * {"u": 2.0, "t": 0.3, "v": 0.5}[kind]
    fake.project()
    return fake


@pytest.mark.parametrize("name", GRIDS)
def test_the_start_is_the_solved_tensor_bit_for_bit(name: str) -> None:
    start = solved(name, matrix())
    assert FakeQuant(start).tensor().same_as(start)
    assert np.array_equal(FakeQuant(start).values().numpy(), start.dequantize())


@pytest.mark.parametrize("name", GRIDS)
def test_values_are_what_ships_bit_for_bit(name: str) -> None:
    fake = moved(name)
    tensor = fake.tensor()
    tensor.check(name)
    assert not np.array_equal(tensor.codes, solved(name, matrix()).codes)
    assert np.array_equal(fake.values().numpy(), tensor.dequantize())


@given(
    arrays.arrays(np.float32, (8,), elements=st.floats(-1e6, 1e6, width=32)), st.sampled_from(["bf16_f16", "float16"])
)
@settings(max_examples=200, deadline=None)
def test_scales_round_as_the_grid_rounds(values: Float, dtype: ScaleDtype) -> None:
    assert np.array_equal(
        fake_quant.round_scale(torch.from_numpy(values), dtype).numpy(), grids.round_scale(values, dtype)
    )


@pytest.mark.parametrize("name", ["int4-b32-f32", "int3-b16-zp-f32", "int2-b32-min-f32"])
def test_gradients_of_scales_and_minima_are_those_of_the_values(name: str) -> None:
    """Against finite differences of Σ g · values, on grids whose scales are not rounded."""
    fake, gradient = moved(name), torch.from_numpy(matrix(seed=7))
    found = fake.gradients(gradient)
    for kind in set(fake.parameters) - {"u"}:
        tensor = fake.parameters[kind]
        for index in ((0, 0), (3, 1), (5, 2)):
            sides = []
            for change in (1e-2, -2e-2):
                tensor[index] += change
                sides.append(float((gradient.double() * fake.values().double()).sum()))
            tensor[index] += 1e-2
            assert (sides[0] - sides[1]) / 2e-2 == pytest.approx(float(found[kind][index]), rel=2e-3, abs=1e-6)


def test_positions_take_the_gradient_straight_through_in_steps() -> None:
    fake, gradient = moved("int4-b32"), torch.from_numpy(matrix(seed=7))
    tensor = fake.tensor()
    assert np.array_equal(fake.gradients(gradient)["u"].numpy(), gradient.numpy() * tensor.per_weight(tensor.scales))


def test_negative_scales_keep_their_sign() -> None:
    start = rtn.Solver().solve(matrix(), grid("int4-b32"), None, rtn.Options(negative_scales=True))
    fake = FakeQuant(start)
    fake.parameters["t"] -= 40.0
    assert (start.scales < 0).any()
    assert np.array_equal(np.sign(fake.tensor().scales), np.sign(start.scales))


def test_codebooks_are_refused() -> None:
    spec = grid("iq4_nl")
    codes = np.full((2, 32), spec.qmin, np.int8)
    with pytest.raises(CalibrationError, match="iq4_nl cannot be trained"):
        FakeQuant(QuantizedTensor(spec, codes, np.ones((2, 1), np.float32)))


def test_torchao_finds_nothing_to_round_in_our_values() -> None:
    """torchao's fake quantizer with our scales gives our values back: both speak of one grid."""
    torchao = pytest.importorskip("torchao.quantization.qat.utils", exc_type=ImportError)
    from torchao.quantization import ZeroPointDomain

    fake = moved("int4-b32")
    tensor = fake.tensor()
    scales = torch.from_numpy(tensor.scales)[:, :2].contiguous()  # whole blocks only
    values = fake.values()[:, :64].contiguous()
    theirs = torchao._fake_quantize_per_channel_group(
        values, scales, torch.zeros_like(scales, dtype=torch.int32), -8, 7, 32, ZeroPointDomain.INT
    )
    assert torch.equal(theirs, values)
