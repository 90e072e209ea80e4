"""Teacher-forced accuracy of an opened session: the shipped prefill for the context, the shipped decode for the rest.

A chunk of `length` tokens is prefilled up to `scored_from`; that call's logits predict token `scored_from`.
Every further token is given to decode(), whose logits predict the one after it. Rows of the reference
logits are read from memory maps as they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lilliput.errors import MeasurementError
from lilliput.grid import Float
from lilliput.progress import Progress, silent
from targets.base import Session
from targets.metrics import TokenMetrics, divergence, log_softmax, summarize
from targets.request import AccuracyReply, AccuracyTask


def measure(session: Session, task: AccuracyTask, progress: Progress = silent) -> AccuracyReply:
    """Raises MeasurementError where logits are not finite or have another vocabulary."""
    chunks = np.load(task.tokens)[: task.chunks]
    reference, dequantized = (np.load(path, mmap_mode="r") for path in (task.reference, task.dequantized))
    metrics = TokenMetrics.empty(len(chunks), chunks.shape[1] - task.scored_from)
    steps = np.empty_like(metrics.kld)
    for c, chunk in enumerate(chunks):
        for i, logits in enumerate(teacher_forced(session, chunk.tolist(), task.scored_from)):
            if logits.shape != reference.shape[2:]:
                raise MeasurementError(f"the runtime's logits are {logits.shape}, wanted {reference.shape[2:]}")
            what = f"chunk {c}, position {task.scored_from + i - 1}"
            candidate = log_softmax(logits, f"the runtime, {what}")
            p = log_softmax(reference[c, i], f"the float model, {what}")
            metrics.put(c, i, p, candidate, int(chunk[task.scored_from + i]))
            steps[c, i] = divergence(log_softmax(dequantized[c, i], f"the dequantized model, {what}"), candidate)
            progress(c * steps.shape[1] + i + 1, steps.size)
    metrics.save(task.metrics_out)
    return AccuracyReply(accuracy=summarize(metrics), step_kld=float(steps.mean()))


def teacher_forced(session: Session, tokens: list[int], scored_from: int) -> Iterator[Float]:
    """Logits (vocab,) that predict tokens[scored_from], tokens[scored_from + 1], … of one chunk."""
    session.reset()
    yield session.prefill(tokens[:scored_from])
    for token in tokens[scored_from:-1]:
        yield session.decode(token)
