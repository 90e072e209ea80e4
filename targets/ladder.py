"""The ladder: what each rung costs, so that a converter's or a runtime's defect is never taken for the price of
quantization, nor the other way round.

    float         the source model in torch
    dequantized   the same decoder with the dequantized weights: the whole price of quantization, and only it
    read_back     with the weights that the format's own reader finds in the file
    exact         the exporter's exact twin on the runtime: no arithmetic beyond float32 rounding
    shipped       the shipped file on the runtime, with whatever its kernels round

`mean_kld` is from float, `step_kld` from the dequantized weights, each the mean over the scored tokens. The
exact rung is slow and may use the first chunks only. Its mean_kld is then the dequantized one over all
chunks plus the difference that the exact twin makes on its own chunks, so that rungs can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lilliput.grid import Float, QuantizedTensor
from lilliput.model import QuantizedModel
from lilliput.progress import Progress, silent
from lilliput.results import Rung
from targets.metrics import TokenMetrics
from targets.reference import EvaluationSet, Logits, compare, compute

Read = Mapping[str, QuantizedTensor | Float]


@dataclass(frozen=True)
class ReadBack:
    """What the file holds beside what it was given: the names of parameters whose bits differ."""

    parameters: int
    differing: tuple[str, ...]

    @property
    def note(self) -> str:
        if not self.differing:
            return f"all {self.parameters} parameters identical, bit for bit"
        return f"{len(self.differing)} of {self.parameters} parameters differ, first {self.differing[0]}"


def compare_weights(model: QuantizedModel, read: Read) -> ReadBack:
    """Compare every parameter: a matrix by codes, scales and offsets, a float by its bits."""
    names = tuple(model.config.parameter_shapes())
    return ReadBack(len(names), tuple(name for name in names if not _identical(model, name, read.get(name))))


def _identical(model: QuantizedModel, name: str, seen: QuantizedTensor | Float | None) -> bool:
    if seen is None:
        return False
    given = model.quantized.get(name)
    if given is not None and isinstance(seen, QuantizedTensor) and given.same_as(seen):
        return True
    return np.array_equal(model.dequantized(name), _as_float(seen))


def _as_float(seen: QuantizedTensor | Float) -> Float:
    return seen.dequantize() if isinstance(seen, QuantizedTensor) else seen


def first_rungs(dequantized: TokenMetrics) -> list[Rung]:
    """float and dequantized."""
    tokens = dequantized.kld.size
    return [
        Rung(rung="float", mean_kld=0.0, step_kld=None, tokens=tokens, note="the reference"),
        Rung(rung="dequantized", mean_kld=dequantized.mean_kld, step_kld=0.0, tokens=tokens),
    ]


def read_back_rung(
    model: QuantizedModel,
    read: Read,
    evaluation: EvaluationSet,
    logits: tuple[Logits, Logits],
    scratch: Path,
    progress: Progress = silent,
) -> tuple[Rung, ReadBack]:
    """The dequantized figure where all bits are identical; else computed in torch with the weights of the file.

    `logits` are the float model's and the dequantized weights'. A parameter that the file does not give is
    taken from the model: its name is among the differing.
    """
    found, (of_float, of_dequantized) = compare_weights(model, read), logits
    if not found.differing:
        metrics = of_dequantized.metrics()
        same = Rung(rung="read_back", mean_kld=metrics.mean_kld, step_kld=0.0, tokens=metrics.kld.size, note=found.note)
        return same, found
    weights = {n: _as_float(read[n]) if n in read else model.dequantized(n) for n in model.config.parameter_shapes()}
    seen = compute(model.config, weights, evaluation, scratch, progress)
    metrics, steps = compare(of_float, seen, evaluation), compare(of_dequantized, seen, evaluation)
    rung = Rung(
        rung="read_back",
        mean_kld=metrics.mean_kld,
        step_kld=steps.mean_kld,
        tokens=metrics.kld.size,
        note=f"{found.note}; computed in torch",
    )
    return rung, found


def exact_rung(metrics: TokenMetrics | None, missing: str, dequantized: TokenMetrics) -> Rung:
    """`metrics` are of the first chunks of the evaluation; None where there are none, `missing` says why."""
    if metrics is None:
        return Rung(rung="exact", mean_kld=None, step_kld=None, tokens=0, note=missing)
    chunks, all_chunks = len(metrics.kld), len(dequantized.kld)
    there = dequantized.first(chunks).mean_kld
    note = "" if chunks == all_chunks else (
        f"measured on the first {chunks} of {all_chunks} chunks: {metrics.mean_kld:.6f} against {there:.6f} "
        "of the dequantized weights there"
    )  # fmt: skip
    return Rung(
        rung="exact",
        mean_kld=max(0.0, dequantized.mean_kld + metrics.mean_kld - there),
        step_kld=metrics.mean_step_kld,
        tokens=metrics.kld.size,
        note=note,
    )


def shipped_rung(metrics: TokenMetrics | None, missing: str) -> Rung:
    if metrics is None:
        return Rung(rung="shipped", mean_kld=None, step_kld=None, tokens=0, note=missing)
    return Rung(rung="shipped", mean_kld=metrics.mean_kld, step_kld=metrics.mean_step_kld, tokens=metrics.kld.size)
