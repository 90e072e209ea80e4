"""Accuracy of the shipped artifact and of its exact twin, in workers of one thread each, side by side.

A worker scores a range of chunks. Workers of one thread never wait for each other, so that all cores are
busy and a busy machine only slows them; threads that wait for each other at every layer would stall there.
The figures do not depend on how many workers there are. The slow exact twin starts first.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lilliput.artifact import Artifact
from lilliput.errors import MeasurementError
from lilliput.progress import Progress
from targets.metrics import TokenMetrics
from targets.request import AccuracyTask, ArtifactReference, Reply, Request

Run = Callable[[Request, Progress], Reply]
EXACT_WEIGHT = 3  # an exact position takes about as long as so many shipped ones
RANGES_PER_SLOT = 2  # smaller pieces end together


@dataclass(frozen=True)
class Subject:
    """What to score, on the first `chunks` of the evaluation."""

    name: Literal["exact", "shipped"]
    artifact: Artifact
    chunks: int

    @property
    def weight(self) -> int:
        return EXACT_WEIGHT if self.name == "exact" else 1


@dataclass(frozen=True, eq=False)
class Scored:
    """Figures of a subject's chunks; None where `missing` says why there are none."""

    metrics: TokenMetrics | None
    missing: str = ""


@dataclass(frozen=True)
class _Part:
    """One worker's work: `size` is in shipped positions."""

    subject: Subject
    request: Request
    size: int


def score(
    subjects: Sequence[Subject], runtime: str, task: AccuracyTask, run: Run, slots: int, progress: Progress
) -> dict[str, Scored]:
    """Score the subjects on up to `slots` workers at a time; each one's figures stay in {task.metrics_out}/{name}.npz.

    `task` says everything but the chunks; its metrics_out is a folder. A worker's MeasurementError makes its
    subject's figures missing; any other error stops all workers.
    """
    scored = _scored(task)
    parts = [part for subject in subjects for part in _parts(subject, runtime, task, slots, scored)]
    tally = _Tally(progress, sum(part.size for part in parts))
    with ThreadPoolExecutor(slots) as pool:
        futures = [pool.submit(_run, run, part, tally.of(part)) for part in parts]
        try:
            outcomes = [future.result() for future in futures]
        except BaseException:  # also an interrupt: workers end at their next sign of progress
            tally.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    pairs = list(zip(parts, outcomes, strict=True))
    return {s.name: _gather(s, [found for part, found in pairs if part.subject == s], task) for s in subjects}


def _scored(task: AccuracyTask) -> int:
    import numpy as np

    return int(np.load(task.tokens, mmap_mode="r").shape[1]) - task.scored_from


def _parts(subject: Subject, runtime: str, task: AccuracyTask, slots: int, scored: int) -> list[_Part]:
    """Ranges of nearly equal length."""
    count = min(subject.chunks, 1 if slots == 1 else RANGES_PER_SLOT * slots)
    bounds = [subject.chunks * i // count for i in range(count + 1)]
    parts = []
    for first, end in itertools.pairwise(bounds):
        out = task.metrics_out / f"{subject.name}-{first}.npz"
        piece = task.model_copy(update={"first": first, "chunks": end - first, "metrics_out": out})
        request = Request(
            artifact=ArtifactReference.of(subject.artifact),
            runtime=runtime,
            threads=1,
            exact=subject.name == "exact",
            tasks=(piece,),
        )
        parts.append(_Part(subject, request, subject.weight * (end - first) * scored))
    return parts


def _run(run: Run, part: _Part, progress: Progress) -> Path | str:
    """Where the part's figures are, or why there are none."""
    try:
        reply = run(part.request, progress)
    except MeasurementError as error:
        return str(error)
    assert reply.metrics is not None
    return reply.metrics


def _gather(subject: Subject, found: list[Path | str], task: AccuracyTask) -> Scored:
    """One subject's figures from its parts', which are removed."""
    for reason in found:
        if isinstance(reason, str):
            return Scored(None, reason)
    paths = [path for path in found if isinstance(path, Path)]
    metrics = TokenMetrics.concatenate([TokenMetrics.load(path) for path in paths])
    metrics.save(task.metrics_out / f"{subject.name}.npz")
    for path in paths:
        path.unlink()
    return Scored(metrics)


class _StoppedError(Exception):
    """Raised in a worker's thread at its next sign of progress: nobody waits for it any more."""


class _Tally:
    """One progress of all parts, told from several threads."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._lock, self._stopped = threading.Lock(), False

    def stop(self) -> None:
        self._stopped = True

    def of(self, part: _Part) -> Progress:
        seen = 0

        def advance(done: int, total: int) -> None:
            nonlocal seen
            with self._lock:
                if self._stopped:
                    raise _StoppedError
                now = part.size * done // total
                self._done, seen = self._done + now - seen, now
                self._progress(self._done, self._total)

        return advance
