"""Write one artifact. That it reads back as it was given is proven when it is validated.

files/          what is published beside the manifest
artifact.json   exporter, main file, context, prefill, notes; provenance as it was handed over; is it in the file
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput import embedded, provenance, registry
from lilliput.artifact import Artifact
from lilliput.errors import ExportError
from lilliput.progress import Progress
from lilliput.recipe_schema import Plugin

if TYPE_CHECKING:
    from exporters.base import Exporter
    from lilliput.model import QuantizedModel

FACTS = "artifact.json"
FILES = "files"


@dataclass(frozen=True)
class Provenance:
    """What an exporter was told of the file's making, and whether the file holds it."""

    told: Mapping[str, str]
    is_embedded: bool


def work(
    quantized: Path, traced: Path, plugin: Plugin, known: Mapping[str, str], folder: Path, progress: Progress,
    limit_bytes: int | None = None,
) -> None:  # fmt: skip
    """`known`: what lilliput.provenance knows beforehand. Raises ExportError for a file above `limit_bytes`, the budget
    that its grids were chosen by, and for one that embeds another provenance than it was given."""
    from lilliput import checkpoint

    (folder / FILES).mkdir()
    model = checkpoint.load(quantized)
    told = provenance.told(model.provenance, known, checkpoint.digest(quantized))
    artifact = export(replace(model, provenance=told), traced, plugin, folder / FILES)
    if limit_bytes is not None and artifact.size_bytes > limit_bytes:
        raise ExportError(
            f"{artifact.main_file} has {artifact.size_bytes} bytes, its budget is {limit_bytes}: lower budget_mb"
        )
    found = embedded.provenance(artifact.path)
    if found not in (None, told):
        raise ExportError(
            f"{artifact.main_file}: exporter {plugin.name!r} embedded another provenance than it was given"
        )
    facts = {
        "exporter": artifact.exporter,
        "main_file": artifact.main_file,
        "context": artifact.context,
        "prefill": artifact.prefill,
        "notes": list(artifact.notes),
    }
    text = {**facts, "provenance": told, "is_embedded": found is not None}
    (folder / FACTS).write_text(json.dumps(text, indent=2) + "\n")
    progress(1, 1)


def export(model: QuantizedModel, traced: Path, plugin: Plugin, folder: Path, *, exact: bool = False) -> Artifact:
    """Let an exporter write into `folder` (exists, empty)."""
    from exporters.base import ExporterOptions
    from lilliput import trace_file

    exporter: Exporter = registry.load("exporters", plugin.name)()
    options = registry.options("exporters", plugin.name, plugin.options)
    assert isinstance(options, ExporterOptions), f"exporter {plugin.name!r} has no Options"
    return exporter.export(model, trace_file.load(traced / "trace.json"), options, folder, exact=exact)


def open_artifact(folder: Path) -> Artifact:
    """The artifact in an export stage's folder."""
    found = _facts(folder)
    names = ("exporter", "main_file", "context", "prefill")
    return Artifact(folder / FILES, **{name: found[name] for name in names}, notes=tuple(found["notes"]))


def provenance_in(folder: Path) -> Provenance:
    """What the file in an export stage's folder was told of its making."""
    found = _facts(folder)
    return Provenance(found["provenance"], found["is_embedded"])


def _facts(folder: Path) -> Any:
    return json.loads((folder / FACTS).read_text())
