"""The stages of a recipe as a graph, each with the key that addresses its result. Nothing is computed here.

    source ─┬─ evaluation ─┬─ reference ────────────┐
            │       └ coverage (with samples)       │
            ├─ suites ── answers ───────────────────┤          where the recipe asks questions
            ├─ samples ── statistics ── quantize ───┼─ dequantized ─┐     one of each per distinct set of rules
            └─ trace ─────────────────────┴─ export ┴─ validate ◄───┘     one of each per target

A budget has more stages. What every matrix costs on a grid is found once, for all targets; each of them then gets
rules of its own:

    samples ── sensitivity ─┬─ price (one a grid) ─┬─ allocate ── quantize
                            └─ correction ─────────┘

`recover`, where a recipe asks for it, trains what `quantize` solved, on the samples, and takes its place. A second
target with the same rules adds one export and one validate. A key is made of the stage's code
(lilliput.fingerprint), its options and the keys of what it reads: so it is known before any work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from lilliput import provenance, registry
from lilliput.fingerprint import fingerprint
from lilliput.progress import Progress
from lilliput.recipe_schema import FLOAT, Budget, Plugin, Recipe, Recover, Rule, Target
from lilliput.run import StageKind
from lilliput.stages import (
    allocate,
    answers,
    correction,
    coverage,
    dequantized,
    evaluation,
    export,
    price,
    quantize,
    recover,
    reference,
    samples,
    sensitivity,
    source,
    statistics,
    suites,
    trace,
)
from lilliput.stages import validate as validation
from lilliput.store import key_of
from lilliput.suites import sha256 as suite_sha256
from lilliput.texts import (
    CALIBRATION_TEXTS,
    EVALUATION_TEXTS,
    builtin_text,
    calibration_text,
    evaluation_text,
    text_sha256,
)

At = Callable[["Stage"], Path]  # the folder of an earlier stage's result


@dataclass(frozen=True, eq=False)
class Stage:
    """One node. `modules` are the roots of its code, `options` (JSON) whatever else its result depends on."""

    kind: StageKind
    subject: str
    inputs: tuple[Stage, ...]
    plugins: tuple[str, ...]
    options: Mapping[str, object]
    work: Callable[[At, Path, Progress], None]

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.subject}" if self.subject else self.kind

    @cached_property
    def key(self) -> str:
        code = fingerprint([f"lilliput.stages.{self.kind}", *self.plugins])
        return key_of(self.kind, code, {stage.name: stage.key for stage in self.inputs}, self.options)


@dataclass(frozen=True)
class First:
    """The stages that solutions and targets read."""

    source: Stage
    evaluation: Stage
    samples: Stage | None  # None: no solver needs statistics
    statistics: Stage | None
    trace: Stage
    reference: Stage
    asked: tuple[Stage, ...]  # suites and the float model's answers, or nothing


@dataclass(frozen=True)
class Priced:
    """What every matrix costs on each grid that budgets choose from, by one solver."""

    sensitivity: Stage
    correction: Stage
    price: Mapping[str, Stage]  # by grid

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (self.sensitivity, self.correction, *self.price.values())


@dataclass(frozen=True)
class Solution:
    """One set of rules and its two stages. The rules of a budget are those that its allocate stage finds."""

    rules: tuple[Rule, ...] | Budget
    quantize: Stage
    dequantized: Stage
    allocate: Stage | None = None
    recover: Stage | None = None  # None: no training after the solve

    @property
    def shipped(self) -> Stage:
        """The stage whose codes land in the files."""
        return self.recover or self.quantize

    def found(self, at: At) -> tuple[Rule, ...]:
        """The rules, once the stages are done."""
        if self.allocate is not None:
            return allocate.rules_in(at(self.allocate))
        assert not isinstance(self.rules, Budget)
        return self.rules


@dataclass(frozen=True)
class TargetStages:
    target: Target
    solution: Solution
    export: Stage
    validate: Stage


@dataclass(frozen=True)
class Graph:
    """All stages of a recipe; `order` is an order in which they can be done."""

    recipe: Recipe
    source: Stage
    evaluation: Stage
    samples: Stage | None  # None: no solver needs statistics
    coverage: Stage | None  # of the samples
    statistics: Stage | None
    priced: tuple[Stage, ...]  # what budgets choose by, where a target has one
    trace: Stage
    reference: Stage
    asked: tuple[Stage, ...]  # suites and the float model's answers, where the recipe has suites
    targets: tuple[TargetStages, ...]

    @property
    def order(self) -> tuple[Stage, ...]:
        first = [self.source, self.evaluation, *self.asked[:1], self.samples, self.coverage, self.trace]
        first += [self.reference, *self.asked[1:], self.statistics]
        solutions = [t.solution for t in self.targets]
        solved = [stage for s in solutions for stage in (s.allocate, s.quantize, s.recover, s.dequantized)]
        made = [s for t in self.targets for s in (t.export, t.validate)]
        return tuple(dict.fromkeys(s for s in [*first, *self.priced, *solved, *made] if s is not None))


def build(recipe: Recipe, source_sha256: str, host: str) -> Graph:
    """The graph of a recipe whose source's files have that hash. `host` names what measures: another measures anew."""
    loaded = source_stage(recipe, source_sha256)
    evaluated = _evaluation(recipe, loaded)
    needs = any(_uses_statistics(recipe.quantize_of(target)) for target in recipe.targets)
    trains = any(recipe.recover_of(target) for target in recipe.targets)
    sampled = _samples(recipe, loaded) if needs or trains else None
    covered = _coverage(loaded, sampled, evaluated) if sampled else None
    gathered = _statistics(loaded, sampled) if sampled and needs else None
    traced = _trace(recipe, loaded)
    held = Stage(
        "reference", "", (loaded, evaluated), (), {},
        lambda at, folder, progress: reference.work(at(loaded), at(evaluated), folder, progress),
    )  # fmt: skip
    asked = _asked(recipe, loaded)
    first = First(loaded, evaluated, sampled, gathered, traced, held, asked)
    priced = _prices(recipe, first)
    solutions: dict[tuple[str, ...], Solution] = {}
    stages = []
    for target in recipe.targets:
        rules, wanted = recipe.quantize_of(target), recipe.recover_of(target)
        if isinstance(rules, Budget):
            solution = _mixed(recipe, target, rules, first, priced[_text(rules.solver)])
        else:
            text = (*(rule.model_dump_json() for rule in rules), wanted.model_dump_json() if wanted else "")
            label = _label(rules, [s.quantize.subject for s in solutions.values()])
            solution = solutions.setdefault(text, solutions.get(text) or _solution(recipe, rules, wanted, label, first))
        stages.append(_target(recipe, target, solution, first, host))
    both = tuple(dict.fromkeys(stage for found in priced.values() for stage in found.stages))
    return Graph(recipe, loaded, evaluated, sampled, covered, gathered, both, traced, held, asked, tuple(stages))


