from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_sensitivity import random_samples
from tiny_models import tiny_source

from calibration import allocation, sensitivity, statistics
from calibration.allocation import Prices
from calibration.divergence import divergence
from calibration.sensitivity import Guided, Sensitivity
from calibration.solve import solve
from calibration.statistics import Statistics
from lilliput.errors import CalibrationError
from lilliput.model import SourceModel
from lilliput.recipe_schema import Plugin, Rule

GRIDS = ("int3-b32", "int4-b32", "int5-b32", "int8-b32", "q4_k")
GPTQ = Plugin(name="gptq")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return tiny_source(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sensed(source: SourceModel, tmp_path_factory: pytest.TempPathFactory) -> Sensitivity:
    return sensitivity.gather(source, random_samples(source), tmp_path_factory.mktemp("sensitivity"))


@pytest.fixture(scope="module")
def plain(source: SourceModel, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return statistics.gather(source, random_samples(source), tmp_path_factory.mktemp("statistics"))


@pytest.fixture(scope="module")
def guided(plain: Statistics, sensed: Sensitivity) -> Guided:
    return Guided(plain, sensed)


@pytest.fixture(scope="module")
def prices(source: SourceModel, sensed: Sensitivity, plain: Statistics, guided: Guided) -> Prices:
    found = [allocation.price(source, guided, sensed, grid) for grid in GRIDS]
    return allocation.prices(source.config, found, allocation.correct(source, plain, sensed, random_samples(source)))


def measured(source: SourceModel, guided: Guided, rules: list[Rule]) -> float:
    return divergence(source, solve(source, rules, guided).quantized, random_samples(source))


def test_only_grids_whose_blocks_fit_are_priced(prices: Prices) -> None:
    assert prices.grids == GRIDS[:-1]  # rows of 64 and 128 columns have no super-block of 256
    assert {len(found) for found in prices.of.values()} == {4}
    for found in prices.of.values():
        assert [p.loss for p in found] == sorted((p.loss for p in found), reverse=True)


def test_the_sum_of_prices_is_what_is_measured(source: SourceModel, guided: Guided, prices: Prices) -> None:
    for grid in ("int3-b32", "int4-b32"):
        predicted = sum(p.loss for found in prices.of.values() for p in found if p.grid == grid)
        found = measured(source, guided, [Rule(match="*", grid=grid, solver=GPTQ)])
        assert predicted == pytest.approx(found, rel=0.5)


def test_mixed_precision_loses_less_than_one_grid(source: SourceModel, guided: Guided, prices: Prices) -> None:
    uniform = sum(p.size_bytes for found in prices.of.values() for p in found if p.grid == "int4-b32")
    choices = prices.within(uniform)
    assert sum(choice.size_bytes for choice in choices) <= uniform
    rules = [Rule(match=choice.name, grid=choice.grid, solver=GPTQ) for choice in choices]
    assert measured(source, guided, rules) < measured(source, guided, [Rule(match="*", grid="int4-b32", solver=GPTQ)])


def test_matrices_of_one_input_get_one_grid(source: SourceModel, prices: Prices) -> None:
    units = allocation.units_of(source.config)
    assert ("layers.0.attention.q", "layers.0.attention.k", "layers.0.attention.v") in units
    assert ("embedding",) in units
    for share in (0.3, 0.5, 0.8):
        most = sum(max(p.size_bytes for p in found) for found in prices.of.values())
        got = {c.name: c.grid for c in prices.within(int(prices.least_bytes + share * (most - prices.least_bytes)))}
        assert all(len({got[name] for name in unit}) == 1 for unit in units)


def test_a_format_keeps_what_it_holds(source: SourceModel, prices: Prices) -> None:
    shapes = source.config.parameter_shapes()
    kept = prices.held_by(lambda spec, role, shape: "odd" if spec.bits % 2 else None, GRIDS, shapes)
    assert kept.grids == ("int4-b32", "int8-b32")
    with pytest.raises(CalibrationError, match=r"can hold embedding \(320, 64\) on none of the grids"):
        prices.held_by(lambda spec, role, shape: "no tables" if role == "embedding" else None, GRIDS, shapes)


def test_prices_survive_a_file(prices: Prices) -> None:
    assert Prices.model_validate_json(prices.model_dump_json()) == prices


def test_a_blank_model_has_the_shapes_of_a_solved_one(source: SourceModel, guided: Guided) -> None:
    rules = [Rule(match="layers.*", grid="int4-b32-zp-f16", solver=GPTQ), Rule(match="*", grid="int8-channel")]
    blank, solved = allocation.blank(source, rules, guided), solve(source, rules, guided)
    assert blank.provenance == solved.provenance
    for name, tensor in solved.quantized.items():
        assert blank.quantized[name].spec == tensor.spec
        assert blank.quantized[name].shape == tensor.shape
        assert not blank.quantized[name].dequantize().any()


def test_divergence_of_nothing_is_nothing(source: SourceModel, tmp_path: Path) -> None:
    assert divergence(source, {}, random_samples(source)) == 0.0


def test_held_out_samples_are_others(source: SourceModel, sensed: Sensitivity) -> None:
    samples = random_samples(source)
    used = sensitivity.taken(samples, sensitivity.spaced(32, 16)).tokens
    others = sensitivity.held_out(samples, sensed, 6).tokens
    assert len(others) == 6
    assert not any((row == used).all(axis=1).any() for row in others)
    assert np.array_equal(
        sensitivity.held_out(sensitivity.taken(samples, np.arange(2)), sensed, 6).tokens, samples.tokens[:2]
    )
