"""The stage `recover`: where it stands in the graph, what it leaves, and what the report says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_recipe
from tiny_models import tiny_llama

from lilliput import checkpoint, pipeline
from lilliput import graph as graphs
from lilliput.errors import RecipeError
from lilliput.graph import Graph
from lilliput.stages import recover
from lilliput.store import Store, unfinished

TRAINED = "recover={method: qat, steps: 3, learning_rate: 0.01, precision: float32}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def graph(folder: Path, model: Path, *overrides: str) -> Graph:
    return graphs.build(tiny_recipe.recipe(folder, model, *overrides), "5" * 64, "a machine")


def test_what_is_trained_takes_the_place_of_what_was_solved(model: Path, tmp_path: Path) -> None:
    plain, trained = graph(tmp_path, model), graph(tmp_path, model, TRAINED)
    names = [stage.name for stage in trained.order]
    assert [name for name in names if name.startswith("recover")] == ["recover:int4-b32+int8-channel"]
    solution, export = trained.targets[0].solution, trained.targets[0].export
    assert solution.recover is not None
    assert solution.quantize.key == plain.targets[0].solution.quantize.key
    assert solution.recover in export.inputs
    assert solution.recover in solution.dequantized.inputs
    assert solution.quantize not in export.inputs
    assert export.key != plain.targets[0].export.key
    longer = graph(tmp_path, model, TRAINED, "recover.steps=4")
    assert longer.targets[0].solution.recover.key != solution.recover.key  # type: ignore[union-attr]


def test_one_target_may_be_trained_alone(model: Path, tmp_path: Path) -> None:
    made = graph(tmp_path, model, f"targets.onnx.{TRAINED}")
    assert [t.solution.recover is not None for t in made.targets] == [True, False, False]
    assert made.targets[1].solution is made.targets[2].solution


def test_training_needs_samples_where_no_solver_does(model: Path, tmp_path: Path) -> None:
    made = graph(tmp_path, model, TRAINED, "quantize=int4-b32", "quantize=[{match: '*', grid: int4-b32, solver: rtn}]")
    assert made.samples is not None
    assert made.statistics is None


def test_an_unknown_key_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'recover\.step': did you mean 'steps'"):
        graph(tmp_path, model, "recover={method: qat, step: 3}")


def test_a_run_trains_once_and_reports_what_it_bought(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    recipe = tiny_recipe.recipe(tmp_path, model, TRAINED, targets=("gguf",))
    planned = pipeline.plan(recipe, tmp_path / "out")
    (stage,) = (stage for stage in planned.stages if stage.kind == "recover")
    assert stage.seconds > 0
    done = pipeline.run(planned)
    folder = Store(tmp_path / "cache").find("recover", stage.key)
    assert folder is not None
    found = json.loads((folder / recover.FACTS).read_text())
    assert found["steps"] == 3
    (note,) = (note for note in done.report.notes if note.startswith("qat of int4-b32+int8-channel: 3 steps"))
    assert f"{found['kld_before']:.4f} to {found['kld_after']:.4f}" in note
    assert checkpoint.load(folder).config.num_layers == 2
    assert not list(folder.parent.glob("*.unfinished"))
    again = pipeline.plan(recipe, tmp_path / "out")
    assert again.cached


def test_the_unfinished_outlives_a_kill_and_only_that(tmp_path: Path) -> None:
    first, second = tmp_path / "key.01.tmp", tmp_path / "key.02.tmp"
    killed = unfinished(first)
    (killed.__enter__() / "training").write_text("half")
    assert killed.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None) is False
    with unfinished(second) as kept:
        assert (kept / "training").read_text() == "half"
    assert not kept.exists()


@pytest.mark.parametrize("given", ["reconstruct: true", "steps: 0"])
def test_what_adapters_do_not_do_is_refused(model: Path, tmp_path: Path, given: str) -> None:
    with pytest.raises(RecipeError, match="adapters are trained on the solved codes"):
        graph(tmp_path, model, f"recover={{method: adapters, {given}}}")
