"""The float model's logits on the evaluation text: what every target is held against."""

from __future__ import annotations

from pathlib import Path

from lilliput.progress import Progress


def work(source: Path, evaluation: Path, folder: Path, progress: Progress) -> None:
    from lilliput.source import open_stage
    from targets.reference import EvaluationSet, compute

    model = open_stage(source)
    compute(model.config, model.weights, EvaluationSet.load(evaluation), folder, progress)
