"""What a worker's end means: its reply, or one error that says why there is none."""

from __future__ import annotations

import signal

from lilliput.errors import MeasurementError, MissingPackageError
from targets.process import Ended
from targets.request import Reply, Request


def judged(request: Request, ended: Ended, reply: Reply | None, free: str, device: str = "host") -> Reply:
    """The reply of a worker that did its work; `free` says how much memory its machine has now.

    Raises MissingPackageError for a package that it lacks, MeasurementError for any other end.
    """
    where = "" if device == "host" else f" on {device}"
    if reply is not None and reply.missing is not None:
        raise MissingPackageError(reply.missing.package, reply.missing.extra, f"runtime {request.runtime!r}{where}")
    if ended.stopped or reply is None or reply.error is not None:
        what = f"{request.runtime} on {request.artifact.main_file}{where and f' ({device})'}"
        raise MeasurementError(f"{what} {_why(ended, reply, free)}")
    return reply


def _why(ended: Ended, reply: Reply | None, free: str) -> str:
    """The tail of the error's line."""
    last = ended.last_words
    tail = f"; it last wrote: {last}" if last else ""
    if ended.stopped:
        return ended.stopped + tail
    if reply is not None and reply.error is not None:
        return f"failed: {reply.error}"
    number = _signal(ended.status)
    if number == signal.SIGKILL:
        return f"was killed by the system, most likely for want of memory ({free}){tail}"
    if number is not None:
        return f"crashed with {number.name}{tail}"
    return f"ended with status {ended.status} and no reply{tail}"


def _signal(status: int) -> signal.Signals | None:
    """The signal that ended it: −n from subprocess, 128 + n from a shell."""
    number = -status if status < 0 else status - 128
    return signal.Signals(number) if number in {int(s) for s in signal.Signals} else None
