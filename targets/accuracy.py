"""Teacher-forced accuracy of an opened session: the shipped prefill for the context, the shipped decode for the rest.

A chunk of `length` tokens is prefilled up to `scored_from`; that call's logits predict token `scored_from`.
Every further token is given to decode(), whose logits predict the one after it. Rows of the reference
logits are read from memory maps as they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lilliput.errors import MeasurementError
from lilliput.grid import Float
from lilliput.progress import Progress, silent
from targets.base import Session
from targets.metrics import TokenMetrics, divergence, log_softmax, reserve
from targets.request import AccuracyTask, LogitsTask


def measure(session: Session, task: AccuracyTask, progress: Progress = silent) -> TokenMetrics:
    """Figures of the task's chunks. Raises MeasurementError where logits are not finite or of another vocabulary."""
    chunks = np.load(task.tokens)[task.first : task.first + task.chunks]
    rows = (teacher_forced(session, chunk.tolist(), task.scored_from) for chunk in chunks)
    return _compare(rows, task, progress)


def record(session: Session, task: LogitsTask, progress: Progress = silent) -> None:
    """Write the logits of the task's chunks, row by row as they come."""
    chunks = np.load(task.tokens)[task.first : task.first + task.chunks]
    scored, kept = chunks.shape[1] - task.scored_from, None
    for c, chunk in enumerate(chunks):
        for i, logits in enumerate(teacher_forced(session, chunk.tolist(), task.scored_from)):
            if kept is None:
                shape = (len(chunks), scored, *logits.shape)
                kept = np.lib.format.open_memmap(task.logits_out, mode="w+", dtype=np.float32, shape=shape)
                reserve(task.logits_out)
            kept[c, i] = logits
            progress(c * scored + i + 1, len(chunks) * scored)
    assert kept is not None, "a task has at least one chunk"
    kept.flush()


def of_logits(path: Path, task: AccuracyTask) -> TokenMetrics:
    """Figures of logits that `record` kept of the same chunks; errors as of `measure`."""
    return _compare(iter(np.load(path, mmap_mode="r")), task, silent)


def _compare(candidates: Iterator[Iterable[Float]], task: AccuracyTask, progress: Progress) -> TokenMetrics:
    chunks = np.load(task.tokens)[task.first : task.first + task.chunks]
    metrics = TokenMetrics.empty(len(chunks), chunks.shape[1] - task.scored_from)
    reference, dequantized = (np.load(path, mmap_mode="r") for path in (task.reference, task.dequantized))
    for c, (chunk, candidate) in enumerate(zip(chunks, candidates, strict=True)):
        rows = zip(reference[task.first + c], dequantized[task.first + c], strict=True)
        for i, (logits, (float_row, dequantized_row)) in enumerate(zip(candidate, rows, strict=True)):
            if logits.shape != float_row.shape:
                raise MeasurementError(f"the runtime's logits are {logits.shape}, wanted {float_row.shape}")
            what = f"chunk {task.first + c}, position {task.scored_from + i - 1}"
            q = log_softmax(logits, f"the runtime, {what}")
            p = log_softmax(float_row, f"the float model, {what}")
            step_kld = divergence(log_softmax(dequantized_row, f"the dequantized model, {what}"), q)
            metrics.put(c, i, p, q, int(chunk[task.scored_from + i]), step_kld)
            progress(c * metrics.kld.shape[1] + i + 1, metrics.kld.size)
    return metrics


def teacher_forced(session: Session, tokens: list[int], scored_from: int) -> Iterator[Float]:
    """Logits (vocab,) that predict tokens[scored_from], tokens[scored_from + 1], … of one chunk."""
    session.reset()
    yield session.prefill(tokens[:scored_from])
    for token in tokens[scored_from:-1]:
        yield session.decode(token)
