"""The collapse detector: how the loss grows as bits fall, where it goes over a cliff, and which matrices fall there.

Every matrix of the model goes on one grid of each width (symmetric, blocks of `block` columns) and the dequantized
weights run in torch on a few chunks of the evaluation text: mean KLD and top-1 agreement, width by width.

    a step     from one width to the next smaller: log(KLD after / KLD before) per bit. Where errors are small the
               KLD is their quadratic form, and a bit less doubles them: log 4 per bit.
    the cliff  the first width whose top-1 agreement is below `limit`; the steepest step is named beside it

At the cliff (without one, at the smallest width) matrices are ranked by predicted loss (calibration.sensitivity).
The first `suspects` of them are confirmed by measurement: the model is run again with one of them alone kept at
KEPT bits, and what the KLD falls by is what this matrix costs; then with all of them kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

from lilliput import graph as graphs
from lilliput.allocated import kind_of
from lilliput.errors import RecipeError
from lilliput.graph import Graph
from lilliput.pipeline import Work
from lilliput.planning import host_of, source_sha256
from lilliput.progress import Progress, silent
from lilliput.recipe_schema import Budget, Plugin, Recipe, Rule
from lilliput.results import Record
from lilliput.run import PlannedStage, Watcher
from lilliput.store import Store, default_root

if TYPE_CHECKING:
    from calibration.sensitivity import Guided, Sensitivity
    from lilliput.model import QuantizedModel, SourceModel
    from targets.reference import EvaluationSet, Logits

BITS = (8, 6, 5, 4, 3, 2)
KEPT = 8  # bits of a suspect that is taken off
NEEDED = ("source", "evaluation", "samples", "coverage", "reference", "statistics", "sensitivity")


@dataclass(frozen=True)
class Options:
    """How a sweep is made. `limit` is the top-1 agreement below which a width has collapsed."""

    bits: tuple[int, ...] = BITS
    block: int = 32
    solver: str = "gptq"
    chunks: int = 4
    suspects: int = 5
    limit: float = 0.7

    def __post_init__(self) -> None:
        if not self.bits or list(self.bits) != sorted(set(self.bits), reverse=True) or not 2 <= self.bits[-1] <= 8:
            raise RecipeError(f"bits {list(self.bits)}: wanted falling widths from 8 to 2, e.g. 8,6,5,4,3,2")


class Width(Record):
    """All matrices at one width. `step` is log(KLD / the next larger width's), a bit; log 4 is 1.39."""

    bits: int
    mean_kld: float
    top1_agreement: float
    predicted_kld: float
    step: float | None


class Suspect(Record):
    """A matrix at the cliff. `costs`: what the KLD falls by when it alone is kept at KEPT bits; None: not measured."""

    name: str
    predicted: float
    costs: float | None


class Sweep(Record):
    """`suspects` and `kinds` are at `suspects_at` bits, the largest predicted loss first."""

    model: str
    tokens: int
    limit: float
    widths: tuple[Width, ...]
    cliff: int | None  # bits; None: no width is below the limit
    steepest: tuple[int, int] | None  # between which widths the KLD grows most a bit
    suspects_at: int
    suspects: tuple[Suspect, ...]
    kept_kld: float  # with all confirmed suspects kept at KEPT bits
    kinds: dict[str, float]  # share of the predicted loss by kind of matrix


def widths(text: str) -> tuple[int, ...]:
    """ "8,4,2" → (8, 4, 2)."""
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise RecipeError(f"bits {text!r}: wanted falling widths from 8 to 2, e.g. 8,6,5,4,3,2")
    return tuple(int(part) for part in parts)


def recipe_of(recipe: Recipe, options: Options, model: str | None = None) -> Recipe:
    """The recipe with as many evaluation chunks as are asked for, and a budget, so that sensitivity is measured."""
    if model is not None:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"source": model, "name": None})})
    evaluation = recipe.evaluation.model_copy(update={"count": options.chunks})
    targets = tuple(target.model_copy(update={"quantize": None}) for target in recipe.targets[:1])
    budget = Budget(bits_per_weight=4.5, solver=Plugin(name=options.solver))
    return recipe.model_copy(update={"evaluation": evaluation, "targets": targets, "quantize": budget})


def planned(recipe: Recipe) -> tuple[Graph, tuple[PlannedStage, ...]]:
    """The graph, and the stages of it that a sweep needs, for a display."""
    graph, store = graphs.build(recipe, source_sha256(recipe.model), host_of(recipe)), Store(default_root())
    stages = [stage for stage in graph.order if stage.kind in NEEDED]
    return graph, tuple(
        PlannedStage(s.kind, s.subject, s.key, store.find(s.kind, s.key) is not None, 0.0) for s in stages
    )


