"""A run of a file in a process of its own: a crash of a runtime is an error here."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lilliput.errors import ArtifactError, MeasurementError
from lilliput.grid import Float

CHILD_S = 1800.0


def answer(command: Sequence[str], request: Mapping[str, object], scratch: Path, what: Path) -> dict[str, Float]:
    """What the child's script answers to a request, both files in `scratch`: arrays by name."""
    asked, out = scratch / "request.json", scratch / "out.npz"
    asked.write_text(json.dumps({**request, "out": str(out)}))
    _run([*command, str(asked)], what)
    with np.load(out) as found:
        return {name: found[name] for name in found.files}


def _run(command: Sequence[str], what: Path) -> None:
    """Raises ArtifactError with the child's last line where the runtime refuses the file, MeasurementError where the
    child was killed or hung."""
    packages = sysconfig.get_paths()["purelib"]
    env = os.environ | {"PYTHONPATH": packages, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=CHILD_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"{what.name}: its process did not end within {CHILD_S:g} s and was stopped") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        kind = MeasurementError if done.returncode < 0 else ArtifactError
        raise kind(f"{what.name}: the runtime failed (status {done.returncode}): {lines[-1][:400]}")
