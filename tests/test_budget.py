"""`quantize: {budget_mb: …}` from the recipe to the written file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import tiny_recipe

from lilliput import manifest, pipeline, report
from lilliput.allocated import Choice, classes
from lilliput.errors import CalibrationError, RecipeError
from lilliput.progress import silent
from lilliput.recipe import load
from lilliput.stages import allocate

MEGA = 10**6


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("LILLIPUT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("model"))


def run(folder: Path, model: Path, *overrides: str, targets: tuple[str, ...] = ("gguf",)) -> report.Report:
    recipe = tiny_recipe.recipe(folder, model, *overrides, targets=targets)
    return pipeline.run(pipeline.plan(recipe, folder / "out")).report


def dequantized(made: report.Report) -> float:
    """The price of the weights alone."""
    (found,) = [rung.mean_kld for rung in made.targets[0].ladder if rung.rung == "dequantized"]
    assert found is not None, made.targets[0].notes
    return found


def test_the_file_keeps_to_the_budget_and_uses_it(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a").mkdir()
    uniform = run(tmp_path / "a", model)
    size = uniform.targets[0].artifact.size_bytes
    (tmp_path / "b").mkdir()
    mixed = run(tmp_path / "b", model, f"quantize={{budget_mb: {size / MEGA}}}")
    assert 0.97 * size < mixed.targets[0].artifact.size_bytes <= size
    (allocation,) = mixed.allocations
    assert allocation.file_bytes == mixed.targets[0].artifact.size_bytes
    assert {choice.name for choice in allocation.choices} >= {"embedding", "layers.1.mlp.down"}
    assert sum(row.size_bytes for row in classes(allocation)) == sum(c.size_bytes for c in allocation.choices)
    assert dequantized(mixed) < dequantized(uniform)
    held = manifest.read(tmp_path / "b" / "out" / "gguf")
    assert held.recipe.quantize.budget_mb == size / MEGA  # type: ignore[union-attr]


@pytest.mark.parametrize("training", [(), ("recover={steps: 1}", "calibration.count=8")])
def test_what_the_file_says_of_name_and_training_counts(tmp_path: Path, model: Path, training: tuple[str, ...]) -> None:
    made = run(tmp_path, model, "quantize={budget_mb: 0.09}", f"model.name={'long' * 40}", *training)
    (allocation,) = made.allocations
    (target,) = made.targets
    noted = "recovered" in manifest.read(tmp_path / "out" / "gguf").provenance
    assert allocation.file_bytes is not None
    if noted or not training:
        assert allocation.file_bytes == target.artifact.size_bytes
    else:  # the training bought nothing, so that the solved model ships, without the training's note
        assert allocation.file_bytes - 64 <= target.artifact.size_bytes <= allocation.file_bytes


def test_each_target_chooses_from_its_own_grids(tmp_path: Path, model: Path) -> None:
    made = run(tmp_path, model, "quantize={bits_per_weight: 5}", targets=("onnx", "litert", "gguf"))
    grids = {a.target: {choice.grid for choice in a.choices} for a in made.allocations}
    assert not any("b" in g and g.startswith("int8") for g in grids["litert"])
    for allocation in made.allocations:
        assert allocation.bits_per_weight <= 5
        assert allocation.loss == pytest.approx(sum(c.loss for c in allocation.choices))
    text = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [a["target"] for a in text["allocations"]] == ["onnx", "litert", "gguf"]
    page = (tmp_path / "out" / "report.md").read_text()
    assert "mlp.down" in page
    decided = [a for a in made.allocations if a.finalists]
    assert decided, "a tiny model's table has grids that cost about the same"
    for allocation in decided:
        assert allocation.tables == min(allocation.finalists, key=lambda one: one.kld).tables
        assert f"measured on samples that no solve had seen: {allocation.finalists[0].tables}" in page
    assert "mlp.down" in (tmp_path / "out" / "report.html").read_text()


def test_a_target_alone_uses_what_was_made_with_the_others(tmp_path: Path, model: Path) -> None:
    """So a proof of one artifact again, by its manifest, is one of the same codes."""
    recipe = tiny_recipe.recipe(tmp_path, model, "quantize={budget_mb: 1}", targets=("onnx", "gguf"))
    both, alone = (pipeline.plan(recipe, tmp_path / "out", targets) for targets in ((), ("gguf",)))
    assert {s.key for s in alone.stages} <= {s.key for s in both.stages}


def test_a_budget_below_the_smallest_file_is_refused_with_its_size(tmp_path: Path, model: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path, model, "quantize={budget_mb: 0.055}", targets=("gguf",))
    plan = pipeline.plan(recipe, tmp_path / "out")
    with pytest.raises(CalibrationError, match=r"the smallest file is 0\.\d+ MB; raise budget_mb"):
        pipeline.run(plan)


def test_a_budget_below_the_matrices_is_refused_before_any_work(tmp_path: Path, model: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path, model, "quantize={bits_per_weight: 3}", targets=("gguf",))
    with pytest.raises(RecipeError, match=r"4\.50 bits per weight\) on the smallest grids"):
        pipeline.plan(recipe, tmp_path / "out")


def test_grids_that_the_format_cannot_hold_are_refused(tmp_path: Path, model: Path) -> None:
    recipe = tiny_recipe.recipe(
        tmp_path, model, "quantize={bits_per_weight: 5, grids: [int4-b32-zp-f16]}", targets=("gguf",)
    )
    with pytest.raises(RecipeError, match="on none of the grids int4-b32-zp-f16"):
        pipeline.plan(recipe, tmp_path / "out")


def test_the_plan_names_the_stages(tmp_path: Path, model: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path, model, "quantize={budget_mb: 1}", targets=("onnx", "gguf"))
    plan = pipeline.plan(recipe, tmp_path / "out")
    names = [stage.name for stage in plan.stages]
    assert {
        "sensitivity",
        "correction",
        "price:int4-b32",
        "price:int8-b32",
        "allocate:onnx",
        "allocate:gguf",
        "quantize:onnx",
    } <= set(names)
    assert [target.size_bytes for target in plan.targets] == [MEGA, MEGA]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{budget_mb: 3, bits_per_weight: 4}", "both of budget_mb and bits_per_weight"),
        ("{grids: [int4-b32]}", "none of budget_mb and bits_per_weight"),
        ("{budget_mb: 3, grids: [float32]}", "float32 is no grid to choose"),
        ("{budget: 3}", "unknown key 'quantize.budget': did you mean 'budget_mb'"),
    ],
)
def test_what_a_budget_is(tmp_path: Path, model: Path, given: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(tiny_recipe.write(tmp_path, model), [f"quantize={given}"])


def test_what_lies_beside_the_matrices_may_depend_on_the_choice() -> None:
    """The smallest choice's file has 40 bytes more beside its matrices than others: the budget is used all the same."""

    class Prices:
        least_bytes, grids = 100, ("a",)

        def within(self, limit: int) -> tuple[Choice, ...]:
            size = min(limit, 1000) // 10 * 10
            return (Choice(name="m", grid="a", weights=1, size_bytes=size, loss=1 / size),)

    class Sizes:
        target = SimpleNamespace(name="t")

        def of(self, choices: tuple[Choice, ...]) -> int:
            size = choices[0].size_bytes
            return size + (50 if size == 100 else 10)

    found = allocate._by_file(Prices(), 500, Sizes(), silent)  # type: ignore[arg-type]
    assert (found.file_bytes, found.choices[0].size_bytes) == (500, 490)
