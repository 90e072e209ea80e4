"""Columns at 16 bit: the grid, the solver's algebra, and its loss on layers with outlier inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_solve import found, rules, source
from test_solvers import loss, matrix, statistics

from calibration import gptq, llm_int8, rtn
from calibration.base import InputStatistics
from calibration.solve import solve
from calibration.statistics import Statistics
from exporters.gguf_llamacpp import Exporter as Gguf
from exporters.litert_int8 import Exporter as Litert
from exporters.onnx_int4 import Exporter as Onnx
from lilliput import checkpoint
from lilliput.errors import CalibrationError, GridError
from lilliput.grid import Float, Outliers, QuantizedTensor, concatenate_rows, grid, take_rows
from lilliput.model import SourceModel

__all__ = ["found", "source"]  # fixtures

GRIDS = ["int8-channel-o4", "int8-b32-o4", "int4-b32-o8", "int4-b32-zp-f16-o4", "int4-channel-o1"]


def outlying(cols: int, seed: int = 0, outliers: int = 4) -> InputStatistics:
    """Correlated inputs of which a few are thirty times larger."""
    given = statistics(cols, seed)
    size = np.ones(cols, np.float32) / np.sqrt(given.second_moments.diagonal())
    size[np.random.default_rng(seed).choice(cols, outliers, replace=False)] *= 30
    moments = given.second_moments * size * size[:, None]
    return replace(given, second_moments=moments, minimum=given.minimum * size, maximum=given.maximum * size)


def solved(weight: Float, name: str, its: InputStatistics, **options: object) -> QuantizedTensor:
    tensor = llm_int8.Solver().solve(weight, grid(name), its, llm_int8.Options.model_validate(options))
    tensor.check("w")
    return tensor


def test_a_grids_name_says_how_many_columns_it_keeps() -> None:
    for name in GRIDS:
        assert grid(name).name == name
        assert grid(name).outliers == int(name.rpartition("o")[2])
    assert grid("int8-channel-o8").bits_per_weight(64) == 8 + (16 + 8 * 16) / 64
    with pytest.raises(GridError, match="need a code for 0"):
        grid("int4-b32-min-f16-o4")
    with pytest.raises(GridError, match="unknown grid"):
        grid("int8-channel-o0")


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("inner", ["gptq", "rtn"])
def test_it_is_better_than_the_same_codes_alone(name: str, inner: str) -> None:
    weight, its, plain = matrix(24, 96), outlying(96), replace(grid(name), outliers=0)
    alone = rtn.Solver().solve(weight, plain, None, rtn.Options())
    tensor = solved(weight, name, its, inner=inner)
    assert tensor.spec == grid(name)
    all_kept = grid(name).outliers >= 4
    assert loss(weight, tensor, its) < (0.1 if all_kept else 1) * loss(weight, alone, its)


def test_the_kept_columns_are_those_of_the_largest_inputs() -> None:
    its = outlying(96)
    size = np.maximum(np.abs(its.minimum), np.abs(its.maximum))
    columns = llm_int8.outlier_columns(its, 4)
    assert size[columns].min() > np.delete(size, columns).max()
    assert (np.diff(columns) > 0).all()


def test_no_other_values_of_the_kept_columns_are_better() -> None:
    """Before their rounding they are the minimum of a parabola: the codes' error is made up for as far as it can be."""
    weight, its = matrix(3, 40), outlying(40)
    tensor = solved(weight, "int4-b32-o4", its, damping=1e-6)
    assert tensor.outliers is not None
    least = loss(weight, tensor, its)
    rng = np.random.default_rng(0)
    for _ in range(50):
        noise = 1e-3 * rng.normal(size=tensor.outliers.values.shape) * np.abs(tensor.outliers.values).max()
        moved = (tensor.outliers.values + noise).astype(np.float16).astype(np.float32)
        other = replace(tensor, outliers=Outliers(tensor.outliers.columns, moved))
        assert loss(weight, other, its) >= least * 0.99


