"""Gather the calibration samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lilliput.progress import Progress


def work(source: Path, options: dict[str, Any], folder: Path, progress: Progress) -> None:
    from calibration import samples
    from lilliput.source import open_stage

    gathered = samples.gather(open_stage(source), samples.SampleOptions.model_validate(options), progress)
    samples.save(gathered, folder)
