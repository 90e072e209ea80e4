"""Runs recipes one after the other, each in a forked process, and kills some of them: used by test_pipeline.

    python run_driver.py JOBS.json EVENTS.jsonl

A job is {"recipe", "out", "cache", "overrides", "targets", "fresh", "kill": [stage, "start" | "middle"] | null}. Each
process appends what its watcher is told: [job, "started" | "built" | "cached", stage], and [job, "exit", code or
error]. The heavy packages are imported once, before the first fork: a run then costs its own work only.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ["USE_TF"] = "0"


class Events:
    """Lines that are on disk before the process can be killed."""

    def __init__(self, path: Path, job: int) -> None:
        self._file, self._job = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), job

    def add(self, event: str, what: str | int) -> None:
        os.write(self._file, f"{json.dumps([self._job, event, what])}\n".encode())


class Killer:
    """A pipeline.Watcher that ends its own process at the chosen stage: before its work, or at its first progress."""

    def __init__(self, events: Events, kill: list[str] | None) -> None:
        self._events, self._kill = events, kill

    def started(self, stage: Any) -> Any:
        self._events.add("started", stage.name)
        if self._kill == [stage.name, "start"]:
            os.kill(os.getpid(), signal.SIGKILL)

        def progress(done: int, total: int) -> None:
            if self._kill == [stage.name, "middle"]:
                os.kill(os.getpid(), signal.SIGKILL)

        return progress

    def finished(self, stage: Any) -> None:
        self._events.add("cached" if stage.cached else "built", stage.name)


def answer(job: dict[str, Any], events: Events) -> int:
    from lilliput import pipeline
    from lilliput.errors import LilliputError
    from lilliput.recipe import load

    os.environ["LILLIPUT_CACHE"] = job["cache"]
    try:
        recipe = load(job["recipe"], job.get("overrides", []))
        plan = pipeline.plan(recipe, Path(job["out"]), job.get("targets", []), None, job.get("fresh", False))
        done = pipeline.run(plan, Killer(events, job.get("kill")))
    except LilliputError as error:
        events.add("error", str(error))
        return error.exit_code
    return done.exit_code


def forked(job: dict[str, Any], events: Events) -> int:
    child = os.fork()
    if child == 0:
        try:
            code = answer(job, events)
        except BaseException:
            traceback.print_exc()
            code = 70
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main() -> None:
    import safetensors.torch
    import torch
    import transformers

    assert safetensors.torch
    assert transformers.AutoTokenizer
    torch.set_num_threads(1)
    for number, job in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        events = Events(Path(sys.argv[2]), number)
        events.add("exit", forked(job, events))


if __name__ == "__main__":
    main()