def source_stage(recipe: Recipe, source_sha256: str) -> Stage:
    """The stage that all others start from; it does not depend on how the recipe quantizes."""
    spec = recipe.model
    return Stage(
        "source", "", (), (), {**spec.model_dump(exclude={"name"}), "sha256": source_sha256},
        lambda _, folder, progress: source.work(spec, folder, progress),
    )  # fmt: skip


def _evaluation(recipe: Recipe, loaded: Stage) -> Stage:
    wanted = recipe.evaluation
    text = wanted.text if wanted.text in EVALUATION_TEXTS else Path(wanted.text)
    return Stage(
        "evaluation", "", (loaded,), (),
        {**wanted.model_dump(exclude={"suites", "most", "items", "most_items"}), "sha256": _text_sha256(wanted.text)},
        lambda at, folder, progress: evaluation.work(at(loaded), text, wanted.count, wanted.length, folder, progress),
    )  # fmt: skip


def _asked(recipe: Recipe, loaded: Stage) -> tuple[Stage, ...]:
    """The recipe's suites as questions, and the float model's answers."""
    names, count, context = recipe.evaluation.suites, recipe.evaluation.items, recipe.context
    if not names:
        return ()
    found = Stage(
        "suites", "", (loaded,), (),
        {"context": context, "items": count, "suites": [suite_sha256(name, count) for name in names]},
        lambda at, folder, progress: suites.work(at(loaded), names, count, context, folder, progress),
    )  # fmt: skip
    answered = Stage(
        "answers", "", (loaded, found), (), {"context": context},
        lambda at, folder, progress: answers.work(at(loaded), at(found), context, folder, progress),
    )  # fmt: skip
    return found, answered


