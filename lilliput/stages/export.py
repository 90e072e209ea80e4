"""Write one artifact, read it back with the format's own reader, and prove that nothing changed on the way.

files/          what is published beside the manifest
artifact.json   exporter, main file, context, prefill
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lilliput import registry
from lilliput.artifact import Artifact
from lilliput.errors import ExportError
from lilliput.grid import Float, QuantizedTensor
from lilliput.model import QuantizedModel
from lilliput.progress import Progress
from lilliput.recipe_schema import Plugin

if TYPE_CHECKING:
    from exporters.base import Exporter

FACTS = "artifact.json"
FILES = "files"


def work(quantized: Path, traced: Path, plugin: Plugin, folder: Path, progress: Progress) -> None:
    from lilliput import checkpoint, trace_file

    exporter: Exporter = registry.load("exporters", plugin.name)()
    options = registry.options("exporters", plugin.name, plugin.options)
    model = checkpoint.load(quantized)
    (folder / FILES).mkdir()
    artifact = exporter.export(model, trace_file.load(traced / "trace.json"), options, folder / FILES)  # type: ignore[arg-type]
    progress(1, 2)
    check_identical(model, exporter.read(artifact), plugin.name)
    facts = {"exporter": artifact.exporter, "main_file": artifact.main_file}
    facts_ = facts | {"context": artifact.context, "prefill": artifact.prefill}
    (folder / FACTS).write_text(json.dumps(facts_, indent=2) + "\n")
    progress(2, 2)


def open_artifact(folder: Path) -> Artifact:
    """The artifact in an export stage's folder."""
    facts = json.loads((folder / FACTS).read_text())
    return Artifact(folder / FILES, **facts)


def check_identical(model: QuantizedModel, seen: Mapping[str, QuantizedTensor | Float], exporter: str) -> None:
    """Raise ExportError naming a matrix whose codes or scales in the file are not the model's, bit for bit."""
    wrong = [name for name, tensor in model.quantized.items() if not _same(tensor, seen.get(name))]
    if wrong:
        raise ExportError(
            f"exporter {exporter!r}: {wrong[0]} ({len(wrong)} of {len(model.quantized)} matrices) does not read back "
            "as it was given, wanted identical codes and scales: a defect of the exporter, please report it"
        )


def _same(tensor: QuantizedTensor, seen: QuantizedTensor | Float | None) -> bool:
    if isinstance(seen, QuantizedTensor):
        return tensor.same_as(seen)
    return seen is not None and np.array_equal(tensor.dequantize(), seen)
