"""The accuracy of files on texts: each on its own runtime, as it ships, teacher-forced in prefill and decode.

The protocol is that of every validation (targets/reference.py, targets/accuracy.py, targets/metrics.py): chunks of 512
tokens, the second half scored. Each file runs on one thread, as many files at once as there are workers, so that a
busy machine slows a run and changes no figure. A file's figures are kept by what they depend on: its bytes, the
text's tokens, the runtime.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.subjects import Subject, open_session
from lilliput.artifact import sha256
from lilliput.fingerprint import fingerprint
from lilliput.results import Accuracy, Record
from lilliput.store import key_of


class Job(Record):
    """One file on one text."""

    subject: Subject
    evaluation: Path  # folder of an EvaluationSet
    reference: Path  # folder of the float model's Logits on it


def score_all(jobs: Sequence[Job], folder: Path, workers: int, say: Callable[[str], None]) -> list[Accuracy]:
    """The figures of each job, in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = [folder / f"{_key(job)}.json" for job in jobs]
    left = [(job, path) for job, path in zip(jobs, kept, strict=True) if not path.is_file()]
    if left:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(left)), mp_context=context) as pool:
            for line in pool.map(_score_and_keep, *zip(*left, strict=True)):
                say(line)
    return [Accuracy.model_validate_json(path.read_bytes()) for path in kept]


def _key(job: Job) -> str:
    from targets.reference import EvaluationSet

    path = job.subject.scored_path
    files = {file.name: sha256(file) for file in sorted(path.parent.glob(f"{path.name}*")) if file.is_file()}
    driver = job.subject.driver
    code = fingerprint(["targets.accuracy", "targets.metrics", f"targets.runtimes.{driver}"])
    return key_of("score", code, {"evaluation": EvaluationSet.load(job.evaluation).sha256}, dict(files))


def _score_and_keep(job: Job, path: Path) -> str:
    found = score(job)
    partial = path.with_suffix(".partial")
    partial.write_text(found.model_dump_json())
    partial.rename(path)
    return f"{job.subject.name}: mean KLD {found.mean_kld:.4f}"


def score(job: Job) -> Accuracy:
    from targets.accuracy import teacher_forced
    from targets.metrics import TokenMetrics, log_softmax, summarize
    from targets.reference import EvaluationSet, Logits

    evaluation, rows = EvaluationSet.load(job.evaluation), Logits(job.reference).open()
    metrics, name = TokenMetrics.empty(*rows.shape[:2]), job.subject.name
    session = open_session(job.subject.model_copy(update={"path": job.subject.scored_path}), threads=1)
    for c, chunk in enumerate(evaluation.tokens.tolist()):
        for i, logits in enumerate(teacher_forced(session, chunk, evaluation.scored_from)):
            p = log_softmax(rows[c, i], f"the float model, chunk {c}, position {i}")
            q = log_softmax(logits, f"{name}, chunk {c}, position {i}")
            metrics.put(c, i, p, q, chunk[evaluation.scored_from + i], step_kld=0.0)
    session.close()
    return summarize(metrics)
