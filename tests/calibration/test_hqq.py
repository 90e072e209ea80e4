"""HQQ against its definition: the norm that it lowers, and what outliers may do to a block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration import hqq, rtn
from calibration.blocks import Blocks
from lilliput.errors import CalibrationError
from lilliput.grid import Float, QuantizedTensor, grid

GRIDS = ["int4-b32", "int4-b32-zp-f16", "int4-b32-min-f16", "int3-b16-zp", "int2-b32-min", "int8-channel", "int4-b128"]


def matrix(rows: int, cols: int, seed: int = 0) -> Float:
    """Heavy tails: outliers in most blocks."""
    return (np.random.default_rng(seed).standard_t(2, size=(rows, cols)) * 0.05).astype(np.float32)


def solved(weight: Float, name: str, **options: object) -> QuantizedTensor:
    tensor = hqq.Solver().solve(weight, grid(name), None, hqq.Options.model_validate(options))
    tensor.check("w")
    return tensor


def norm(weight: Float, tensor: QuantizedTensor, p: float = 0.7) -> float:
    return float((np.abs(weight - tensor.dequantize()).astype(np.float64) ** p).sum())


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("cols", [31, 70, 128])
def test_the_norm_falls_below_that_of_searched_rounding(name: str, cols: int) -> None:
    weight = matrix(40, cols)
    searched = rtn.Solver().solve(weight, grid(name), None, rtn.Options())
    tensor = solved(weight, name)
    assert norm(weight, tensor) <= norm(weight, searched) * (1 if grid(name).bits == 8 else 0.999)
    assert solved(weight, name, steps=0).same_as(searched)


@pytest.mark.parametrize("name", GRIDS)
def test_no_worse_than_max_abs_rounding_in_squared_error(name: str) -> None:
    weight = matrix(64, 128)
    plain = rtn.Solver().solve(weight, grid(name), None, rtn.Options(candidates=1, refine=0))

    def squared(tensor: QuantizedTensor) -> float:
        return float(np.square(weight - tensor.dequantize()).sum())

    assert norm(weight, solved(weight, name)) < norm(weight, plain)
    if grid(name).bits > 4:
        assert squared(solved(weight, name)) <= 1.05 * squared(plain)


def test_an_outlier_is_left_out_of_the_fit() -> None:
    """Weights on a grid of scale 0.01 but for one: least squares bends the scale to it, the norm does not."""
    spec = grid("int4-b32-f32")
    weight = torch.from_numpy(np.random.default_rng(0).integers(-7, 8, size=(1, 1, 32)) * 0.01).float()
    weight[0, 0, 0] = 0.2
    start = Blocks(spec, torch.full((1, 1), 0.0103), torch.zeros(1, 1))
    found = hqq._descend(weight, torch.ones(1, 32), start, hqq.Options(steps=20))
    bent = hqq._fit(weight, torch.ones(1, 32), start.spread().codes(weight), start)
    assert found.s.item() == pytest.approx(0.01, rel=0.002)
    assert abs(bent.s.item() - 0.01) > 5 * abs(found.s.item() - 0.01)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(0, 10**6), st.sampled_from(GRIDS), st.sampled_from([1e-12, 1e-3, 1.0, 1e5]))
def test_every_width_and_size_stays_on_the_grid(cols: int, seed: int, name: str, size: float) -> None:
    weight = (matrix(3, cols, seed) * size).astype(np.float32)
    weight[0] = 0
    tensor = solved(weight, name, steps=5)
    assert np.isfinite(tensor.dequantize()).all()
    assert not tensor.dequantize()[0].any()


def test_the_threshold_is_the_papers() -> None:
    """One step by hand: only the clipped weight is an outlier, and the scale is that of the others."""
    spec = grid("int2-b4-f32")  # codes -2 to 1
    w = torch.tensor([[[1.0, -1.0, -2.0, 9.0]]])
    start = Blocks(spec, torch.full((1, 1), 1.1), torch.zeros(1, 1))
    step = hqq._fit(
        torch.tensor([[[1.0, -1.0, -2.0, 1.2]]]), torch.ones(1, 4), torch.tensor([[[1.0, -1, -2, 1]]]), start
    )
    assert step.s.item() == pytest.approx((1 + 1 + 4 + 1.2) / 7)
    best = hqq._descend(w, torch.ones(1, 4), start, hqq.Options(steps=10))
    assert best.s.item() == pytest.approx(1, abs=0.05)


def test_grids_without_free_scales_are_refused() -> None:
    with pytest.raises(CalibrationError, match="solver hqq chooses free scales, grid q4_k has none"):
        solved(matrix(2, 256), "q4_k")
