"""A target's folder as `run` publishes it: a tiny checkpoint, proven (by made-up figures) on torch."""

from __future__ import annotations

from pathlib import Path

from sample_report import passing, report

from lilliput import checkpoint, manifest
from lilliput.manifest import ArtifactFacts, Manifest
from lilliput.model import QuantizedModel
from lilliput.recipe_schema import Recipe

CONTEXT = 128


def recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"source": "nowhere"},
            "context": CONTEXT,
            "evaluation": {"length": 64},
            "quantize": [{"match": "*", "grid": "int8-channel", "solver": "rtn"}],
            "targets": [{"name": "torch", "exporter": "onnx_int4", "runtime": "torch_cpu"}],
        }
    )


def publish(model: QuantizedModel, folder: Path) -> Path:
    """Write `model` as a checkpoint that torch_cpu opens, with its tokenizer beside it, and its manifest."""
    checkpoint.save(model, folder)
    made, result = report(), passing().model_copy(update={"name": "torch", "runtime": "torch_cpu"})
    described = Manifest(
        name=model.name,
        target="torch",
        artifact=ArtifactFacts(exporter="checkpoint", main_file="model.json", context=CONTEXT, prefill=0),
        files=manifest.files_of(folder),
        recipe=recipe(),
        recipe_sha256="ab" * 32,
        source=made.source,
        calibration=None,
        evaluation=made.evaluation,
        tensors=made.tensors,
        seed=0,
        stages={},
        versions=made.versions,
        host=made.host,
        result=result,
        created=made.created,
    )
    manifest.write(described, folder)
    return folder
