"""Prove one artifact on its runtime and device: speed, memory, accuracy, the ladder. Gates are judged after it.

    result.json   the TargetResult without gates, so that another limit needs no new measurement
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lilliput.progress import Progress
from lilliput.recipe_schema import Target
from lilliput.results import Gate, TargetResult
from lilliput.stages.export import open_artifact

if TYPE_CHECKING:
    from lilliput.artifact import Artifact

RESULT = "result.json"


@dataclass(frozen=True)
class Held:
    """The folders that a candidate is held against."""

    evaluation: Path
    reference: Path
    dequantized: Path


def work(
    quantized: Path, traced: Path, exported: Path, held: Held, target: Target, folder: Path, progress: Progress
) -> None:
    result = measure(open_artifact(exported), quantized, traced, held, target, progress)
    (folder / RESULT).write_text(result.model_dump_json(indent=2) + "\n")


def judged(folder: Path, gates: tuple[Gate, ...]) -> TargetResult:
    """A validate stage's result with its gates judged."""
    return judge(TargetResult.model_validate_json((folder / RESULT).read_bytes()), gates)
