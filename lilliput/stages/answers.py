"""The float model's answers to the suites' questions, with their logits: what every target's are held against."""

from __future__ import annotations

from pathlib import Path

from lilliput.progress import Progress


def work(source: Path, asked: Path, context: int, folder: Path, progress: Progress) -> None:
    import torch

    from lilliput import decoder
    from lilliput.source import open_stage
    from targets.answers import QUESTIONS, answer_all, load_questions
    from targets.runtimes.torch_cpu import TorchSession

    with torch.inference_mode():
        session = TorchSession(decoder.build(open_stage(source)), context)
        answer_all(session, load_questions(asked / QUESTIONS), folder, progress)
