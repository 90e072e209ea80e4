"""This machine as a device: each request runs in a worker process of its own.

Nothing is copied: the worker reads and writes this machine's files. If this process is itself killed, the worker
sees its standard input close and ends. A worker that crashed, hung or was killed by the system becomes one
MeasurementError with the last lines that it wrote.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import ClassVar

from pydantic import BaseModel

from lilliput.progress import Progress, silent
from lilliput.results import Host
from targets import machine, outcome, probe
from targets.probe import Probe
from targets.process import Limits, follow
from targets.request import Reply, Request

WORKER = (sys.executable, "-P", "-X", "faulthandler", "-m", "targets.worker")
# The worker's numpy must not compete with the runtime's threads.
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}


class Options(Limits):
    """The limits of a worker."""


class Device:
    """The machine that this process runs on."""

    Options: ClassVar[type[BaseModel]] = Options

    def describe(self, options: BaseModel) -> Host:
        return machine.describe("host")

    def open(self, options: BaseModel) -> HostConnection:
        assert isinstance(options, Options)
        return HostConnection(options)


class HostConnection:
    """Workers of this process, each with a temporary folder of its own."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def probe(self) -> Probe:
        return probe.here("host", Path(tempfile.gettempdir()))

    def push(self, path: Path) -> PurePath:
        return path

    def run(self, request: Request, progress: Progress = silent) -> Reply:
        return self.answer(request, WORKER, progress)

    def answer(self, request: Request, worker: Sequence[str], progress: Progress, device: str = "host") -> Reply:
        """What a worker that is started so replies."""
        with tempfile.TemporaryDirectory(prefix="lilliput-") as name:
            folder = Path(name)
            asked, answered = folder / "request.json", folder / "reply.json"
            asked.write_text(request.model_dump_json())
            command = [*worker, str(asked), str(answered)]
            ended = follow(command, folder / "stderr.txt", self._options, progress, ENVIRONMENT)
            reply = Reply.model_validate_json(answered.read_bytes()) if answered.exists() else None
        free = f"{machine.available_memory_bytes() / 1e9:.1f} GB are available now"
        return outcome.judged(request, ended, reply, free, device)

    def pull(self, there: PurePath, here: Path) -> None:
        shutil.copyfile(there, here)

    def close(self) -> None:
        """Every worker has ended with its request."""
