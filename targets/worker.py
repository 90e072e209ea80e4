"""The worker process: `python -m targets.worker REQUEST.json REPLY.json` (see targets.request).

Standard output carries progress lines alone; whatever a runtime prints goes to standard error. The worker
ends itself when its standard input closes: a parent that was killed leaves nothing running.

Exit status 0: the reply holds the figures. 1: it holds an error. Anything else: the process was ended from
outside or crashed, and there may be no reply.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from lilliput import registry
from lilliput.errors import LilliputError
from lilliput.progress import Progress
from targets.base import Runtime, Session
from targets.request import (
    AccuracyTask,
    CountTask,
    GenerateTask,
    LatencyTask,
    LogitsTask,
    MissingPackage,
    Reply,
    Request,
    SuiteTask,
    Task,
)

PROGRESS_EVERY_S = 0.2
MARK = 0x5EED


def main() -> int:
    """Answer the request; the process's exit status."""
    lines = claim_stdout()
    threading.Thread(target=end_with_parent, daemon=True).start()
    request_path, reply_path = map(Path, sys.argv[1:3])
    request = Request.model_validate_json(request_path.read_bytes())
    reply = answer(request, report_to(lines))
    partial = reply_path.with_suffix(".partial")
    partial.write_text(reply.model_dump_json())
    partial.replace(reply_path)
    return 0 if reply.error is None and reply.missing is None else 1


def answer(request: Request, progress: Progress) -> Reply:
    """Do all tasks. An error of ours ends the work and is in the reply; any other is a crash, with its traceback."""
    runtime: Runtime = registry.load("runtimes", request.runtime)()
    for package in runtime.packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            return Reply(missing=MissingPackage(package=error.name or package, extra=runtime.extra))
    reply = Reply(versions=runtime.versions())
    artifact = request.artifact.artifact()
    work = _Work(functools.partial(runtime.open, artifact, request.threads, exact=request.exact), progress)
    try:
        for task in request.tasks:
            reply = work.do(task, reply, request.threads)
    except LilliputError as error:
        return reply.model_copy(update={"error": str(error)})
    finally:
        work.close()
    return reply


class _Work:
    """The session, opened by the first task: a latency task times that."""

    def __init__(self, open_session: Callable[[], Session], progress: Progress) -> None:
        self._open, self._progress = open_session, progress
        self._session: Session | None = None

    def do(self, task: Task, reply: Reply, threads: int) -> Reply:
        """The reply with what the task found."""
        from targets import accuracy, answers, measure

        if isinstance(task, LatencyTask):
            self.close()
            found, self._session = measure.measure(self._open, threads, task, self._progress)
            return reply.model_copy(update={"latency": found})
        self._session = self._session or self._open()
        if isinstance(task, AccuracyTask):
            accuracy.measure(self._session, task, self._progress).save(task.metrics_out)
            return reply.model_copy(update={"metrics": task.metrics_out})
        if isinstance(task, LogitsTask):
            accuracy.record(self._session, task, self._progress)
            return reply.model_copy(update={"logits": task.logits_out})
        if isinstance(task, SuiteTask):
            questions = answers.load_questions(task.questions)
            answered = answers.compare_all(self._session, questions, task.reference, self._progress)
            answers.save_answers(answered, task.answers_out)
            return reply.model_copy(update={"answers": task.answers_out})
        if isinstance(task, CountTask):
            count(self._session, task)
            return reply
        assert isinstance(task, GenerateTask)
        return reply.model_copy(update={"generated": generate(self._session, task)})

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


def count(session: Session, task: CountTask) -> None:
    """Decode the last `steps` tokens between the marks 1 and 2 (targets/devices/arm/count.c).

    Python's collector would come when it will: it is off meanwhile, so that the counts repeat.
    """
    mark = ctypes.CDLL(None).getpriority
    session.reset()
    session.prefill(task.tokens[: -task.steps])
    gc.collect()
    gc.disable()
    mark(MARK, 1)
    for token in task.tokens[-task.steps :]:
        session.decode(token)
    mark(MARK, 2)
    gc.enable()


def generate(session: Session, task: GenerateTask) -> tuple[int, ...]:
    """Greedy tokens, the stop token left out."""
    session.reset()
    token, tokens = int(session.prefill(task.prompt).argmax()), list[int]()
    while token not in task.stop_tokens and len(tokens) < task.max_tokens:
        tokens.append(token)
        token = int(session.decode(token).argmax())
    return tuple(tokens)


def claim_stdout() -> TextIO:
    """Standard output for us alone; file descriptor 1 becomes standard error, also for C libraries."""
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return ours


def report_to(lines: TextIO) -> Progress:
    """Progress lines, not too many of them."""
    last_s = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s < PROGRESS_EVERY_S and done < total:
            return
        last_s = time.monotonic()
        print(json.dumps([done, total]), file=lines, flush=True)

    return progress


def end_with_parent() -> None:
    """Wait for the end of standard input, whose other end only the parent holds; take our own children along."""
    while os.read(0, 4096):
        pass
    if os.getpgrp() == os.getpid():  # a group of our own, as targets.process makes it
        os.killpg(0, signal.SIGKILL)
    os._exit(70)


if __name__ == "__main__":
    sys.exit(main())
