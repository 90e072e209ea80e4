"""The plan: everything that can be known, checked and refused before any work.

Checked are, in this order: the output folder, the source's files, that every matrix has a rule, that every format holds
every matrix on its grid, the plugins' options, the packages they need, free disk and memory. Where all results of
a target are in the store already, they prove that its formats and packages fit, and nothing heavy is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lilliput import graph as graphs
from lilliput import output, registry, source_grids
from lilliput.artifact import sha256
from lilliput.assignment import assign, parameter_count
from lilliput.errors import ExportError, MissingPackageError, RecipeError, did_you_mean
from lilliput.estimate import artifact_bytes, budget_bytes, estimate
from lilliput.graph import Graph, Stage, TargetStages
from lilliput.grid import grid
from lilliput.model import DecoderConfig, role_of
from lilliput.recipe_schema import FLOAT, MEGA, PASSTHROUGH, Budget, ModelSpec, Recipe, Rule, Target
from lilliput.run import Plan, PlannedStage, PlannedTarget
from lilliput.stages import validate
from lilliput.store import Store, default_root

if TYPE_CHECKING:
    from exporters.base import Exporter

MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".md")  # of a Hugging Face folder


def plan(recipe: Recipe, out: Path, targets: Sequence[str] = (), model: str | None = None, fresh: bool = False) -> Plan:
    """All stages in order, what is cached and what the rest will take; every check that needs no work.

    `targets` keeps the targets of these names, `model` replaces the recipe's source, `fresh` ignores what is cached.
    Raises LilliputError: a format that cannot hold a tensor, a missing package, too little disk or memory,
    an output folder that holds something else.
    """
    recipe = chosen(recipe, targets, model)
    output.check(out)
    for target in recipe.targets:
        _check_runtime(target)
    store = Store(default_root())
    digest, host = source_sha256(recipe.model), host_of(recipe)
    recipe = _with_source_grids(recipe, store, digest)
    graph = graphs.build(recipe, digest, host)
    cached = {stage.name: not fresh and store.find(stage.kind, stage.key) is not None for stage in graph.order}
    config = _config(recipe.model, store, graph.source)
    _check_sizes(recipe, config)
    for stages in graph.targets:
        if not (cached[stages.export.name] and cached[stages.validate.name]):
            check_target(stages, config)
    made, found = _planned(recipe, graph, cached, config), estimate(recipe, config)
    left = [stage for stage in made if not stage.cached]
    done = Plan(
        recipe=recipe,
        recipe_sha256=recipe_sha256(recipe),
        source_sha256=digest,
        host=host,
        out=out,
        store=store.root,
        fresh=fresh,
        parameters=parameter_count(config),
        stages=made,
        targets=tuple(_planned_target(stages, config) for stages in graph.targets),
        ram_bytes=found.ram_bytes if any(stage.kind != "report" for stage in left) else 0,
        disk_bytes=sum(found.disk_bytes.get(stage.kind, 0) for stage in left),
        seconds=sum(stage.seconds for stage in left),
    )
    _check_machine(done)
    return done


def recipe_sha256(recipe: Recipe) -> str:
    """Of the canonical JSON: comments, order of keys and defaults that are written out do not count."""
    return hashlib.sha256(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def chosen(recipe: Recipe, targets: Sequence[str], model: str | None) -> Recipe:
    """The recipe with these targets only, and another model."""
    names = [target.name for target in recipe.targets]
    for name in targets:
        if name not in names:
            raise RecipeError(f"recipe {recipe.name} has no target {name!r}: {did_you_mean(name, names)}")
    kept = tuple(target for target in recipe.targets if not targets or target.name in targets)
    spec = recipe.model if model is None else recipe.model.model_copy(update={"source": model, "name": None})
    return recipe.model_copy(update={"targets": kept, "model": spec})


def config_of(recipe: Recipe) -> DecoderConfig:
    """The model's configuration, before any work."""
    source = graphs.source_stage(recipe, source_sha256(recipe.model))
    return _config(recipe.model, Store(default_root()), source)


