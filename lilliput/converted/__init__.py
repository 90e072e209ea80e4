"""A Keras model or SavedModel as an int8 `.tflite` that tensorflow's own converter makes.

    model.keras, model.h5     a whole model; Lambda layers are Python code and only read when asked for
    folder/saved_model.pb     a SavedModel; what touches files or runs code in it, likewise

This is another route than that of traced networks: nothing here solves. TFLiteConverter takes ranges over the
calibration samples and chooses every code (weights int8 per channel, activations int8 per tensor). What comes of it is
judged as any file is (judged.py): against the float model on held-out samples, in two interpreters.

tensorflow is imported in a child process alone (converter_child.py).
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lilliput import child
from lilliput.errors import CalibrationError, MissingPackageError, SourceError
from lilliput.grid import Float

SUFFIXES = (".keras", ".h5", ".hdf5")
SAVED_MODEL = "saved_model.pb"
EXPORTER = "tensorflow_converter"  # of an artifact's `exporter`
RUNTIMES = ("litert_static_cpu", "tensorflow_cpu")  # which must agree
CHILD = Path(__file__).with_name("converter_child.py")


@dataclass(frozen=True, eq=False)
class Converted:
    """The file's bytes, and the held-out samples with the float model's outputs, by name (held out, 1, …)."""

    tflite: bytes
    inputs: dict[str, npt.NDArray[Any]]
    outputs: dict[str, Float]
    calibration_samples: int
    tensorflow: str  # its version
    proof: str  # a sentence for the report

    @property
    def held_out(self) -> int:
        return len(next(iter(self.outputs.values())))


def is_source(path: Path) -> bool:
    """Whether tensorflow's converter reads it."""
    return path.suffix.lower() in SUFFIXES or (path / SAVED_MODEL).is_file()


def convert(path: Path, samples: Path | None, *, held_out: int, most: int, allow_unsafe: bool = False) -> Converted:
    """Convert, calibrated on all but every `held_out`-th of the first `most` samples.

    Raises SourceError for a model that is damaged, has dynamic shapes, unknown objects or Python code that is not
    allowed, or that the converter refuses; CalibrationError for samples that do not fit it or are fewer than
    `held_out`; MissingPackageError without tensorflow. Nothing is left on the disk.
    """
    if find_spec("tensorflow") is None:
        raise MissingPackageError("tensorflow", "litert", "converting a Keras model")
    if samples is None or samples.suffix != ".npz":
        raise CalibrationError(f"{path} needs --samples, an .npz with an array for each input")
    with tempfile.TemporaryDirectory(prefix="lilliput-converted-") as folder:
        scratch = Path(folder)
        request = {
            "model": str(path.resolve()), "samples": str(samples.resolve()), "scratch": folder,
            "tflite": str(scratch / "model.tflite"), "held_out": held_out, "least": held_out, "most": most,
            "allow_unsafe": allow_unsafe,
        }  # fmt: skip
        command = [sys.executable, "-P", str(CHILD)]
        found = child.answer(command, request, scratch, path, who="tensorflow's converter", refused=SourceError)
        if "refused" in found:
            _refuse(path, str(found["refused"]))
        tflite = (scratch / "model.tflite").read_bytes()
    facts = json.loads(str(found["facts"]))
    outputs = {name: np.asarray(array, np.float32) for name, array in _of("output.", found).items()}
    return Converted(tflite, _of("input.", found), outputs, facts["calibration"], facts["tensorflow"], facts["proof"])


def provenance(made: Converted) -> dict[str, str]:
    """Who chose the codes."""
    who = f"tensorflow {made.tensorflow}'s own converter chose codes and ranges, Lilliput solved nothing"
    return {"weights": "int8 weights", "activations": f"int8 activations: {who}"}


def _refuse(path: Path, reason: str) -> None:
    if reason.startswith("--samples"):
        raise CalibrationError(reason)
    raise SourceError(f"{path}: {reason}")


def _of(prefix: str, found: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in found.items() if name.startswith(prefix)}
