"""Solvers against brute force, the paper's sequential form, and a correlated layer."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from calibration import gptq, rtn
from calibration.base import InputStatistics, Solver
from calibration.gptq import inverse_factor
from calibration.scale_search import find_blocks, nearest
from lilliput import registry
from lilliput.errors import CalibrationError
from lilliput.grid import COMMON_GRIDS, Float, GridSpec, QuantizedTensor, grid, round_scale

GRIDS = [*COMMON_GRIDS, "int3-b16-zp", "int2-b32-min", "int8-channel-f32", "int5-channel-zp"]


def statistics(cols: int, seed: int = 0, tokens: int = 400) -> InputStatistics:
    """Inputs that are correlated and of very different size, as a network's are."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(cols // 3 + 1, cols)) * np.exp(rng.normal(size=cols))
    x = rng.normal(size=(tokens, len(factors))) @ factors + 0.1 * rng.normal(size=(tokens, cols))
    moments = (x.T @ x / tokens).astype(np.float32)
    return InputStatistics(moments, x.min(0).astype(np.float32), x.max(0).astype(np.float32), tokens)


def matrix(rows: int, cols: int, seed: int = 0) -> Float:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, size=(rows, cols)) * 0.05).astype(np.float32)


def loss(weight: Float, tensor: QuantizedTensor, found: InputStatistics) -> float:
    """Expected squared error of the output."""
    error = (weight - tensor.dequantize()).astype(np.float64)
    return float(np.einsum("ri,ij,rj->", error, found.second_moments.astype(np.float64), error))


def squared_error(weight: Float, tensor: QuantizedTensor) -> float:
    return float(((weight - tensor.dequantize()).astype(np.float64) ** 2).sum())


def solve(
    solver: Solver, weight: Float, name: str, found: InputStatistics | None, **options: object
) -> QuantizedTensor:
    tensor = solver.solve(weight, grid(name), found, solver.Options.model_validate(options))
    tensor.check("w")
    return tensor


def test_the_folder_lists_the_solvers_and_nothing_else() -> None:
    assert registry.known("solvers") == ("gptq", "hqq", "llm_int8", "passthrough", "rtn")
    assert registry.constant("solvers", "gptq", "needs_statistics") is True
    assert registry.constant("solvers", "rtn", "needs_statistics") is False


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("cols", [1, 31, 70, 128])
def test_every_grid_and_width_gives_a_tensor_on_the_grid(name: str, cols: int) -> None:
    weight, found = matrix(5, cols), statistics(cols)
    step = np.abs(weight).max() / (2 ** (grid(name).bits - 1) - 1)  # of the max-abs scale
    plain, solved = solve(rtn.Solver(), weight, name, None), solve(gptq.Solver(), weight, name, found)
    assert plain.shape == solved.shape == weight.shape
    assert squared_error(weight, plain) <= weight.size * (0.51 * step) ** 2
    assert squared_error(weight, solved) <= weight.size * step**2


@pytest.mark.parametrize("name", GRIDS)
def test_search_beats_max_abs_rounding_and_gptq_beats_both(name: str) -> None:
    weight, found = matrix(48, 160), statistics(160)
    plain = solve(rtn.Solver(), weight, name, None, candidates=1, refine=0)
    searched = solve(rtn.Solver(), weight, name, None)
    weighted = solve(rtn.Solver(), weight, name, found, weighted=True)
    assert squared_error(weight, searched) <= squared_error(weight, plain)
    diagonal = InputStatistics(np.diag(np.diag(found.second_moments)), found.minimum, found.maximum, found.count)
    assert loss(weight, weighted, diagonal) <= loss(weight, searched, diagonal)
    assert loss(weight, solve(gptq.Solver(), weight, name, found), found) < 0.8 * loss(weight, weighted, found)


