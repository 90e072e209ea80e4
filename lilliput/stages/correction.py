"""Measure how far the predicted losses are off, matrix by matrix: corrections.json."""

from __future__ import annotations

from pathlib import Path

from lilliput.progress import Progress
from lilliput.recipe_schema import Plugin

CORRECTIONS = "corrections.json"


def work(
    source: Path, samples: Path, statistics: Path, sensitivity: Path, solver: Plugin, folder: Path, progress: Progress
) -> None:
    from calibration import allocation
    from calibration.samples import load
    from calibration.sensitivity import Sensitivity
    from calibration.statistics import Statistics
    from lilliput.source import open_stage

    found = Sensitivity(sensitivity)
    corrections = allocation.correct(open_stage(source), Statistics(statistics), found, load(samples), solver)
    (folder / CORRECTIONS).write_text(corrections.model_dump_json(indent=1) + "\n")
    progress(1, 1)
