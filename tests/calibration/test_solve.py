from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_source

from calibration import rtn
from calibration.output_error import output_error
from calibration.samples import Provenance, Samples
from calibration.solve import solve
from calibration.statistics import Statistics, gather
from lilliput import checkpoint
from lilliput.errors import CalibrationError, RecipeError
from lilliput.grid import grid
from lilliput.model import SourceModel, role_of
from lilliput.recipe_schema import Rule

LAYERS = {"match": "layers.*", "grid": "int4-b32", "solver": "gptq"}
TABLES = {"match": "*", "grid": "int8-channel", "solver": "rtn"}


def rules(*given: dict[str, Any]) -> tuple[Rule, ...]:
    return tuple(Rule.model_validate(rule) for rule in given)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return tiny_source(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def found(source: SourceModel, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    tokens = np.random.default_rng(0).integers(0, 320, (8, 64)).astype(np.int32)
    samples = Samples(tokens, Provenance("text", "random tokens", "5" * 64, *tokens.shape))
    return gather(source, samples, tmp_path_factory.mktemp("statistics"))


def test_the_first_rule_that_matches_wins(source: SourceModel, found: Statistics) -> None:
    down = {"match": "*.down", "grid": "int8-b32", "solver": {"name": "rtn", "weighted": True}}
    model = solve(source, rules(down, LAYERS, TABLES), found)
    grids = {name: tensor.spec.name for name, tensor in model.quantized.items()}
    assert grids["layers.0.mlp.down"] == grids["layers.1.mlp.down"] == "int8-b32"
    assert grids["layers.0.mlp.up"] == "int4-b32"
    assert grids["embedding"] == "int8-channel"
    assert set(model.floats) == {name for name in source.weights if role_of(name) == "vector"}
    expected = rtn.Solver().solve(
        source.weights["layers.1.mlp.down"], grid("int8-b32"), found["layers.1.mlp.down"], rtn.Options(weighted=True)
    )
    assert model.quantized["layers.1.mlp.down"].same_as(expected)


def test_provenance_names_source_samples_rules_and_what_stays_in_float(source: SourceModel, found: Statistics) -> None:
    kept = {"match": "layers.1.attention.*", "grid": "float32"}
    damped = {**LAYERS, "solver": {"name": "gptq", "damping": 0.05}}
    model = solve(source, rules(kept, damped, TABLES), found)
    assert model.provenance == {
        "source": source.origin,
        "source_sha256": source.sha256,
        "license": "Apache-2.0",
        "calibration": "8 x 64 tokens, random tokens",
        "calibration_sha256": "5" * 64,
        "rule layers.1.attention.*": "kept in float32",
        "rule layers.*": "int4-b32 by gptq, damping 0.05",
        "rule *": "int8-channel by rtn",
        "matrices_in_float": ", ".join(f"layers.1.attention.{name}" for name in "qkvo"),
    }
    assert np.array_equal(model.floats["layers.1.attention.q"], source.weights["layers.1.attention.q"])


def test_the_same_bytes_on_any_number_of_threads(source: SourceModel, found: Statistics, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            checkpoint.save(solve(source, rules(LAYERS, TABLES), found), tmp_path / str(count))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for file in ("codes.safetensors", "floats.safetensors", "model.json"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "3" / file).read_bytes()
    assert checkpoint.load(tmp_path / "1").quantized["embedding"].spec == grid("int8-channel")


def test_progress_counts_the_matrices(source: SourceModel) -> None:
    steps: list[tuple[int, int]] = []
    solve(source, rules(TABLES), None, lambda *step: steps.append(step))
    assert steps == [(i + 1, 15) for i in range(15)]  # two layers of seven, and the embedding


def test_every_matrix_needs_a_rule_and_every_rule_a_matrix(source: SourceModel, found: Statistics) -> None:
    with pytest.raises(RecipeError, match="no rule matches 'embedding'"):
        solve(source, rules(LAYERS), found)
    with pytest.raises(CalibrationError, match=r"rule 'layer\.0' matches no matrix"):
        solve(source, rules({**LAYERS, "match": "layer.0"}, LAYERS, TABLES), found)
    tied = {"match": "head", "grid": "int8-channel", "solver": "rtn"}
    assert solve(source, rules(tied, TABLES), None).quantized.keys() == {n for n in source.weights if "norm" not in n}


def test_a_solver_that_needs_statistics_says_so_before_any_work(source: SourceModel) -> None:
    with pytest.raises(CalibrationError, match=r"rule 'layers\.\*': solver gptq needs calibration statistics"):
        solve(source, rules(TABLES | {"match": "embedding"}, LAYERS), None)


def test_a_tied_table_has_the_statistics_of_the_head_and_another_none(found: Statistics, tmp_path: Path) -> None:
    tied, untied = (tiny_source(tmp_path / str(t), tie_word_embeddings=t) for t in (True, False))
    solved = solve(tied, rules({**TABLES, "solver": "gptq"}), found).quantized["embedding"]
    rounded = solve(tied, rules(TABLES), found).quantized["embedding"]
    errors = [
        output_error(tied.weights["embedding"] - t.dequantize(), found["embedding"].second_moments)
        for t in (solved, rounded)
    ]
    assert errors[0] < errors[1]
    tokens = np.random.default_rng(0).integers(0, 320, (2, 64)).astype(np.int32)
    its = gather(
        untied, Samples(tokens, Provenance("text", "random tokens", "5" * 64, *tokens.shape)), tmp_path / "its"
    )
    with pytest.raises(CalibrationError, match="gptq needs calibration statistics, and there are none: use rtn"):
        solve(untied, rules({**TABLES, "solver": "gptq"}), its)