def best_by_brute_force(weights: Float, spec: GridSpec, importance: Float) -> float:
    """The least weighted error of one block over every scale that the dtype holds in the range of interest."""
    largest = float(np.abs(weights).max())
    bits = np.arange(0, 1 << 15, dtype=np.uint16).view(np.float16).astype(np.float32)
    scales = np.unique(round_scale(bits[np.isfinite(bits)], spec.scale_dtype))
    scales = scales[(scales > largest / 30) & (scales < largest)]
    codes = np.clip(np.rint(weights / scales[:, None]), spec.qmin, spec.qmax)
    return float((importance * (codes * scales[:, None] - weights) ** 2).sum(1).min())


@pytest.mark.parametrize("cols", [16, 32])
def test_search_is_close_to_the_optimum_of_all_scales(cols: int) -> None:
    rng, spec = np.random.default_rng(cols), grid("int4-b32")
    weight, importance = matrix(200, cols), rng.uniform(0.1, 3, cols).astype(np.float32)
    tensor = nearest(weight, find_blocks(weight, spec, importance, rtn.Options()))
    errors = (importance * (weight - tensor.dequantize()) ** 2).sum(1)
    optima = np.array([best_by_brute_force(row, spec, importance) for row in weight])
    assert (errors >= optima * 0.999).all()
    assert errors.sum() <= 1.05 * optima.sum()


def test_nearest_codes_are_the_best_codes_for_their_scale() -> None:
    weight, spec = matrix(3, 4), grid("int2-b32")
    tensor = solve(rtn.Solver(), weight, "int2-b32", None)
    for row in range(3):
        every = np.array(list(itertools.product(range(spec.qmin, spec.qmax + 1), repeat=4)), np.float32)
        errors = ((every * tensor.scales[row, 0] - weight[row]) ** 2).sum(1)
        assert np.array_equal(every[errors.argmin()], tensor.codes[row])


def test_negative_scales_only_when_asked_for_and_then_better() -> None:
    weight = matrix(64, 128)
    positive = solve(rtn.Solver(), weight, "int4-b32", None)
    both = solve(rtn.Solver(), weight, "int4-b32", None, negative_scales=True)
    assert (positive.scales > 0).all()
    assert (both.scales < 0).any()
    assert squared_error(weight, both) < squared_error(weight, positive)


@pytest.mark.parametrize("name", GRIDS)
def test_zero_tiny_and_huge_blocks_have_usable_scales(name: str) -> None:
    weight = np.zeros((4, 64), np.float32)
    weight[1], weight[2], weight[3] = 1e-12, 1e6, matrix(1, 64)
    for solver, found in ((rtn.Solver(), None), (gptq.Solver(), statistics(64))):
        tensor = solve(solver, weight, name, found)
        assert np.isfinite(tensor.dequantize()).all()
        assert (tensor.scales > 0).all()
        assert not tensor.dequantize()[0].any()
        assert np.abs(tensor.dequantize()[1]).max() <= 1e-7


def sequential_gptq(weight: Float, tensor: QuantizedTensor, moments: Float, damping: float, order: list[int]) -> Float:
    """The paper's algorithm before its Cholesky form: the inverse Hessian shrinks by one column a step (float64)."""
    h = moments.astype(np.float64) + np.diag(np.diag(moments)) * damping
    inverse, w = np.linalg.inv(h), weight.astype(np.float64)
    codes, scales = np.zeros(weight.shape), tensor.per_weight(tensor.scales).astype(np.float64)
    for column in order:
        codes[:, column] = np.clip(np.rint(w[:, column] / scales[:, column]), tensor.spec.qmin, tensor.spec.qmax)
        error = (w[:, column] - codes[:, column] * scales[:, column]) / inverse[column, column]
        w -= error[:, None] * inverse[column]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1  # never read again
    return codes.astype(np.float32)


@pytest.mark.parametrize("activation_order", [True, False])
def test_cholesky_form_gives_the_codes_of_the_sequential_form(activation_order: bool) -> None:
    weight, found = matrix(6, 150), statistics(150)
    tensor = solve(gptq.Solver(), weight, "int4-b32", found, activation_order=activation_order, rounds=0)
    order = list(range(150))
    if activation_order:
        order = np.argsort(-np.diag(found.second_moments), kind="stable").tolist()
    expected = sequential_gptq(weight, tensor, found.second_moments, 0.01, order)
    assert (tensor.codes != expected).mean() <= 0.002  # a tie may fall to the other side in float32


