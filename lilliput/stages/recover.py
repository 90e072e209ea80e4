"""Train the solved model on its grids: the checkpoint that ships, and recovery.json, what it cost and bought."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from lilliput.progress import Progress
from lilliput.recipe_schema import Recover

FACTS = "recovery.json"


def work(source: Path, solved: Path, samples: Path, options: Recover, folder: Path, progress: Progress) -> None:
    from calibration import adapters, qat
    from calibration.samples import load
    from lilliput import checkpoint
    from lilliput.source import open_stage
    from lilliput.store import unfinished

    with unfinished(folder) as kept:
        train = qat.recover if options.method == "qat" else adapters.recover
        model, found = train(open_stage(source), checkpoint.load(solved), load(samples), options, kept, progress)
        checkpoint.save(model, folder)
        (folder / FACTS).write_text(json.dumps(asdict(found), indent=2) + "\n")


def note(folder: Path, subject: str) -> str:
    """What a training cost and bought, in a sentence."""
    found = json.loads((folder / FACTS).read_text())
    fell = f"{found['kld_before']:.4f} to {found['kld_after']:.4f}"
    if found["kld_reconstructed"] is not None:
        fell += f" ({found['kld_reconstructed']:.4f} when its layers were reconstructed)"
    if found["kld_unmerged"] is not None:
        fell += f" ({found['kld_unmerged']:.4f} with the adapters beside their base)"
    verdict = "" if found["kept"] else "; it did not fall, so the solved model ships"
    return (
        f"{found['method']} of {subject}: {found['steps']} steps, {found['tokens']} tokens, {found['seconds']:.0f} s; "
        f"mean KLD on {found['held_out_tokens']} tokens of the samples that were held out {fell}{verdict}"
    )
