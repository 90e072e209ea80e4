"""Gates: a limit on a figure, and what it comes to. PASS, FAIL, or INCONCLUSIVE with the reason.

    no figure                                    INCONCLUSIVE: what was not measured proves nothing
    the figure's 95 % interval holds the limit   INCONCLUSIVE: more text could decide either way
    beyond the limit, on a disturbed machine     INCONCLUSIVE: a disturbance only ever slows, so a limit that
                                                 is kept in spite of it is kept, but one that is missed may not be
    otherwise                                    PASS within the limit (and at it), FAIL beyond

Three gates are always on: the file reads back as it was given, the runtime at its exact setting computes
what torch does (EXACT_STEP_KLD_MAX nats a token), and the artifact speaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lilliput.results import (
    Accuracy,
    Gate,
    GateResult,
    Generation,
    Instructions,
    Interval,
    Latency,
    Memory,
    Metric,
    SuiteFigures,
)

Part = Literal["accuracy", "latency", "exact", "suites", "instructions"]  # what a worker measures

EXACT_STEP_KLD_MAX = 1e-4
LATENCY_METRICS: frozenset[Metric] = frozenset(
    ("load_ms", "ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "decode_ms_p90")
)


@dataclass(frozen=True)
class Figure:
    """A metric's value; `missing` says why there is none, `disturbed` why it is not to be trusted."""

    value: float | None
    interval: Interval | None = None
    missing: str = "not measured"
    disturbed: str | None = None


@dataclass(frozen=True)
class Figures:
    """All that was measured of a target; `missing` has the reason by part."""

    accuracy: Accuracy | None
    latency: Latency | None
    memory: Memory | None
    size_bytes: int
    exact_step_kld: float | None
    shipped_step_kld: float | None
    missing: Mapping[Part, str]
    instructions: Instructions | None = None
    suites: SuiteFigures | None = None

    def slices(self) -> dict[str, Figure]:
        """What each slice lost, by its name; one figure that is missing where there are no slices."""
        if self.suites is None:
            return {"": Figure(None, missing=self.missing.get("suites", "the recipe's evaluation has no suites"))}
        return {f" {s.name}": Figure(s.drop, s.drop_interval) for s in self.suites.slices}

    def of(self, metric: Metric) -> Figure:
        """The figure that a recipe's gate on that metric is held against."""
        if metric in LATENCY_METRICS:
            unstable = self.latency.unstable if self.latency else None
            return Figure(_attribute(self.latency, metric), None, self._why("latency"), unstable)
        if metric == "peak_rss_mb":
            return Figure(self.memory.peak_rss_bytes / 1e6 if self.memory else None, None, self._why("latency"))
        if metric == "instructions_per_token":
            value = self.instructions.per_token if self.instructions else None
            return Figure(value, None, self.missing.get("instructions", "not counted: the device is no emulator"))
        if metric == "size_mb":
            return Figure(self.size_bytes / 1e6)
        if metric == "exact_step_kld":
            return Figure(self.exact_step_kld, None, self._why("exact"))
        if metric == "shipped_step_kld":
            return Figure(self.shipped_step_kld, None, self._why("accuracy"))
        interval = None if self.accuracy is None else getattr(self.accuracy, f"{metric}_interval", None)
        return Figure(_attribute(self.accuracy, metric), interval, self._why("accuracy"))

    def _why(self, part: Part) -> str:
        return self.missing.get(part, "not measured")


def _attribute(record: Accuracy | Latency | None, metric: Metric) -> float | None:
    return None if record is None else float(getattr(record, metric))


def judge(name: str, kind: Literal["max", "min"], limit: float, figure: Figure) -> GateResult:
    """One gate's outcome, by the table above."""
    if figure.value is None:
        return GateResult(
            name=name, kind=kind, limit=limit, value=None, verdict="INCONCLUSIVE", note=f"no figure: {figure.missing}"
        )
    within = figure.value <= limit if kind == "max" else figure.value >= limit
    verdict: Literal["PASS", "INCONCLUSIVE", "FAIL"] = "PASS" if within else "FAIL"
    note = ""
    if figure.interval and figure.interval.low < limit < figure.interval.high:
        verdict = "INCONCLUSIVE"
        note = (
            f"its 95 % interval {figure.interval.low:.4g} to {figure.interval.high:.4g} holds the limit: evaluate more"
        )
    elif figure.disturbed and not within:
        verdict, note = "INCONCLUSIVE", figure.disturbed
    return GateResult(name=name, kind=kind, limit=limit, value=figure.value, verdict=verdict, note=note)


def judge_all(gates: Sequence[Gate], figures: Figures) -> list[GateResult]:
    """A recipe's gates in their order; one on slices is judged for each of them."""
    results = []
    for gate in gates:
        found = figures.slices() if gate.metric == "slice_drop" else {"": figures.of(gate.metric)}
        for name, figure in found.items():
            if gate.max is not None:
                results.append(judge(f"{gate.metric}{name}", "max", gate.max, figure))
            elif gate.min is not None:
                results.append(judge(f"{gate.metric}{name}", "min", gate.min, figure))
    return results


def read_back_gate(differing: int, note: str) -> GateResult:
    """Tensors that read back differently: none may."""
    verdict: Literal["PASS", "FAIL"] = "FAIL" if differing else "PASS"
    return GateResult(name="read_back", kind="max", limit=0, value=differing, verdict=verdict, note=note)


def exact_gate(figures: Figures) -> GateResult:
    """The runtime at its exact setting against the same weights in torch."""
    return judge("exact_step_kld", "max", EXACT_STEP_KLD_MAX, figures.of("exact_step_kld"))


def generation_gate(
    generation: Generation | None, missing: str, float_tokens: Sequence[int] | None = None
) -> GateResult:
    """The artifact says something, and not one token over and over; unless the float model does just that.

    `value` counts distinct tokens; a single token is no repetition.
    """
    if generation is None:
        return judge("generation", "min", 1, Figure(None, missing=missing))
    distinct, limit = len(set(generation.tokens)), 2 if len(generation.tokens) > 1 else 1
    if distinct < limit and float_tokens is not None and tuple(float_tokens) == generation.tokens:
        note = "the float model says the same"
        return GateResult(name="generation", kind="min", limit=limit, value=distinct, verdict="PASS", note=note)
    result = judge("generation", "min", limit, Figure(distinct))
    note = "" if result.verdict == "PASS" else f"says {generation.text!r} after {generation.prompt!r}"
    return result.model_copy(update={"note": note})


def dot_product_gate(found: Instructions | None, missing: str) -> GateResult:
    """A runtime with low-bit weights uses the dot product of a processor that has it."""
    if found is None:
        return judge("dot_product", "min", 1, Figure(None, missing=missing))
    result = judge("dot_product", "min", 1, Figure(found.dot_per_token + found.mmla_per_token))
    note = "" if result.verdict == "PASS" else (
        f"no SDOT, UDOT or MMLA in {found.tokens} decoded tokens on a processor that has them: "
        "the runtime's build, or its choice of kernels, lacks the dot product"
    )  # fmt: skip
    return result.model_copy(update={"note": note})


def speaks(tokens: Sequence[int]) -> bool:
    """Whether the tokens pass the generation gate by themselves."""
    return len(set(tokens)) >= (2 if len(tokens) > 1 else 1)