@pytest.mark.parametrize("name", GRIDS)
def test_coordinate_descent_never_raises_the_loss(name: str) -> None:
    weight, found = matrix(32, 150), statistics(150)
    damped = replace(found, second_moments=gptq.damped(torch.from_numpy(found.second_moments), 0.01).numpy())
    losses = [loss(weight, solve(gptq.Solver(), weight, name, found, rounds=n), damped) for n in (0, 1, 2, 4)]
    assert losses[1] < losses[0]
    assert losses[2] <= losses[1] * 1.000001
    assert losses[3] <= losses[2] * 1.000001


def test_coordinate_descent_ends_where_no_single_code_is_better() -> None:
    weight, found, spec = matrix(3, 12), statistics(12), grid("int2-b4")
    h = gptq.damped(torch.from_numpy(found.second_moments), 0.01).numpy()
    damped = replace(found, second_moments=h)
    tensor = solve(gptq.Solver(), weight, spec.name, found, rounds=50)
    least = loss(weight, tensor, damped)
    for row, col, code in itertools.product(range(3), range(12), range(spec.qmin, spec.qmax + 1)):
        codes = tensor.codes.copy()
        codes[row, col] = code
        assert loss(weight, QuantizedTensor(spec, codes, tensor.scales), damped) >= least * 0.99999


def test_without_correlation_gptq_is_round_to_nearest() -> None:
    weight, found = matrix(8, 96), statistics(96)
    diagonal = InputStatistics(np.diag(np.diag(found.second_moments)), found.minimum, found.maximum, found.count)
    solved = solve(gptq.Solver(), weight, "int4-b32", diagonal, rounds=0)
    assert solved.same_as(solve(rtn.Solver(), weight, "int4-b32", diagonal, weighted=True))


def test_inverse_factor_is_the_cholesky_factor_of_the_inverse() -> None:
    moments = statistics(40).second_moments
    factor = inverse_factor(torch.from_numpy(moments), 0.01).double().numpy()
    damped = moments + np.diag(np.diag(moments)) * 0.01
    assert np.allclose(factor.T @ factor @ damped, np.eye(40), atol=1e-4)
    assert not np.tril(factor, -1).any()


def test_singular_and_dead_inputs_are_solved() -> None:
    weight, x = matrix(8, 64), np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    x[:, 7] = 0
    found = InputStatistics(x.T @ x / 3, x.min(0), x.max(0), 3)
    tensor = solve(gptq.Solver(), weight, "int4-b32", found, damping=0)
    weighted = solve(rtn.Solver(), weight, "int4-b32", found, weighted=True)
    assert loss(weight, tensor, found) < loss(weight, weighted, found)
    nothing = InputStatistics(np.zeros((64, 64), np.float32), x.min(0), x.max(0), 3)
    assert np.abs(solve(gptq.Solver(), weight, "int4-b32", nothing).dequantize() - weight).max() < 0.1


def test_solving_twice_gives_the_same_bits_on_any_number_of_threads() -> None:
    weight, found, threads = matrix(40, 128), statistics(128), torch.get_num_threads()
    first = solve(gptq.Solver(), weight, "int4-b32", found)
    try:
        torch.set_num_threads(1)
        assert solve(gptq.Solver(), weight, "int4-b32", found).same_as(first)
    finally:
        torch.set_num_threads(threads)


def test_missing_and_foreign_statistics_are_refused() -> None:
    with pytest.raises(CalibrationError, match="gptq needs calibration statistics"):
        solve(gptq.Solver(), matrix(2, 32), "int4-b32", None)
    with pytest.raises(CalibrationError, match="of 64 inputs, the matrix has 32"):
        solve(gptq.Solver(), matrix(2, 32), "int4-b32", statistics(64))
    with pytest.raises(CalibrationError, match="weigh"):
        solve(rtn.Solver(), matrix(2, 32), "int4-b32", None, weighted=True)