def source_sha256(spec: ModelSpec) -> str:
    """Of the files that a source is read from: a file's own, or that of the list of a folder's. Opens no model."""
    from lilliput.source import resolve

    path = resolve(spec.source, allow_pickle=spec.allow_pickle)
    if path.is_file():
        return sha256(path)
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in MODEL_FILES)
    return hashlib.sha256("".join(f"{sha256(file)}  {file.name}\n" for file in files).encode()).hexdigest()


def host_of(recipe: Recipe) -> str:
    """What a measurement depends on: processor, its extensions, cores. One line per device that the recipe names."""
    lines = []
    for plugin in dict.fromkeys(target.device for target in recipe.targets):
        device, options = validate.device_of(plugin)
        host = device.describe(options)
        lines.append(f"{host.device}: {host.cpu}, {host.architecture}, {' '.join(host.isa)}, {host.cores} cores")
    return "\n".join(lines)


def _config(spec: ModelSpec, store: Store, source: Stage) -> DecoderConfig:
    """The decoder's configuration: from the source stage where that is done, else from the source's own metadata."""
    if folder := store.find(source.kind, source.key):
        return DecoderConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    from lilliput.source import open_original, resolve

    path = resolve(spec.source, allow_pickle=spec.allow_pickle)
    return open_original(path, allow_pickle=spec.allow_pickle, allow_remote_code=spec.allow_remote_code).config


def _with_source_grids(recipe: Recipe, store: Store, digest: str) -> Recipe:
    """`quantize: source` as rules, and every rule that takes the source's codes held against them."""
    if not source_grids.asked(recipe):
        return recipe
    spec, source = recipe.model, graphs.source_stage(recipe, digest)
    config, folder = _config(spec, store, source), store.find(source.kind, source.key)
    if folder:
        held = source_grids.of_stage(folder)
    else:
        from lilliput.source import resolve

        path = resolve(spec.source, allow_pickle=spec.allow_pickle)
        held = source_grids.of_original(path, allow_pickle=spec.allow_pickle, allow_remote_code=spec.allow_remote_code)
    found = source_grids.resolved(recipe, held, config)
    for rules in map(found.quantize_of, found.targets):
        if not isinstance(rules, Budget):
            source_grids.check(assign(rules, config), held, config)
    return found


def _check_sizes(recipe: Recipe, config: DecoderConfig) -> None:
    lengths = {"context": recipe.context, "evaluation.length": recipe.evaluation.length}
    lengths["calibration.length"] = recipe.calibration.length
    for key, length in lengths.items():
        if length > config.max_positions:
            raise RecipeError(
                f"{key} is {length}, the model has {config.max_positions} positions: set {key} to at most that"
            )


def _check_runtime(target: Target) -> None:
    opens = registry.constant("runtimes", target.runtime.name, "exporters")
    assert isinstance(opens, tuple)
    if target.exporter.name not in opens:
        raise RecipeError(
            f"target {target.name!r}: runtime {target.runtime.name!r} does not open artifacts of exporter "
            f"{target.exporter.name!r}, it opens those of {', '.join(opens)}: choose another runtime or exporter"
        )


def check_target(stages: TargetStages, config: DecoderConfig) -> None:
    """Packages, options, and every matrix's shape and grid against the format."""
    target = stages.target
    for kind, plugin in (("exporters", target.exporter), ("runtimes", target.runtime)):
        for package, extra in registry.missing_packages(kind, plugin.name):  # type: ignore[arg-type]
            raise MissingPackageError(package, extra, f"target {target.name!r} ({plugin.name})")
    registry.options("exporters", target.exporter.name, target.exporter.options)
    registry.options("runtimes", target.runtime.name, target.runtime.options)
    registry.options("devices", target.device.name, target.device.options)
    rules = stages.solution.rules
    if isinstance(rules, Budget):
        _check_budget(target, rules, config)
        return
    assigned = assign(rules, config)
    for rule in dict.fromkeys(rule.model_dump_json() for rule in assigned.values()):
        checked = Rule.model_validate_json(rule)
        registry.options("solvers", checked.solver.name, checked.solver.options)
        for transform in checked.transforms:
            registry.options("transforms", transform.name, transform.options)
    check_formats(target, assigned, config)


