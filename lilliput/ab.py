"""Two settings of one recipe, side by side: which calibration text (or solver, or grid) loses less, and is it sure?

Both are solved, and their dequantized weights run in torch on the same evaluation chunks; no artifact is written. The
figure is the mean KLD from the float model. With a_c and b_c the means of chunk c,

    difference = mean over c of (b_c − a_c)        below 0: B loses less

and its 95 % interval is the percentile bootstrap over chunks of these paired differences: what is hard in a chunk is
hard for both, and drops out. Where the interval holds 0, the noise is too large to tell. Stages are the pipeline's
own, so whatever the store holds of either side is used, and a run of the winner goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lilliput import facts
from lilliput import graph as graphs
from lilliput.errors import RecipeError
from lilliput.graph import Graph, Solution, Stage
from lilliput.pipeline import Work
from lilliput.planning import host_of, source_sha256
from lilliput.progress import Progress
from lilliput.recipe_schema import Recipe
from lilliput.report import StageTime, TextFacts
from lilliput.results import Interval, Record
from lilliput.run import PlannedStage, Watcher
from lilliput.store import Store, default_root

Finding = Literal["A is better", "B is better", "the noise is too large", "the same"]


class Pair(Record):
    """One solved model of each side; `difference` is B's mean KLD less A's, in nats a token."""

    grids: str
    targets: tuple[str, ...]
    mean_kld_a: float
    mean_kld_b: float
    difference: float
    interval: Interval | None  # None: a single chunk has none
    finding: Finding


class AB(Record):
    """`tokens` are those that were scored."""

    settings_a: tuple[str, ...]
    settings_b: tuple[str, ...]
    calibration_a: TextFacts | None
    calibration_b: TextFacts | None
    evaluation: TextFacts
    tokens: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Side:
    """A or B: its recipe, its settings, and its stages."""

    name: Literal["A", "B"]
    recipe: Recipe
    settings: tuple[str, ...]
    graph: Graph

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those that lead to the dequantized models' logits, and the check of the samples."""
        left = [t.solution.dequantized for t in self.graph.targets]
        left += [self.graph.coverage] if self.graph.coverage else []
        needed: set[Stage] = set()
        while left:
            needed.add(stage := left.pop())
            left += [s for s in stage.inputs if s not in needed]
        return tuple(stage for stage in self.graph.order if stage in needed)


def sides(a: Recipe, b: Recipe, settings_a: Sequence[str], settings_b: Sequence[str]) -> tuple[Side, Side]:
    """Raises RecipeError where the two do not compare: another model or evaluation text, or nothing that differs."""
    left = Side("A", a, tuple(settings_a), _graph(a))
    right = Side("B", b, tuple(settings_b), _graph(b))
    for what in ("source", "evaluation"):
        if getattr(left.graph, what).key != getattr(right.graph, what).key:
            raise RecipeError(
                f"A and B have not the same {what}: their losses do not compare; set it for both by --set"
            )
    if [t.target.name for t in left.graph.targets] != [t.target.name for t in right.graph.targets]:
        raise RecipeError("A and B have not the same targets: set them for both by --set")
    if {s.key for s in left.stages} == {s.key for s in right.stages}:
        raise RecipeError("A and B are solved alike: let --set-a or --set-b change calibration or quantize")
    return left, right


def _graph(recipe: Recipe) -> Graph:
    return graphs.build(recipe, source_sha256(recipe.model), host_of(recipe))


def planned(both: tuple[Side, Side]) -> tuple[PlannedStage, ...]:
    """The stages of both sides for a display; what they will take is not estimated."""
    store = Store(default_root())
    return tuple(
        _of(side, PlannedStage(s.kind, s.subject, s.key, store.find(s.kind, s.key) is not None, 0.0))
        for side in both
        for s in side.stages
    )


def ab(both: tuple[Side, Side], watcher: Watcher) -> AB:
    """Solve what is not solved yet, and compare."""
    a, b = both
    store = Store(default_root())
    work = {side.name: Work(store, Named(side, watcher), fresh=False) for side in both}
    for side in both:  # leakage is refused on both sides before long work on either
        if side.graph.coverage:
            work[side.name].folder(side.graph.coverage)
    for side in both:
        for stage in side.stages:
            work[side.name].folder(stage)
    pairs, tokens = _pairs(a, b, work)
    return AB(
        settings_a=a.settings,
        settings_b=b.settings,
        calibration_a=_calibration(a, work["A"]),
        calibration_b=_calibration(b, work["B"]),
        evaluation=facts.evaluation_facts(a.recipe, work["A"].folder(a.graph.evaluation)),
        tokens=tokens,
        pairs=pairs,
    )


def _pairs(a: Side, b: Side, work: dict[Literal["A", "B"], Work]) -> tuple[tuple[Pair, ...], int]:
    """Each pair of solved models once, with the targets that share it; and the number of scored tokens."""
    targets: dict[tuple[str, str], list[str]] = {}
    solutions: dict[tuple[str, str], tuple[Solution, Solution]] = {}
    for left, right in zip(a.graph.targets, b.graph.targets, strict=True):
        keys = left.solution.dequantized.key, right.solution.dequantized.key
        targets.setdefault(keys, []).append(left.target.name)
        solutions[keys] = left.solution, right.solution
    found, tokens = [], 0
    for keys, (left_solution, right_solution) in solutions.items():
        pair, tokens = _pair(left_solution, right_solution, work, tuple(targets[keys]))
        found.append(pair)
    return tuple(found), tokens


def _pair(a: Solution, b: Solution, work: dict[Literal["A", "B"], Work], targets: tuple[str, ...]) -> tuple[Pair, int]:
    from targets.metrics import bootstrap_interval
    from targets.reference import Logits

    left = Logits(work["A"].verified(a.dequantized)).metrics()
    right = Logits(work["B"].verified(b.dequantized)).metrics()
    interval = bootstrap_interval(right.kld - left.kld)
    grids = " / ".join(dict.fromkeys((a.dequantized.subject, b.dequantized.subject)))
    pair = Pair(
        grids=grids,
        targets=targets,
        mean_kld_a=left.mean_kld,
        mean_kld_b=right.mean_kld,
        difference=right.mean_kld - left.mean_kld,
        interval=interval,
        finding=finding(interval, same=a.dequantized.key == b.dequantized.key),
    )
    return pair, left.kld.size


def finding(interval: Interval | None, *, same: bool) -> Finding:
    """What an interval of the paired difference says."""
    if same:
        return "the same"
    if interval is None or interval.low <= 0 <= interval.high:
        return "the noise is too large"
    return "B is better" if interval.high < 0 else "A is better"


def _calibration(side: Side, work: Work) -> TextFacts | None:
    return facts.calibration_facts(work.folder(side.graph.samples)) if side.graph.samples else None


def _of(side: Side, stage: PlannedStage) -> PlannedStage:
    return replace(stage, subject=f"{stage.subject} of {side.name}".strip())


class Named:
    """A watcher that tells another of one side's stages, each with the side's name."""

    def __init__(self, side: Side, watcher: Watcher) -> None:
        self._side, self._watcher = side, watcher

    def started(self, stage: PlannedStage) -> Progress:
        return self._watcher.started(_of(self._side, stage))

    def finished(self, stage: StageTime) -> None:
        kind, _, subject = stage.name.partition(":")
        named = f"{kind}:{subject} of {self._side.name}" if subject else f"{kind}:of {self._side.name}"
        self._watcher.finished(stage.model_copy(update={"name": named}))