@dataclass(frozen=True)
class Measured:
    """A float model and what its quantized siblings are solved by and held against."""

    source: SourceModel
    statistics: Guided
    sensitivity: Sensitivity
    evaluation: EvaluationSet
    reference: Logits
    options: Options

    def solve(self, bits: int, names: Sequence[str] | None = None) -> QuantizedModel:
        """All matrices at one width, or only those named: the others stay in float."""
        from calibration.solve import solve

        solver = Plugin(name=self.options.solver)
        wanted = names or ["*"]
        rules = [Rule(match=name, grid=f"int{bits}-b{self.options.block}", solver=solver) for name in wanted]
        if names:
            rules.append(Rule(match="*", grid="float32"))
        return solve(self.source, rules, self.statistics)

    def predicted(self, model: QuantizedModel) -> dict[str, float]:
        """Predicted KLD by matrix, the largest first."""
        losses = {n: self.sensitivity[n].loss(self.source.weights[n], t) for n, t in model.quantized.items()}
        return dict(sorted(losses.items(), key=lambda item: -item[1]))

    def measure(self, model: QuantizedModel) -> tuple[float, float]:
        """Mean KLD and top-1 agreement."""
        from lilliput.stages.dequantized import Dequantized
        from targets.metrics import summarize
        from targets.reference import compare, compute

        with tempfile.TemporaryDirectory(prefix="lilliput-") as scratch:
            logits = compute(model.config, Dequantized(model), self.evaluation, Path(scratch))
            accuracy = summarize(compare(self.reference, logits, self.evaluation))
        return accuracy.mean_kld, accuracy.top1_agreement


def prepare(graph: Graph, options: Options, watcher: Watcher) -> Measured:
    """Do the stages that are not done."""
    from calibration.sensitivity import Guided, Sensitivity
    from calibration.statistics import Statistics
    from lilliput.source import open_stage
    from targets.reference import EvaluationSet, Logits

    work = Work(Store(default_root()), watcher, fresh=False)
    found = {stage.kind: work.folder(stage) for stage in graph.order if stage.kind in NEEDED}
    sensitivity = Sensitivity(found["sensitivity"])
    return Measured(
        open_stage(found["source"]),
        Guided(Statistics(found["statistics"]), sensitivity),
        sensitivity,
        EvaluationSet.load(found["evaluation"]),
        Logits(found["reference"]),
        options,
    )


def sweep(model: Measured, progress: Progress = silent) -> Sweep:
    """Solve and measure width by width, then the suspects; `progress` counts measured models."""
    options = model.options
    total = len(options.bits) + options.suspects + 1
    widths: list[Width] = []
    cliff: int | None = None
    at: tuple[int, QuantizedModel] | None = None
    for bits in options.bits:
        solved = model.solve(bits)
        kld, top1 = model.measure(solved)
        before = widths[-1] if widths else None
        step = log(kld / before.mean_kld) / (before.bits - bits) if before and before.mean_kld > 0 < kld else None
        predicted = sum(model.predicted(solved).values())
        widths.append(Width(bits=bits, mean_kld=kld, top1_agreement=top1, predicted_kld=predicted, step=step))
        progress(len(widths), total)
        if cliff is None:
            cliff, at = bits if top1 < options.limit else None, (bits, solved)
    assert at is not None
    losses = model.predicted(at[1])
    whole = next(width.mean_kld for width in widths if width.bits == at[0])
    suspects, kept_kld = _suspects(model, at[1], losses, whole, lambda n: progress(len(widths) + n, total))
    pairs = [(a.bits, b.bits, b.step) for a, b in pairwise(widths) if b.step is not None]
    steepest = max(pairs, key=lambda pair: pair[2], default=None)
    return Sweep(
        model=model.source.name,
        tokens=len(model.evaluation.tokens) * model.evaluation.scored,
        limit=options.limit,
        widths=tuple(widths),
        cliff=cliff,
        steepest=steepest[:2] if steepest else None,
        suspects_at=at[0],
        suspects=suspects,
        kept_kld=kept_kld,
        kinds=_kinds(losses),
    )


def _suspects(
    model: Measured, solved: QuantizedModel, losses: dict[str, float], whole: float, progress: Callable[[int], None]
) -> tuple[tuple[Suspect, ...], float]:
    """All matrices by predicted loss, the first of them measured; and the KLD with these kept at KEPT bits."""
    first = list(losses)[: model.options.suspects]
    kept = model.solve(KEPT, first).quantized
    costs: dict[str, float] = {}
    for name in first:
        costs[name] = whole - model.measure(replace(solved, quantized={**solved.quantized, name: kept[name]}))[0]
        progress(len(costs))
    together, _ = model.measure(replace(solved, quantized={**solved.quantized, **kept}))
    progress(len(costs) + 1)
    found = (Suspect(name=name, predicted=loss, costs=costs.get(name)) for name, loss in losses.items())
    return tuple(found), together


def _kinds(losses: dict[str, float]) -> dict[str, float]:
    """Shares of the predicted loss, the largest first."""
    total, found = sum(losses.values()) or 1.0, dict[str, float]()
    for name, loss in losses.items():
        found[kind_of(name)] = found.get(kind_of(name), 0.0) + loss / total
    return dict(sorted(found.items(), key=lambda item: -item[1]))