def _samples(recipe: Recipe, loaded: Stage) -> Stage:
    options = recipe.calibration.model_dump() | {"seed": recipe.seed}
    texts = [part.samples for part in recipe.calibration.parts]
    digest = " ".join("" if text == "self" else _samples_sha256(text) for text in texts)
    return Stage(
        "samples", "", (loaded,), (), {**options, "sha256": digest},
        lambda at, folder, progress: samples.work(at(loaded), options, folder, progress),
    )  # fmt: skip


def _coverage(loaded: Stage, sampled: Stage, evaluated: Stage) -> Stage:
    return Stage(
        "coverage", "", (loaded, sampled, evaluated), (), {},
        lambda at, folder, progress: coverage.work(at(loaded), at(sampled), at(evaluated), folder, progress),
    )  # fmt: skip


def _statistics(loaded: Stage, sampled: Stage) -> Stage:
    return Stage(
        "statistics", "", (loaded, sampled), (), {},
        lambda at, folder, progress: statistics.work(at(loaded), at(sampled), folder, progress),
    )  # fmt: skip


def _trace(recipe: Recipe, loaded: Stage) -> Stage:
    context, prefill = recipe.context, recipe.prefill
    return Stage(
        "trace", "", (loaded,), (), {"context": context, "prefill": prefill},
        lambda at, folder, progress: trace.work(at(loaded), context, prefill, folder, progress),
    )  # fmt: skip


def _prices(recipe: Recipe, first: First) -> dict[str, Priced]:
    """One for each solver of the recipe's budgets, with the grids of all targets that have it."""
    wanted: dict[str, tuple[Plugin, list[str]]] = {}
    for target in recipe.targets:
        budget = recipe.quantize_of(target)
        if isinstance(budget, Budget):
            _, grids = wanted.setdefault(_text(budget.solver), (budget.solver, []))
            grids += [name for name in grids_of(target, budget) if name not in grids]
    sensed = _sensitivity(recipe.seed, first) if wanted else None
    return {
        text: _priced(solver, grids, "" if i == 0 else f"#{i + 1}", sensed, first)
        for i, (text, (solver, grids)) in enumerate(wanted.items())
        if sensed
    }


def _sensitivity(seed: int, first: First) -> Stage:
    loaded, sampled = first.source, first.samples
    assert sampled is not None
    return Stage(
        "sensitivity", "", (loaded, sampled), (), {"seed": seed},
        lambda at, folder, progress: sensitivity.work(at(loaded), at(sampled), seed, folder, progress),
    )  # fmt: skip


def _priced(solver: Plugin, grids: Sequence[str], number: str, sensed: Stage, first: First) -> Priced:
    loaded, sampled, gathered = first.source, first.samples, first.statistics
    assert sampled is not None
    assert gathered is not None
    plugins, options = (registry.module_name("solvers", solver.name),), {"solver": solver.model_dump()}
    corrected = Stage(
        "correction", number, (loaded, sampled, gathered, sensed), plugins, options,
        lambda at, folder, progress: correction.work(
            at(loaded), at(sampled), at(gathered), at(sensed), solver, folder, progress
        ),
    )  # fmt: skip

    def priced(grid: str) -> Stage:
        return Stage(
            "price", f"{grid}{number}", (loaded, gathered, sensed), plugins, {**options, "grid": grid},
            lambda at, folder, progress: price.work(
                at(loaded), at(gathered), at(sensed), grid, solver, folder, progress
            ),
        )  # fmt: skip

    return Priced(sensed, corrected, {grid: priced(grid) for grid in grids})


