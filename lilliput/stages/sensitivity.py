"""Forward and back through the float model over a few of the samples: what an error of each matrix costs."""

from __future__ import annotations

from pathlib import Path

from lilliput.progress import Progress


def work(source: Path, samples: Path, seed: int, folder: Path, progress: Progress) -> None:
    from calibration import sensitivity
    from calibration.samples import load
    from lilliput.source import open_stage

    sensitivity.gather(open_stage(source), load(samples), folder, seed=seed, progress=progress)
