"""Run the float model over the samples, layer by layer, and keep the statistics of every linear's input."""

from __future__ import annotations

from pathlib import Path

from lilliput.progress import Progress


def work(source: Path, samples: Path, folder: Path, progress: Progress) -> None:
    from calibration import statistics
    from calibration.samples import load
    from lilliput.source import open_stage

    statistics.gather(open_stage(source), load(samples), folder, progress)