def grids_of(target: Target, budget: Budget) -> tuple[str, ...]:
    """The grids that a target's budget chooses from: its own, or those that the exporter's runtime runs fast."""
    if budget.grids:
        return budget.grids
    found = registry.constant("exporters", target.exporter.name, "budget_grids")
    assert isinstance(found, tuple)
    return found


def _mixed(recipe: Recipe, target: Target, budget: Budget, first: First, priced: Priced) -> Solution:
    """The solution of one target's budget."""
    loaded, traced, sampled, gathered = first.source, first.trace, first.samples, first.statistics
    grids = grids_of(target, budget)
    assert sampled is not None
    assert gathered is not None
    exporter, found = registry.module_name("exporters", target.exporter.name), [priced.price[grid] for grid in grids]
    wanted = recipe.recover_of(target)
    said = allocate.Said(
        recipe.model.name, _known(recipe, target), provenance.RECOVERED[wanted.method] if wanted else None
    )
    allocated = Stage(
        "allocate", target.name,
        (loaded, traced, sampled, gathered, priced.sensitivity, priced.correction, *found),
        (exporter, registry.module_name("solvers", budget.solver.name)),
        {"budget": budget.model_dump(), "grids": grids, "said": asdict(said)}
        | target.model_dump(include={"name", "exporter"}),
        lambda at, folder, progress: allocate.work(
            allocate.Held(
                at(loaded), at(traced), at(sampled), at(gathered), at(priced.sensitivity), at(priced.correction),
                tuple(map(at, found)),
            ),
            target, budget, grids, said, folder, progress,
        ),
    )  # fmt: skip
    solved = Stage(
        "quantize", target.name, (loaded, gathered, priced.sensitivity, allocated),
        (registry.module_name("solvers", budget.solver.name),), {"name": recipe.model.name},
        lambda at, folder, progress: quantize.work(
            at(loaded), at(gathered), allocate.rules_in(at(allocated)), recipe.model.name, folder, progress,
            at(priced.sensitivity),
        ),
    )  # fmt: skip
    return _finished(budget, target.name, solved, wanted, first, allocated)


def _solution(
    recipe: Recipe, rules: tuple[Rule, ...], wanted: Recover | None, label: str, first: First
) -> Solution:  # fmt: skip
    loaded, used = first.source, first.statistics if _uses_statistics(rules) else None
    solvers = {registry.module_name("solvers", rule.solver.name) for rule in rules if rule.grid != FLOAT}
    solvers |= {registry.module_name("transforms", t.name) for rule in rules for t in rule.transforms}
    solved = Stage(
        "quantize", label, (loaded, used) if used else (loaded,), tuple(sorted(solvers)),
        {"rules": [rule.model_dump() for rule in rules], "name": recipe.model.name},
        lambda at, folder, progress: quantize.work(
            at(loaded), at(used) if used else None, rules, recipe.model.name, folder, progress
        ),
    )  # fmt: skip
    return _finished(rules, label, solved, wanted, first)


def _finished(
    rules: tuple[Rule, ...] | Budget, label: str, solved: Stage, wanted: Recover | None, first: First,
    allocated: Stage | None = None,
) -> Solution:  # fmt: skip
    """What follows a solve: training, where it is wanted, and the logits of what ships."""
    trained = _recover(wanted, label, solved, first) if wanted else None
    return Solution(rules, solved, _dequantized(label, trained or solved, first), allocated, trained)


