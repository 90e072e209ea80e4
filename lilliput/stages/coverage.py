"""What the calibration samples hold of what will be judged, and that they share no text with it: before long work.

coverage.json    lilliput.report.Coverage
"""

from __future__ import annotations

from pathlib import Path

from lilliput.progress import Progress
from lilliput.report import Coverage, Slice

NAME = "coverage.json"


def work(source: Path, samples: Path, evaluation: Path, folder: Path, progress: Progress) -> None:
    """Raises CalibrationError where the two texts are the same in part."""
    from calibration import coverage
    from calibration.overlap import overlap, refuse
    from calibration.samples import load
    from lilliput.source import open_stage
    from lilliput.tokenizer_folder import load_tokenizer
    from targets.reference import EvaluationSet

    tokenizer = load_tokenizer(open_stage(source).tokenizer)
    gathered, judged = load(samples), EvaluationSet.load(evaluation)
    found = overlap(gathered.tokens, judged.tokens)
    refuse(found, judged.tokens, (gathered.provenance.description, judged.description), tokenizer.decode)
    held, wanted = (coverage.shares(tokens, tokenizer) for tokens in (gathered.tokens, judged.tokens))
    made = Coverage(
        slices=tuple(
            Slice(name=name, calibration=held.get(name, 0.0), evaluation=wanted.get(name, 0.0))
            for name in sorted({*held, *wanted})
        ),
        warnings=coverage.warnings(held, wanted),
        shared=found.share,
    )
    (folder / NAME).write_text(made.model_dump_json(indent=2) + "\n")
    progress(1, 1)


def load(folder: Path) -> Coverage:
    """Read what `work` wrote."""
    return Coverage.model_validate_json((folder / NAME).read_bytes())
