"""Solve every matrix on the grid of its rule: one checkpoint of codes and scales."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lilliput.progress import Progress
from lilliput.recipe_schema import Rule


def work(
    source: Path, statistics: Path | None, rules: tuple[Rule, ...], name: str | None, folder: Path, progress: Progress,
    sensitivity: Path | None = None,
) -> None:  # fmt: skip
    """With `sensitivity`, solvers weigh by what an error costs, and the tied embedding has statistics too."""
    from calibration.sensitivity import Guided, Sensitivity
    from calibration.solve import solve
    from calibration.statistics import Statistics
    from lilliput import checkpoint
    from lilliput.source import open_stage

    model = open_stage(source)
    gathered = Statistics(statistics) if statistics else None
    if gathered and sensitivity:
        gathered = Guided(gathered, Sensitivity(sensitivity))
    checkpoint.save(solve(replace(model, name=name or model.name), rules, gathered, progress), folder)
