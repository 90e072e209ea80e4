"""What tests of far devices share: requests to the rogue runtime, errors within a bounded time, and what is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lilliput.artifact import Artifact
from lilliput.errors import MeasurementError
from targets.request import ArtifactReference, GenerateTask, Request

BOUND_S = 60.0  # of every fault; most take a second or two on an idle machine


def eventually(holds: Callable[[], object]) -> bool:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.05)
    return False


def empty(folder: Path) -> bool:
    return eventually(lambda: not list(folder.iterdir()))


def request(folder: Path, kind: str, runtime: str = "rogue") -> Request:
    folder.mkdir(exist_ok=True)
    (folder / kind).write_text("the artifact")
    artifact = ArtifactReference.of(Artifact(folder, "checkpoint", kind, context=64, prefill=0))
    task = GenerateTask(prompt=(1, 2), max_tokens=5)
    return Request(artifact=artifact, runtime=runtime, threads=1, tasks=(task,))


def fails(work: Callable[[], object]) -> str:
    """The one line that the work ends with, within BOUND_S."""
    start = time.monotonic()
    with pytest.raises(MeasurementError) as caught:
        work()
    assert time.monotonic() - start < BOUND_S
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pids(there: Path) -> list[int]:
    """Of the rogue worker that hangs, and of its child; it writes them beside its artifact."""
    found: list[Path] = []
    assert eventually(lambda: found.extend(there.glob("lilliput-*/*/pids")) or found)
    assert eventually(lambda: len(found[0].read_text().split()) == 2)
    return [int(pid) for pid in found[0].read_text().split()]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
