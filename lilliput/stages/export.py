"""Write one artifact. That it reads back as it was given is proven when it is validated.

files/          what is published beside the manifest
artifact.json   exporter, main file, context, prefill, notes
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lilliput import registry
from lilliput.artifact import Artifact
from lilliput.errors import ExportError
from lilliput.progress import Progress
from lilliput.recipe_schema import Plugin

if TYPE_CHECKING:
    from exporters.base import Exporter
    from lilliput.model import QuantizedModel

FACTS = "artifact.json"
FILES = "files"


def work(
    quantized: Path, traced: Path, plugin: Plugin, folder: Path, progress: Progress, limit_bytes: int | None = None
) -> None:
    """Raises ExportError for a file above `limit_bytes`: the budget that its grids were chosen by."""
    from lilliput import checkpoint

    (folder / FILES).mkdir()
    artifact = export(checkpoint.load(quantized), traced, plugin, folder / FILES)
    if limit_bytes is not None and artifact.size_bytes > limit_bytes:
        raise ExportError(
            f"{artifact.main_file} has {artifact.size_bytes} bytes, its budget is {limit_bytes}: lower budget_mb"
        )
    facts = {
        "exporter": artifact.exporter,
        "main_file": artifact.main_file,
        "context": artifact.context,
        "prefill": artifact.prefill,
        "notes": list(artifact.notes),
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
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
    facts = json.loads((folder / FACTS).read_text())
    return Artifact(folder / FILES, **{**facts, "notes": tuple(facts["notes"])})
