"""What a planted defect is, and what planting needs of every format.

A defect spoils a copy of an artifact's folder as a converter, a copy or an editor might. It is caught where a finding
of the wanted rule names the wanted place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lilliput import checks
from lilliput.checks import Checked, Finding
from lilliput.checks.base import Format
from lilliput.checks.comparison import Source

LAYER = 1  # the layer that is spoiled, of models with two and more
BLOCK = 32


@dataclass(frozen=True)
class Defect:
    """`plant` spoils the folder; `rule` must find it at a place that contains `place`."""

    format: Format
    name: str
    rule: str
    place: str
    plant: Callable[[Path], None]
    file: str = ""  # the file that is checked, where it is not the format's own

    @property
    def id(self) -> str:
        return f"{self.format}: {self.name}"

    @property
    def needs_source(self) -> bool:
        return self.rule.startswith("SOURCE-")


MODEL_FILES: Mapping[Format, str] = {"onnx": "model.onnx", "gguf": "model.gguf", "tflite": "model.tflite"}


def spoiled(defect: Defect, artifact: Path, folder: Path, source: Source) -> Checked:
    """Plant a defect into a copy of `artifact` at `folder` (absent), and check that."""
    shutil.copytree(artifact, folder)
    defect.plant(folder)
    return checks.check(folder / (defect.file or MODEL_FILES[defect.format]), source if defect.needs_source else None)


def caught(defect: Defect, checked: Checked) -> Finding | None:
    """The finding that names the defect, or None."""
    return next((f for f in checked.findings if f.rule == defect.rule and defect.place in f.place), None)


def round_to_nearest(values: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Codes in [-7, 7] of (rows, cols) in blocks of 32, and float16 scales (rows, n_blocks)."""
    rows = len(values)
    blocks = values.reshape(rows, -1, BLOCK)
    scales = (np.abs(blocks).max(-1) / 7).astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint(blocks / np.maximum(scales, 1e-8)[..., None]), -7, 7).astype(np.int8)
    return codes.reshape(rows, -1), scales


def swap_nibbles(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.asarray((data >> 4) | (data << 4), np.uint8)


def pack_neighbours(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Two codes to a byte, the first in the low nibble, in two's complement."""
    nibbles = (codes.reshape(-1) & 15).astype(np.uint8)
    return np.asarray(nibbles[0::2] | (nibbles[1::2] << 4), np.uint8)
