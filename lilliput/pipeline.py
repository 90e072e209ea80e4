"""The pipeline: plan(recipe) → Plan, run(plan) → Run, validate(artifact's folder) → TargetResult.

A run walks the graph's stages in order. A stage whose result is in the store is not done again; before a result is
read by a stage that is done, its bytes are verified, and a damaged one is made anew. A run that was killed
leaves finished stages behind, and the next one goes on from there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from lilliput import facts, manifest, memory, output, report
from lilliput import graph as graphs
from lilliput.graph import Graph, Stage, TargetStages
from lilliput.manifest import ArtifactFacts, Manifest
from lilliput.planning import host_of, plan, source_sha256
from lilliput.progress import Progress
from lilliput.recipe_schema import Budget, Recipe
from lilliput.report import Report, StageTime, StepLoss, TensorClass
from lilliput.results import Host, TargetResult, worst
from lilliput.run import Plan, PlannedStage, PlannedTarget, Quiet, Run, Watcher
from lilliput.stages import allocate, coverage, recover
from lilliput.stages import export as exporting
from lilliput.stages import validate as validation
from lilliput.store import Store, default_root, publish

__all__ = ["Plan", "PlannedStage", "PlannedTarget", "Quiet", "Run", "Watcher", "plan", "run", "validate"]


def run(plan: Plan, watcher: Watcher | None = None, kept: set[str] | None = None) -> Run:
    """Do what is planned; write `out/<target>/…` with manifest.json and `out/report.json|md|html`.

    `kept` are keys of results that a fresh run need not do again; those that it does are added.
    """
    graph = graphs.build(plan.recipe, plan.source_sha256, plan.host)
    work = Work(Store(plan.store), watcher or Quiet(), plan.fresh, kept)
    with output.claimed(plan.out):
        work.store.clean()
        for stage in graph.order:
            work.folder(stage)
        with work.timed(PlannedStage("report", "", "", cached=False, seconds=0.0)):
            made = _report(plan, graph, work)
            for stages, result in zip(graph.targets, made.targets, strict=True):
                _publish(plan, graph, stages, result, made, work)
            report.write(made, plan.out)
        work.store.expire()
    return Run(plan, made)


class Work:
    """The stages that were asked for so far, each at most once: found in the store, or done."""

    def __init__(self, store: Store, watcher: Watcher, fresh: bool, kept: set[str] | None = None) -> None:
        self.store = store
        self.times: list[StageTime] = []
        self._watcher, self._fresh = watcher, fresh
        self._kept = set() if kept is None else kept
        self._folders: dict[str, Path] = {}
        self._verified: set[str] = set()

    def folder(self, stage: Stage) -> Path:
        """The folder of a stage's result."""
        if stage.key not in self._folders:
            again = self._fresh and stage.key not in self._kept
            found = None if again else self.store.find(stage.kind, stage.key)
            if found is None:
                self._do(stage, replace=again)
            else:
                self.store.use(stage.kind, stage.key)
                self._folders[stage.key] = found
                self._note(stage.name, cached=True, seconds=0.0)
        return self._folders[stage.key]

    def verified(self, stage: Stage) -> Path:
        """The folder of a result whose bytes were checked; a damaged one is made anew."""
        self.folder(stage)
        if stage.key not in self._verified:
            if not self.store.verify(stage.kind, stage.key):
                self._do(stage, replace=True)
            self._verified.add(stage.key)
        return self._folders[stage.key]

    def _do(self, stage: Stage, *, replace: bool) -> None:
        _use_cores()
        for needed in stage.inputs:
            self.verified(needed)
        planned = PlannedStage(stage.kind, stage.subject, stage.key, cached=False, seconds=0.0)
        progress, start = self._watcher.started(planned), time.monotonic()
        self._folders[stage.key], there = self.store.build(
            stage.kind, stage.key, lambda folder: stage.work(self.folder, folder, progress), fresh=replace
        )
        memory.give_back()
        self._verified.add(stage.key)
        self._kept.add(stage.key)
        self._note(stage.name, cached=there, seconds=time.monotonic() - start)

    @contextmanager
    def timed(self, planned: PlannedStage) -> Iterator[Progress]:
        """Tell the watcher of a stage that is not addressed by content."""
        start = time.monotonic()
        yield self._watcher.started(planned)
        self._note(planned.name, cached=False, seconds=time.monotonic() - start)

    def _note(self, name: str, *, cached: bool, seconds: float) -> None:
        noted = StageTime(name=name, seconds=seconds, cached=cached)
        self.times = [*(t for t in self.times if t.name != name), noted]
        self._watcher.finished(noted)


@cache
def _use_cores() -> None:
    """torch on the cores that this process may use: it does not see a container's quota."""
    import torch

    from targets.machine import usable_cores

    torch.set_num_threads(usable_cores())


