"""Scoring in parts: the same figures however it is cut, and what a failure or an interrupt leaves."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_setting import CHUNKS, LENGTH, Setting

from lilliput.errors import MeasurementError
from lilliput.progress import Progress, silent
from targets import accuracy
from targets.metrics import TokenMetrics
from targets.request import AccuracyTask, Reply, Request
from targets.runtimes.torch_cpu import Runtime
from targets.scoring import Subject, score


def task(setting: Setting, folder: Path) -> AccuracyTask:
    return AccuracyTask(
        tokens=setting.float_model.folder.parent / "evaluation" / "tokens.npy",
        scored_from=LENGTH // 2,
        chunks=CHUNKS,
        reference=setting.float_model.path,
        dequantized=setting.dequantized.path,
        metrics_out=folder,
    )


class InProcess:
    """Answers in this process, one request at a time, and remembers the requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._lock = threading.Lock()

    def __call__(self, request: Request, progress: Progress) -> Reply:
        with self._lock:
            self.requests.append(request)
            (only,) = request.tasks
            assert isinstance(only, AccuracyTask)
            session = Runtime().open(request.artifact.artifact(), request.threads)
            accuracy.measure(session, only, progress).save(only.metrics_out)
            return Reply(metrics=only.metrics_out)


def subjects(setting: Setting) -> list[Subject]:
    return [Subject("exact", setting.artifact, 1), Subject("shipped", setting.artifact, CHUNKS)]


@pytest.mark.parametrize("slots", [1, 2])
def test_figures_do_not_depend_on_the_cut(setting: Setting, tmp_path: Path, slots: int) -> None:
    run, seen = InProcess(), list[tuple[int, int]]()
    tell = lambda done, total: seen.append((done, total))  # noqa: E731
    scored = score(subjects(setting), "torch_cpu", task(setting, tmp_path), run, slots, tell)
    assert len(run.requests) == (2 if slots == 1 else 1 + CHUNKS)
    assert {request.threads for request in run.requests} == {1}
    assert [request.exact for request in run.requests].count(True) == 1
    wanted = setting.dequantized.metrics()
    found = scored["shipped"].metrics
    assert found is not None
    np.testing.assert_allclose(found.kld, wanted.kld, atol=1e-6)
    np.testing.assert_array_equal(TokenMetrics.load(tmp_path / "shipped.npz").kld, found.kld)
    assert {path.name for path in tmp_path.iterdir()} == {"exact.npz", "shipped.npz"}
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == (CHUNKS + 3) * (LENGTH // 2)


def test_a_worker_that_fails_makes_its_subject_missing_and_no_other(setting: Setting, tmp_path: Path) -> None:
    inner = InProcess()

    def run(request: Request, progress: Progress) -> Reply:
        (only,) = request.tasks
        assert isinstance(only, AccuracyTask)
        if only.first == 2:
            raise MeasurementError("it crashed")
        return inner(request, progress)

    scored = score(subjects(setting), "torch_cpu", task(setting, tmp_path), run, 2, silent)
    assert (scored["shipped"].metrics, scored["shipped"].missing) == (None, "it crashed")
    assert scored["exact"].metrics is not None


def test_another_error_stops_the_other_workers(setting: Setting, tmp_path: Path) -> None:
    """The second worker never ends by itself: it is its progress that tells it."""
    ended = threading.Event()

    def run(request: Request, progress: Progress) -> Reply:
        if request.exact:
            raise KeyError("a defect of ours")
        try:
            while True:
                progress(0, 1)
        finally:
            ended.set()

    with pytest.raises(KeyError, match="a defect of ours"):
        score(subjects(setting), "torch_cpu", task(setting, tmp_path), run, 2, silent)
    assert ended.is_set()