def test_the_inner_solver_sees_what_is_left_once_the_kept_columns_made_up() -> None:
    """tr(D S Dᵀ) is the loss with the best kept columns, for any codes of the rest."""
    rng, its = np.random.default_rng(1), outlying(12)
    moments = gptq.damped(torch.from_numpy(its.second_moments), 0.01)
    columns, rest = np.array([2, 7]), np.setdiff1d(np.arange(12), [2, 7])
    makes_up = torch.linalg.solve(moments[columns][:, columns], moments[columns][:, rest])
    left = llm_int8._schur(moments, columns, rest, makes_up)
    d = rng.normal(size=12)
    d[columns] = -makes_up.numpy() @ d[rest]
    assert d[rest] @ left[np.ix_(rest, rest)] @ d[rest] == pytest.approx(d @ moments.numpy() @ d, rel=1e-4)
    assert not left[columns].any()


def test_rows_stack_and_reorder_with_their_kept_columns() -> None:
    its = outlying(40)
    a, b = (solved(matrix(6, 40, seed), "int4-b32-o4", its) for seed in (0, 1))
    both = concatenate_rows([a, b])
    assert np.array_equal(both.dequantize(), np.concatenate([a.dequantize(), b.dequantize()]))
    assert take_rows(both, np.arange(6, 12)).same_as(b)
    assert not take_rows(both, np.arange(6)).same_as(b)
    other = solved(matrix(6, 40), "int4-b32-o4", outlying(40, seed=9))
    with pytest.raises(GridError, match="different columns at 16 bit"):
        concatenate_rows([a, other])


def test_a_tensor_that_is_not_on_its_grid_is_refused() -> None:
    tensor = solved(matrix(6, 40), "int4-b32-o4", outlying(40))
    assert tensor.outliers is not None
    with pytest.raises(GridError, match="int4-b32-o4 keeps 4 columns at 16 bit, seen none: solver llm_int8"):
        replace(tensor, outliers=None)
    with pytest.raises(GridError, match="no float16"):
        replace(tensor, outliers=Outliers(tensor.outliers.columns, tensor.outliers.values + np.float32(1e-6))).check(
            "w"
        )
    codes = tensor.codes.copy()
    codes[:, tensor.outliers.columns[0]] = 3
    with pytest.raises(GridError, match="have codes beside 0"):
        replace(tensor, codes=codes).check("w")


def test_errors_name_the_way_out() -> None:
    with pytest.raises(CalibrationError, match="grid int8-channel keeps no columns at 16 bit: try int8-channel-o8"):
        solved(matrix(4, 40), "int8-channel", outlying(40))
    with pytest.raises(GridError, match="solver llm_int8 chooses them"):
        rtn.Solver().solve(matrix(4, 40), grid("int8-channel-o8"), None, rtn.Options())


def test_formats_without_such_columns_refuse_them_with_a_way_out() -> None:
    spec = grid("int8-b32-o8")
    assert "choose int8-b32" in str(Litert().refuses(spec, "linear", (64, 64)))
    assert "choose int8-b32" in str(Gguf().refuses(spec, "linear", (64, 64)))
    assert Onnx().refuses(spec, "linear", (64, 64)) is None
    assert "without -o" in str(Onnx().refuses(spec, "embedding", (64, 64)))


def test_a_rule_gives_a_checkpoint_with_its_kept_columns(
    source: SourceModel, found: Statistics, tmp_path: Path
) -> None:
    kept = {"match": "layers.*", "grid": "int4-b32-o2", "solver": "llm_int8"}
    model = solve(source, rules(kept, {"match": "*", "grid": "int8-channel", "solver": "rtn"}), found)
    q, k = (model.quantized[f"layers.0.attention.{name}"].outliers for name in "qk")
    assert q is not None
    assert k is not None
    assert np.array_equal(q.columns, k.columns)
    checkpoint.save(model, tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert all(loaded.quantized[name].same_as(tensor) for name, tensor in model.quantized.items())
    assert [step.step for step in model.steps] == ["rtn", "llm_int8"]
    assert model.steps[1].relative_error < model.steps[0].relative_error