def _recover(wanted: Recover, label: str, solved: Stage, first: First) -> Stage:
    loaded, sampled = first.source, first.samples
    assert sampled is not None
    return Stage(
        "recover", label, (loaded, solved, sampled), (), {"recover": wanted.model_dump()},
        lambda at, folder, progress: recover.work(at(loaded), at(solved), at(sampled), wanted, folder, progress),
    )  # fmt: skip


def _dequantized(label: str, solved: Stage, first: First) -> Stage:
    evaluated, held = first.evaluation, first.reference
    return Stage(
        "dequantized", label, (solved, evaluated, held), (), {},
        lambda at, folder, progress: dequantized.work(at(solved), at(evaluated), at(held), folder, progress),
    )  # fmt: skip


def _target(recipe: Recipe, target: Target, solution: Solution, first: First, host: str) -> TargetStages:
    solved, traced = solution.shipped, first.trace
    exporter = registry.module_name("exporters", target.exporter.name)
    limit = solution.rules.limit_bytes if isinstance(solution.rules, Budget) else None
    known = _known(recipe, target)
    exported = Stage(
        "export", target.name, (solved, traced), (exporter,),
        {"exporter": target.exporter.model_dump(), "limit_bytes": limit, "known": known},
        lambda at, folder, progress: export.work(
            at(solved), at(traced), target.exporter, known, folder, progress, limit
        ),
    )  # fmt: skip
    plugins = [registry.module_name("runtimes", target.runtime.name)]
    plugins.append(registry.module_name("devices", target.device.name))
    wanted = target.model_dump(include={"name", "runtime", "device", "threads", "board"}) | {"host": host}

    inputs = (
        first.source, solved, traced, first.evaluation, first.reference, solution.dequantized, *first.asked,
    )  # fmt: skip

    def work(at: At, folder: Path, progress: Progress) -> None:
        validation.work(at(exported), validation.Held(*map(at, inputs)), target, folder, progress)

    validated = Stage("validate", target.name, (*inputs, exported), (exporter, *plugins), wanted, work)
    return TargetStages(target, solution, exported, validated)


def _known(recipe: Recipe, target: Target) -> dict[str, str]:
    """What the target's file says of its making; it reads samples where its rules have statistics or it is trained."""
    calibrated = _uses_statistics(recipe.quantize_of(target)) or recipe.recover_of(target) is not None
    return provenance.known(recipe, target, calibrated=calibrated)


def _text(plugin: Plugin) -> str:
    return plugin.model_dump_json()


def _uses_statistics(rules: tuple[Rule, ...] | Budget) -> bool:
    """A budget weighs by them, whatever its solver."""
    return isinstance(rules, Budget) or any(map(_needs_statistics, rules))


def _needs_statistics(rule: Rule) -> bool:
    """A solver says so, or has an option `weighted` that asks for them; every transform does."""
    if rule.grid == FLOAT:
        return False
    if rule.transforms:
        return True
    weighted = bool(rule.solver.options.get("weighted"))
    return weighted or bool(registry.constant("solvers", rule.solver.name, "needs_statistics"))


def _label(rules: tuple[Rule, ...], taken: list[str]) -> str:
    """The distinct grids, in the rules' order: int4-b32+int8-channel. A second set of the same grids gets a number."""
    label = "+".join(dict.fromkeys(rule.grid for rule in rules))
    same = sum(name.partition("#")[0] == label for name in taken)
    return f"{label}#{same + 1}" if same else label


def _samples_sha256(text: str) -> str:
    return text_sha256(calibration_text(text)) if text in CALIBRATION_TEXTS else _text_sha256(text)


def _text_sha256(text: str) -> str:
    """Of a text file, a built-in text, or a data set's files (paths, sizes, times); "" where only its id is known."""
    if text == "builtin":
        return text_sha256(builtin_text())
    if text in EVALUATION_TEXTS:
        return text_sha256(evaluation_text(text))
    path = Path(text.removeprefix("dataset:"))
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        listing = "\n".join(f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    return ""
