"""What every matrix costs on every grid that a budget may choose: bytes and predicted loss, in prices.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lilliput.progress import Progress
from lilliput.recipe_schema import Plugin

PRICES = "prices.json"


def work(
    source: Path,
    statistics: Path,
    sensitivity: Path,
    grids: Sequence[str],
    solver: Plugin,
    folder: Path,
    progress: Progress,
) -> None:
    from calibration import allocation
    from calibration.sensitivity import Guided, Sensitivity
    from calibration.statistics import Statistics
    from lilliput.source import open_stage

    found = Sensitivity(sensitivity)
    guided = Guided(Statistics(statistics), found)
    prices = allocation.prices(open_stage(source), guided, found, grids, solver, progress)
    (folder / PRICES).write_text(prices.model_dump_json(indent=1) + "\n")
