"""A script in a process of its own, asked by a JSON file and answering with arrays: a crash in it is an error here."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lilliput.errors import ArtifactError, LilliputError, MeasurementError

CHILD_S = 1800.0


def answer(
    command: Sequence[str], request: Mapping[str, object], scratch: Path, what: Path, *,
    who: str = "the runtime", refused: type[LilliputError] = ArtifactError,
) -> dict[str, npt.NDArray[Any]]:  # fmt: skip
    """What the child's script answers to a request, both files in `scratch`: arrays by name.

    Raises `refused` with the child's last line where it failed, MeasurementError where it was killed or hung.
    """
    asked, out = scratch / "request.json", scratch / "out.npz"
    asked.write_text(json.dumps({**request, "out": str(out)}))
    packages = sysconfig.get_paths()["purelib"]
    env = os.environ | {"PYTHONPATH": packages, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*command, str(asked)], capture_output=True, text=True, env=env, timeout=CHILD_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"{what.name}: its process did not end within {CHILD_S:g} s and was stopped") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        kind = MeasurementError if done.returncode < 0 else refused
        raise kind(f"{what.name}: {who} failed (status {done.returncode}): {lines[-1][:400]}")
    with np.load(out) as found:
        return {name: found[name] for name in found.files}
