"""Load the float model: weights, configuration and tokenizer in the decoder's own terms, proven."""

from __future__ import annotations

from pathlib import Path

from lilliput.progress import Progress
from lilliput.recipe_schema import ModelSpec


def work(spec: ModelSpec, folder: Path, progress: Progress) -> None:
    from lilliput.source import load

    load(
        spec.source,
        folder,
        allow_pickle=spec.allow_pickle,
        allow_remote_code=spec.allow_remote_code,
        progress=progress,
    )
