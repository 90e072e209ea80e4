"""Where the loss is: the ladder's rungs as steps, each with what it costs and who pays it.

The rungs (lilliput.results.RungName) each give a mean divergence from the float model. A step is the
difference to the rung before:

    dequantized    the codes and scales that the solver chose
    read_back      writing the file and reading it: nothing, where the bits are identical
    exact          the runtime computing the same weights at its most exact setting
    shipped        the runtime's own arithmetic as it ships (8-bit activations and the like)

A step can be negative: two errors may cancel. A rung that was not measured has no step, and the next
step then counts from the last rung that was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lilliput.results import GateResult, Rung, RungName, TargetResult

CAUSES: dict[RungName, str] = {
    "float": "the source model",
    "dequantized": "quantization: the codes and scales",
    "read_back": "writing the file and reading it back",
    "exact": "the runtime at its exact setting",
    "shipped": "the runtime's arithmetic as shipped",
}
LOSS_METRICS = ("mean_kld", "top1_agreement", "perplexity", "perplexity_ratio")


@dataclass(frozen=True)
class Step:
    """One rung: its divergence from float (`total`), and what it adds to the last measured rung before it."""

    rung: RungName
    cause: str
    before: float
    total: float | None
    step_kld: float | None
    note: str

    @property
    def added(self) -> float | None:
        return None if self.total is None else self.total - self.before


def steps(ladder: Sequence[Rung]) -> list[Step]:
    """The ladder's steps in its order."""
    found, level = [], 0.0
    for rung in ladder:
        found.append(Step(rung.rung, CAUSES[rung.rung], level, rung.mean_kld, rung.step_kld, rung.note))
        level = level if rung.mean_kld is None else rung.mean_kld
    return found


def costliest(ladder: Sequence[Rung]) -> Step | None:
    """The step that adds most; None where nothing adds anything."""
    adding = [step for step in steps(ladder) if step.added is not None and step.added > 0]
    return max(adding, key=lambda step: step.added or 0.0, default=None)


def guilty(target: TargetResult, gate: GateResult) -> Step | None:
    """The rung that answers for a gate that did not pass: of a loss the costliest, of a step its own."""
    if gate.name in LOSS_METRICS:
        return costliest(target.ladder)
    rung = {"exact_step_kld": "exact", "shipped_step_kld": "shipped"}.get(gate.name)
    return next((step for step in steps(target.ladder) if step.rung == rung), None)