def _report(plan: Plan, graph: Graph, work: Work) -> Report:
    recipe, source = plan.recipe, work.folder(graph.source)
    targets = tuple(
        validation.judged(work.folder(stages.validate), plan.recipe.gates_of(stages.target)) for stages in graph.targets
    )
    covered = coverage.load(work.folder(graph.coverage)) if graph.coverage else None
    return Report(
        verdict=worst([target.verdict for target in targets]),
        recipe=facts.recipe_facts(recipe, plan.recipe_sha256),
        source=facts.source_facts(recipe, source),
        calibration=facts.calibration_facts(work.folder(graph.samples)) if graph.samples else None,
        evaluation=facts.evaluation_facts(recipe, work.folder(graph.evaluation)),
        coverage=covered,
        host=targets[0].host or _host(recipe),
        versions=facts.versions(),
        tensors=_tensors(graph, work),
        targets=targets,
        steps=_steps(graph, work),
        allocations=tuple(
            allocate.allocation_in(work.folder(stages.solution.allocate))
            for stages in graph.targets
            if stages.solution.allocate
        ),
        stages=tuple(work.times),
        notes=(*facts.proofs(source), *(covered.warnings if covered else ()), *_recoveries(graph, work)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _recoveries(graph: Graph, work: Work) -> list[str]:
    """What each training after the solve cost and bought."""
    stages = dict.fromkeys(t.solution.recover for t in graph.targets)
    return [recover.note(work.folder(stage), stage.subject) for stage in stages if stage is not None]


def _host(recipe: Recipe) -> Host:
    device, options = validation.device_of(recipe.targets[0].device)
    return device.describe(options)


def _tensors(graph: Graph, work: Work) -> tuple[TensorClass, ...]:
    """Of every distinct set of rules, each class once."""
    return tuple(dict.fromkeys(c for stages in graph.targets for c in _classes(graph, stages, work)))


def _classes(graph: Graph, stages: TargetStages, work: Work) -> tuple[TensorClass, ...]:
    config, solution = facts.config_of(work.folder(graph.source)), stages.solution
    if solution.allocate is None:
        return facts.tensor_classes(solution.found(work.folder), config)
    assert isinstance(solution.rules, Budget)
    found = allocate.allocation_in(work.folder(solution.allocate))
    return facts.allocated_classes(found, solution.rules.solver.name, config)


def _steps(graph: Graph, work: Work) -> tuple[StepLoss, ...]:
    """Of every distinct set of rules, each step once; what re-quantizing cost of every solution. A budget has a rule a
    matrix: its table is the allocation's."""
    solutions = {work.folder(stages.solution.quantize): stages.solution for stages in graph.targets}
    found = [
        step
        for folder, solution in solutions.items()
        for step in facts.solve_steps(folder)
        if step.source_grid is not None or solution.allocate is None
    ]
    return tuple(dict.fromkeys(found))


def _publish(plan: Plan, graph: Graph, stages: TargetStages, result: TargetResult, made: Report, work: Work) -> None:
    """Copy the artifact beside its manifest; nothing is copied where the same files lie there already."""
    destination, exported = plan.out / stages.target.name, work.verified(stages.export)
    artifact = exporting.open_artifact(exported)
    recipe, told = plan.recipe.model_copy(update={"targets": (stages.target,)}), exporting.provenance_in(exported)
    described = Manifest(
        name=made.source.name,
        target=stages.target.name,
        artifact=ArtifactFacts(
            exporter=artifact.exporter,
            main_file=artifact.main_file,
            context=artifact.context,
            prefill=artifact.prefill,
        ),
        files=manifest.files_of(artifact.folder),
        recipe=recipe,
        recipe_sha256=plan.recipe_sha256,
        source=made.source,
        calibration=made.calibration,
        evaluation=made.evaluation,
        tensors=_classes(graph, stages, work),
        seed=recipe.seed,
        stages={stage.name: stage.key for stage in _ancestry(stages.validate)},
        versions=made.versions | result.versions,
        host=made.host,
        result=result,
        provenance=dict(told.told),
        is_embedded=told.is_embedded,
        created=validation.measured_at(work.folder(stages.validate)),
    )
    if not destination.is_dir() or manifest.files_of(destination) != described.files:
        publish(artifact.folder, destination)
    manifest.write(described, destination)


def _ancestry(stage: Stage) -> list[Stage]:
    """A stage and all that it depends on, first things first."""
    return list(dict.fromkeys([s for needed in stage.inputs for s in _ancestry(needed)] + [stage]))


def validate(folder: Path, progress: Progress) -> TargetResult:
    """Prove an artifact's folder again on this machine, against the float model and by the gates of its manifest.

    Whatever the store still holds of its run is used. Raises ArtifactError for files that are not the manifest's.
    """
    found = manifest.opened(folder)
    recipe = found.recipe
    graph = graphs.build(recipe, source_sha256(recipe.model), host_of(recipe))
    (stages,) = graph.targets
    work = Work(Store(default_root()), Quiet(), fresh=False)
    held = validation.Held(*map(work.verified, stages.validate.inputs[:-1]))
    with tempfile.TemporaryDirectory(prefix="lilliput-") as scratch:
        measured = validation.measure(found.open(folder), held, stages.target, Path(scratch), progress)
    return validation.judge(measured, recipe.gates_of(stages.target))
