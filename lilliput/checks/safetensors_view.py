"""Safetensors files as rules see them: float tensors by name, from one file or the shards of one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from lilliput.checks.opened import Tensor
from lilliput.grid import Float
from lilliput.inspection.found import TensorFound


def tensors(files: list[Path], found: tuple[TensorFound, ...]) -> tuple[Tensor, ...]:
    """Each tensor in the file that holds it; integers are left out."""
    from safetensors import safe_open

    where: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    floats = [t for t in found if t.dtype.startswith(("F", "BF"))]
    return tuple(Tensor(t.name, t.role, t.dtype, t.shape, 0, partial(_read, where[t.name], t.name)) for t in floats)


def _read(file: Path, name: str) -> Float:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return np.asarray(opened.get_tensor(name).float().numpy(), np.float32)
