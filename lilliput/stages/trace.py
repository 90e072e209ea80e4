"""Trace the decoder: trace.json. Weights are not needed, only the configuration."""

from __future__ import annotations

from pathlib import Path

from lilliput import trace_file
from lilliput.progress import Progress


def work(source: Path, context: int, prefill: int, folder: Path, progress: Progress) -> None:
    import torch

    from lilliput.decoder import Decoder
    from lilliput.source import open_stage
    from lilliput.trace import trace

    with torch.device("meta"):
        decoder = Decoder(open_stage(source).config)
    trace_file.save(trace(decoder, context, prefill), folder / "trace.json")
    progress(1, 1)
