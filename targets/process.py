"""A local command that reports progress: followed to its end, or stopped with all that it started.

It leads a process group, which is killed as a whole when the command takes longer than its limit, reports no progress
for too long, or when this process is interrupted. Each line of its standard output is a JSON list [done, total];
its standard input stays open and empty, and closes when this process ends: who reads it can end too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from lilliput.progress import Progress

LINES_SHOWN = 4
PROGRESS_LINE = re.compile(rb"\[\d+, \d+\]")


class Limits(BaseModel):
    """How long a worker may take as a whole, and between two signs of progress (loading has none)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit_s: float = Field(3600.0, gt=0)
    stall_s: float = Field(300.0, gt=0)


@dataclass(frozen=True)
class Ended:
    """How a command ended: `stopped` says why we killed it, where we did. `status` < 0 is a signal's number."""

    status: int
    stopped: str | None
    stderr: str

    @property
    def last_words(self) -> str:
        """The end of what it wrote to standard error, in one line; "" where it wrote nothing."""
        lines = [line.strip() for line in self.stderr.splitlines()[-LINES_SHOWN:]]
        return " | ".join(line for line in lines if line)


def follow(
    command: Sequence[str], log: Path, limits: Limits, progress: Progress, env: Mapping[str, str] | None = None
) -> Ended:
    """Run to its end or kill it; nothing of its process group is left when this returns or raises.

    Standard error goes to the file `log`; `env` is added to this process's environment.
    """
    with log.open("wb") as stderr:
        worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=os.environ | (env or {}),
            start_new_session=True,
        )
    try:
        stopped = _follow(worker, limits, progress)
    finally:
        kill_group(worker)
    return Ended(worker.returncode, stopped, log.read_text(errors="replace"))


def _follow(worker: subprocess.Popen[bytes], limits: Limits, progress: Progress) -> str | None:
    """Pass progress on until the worker ends; or the reason why it must be killed."""
    assert worker.stdout is not None
    deadline, unfinished = time.monotonic() + limits.limit_s, b""
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        while True:
            patience_s = min(limits.stall_s, deadline - time.monotonic())
            if patience_s <= 0:
                return f"did not end within {limits.limit_s:g} s and was stopped: raise the device's limit_s"
            if not selector.select(patience_s):
                if patience_s < limits.stall_s:
                    continue
                return f"made no progress for {limits.stall_s:g} s and was stopped: raise the device's stall_s"
            data = os.read(worker.stdout.fileno(), 65536)
            if not data:
                break
            unfinished = _pass_on(unfinished + data, progress)
    patience_s = min(limits.stall_s, deadline - time.monotonic())
    return None if _ends_within(worker.pid, patience_s) else "answered but did not end, and was stopped"


def _ends_within(pid: int, patience_s: float) -> bool:
    """Wait without reaping: until then the process group's id cannot become another's."""
    until = time.monotonic() + patience_s
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True


def _pass_on(data: bytes, progress: Progress) -> bytes:
    """Tell of the last whole line; what follows it. Other lines are a far shell's greetings."""
    *lines, unfinished = data.split(b"\n")
    reports = [line for line in lines if PROGRESS_LINE.fullmatch(line.strip())]
    if reports:
        done, total = json.loads(reports[-1])
        progress(done, total)
    return unfinished


def kill_group(worker: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and the group."""
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            pipe.close()
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the whole group has ended
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
