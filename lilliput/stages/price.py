"""What every matrix costs on one grid that budgets may choose: bytes and predicted loss, in prices.json."""

from __future__ import annotations

from pathlib import Path

from lilliput.progress import Progress
from lilliput.recipe_schema import Plugin

PRICES = "prices.json"


def work(
    source: Path, statistics: Path, sensitivity: Path, grid: str, solver: Plugin, folder: Path, progress: Progress
) -> None:
    from calibration import allocation
    from calibration.sensitivity import Guided, Sensitivity
    from calibration.statistics import Statistics
    from lilliput.source import open_stage

    found = Sensitivity(sensitivity)
    guided = Guided(Statistics(statistics), found)
    prices = allocation.price(open_stage(source), guided, found, grid, solver, progress)
    (folder / PRICES).write_text(prices.model_dump_json(indent=1) + "\n")
