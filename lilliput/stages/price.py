"""What every matrix costs on every grid that a budget may choose: bytes and predicted loss, in prices.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lilliput.progress import Progress
from lilliput.recipe_schema import Plugin

PRICES = "prices.json"


@dataclass(frozen=True)
class Held:
    """The folders of what prices are made from."""

    source: Path
    samples: Path
    statistics: Path
    sensitivity: Path


def work(held: Held, grids: Sequence[str], solver: Plugin, folder: Path, progress: Progress) -> None:
    from calibration import allocation
    from calibration.samples import load
    from calibration.sensitivity import Guided, Sensitivity
    from calibration.statistics import Statistics
    from lilliput.source import open_stage

    source, samples, sensitivity = open_stage(held.source), load(held.samples), Sensitivity(held.sensitivity)
    guided = Guided(Statistics(held.statistics), sensitivity)
    prices = allocation.prices(source, guided, sensitivity, samples, grids, solver, progress)
    (folder / PRICES).write_text(prices.model_dump_json(indent=1) + "\n")
