"""The plan: counted sizes, labelled estimates, and no trace of it on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_recipe
from tiny_models import quantize, source_of, tiny_llama

from lilliput import facts, pipeline
from lilliput.assignment import assign, parameter_count
from lilliput.estimate import artifact_bytes, estimate
from lilliput.model import DecoderConfig
from lilliput.recipe import load

SMOLLM2 = DecoderConfig(
    "llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, "rms", 1e-5, "rope", "silu", True, False, False, True, 100000.0
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))


def test_a_plan_touches_nothing_and_lists_all_that_is_to_do(tmp_path: Path, model: Path) -> None:
    made = pipeline.plan(tiny_recipe.recipe(tmp_path, model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()
    assert [stage.cached for stage in made.stages] == [False] * 16
    assert made.stages[-1].name == "report"
    assert made.seconds == pytest.approx(sum(stage.seconds for stage in made.stages))
    assert [target.name for target in made.targets] == ["onnx", "litert", "gguf"]
    assert made.parameters == 94528 == parameter_count(source_of(model).config)
    assert not made.cached


def test_planned_sizes_are_the_exact_bytes_of_codes_scales_and_floats(tmp_path: Path, model: Path) -> None:
    source, recipe = source_of(model), tiny_recipe.recipe(tmp_path, model)
    quantized = quantize(source)
    floats = sum(array.nbytes for array in quantized.floats.values())
    counted = sum(tensor.size_bytes for tensor in quantized.quantized.values()) + floats
    assert artifact_bytes(assign(recipe.quantize, source.config), source.config) == counted


def test_a_second_target_costs_a_fraction_of_the_first() -> None:
    recipe = load("smollm2-135m-everywhere")
    seconds = estimate(recipe, SMOLLM2).seconds
    assert seconds["export"] + seconds["validate"] < 0.4 * sum(seconds.values())
    assert artifact_bytes(assign(recipe.quantize, SMOLLM2), SMOLLM2) == 88_270_080


def test_targets_and_model_can_be_chosen(tmp_path: Path, model: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path, model).model_copy()
    other = tiny_llama(tmp_path / "other", seed=1)
    made = pipeline.plan(recipe, tmp_path / "out", ["gguf", "onnx"], str(other))
    assert [target.name for target in made.recipe.targets] == ["onnx", "gguf"]
    assert (made.recipe.model.source, made.recipe.model.name) == (str(other), None)
    same = pipeline.plan(recipe, tmp_path / "out", ["gguf", "onnx"])
    assert made.source_sha256 != same.source_sha256
    assert {a.key for a in made.stages if a.key}.isdisjoint(b.key for b in same.stages)


def test_tensor_classes_cover_every_weight_once(tmp_path: Path, model: Path) -> None:
    config, recipe = source_of(model).config, tiny_recipe.recipe(tmp_path, model)
    classes = facts.tensor_classes(recipe.quantize, config)
    assert sum(c.weights for c in classes) == parameter_count(config)
    assert sum(c.tensors for c in classes) == len(config.parameter_shapes())
    assert [(c.grid, c.solver) for c in classes] == [("int4-b32", "gptq"), ("int8-channel", "rtn"), ("float32", None)]
    assert classes[0].bits_per_weight == 4.5
    assert sum(c.size_bytes for c in classes) == artifact_bytes(assign(recipe.quantize, config), config)


DRY = """
import sys
from pathlib import Path
from lilliput import pipeline
from lilliput.recipe import load
pipeline.plan(load(sys.argv[1]), Path(sys.argv[2]))
print(sorted({"onnxruntime", "tensorflow", "llama_cpp", "transformers"} & set(sys.modules)))
"""


def test_a_plan_imports_no_runtime(tmp_path: Path, model: Path) -> None:
    path = tiny_recipe.write(tmp_path, model)
    command = [sys.executable, "-c", DRY, str(path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout == "[]\n", done.stderr


def test_another_evaluation_text_is_another_stage(tmp_path: Path, model: Path) -> None:
    keys = []
    for text in ("builtin", "docstrings"):
        recipe = tiny_recipe.recipe(tmp_path, model, f"evaluation.text={text}")
        planned = pipeline.plan(recipe, tmp_path / "out")
        keys.append(next(stage.key for stage in planned.stages if stage.name == "evaluation"))
    assert keys[0] != keys[1]
