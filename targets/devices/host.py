"""This machine as a device: each request runs in a worker process of its own.

The worker leads a process group, which is killed as a whole when the worker takes longer than its limit,
reports no progress for too long, or when this process is interrupted; if this process is itself killed,
the worker sees its standard input close and ends. A worker that crashed, hung or was killed by the system
becomes one MeasurementError with the last lines that it wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from lilliput.errors import MeasurementError, MissingPackageError
from lilliput.progress import Progress, silent
from lilliput.results import Host
from targets import machine
from targets.request import Reply, Request

STDERR_LINES = 4
WORKER = (sys.executable, "-P", "-X", "faulthandler", "-m", "targets.worker")


class Options(BaseModel):
    """How long a worker may take as a whole, and between two signs of progress (loading has none)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit_s: float = Field(3600.0, gt=0)
    stall_s: float = Field(300.0, gt=0)


class Device:
    """The machine that this process runs on."""

    Options: ClassVar[type[BaseModel]] = Options

    def describe(self) -> Host:
        return machine.describe("host")

    def threads(self) -> int:
        return machine.usable_cores()

    def run(self, request: Request, options: BaseModel, progress: Progress = silent) -> Reply:
        assert isinstance(options, Options)
        with tempfile.TemporaryDirectory(prefix="lilliput-") as name:
            folder = Path(name)
            (folder / "request.json").write_text(request.model_dump_json())
            what = f"{request.runtime} on {request.artifact.main_file}"
            ended = _run_worker(folder, options, progress)
            reply = _reply(folder / "reply.json")
            stderr = (folder / "stderr.txt").read_text(errors="replace")
        _raise_missing(reply, request.runtime)
        if ended.stopped or reply is None or reply.error is not None:
            raise MeasurementError(f"{what} {_why(ended, reply, stderr)}")
        return reply


@dataclass(frozen=True)
class _Ended:
    """How a worker ended: `stopped` says why we killed it, where we did."""

    status: int
    stopped: str | None


def _run_worker(folder: Path, options: Options, progress: Progress) -> _Ended:
    """Run to its end or kill it; nothing of its process group is left when this returns or raises."""
    command = [*WORKER, str(folder / "request.json"), str(folder / "reply.json")]
    # The worker's numpy must not compete with the runtime's threads.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    with (folder / "stderr.txt").open("wb") as stderr:
        worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            start_new_session=True,
        )
    try:
        stopped = _follow(worker, options, progress)
    finally:
        _kill_group(worker)
    return _Ended(worker.returncode, stopped)


def _follow(worker: subprocess.Popen[bytes], options: Options, progress: Progress) -> str | None:
    """Pass progress on until the worker ends; or the reason why it must be killed."""
    assert worker.stdout is not None
    deadline = time.monotonic() + options.limit_s
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        while True:
            patience_s = min(options.stall_s, deadline - time.monotonic())
            if patience_s <= 0:
                return f"did not end within {options.limit_s:g} s and was stopped: raise the device's limit_s"
            if not selector.select(patience_s):
                if patience_s < options.stall_s:
                    continue
                return f"made no progress for {options.stall_s:g} s and was stopped: raise the device's stall_s"
            if not _pass_on(worker.stdout, progress):
                break
    patience_s = min(options.stall_s, deadline - time.monotonic())
    return None if _ends_within(worker.pid, patience_s) else "answered but did not end, and was stopped"


def _ends_within(pid: int, patience_s: float) -> bool:
    """Wait without reaping: until then the process group's id cannot become another's."""
    until = time.monotonic() + patience_s
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True


def _pass_on(stdout: IO[bytes], progress: Progress) -> bool:
    """Read what there is; False at the end. Lines are far shorter than a pipe's atomic write."""
    data = os.read(stdout.fileno(), 65536)
    lines = data.splitlines()
    if lines:
        done, total = json.loads(lines[-1])
        progress(done, total)
    return bool(data)


def _kill_group(worker: subprocess.Popen[bytes]) -> None:
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            pipe.close()
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the whole group has ended
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _reply(path: Path) -> Reply | None:
    return Reply.model_validate_json(path.read_bytes()) if path.exists() else None


def _raise_missing(reply: Reply | None, runtime: str) -> None:
    if reply is not None and reply.missing is not None:
        raise MissingPackageError(reply.missing.package, reply.missing.extra, f"runtime {runtime!r}")


def _why(ended: _Ended, reply: Reply | None, stderr: str) -> str:
    """The tail of the error's line."""
    last = " | ".join(line.strip() for line in stderr.splitlines()[-STDERR_LINES:] if line.strip())
    tail = f"; it last wrote: {last}" if last else ""
    if ended.stopped:
        return ended.stopped + tail
    if reply is not None and reply.error is not None:
        return f"failed: {reply.error}"
    if ended.status == -signal.SIGKILL:
        free_gb = machine.available_memory_bytes() / 1e9
        return f"was killed by the system, most likely for want of memory ({free_gb:.1f} GB are available now){tail}"
    if ended.status < 0:
        return f"crashed with {signal.Signals(-ended.status).name}{tail}"
    return f"ended with status {ended.status} and no reply{tail}"
