"""What a validation needs, tiny: a quantized model with its references; and runtimes that misbehave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import numpy as np
import tiny_models

from lilliput import checkpoint
from lilliput.artifact import Artifact
from lilliput.model import QuantizedModel, SourceModel
from targets import reference
from targets.reference import EvaluationSet, Logits

CHUNKS, LENGTH = 3, 24


@dataclass(frozen=True, eq=False)
class Setting:
    """A float model, the same on its grids, the evaluation tokens and both models' logits."""

    source: SourceModel
    model: QuantizedModel
    evaluation: EvaluationSet
    float_model: Logits
    dequantized: Logits
    artifact: Artifact  # the checkpoint folder, as torch_cpu opens it


def make(folder: Path) -> Setting:
    """Write the setting's parts into `folder`."""
    source = tiny_models.tiny_source(folder)
    model = tiny_models.quantize(source)
    checkpoint.save(model, folder / "checkpoint")
    tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (CHUNKS, LENGTH)).astype(np.int32)
    evaluation = EvaluationSet(tokens, "0" * 64, "random tokens")
    evaluation.save(folder / "evaluation")
    float_model = reference.compute(source.config, source.weights, evaluation, folder / "float")
    weights = {name: model.dequantized(name) for name in source.config.parameter_shapes()}
    dequantized = reference.compute_against(float_model, source.config, weights, evaluation, folder / "dequantized")
    artifact = Artifact(folder / "checkpoint", "checkpoint", "model.json", context=64, prefill=0)
    return Setting(source, model, evaluation, float_model, dequantized, artifact)


def write_rogue(site: Path) -> None:
    """Runtimes `rogue` and `absent` as another distribution's, for Pythons that have `site` in their path."""
    facts = site / "rogue-0.1.dist-info"
    facts.mkdir(parents=True)
    (site / "rogue_runtime.py").write_text(ROGUE)
    (site / "absent_runtime.py").write_text("from rogue_runtime import Absent as Runtime\n")
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: rogue\nVersion: 0.1\n")
    (facts / "entry_points.txt").write_text(
        dedent("""
            [lilliput.runtimes]
            rogue = rogue_runtime
            absent = absent_runtime
        """)
    )


# By the main file's name of the artifact that it opens.
ROGUE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from textwrap import dedent
import numpy as np

class Session:
    def __init__(self, artifact): self.kind, self.folder = artifact.main_file, artifact.folder
    def reset(self): pass
    def prefill(self, tokens): return self.decode(tokens[-1])
    def decode(self, token):
        logits = np.zeros(320, np.float32)
        if self.kind == "nan": logits[7] = np.nan
        if self.kind == "narrow": return logits[:100]
        logits[3 if self.kind == "stuck" else (token + 1) % 320] = 1.0
        return logits
    def close(self): pass

class Runtime:
    exporters, packages, extra = ("checkpoint",), (), "rogue"
    def open(self, artifact, threads, *, exact=False):
        kind = artifact.main_file
        print("stdout noise"); os.write(1, b"[1, 2, 3]\\n"); sys.stdout.flush()
        if kind == "crash": os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "killed": os.kill(os.getpid(), signal.SIGKILL)
        if kind == "raise": raise RuntimeError("the delegate is gone")
        if kind == "quiet": os._exit(0)
        if kind == "hang":
            child = subprocess.Popen(["sleep", "600"])
            (artifact.folder / "pids").write_text(f"{os.getpid()} {child.pid}")
            time.sleep(600)
        return Session(artifact)
    def versions(self): return {"rogue": "0.1"}

class Absent(Runtime):
    packages = ("package_that_is_not_there",)
"""