def _check_budget(target: Target, budget: Budget, config: DecoderConfig) -> None:
    """Raise RecipeError for a budget below what the smallest grids take, whatever else the file holds."""
    registry.options("solvers", budget.solver.name, budget.solver.options)
    if budget.solver.name == PASSTHROUGH:
        raise RecipeError(
            f"target {target.name!r}: {PASSTHROUGH} chooses no codes that a budget could compare grids by"
        )
    exporter: Exporter = registry.load("exporters", target.exporter.name)()
    shapes = {n: (s[0], s[1]) for n, s in config.parameter_shapes().items() if role_of(n) != "vector"}
    least, weights = 0.0, 0
    for name, (rows, cols) in shapes.items():
        specs = [grid(choice) for choice in graphs.grids_of(target, budget)]
        bits = [s.bits_per_weight(cols) for s in specs if exporter.refuses(s, role_of(name), (rows, cols)) is None]
        if not bits:
            raise RecipeError(
                f"target {target.name!r}: {target.exporter.name} holds {name} ({rows}, {cols}) on none of the grids "
                f"{', '.join(graphs.grids_of(target, budget))}: give `grids` one that it can hold"
            )
        least, weights = least + rows * cols * min(bits) / 8, weights + rows * cols
    limit = budget.limit_bytes or int((budget.bits_per_weight or 0.0) * weights / 8)
    if limit < least:
        raise RecipeError(
            f"target {target.name!r}: a budget of {limit / MEGA:.1f} MB is too small: the matrices alone take "
            f"{least / MEGA:.1f} MB ({8 * least / weights:.2f} bits per weight) on the smallest grids: raise it"
        )


def check_formats(target: Target, assigned: dict[str, Rule], config: DecoderConfig) -> None:
    """Raise ExportError naming the first matrix that the target's format cannot hold on its grid."""
    exporter: Exporter = registry.load("exporters", target.exporter.name)()
    shapes = config.parameter_shapes()
    for name, rule in assigned.items():
        if rule.grid == FLOAT:
            continue
        rows, cols = shapes[name]
        if reason := exporter.refuses(grid(rule.grid), role_of(name), (rows, cols)):
            raise ExportError(
                f"target {target.name!r}: {name} ({rows}, {cols}) on grid {rule.grid}: {reason}; "
                "give the matrix another grid in `quantize`, or the target a `quantize` of its own"
            )


def _planned(recipe: Recipe, graph: Graph, cached: dict[str, bool], config: DecoderConfig) -> tuple[PlannedStage, ...]:
    seconds = estimate(recipe, config).seconds
    stages = [
        PlannedStage(s.kind, s.subject, s.key, cached[s.name], 0.0 if cached[s.name] else seconds[s.kind])
        for s in graph.order
    ]
    return (*stages, PlannedStage("report", "", "", cached=False, seconds=seconds["report"]))


def _planned_target(stages: TargetStages, config: DecoderConfig) -> PlannedTarget:
    target, rules = stages.target, stages.solution.rules
    size = budget_bytes(rules, config) if isinstance(rules, Budget) else artifact_bytes(assign(rules, config), config)
    estimate = ""
    if target.board is not None:
        from targets import boards

        estimate = boards.shown(boards.load(target.board), size, parameter_count(config))
    return PlannedTarget(target.name, target.exporter.name, target.runtime.name, target.device.url, size, estimate)


def _check_machine(made: Plan) -> None:
    from targets.machine import check_disk, check_memory

    what = f"recipe {made.recipe.name} (estimate)"
    check_memory(made.ram_bytes, what)
    check_disk(made.store, made.disk_bytes, what)
    check_disk(made.out, sum(target.size_bytes for target in made.targets), what)
