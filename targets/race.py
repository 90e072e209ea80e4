"""Two artifacts decode side by side in one process of their own: `python -m targets.race REQUEST.json REPLY.json`.

A contender is a session with a cache of `depth` tokens; its step decodes one more. The protocol is that of
targets.duel, the process that of targets.worker: progress on standard output, gone when its parent is.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

from lilliput import registry
from lilliput.errors import InputError, LilliputError, MeasurementError
from lilliput.progress import Progress
from lilliput.results import Record
from targets.base import Session
from targets.duel import Duel, Rules, duel
from targets.process import Limits, follow
from targets.request import ArtifactReference
from targets.worker import claim_stdout, end_with_parent, report_to

DEPTH = 16
TOKEN = 7  # every vocabulary has it; a step costs the same whatever the token is
COMMAND = (sys.executable, "-P", "-X", "faulthandler", "-m", "targets.race")
LIMITS = Limits(limit_s=3600.0, stall_s=300.0)
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}


class Side(Record):
    """An artifact and what runs it."""

    artifact: ArtifactReference
    runtime: str


class Request(Record):
    a: Side
    b: Side
    threads: int
    max_rise: float  # of A's time a step, as a share


class Reply(Record):
    duel: Duel | None = None
    error: str | None = None


class Decoding:
    """A contender: each step decodes a token after the ones before."""

    def __init__(self, side: Side, threads: int, depth: int) -> None:
        session: Session = registry.load("runtimes", side.runtime)().open(side.artifact.artifact(), threads)
        if not hasattr(session, "decode"):
            session.close()
            raise InputError(f"{side.artifact.main_file} runs whole inputs, wanted a model that decodes tokens")
        self._session = session
        session.reset()
        session.prefill([TOKEN] * depth)

    def step(self) -> object:
        return self._session.decode(TOKEN)

    def close(self) -> None:
        self._session.close()


def race(request: Request, progress: Progress) -> Duel:
    """In a process of its own. Raises MeasurementError where that fails, crashes or hangs."""
    with tempfile.TemporaryDirectory(prefix="lilliput-") as name:
        folder = Path(name)
        asked, answered = folder / "request.json", folder / "reply.json"
        asked.write_text(request.model_dump_json())
        command = [*COMMAND, str(asked), str(answered)]
        ended = follow(command, folder / "stderr.txt", LIMITS, progress, ENVIRONMENT)
        reply = Reply.model_validate_json(answered.read_bytes()) if answered.exists() else Reply()
    if reply.duel is None:
        why = ended.stopped or reply.error or f"ended with status {ended.status}; it last wrote: {ended.last_words}"
        raise MeasurementError(f"{request.a.artifact.main_file} against {request.b.artifact.main_file}: {why}")
    return reply.duel


def answer(request: Request, progress: Progress) -> Reply:
    """Every step fits into the smaller cache."""
    rules = Rules(max_rise=request.max_rise)
    steps = rules.pairs + rules.warm_up
    depth = min(DEPTH, min(side.artifact.context for side in (request.a, request.b)) - steps)
    if depth < 1:
        return Reply(error=f"a context of less than {steps + 1} positions is too small to be timed")
    a, b = (partial(Decoding, side, request.threads, depth) for side in (request.a, request.b))
    try:
        return Reply(duel=duel(a, b, rules, progress))
    except LilliputError as error:
        return Reply(error=str(error))


def main() -> int:
    """Answer the request; the process's exit status."""
    lines = claim_stdout()
    threading.Thread(target=end_with_parent, daemon=True).start()
    request = Request.model_validate_json(Path(sys.argv[1]).read_bytes())
    reply = answer(request, report_to(lines))
    partial_path = Path(sys.argv[2]).with_suffix(".partial")
    partial_path.write_text(reply.model_dump_json())
    partial_path.replace(sys.argv[2])
    return 0 if reply.error is None else 1


if __name__ == "__main__":
    sys.exit(main())
