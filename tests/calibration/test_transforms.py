"""Transforms against their definitions, and chains from a rule to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_source

from calibration import awq, gptq, rtn, smoothquant
from calibration.base import InputStatistics, Readers, SolverOptions, Transform
from calibration.folding import fold_moments
from calibration.output_error import output_error, sample_rows
from calibration.samples import Provenance, Samples
from calibration.solve import solve
from calibration.statistics import Statistics, gather
from lilliput import checkpoint, decoder
from lilliput.errors import CalibrationError
from lilliput.grid import Float, grid
from lilliput.model import SourceModel
from lilliput.recipe_schema import Rule

TABLES = {"match": "*", "grid": "int8-channel", "solver": "rtn"}


def statistics(cols: int, seed: int = 0) -> InputStatistics:
    """Correlated inputs, a few of them twenty times larger than the others."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(500, cols // 2)) @ rng.normal(size=(cols // 2, cols)) + 0.3 * rng.normal(size=(500, cols))
    x[:, rng.choice(cols, max(1, cols // 24), replace=False)] *= 20
    return InputStatistics(
        (x.T @ x / 500).astype(np.float32), x.min(0).astype(np.float32), x.max(0).astype(np.float32), 500
    )


def readers(cols: int = 96, grids: tuple[str, ...] = ("int4-b32", "int4-b32"), shared: Any = None) -> Readers:
    rng = np.random.default_rng(1)
    weights = tuple((rng.standard_t(4, size=(40, cols)) * 0.05).astype(np.float32) for _ in grids)
    return Readers(weights, tuple(map(grid, grids)), statistics(cols), np.arange(cols) if shared is None else shared)


def chosen(transform: Transform, given: Readers, **options: object) -> Float:
    factors = transform.factors(given, transform.Options.model_validate(options))
    assert factors.dtype == np.float32
    assert factors.shape == (given.shared.max() + 1,)
    assert (factors > 0).all()
    return factors


def rounding_loss(given: Readers, factors: Float) -> float:
    """Of the readers rounded to nearest after their columns were multiplied."""
    columns, options = factors[given.shared], rtn.Options(candidates=4, refine=1)
    moments = fold_moments(given.statistics, columns).second_moments
    return sum(
        output_error(w * columns - rtn.Solver().solve(w * columns, spec, None, options).dequantize(), moments)
        for w, spec in zip(given.weights, given.specs, strict=True)
    )


def test_output_error_is_the_mean_squared_output_over_tokens() -> None:
    rng = np.random.default_rng(0)
    x, d = rng.normal(size=(200, 9)), rng.normal(size=(5, 9)).astype(np.float32)
    moments = (x.T @ x / 200).astype(np.float32)
    assert output_error(d, moments) == pytest.approx(float(((x @ d.T) ** 2).sum(1).mean()), rel=1e-5)
    assert sample_rows(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert sample_rows(100, 3).tolist() == [0, 49, 99]


@pytest.mark.parametrize("grids", [("int4-b32", "int4-b32"), ("int4-b128",), ("int3-b32-zp",), ("int4-channel",)])
def test_awq_takes_the_best_of_its_family_and_is_never_worse_than_nothing(grids: tuple[str, ...]) -> None:
    given = readers(grids=grids)
    best = chosen(awq.Transform(), given)
    size = np.sqrt(given.statistics.second_moments.diagonal())
    family = [size ** (i / 20) / np.sqrt((size ** (i / 20)).max() * (size ** (i / 20)).min()) for i in range(21)]
    losses = [rounding_loss(given, f.astype(np.float32)) for f in family]
    assert rounding_loss(given, best) == pytest.approx(min(losses), rel=1e-3)
    assert rounding_loss(given, best) < 0.9 * losses[0]


def test_awq_leaves_equal_inputs_alone() -> None:
    given = readers()
    flat = replace(given, statistics=replace(given.statistics, second_moments=np.eye(96, dtype=np.float32)))
    assert np.allclose(chosen(awq.Transform(), flat), 1)


def test_smoothquant_is_the_papers_formula() -> None:
    given = readers()
    found = chosen(smoothquant.Transform(), given, alpha=0.7, measure="max")
    inputs = np.maximum(np.abs(given.statistics.minimum), np.abs(given.statistics.maximum))
    weights = np.max([np.abs(w).max(0) for w in given.weights], axis=0)
    expected = inputs**0.7 / weights**0.3
    assert np.allclose(found, expected / np.exp(np.log(expected).mean()), rtol=1e-4)


def test_smoothquant_by_rms_at_one_half_is_the_least_product_of_norms() -> None:
    given = readers()
    inputs = np.sqrt(given.statistics.second_moments.diagonal())
    weights = np.sqrt(sum(np.square(w).sum(0) for w in given.weights))

    def product(factors: Float) -> float:
        return float(((inputs / factors) ** 2).sum() * ((weights * factors) ** 2).sum())

    least = product(chosen(smoothquant.Transform(), given, alpha=0.5, measure="rms"))
    assert least == pytest.approx(float((inputs * weights).sum() ** 2), rel=1e-4)
    rng = np.random.default_rng(3)
    best = chosen(smoothquant.Transform(), given, alpha=0.5, measure="rms")
    assert all(product(best * np.exp(0.1 * rng.normal(size=96)).astype(np.float32)) > least for _ in range(20))


@pytest.mark.parametrize("transform", [awq.Transform(), smoothquant.Transform()])
def test_shared_columns_share_a_factor_and_dead_inputs_are_harmless(transform: Transform) -> None:
    given = readers(shared=np.tile(np.arange(48), 2))
    assert chosen(transform, given).shape == (48,)
    found = readers().statistics
    moments, low, high = found.second_moments.copy(), found.minimum.copy(), found.maximum.copy()
    moments[:, :5] = moments[:5] = low[:5] = high[:5] = 0
    dead = replace(readers(), statistics=InputStatistics(moments, low, high, 500))
    assert np.isfinite(chosen(transform, dead)).all()
    nothing = InputStatistics(np.zeros_like(moments), low * 0, high * 0, 500)
    assert np.allclose(chosen(transform, replace(dead, statistics=nothing)), 1)


@pytest.mark.parametrize("steps", [("smoothquant", "gptq"), ("awq", "gptq"), ("awq", "rtn")])
def test_a_chain_on_a_correlated_layer_is_no_worse_than_rounding(steps: tuple[str, str]) -> None:
    given = readers(grids=("int4-b32",))
    transform = {"smoothquant": smoothquant.Transform(), "awq": awq.Transform()}[steps[0]]
    columns = chosen(transform, given)[given.shared]
    found = fold_moments(given.statistics, columns)
    solver, options = {"gptq": (gptq.Solver(), gptq.Options()), "rtn": (rtn.Solver(), rtn.Options())}[steps[1]]
    scaled = given.weights[0] * columns
    error = output_error(
        scaled - solver.solve(scaled, given.specs[0], found, options).dequantize(), found.second_moments
    )
    assert error <= rounding_loss(given, np.ones(96, np.float32))


def rules(*given: dict[str, Any]) -> tuple[Rule, ...]:
    return tuple(Rule.model_validate(rule) for rule in given)


def layers(*solver: Any, match: str = "layers.*") -> dict[str, Any]:
    return {"match": match, "grid": "int4-b32", "solver": list(solver)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[SourceModel, Statistics]]:
    held: dict[str, tuple[SourceModel, Statistics]] = {}

    def of(kind: str) -> tuple[SourceModel, Statistics]:
        if kind not in held:
            source = tiny_source(tmp_path_factory.mktemp(kind), kind)
            tokens = np.random.default_rng(0).integers(0, 320, (8, 64)).astype(np.int32)
            samples = Samples(tokens, Provenance("text", "random tokens", "5" * 64, *tokens.shape))
            held[kind] = source, gather(source, samples, tmp_path_factory.mktemp("statistics"))
        return held[kind]

    return of


Made = Callable[[str], tuple[SourceModel, Statistics]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("chain", [("smoothquant", "gptq"), ("awq", "rtn"), ("smoothquant", "awq", "gptq")])
def test_a_chain_is_solved_saved_and_reported(kind: str, chain: tuple[str, ...], made: Made, tmp_path: Path) -> None:
    source, found = made(kind)
    model = solve(source, rules(layers(*chain), TABLES), found)
    assert [s.step for s in model.steps] == ["rtn", *chain]
    assert {(s.match, s.grid) for s in model.steps} == {("layers.*", "int4-b32")}
    assert all(0 < s.relative_error < 0.1 for s in model.steps)
    if "awq" in chain:  # which minimises what is measured
        assert (
            model.steps[chain.index("awq") + 1].relative_error <= model.steps[chain.index("awq")].relative_error * 1.02
        )
    if chain[-1] == "gptq":
        assert model.steps[-1].relative_error < model.steps[0].relative_error
    assert not np.array_equal(model.floats["layers.0.attention_norm"], source.weights["layers.0.attention_norm"])
    described = ", then ".join(chain)
    assert model.provenance["rule layers.*"] == f"int4-b32 by {described}"
    unfolded = ", ".join(f"layers.{i}.mlp.down" for i in range(2))
    assert model.provenance.get("matrices_not_folded") == (unfolded if kind == "gpt2" else None)
    checkpoint.save(model, tmp_path)
    assert checkpoint.load(tmp_path).steps == model.steps


def test_the_dequantized_chain_is_close_to_the_float_model(made: Made) -> None:
    """8-bit codes of the folded matrices and the folded norms together: the model that went in."""
    source, found = made("llama")
    both = [solve(source, rules({**layers(*c), "grid": "int8-b32"}, TABLES), found) for c in (["rtn"], ["awq", "rtn"])]
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 320, (2, 40)))
    with torch.inference_mode():
        wanted = decoder.build(source)(tokens)
        errors = []
        for model in both:
            weights = {name: model.dequantized(name) for name in source.weights}
            errors.append(float((decoder.build(replace(source, weights=weights))(tokens) - wanted).square().mean()))
    assert errors[1] < 1.5 * errors[0]


def test_matrices_that_read_one_input_need_the_same_transforms(made: Made) -> None:
    source, found = made("llama")
    only_q = layers("awq", "gptq", match="*.attention.q")
    with pytest.raises(CalibrationError, match=r"rule '\*\.attention\.q': awq finds no place"):
        solve(source, rules(only_q, layers("gptq"), TABLES), found)
    with pytest.raises(CalibrationError, match="rule 'embedding': awq finds no place"):
        solve(source, rules({**TABLES, "match": "embedding", "solver": ["awq", "rtn"]}, layers("gptq"), TABLES), found)
    only_down = layers("awq", "gptq", match="*.down")
    model = solve(source, rules(only_down, layers("gptq"), TABLES), found)
    assert [s.step for s in model.steps if s.match == "*.down"] == ["rtn", "awq", "gptq"]
    assert [s.step for s in model.steps if s.match == "layers.*"] == ["rtn", "gptq"]
    assert np.array_equal(model.floats["layers.0.mlp_norm"], source.weights["layers.0.mlp_norm"])
    other = layers({"name": "awq", "steps": 5}, "gptq", match="*.attention.o")
    model = solve(source, rules(other, layers("awq", "gptq", match="*.attention.*"), layers("gptq"), TABLES), found)
    assert "matrices_not_folded" not in model.provenance


def test_transforms_need_statistics(made: Made) -> None:
    source, _ = made("llama")
    with pytest.raises(CalibrationError, match=r"rule 'layers\.\*': transform awq needs calibration statistics"):
        solve(source, rules(layers("awq", "rtn"), TABLES), None)


def test_transforms_have_no_options_of_others() -> None:
    assert isinstance(awq.Options(), SolverOptions)
    with pytest.raises(ValueError, match="alpha"):
        smoothquant.Options(alpha=1.5)
