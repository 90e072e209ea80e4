"""The stages of a recipe as a graph, each with the key that addresses its result. Nothing is computed here.

    source ─┬─ evaluation ─┬─ reference ────────────┐
            │       └ coverage (with samples)       │
            ├─ samples ── statistics ── quantize ───┼─ dequantized ─┐     one of each per distinct set of rules
            └─ trace ─────────────────────┴─ export ┴─ validate ◄───┘     one of each per target

A second target with the same rules adds one export and one validate. A key is made of the stage's code
(lilliput.fingerprint), its options and the keys of what it reads: so it is known before any work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lilliput import registry
from lilliput.fingerprint import fingerprint
from lilliput.progress import Progress
from lilliput.recipe_schema import FLOAT, Recipe, Rule, Target
from lilliput.run import StageKind
from lilliput.stages import (
    coverage,
    dequantized,
    evaluation,
    export,
    quantize,
    reference,
    samples,
    source,
    statistics,
    trace,
)
from lilliput.stages import validate as validation
from lilliput.store import key_of
from lilliput.texts import EVALUATION_TEXTS, builtin_text, evaluation_text, text_sha256

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
class Solution:
    """One set of rules and its two stages."""

    rules: tuple[Rule, ...]
    quantize: Stage
    dequantized: Stage


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
    trace: Stage
    reference: Stage
    targets: tuple[TargetStages, ...]

    @property
    def order(self) -> tuple[Stage, ...]:
        first = [self.source, self.evaluation, self.samples, self.coverage, self.trace, self.reference]
        first.append(self.statistics)
        solved = [s for t in self.targets for s in (t.solution.quantize, t.solution.dequantized)]
        made = [s for t in self.targets for s in (t.export, t.validate)]
        return tuple(dict.fromkeys(s for s in [*first, *solved, *made] if s is not None))


def build(recipe: Recipe, source_sha256: str, host: str) -> Graph:
    """The graph of a recipe whose source's files have that hash. `host` names what measures: another measures anew."""
    loaded = _source(recipe, source_sha256)
    evaluated = _evaluation(recipe, loaded)
    needs = any(_needs_statistics(rule) for target in recipe.targets for rule in recipe.rules_of(target))
    sampled = _samples(recipe, loaded) if needs else None
    covered = _coverage(loaded, sampled, evaluated) if sampled else None
    gathered = _statistics(loaded, sampled) if sampled else None
    traced = _trace(recipe, loaded)
    held = Stage(
        "reference", "", (loaded, evaluated), (), {},
        lambda at, folder, progress: reference.work(at(loaded), at(evaluated), folder, progress),
    )  # fmt: skip
    solutions: dict[tuple[str, ...], Solution] = {}
    stages = []
    for target in recipe.targets:
        rules = recipe.rules_of(target)
        text = tuple(rule.model_dump_json() for rule in rules)
        if text not in solutions:
            label = _label(rules, [s.quantize.subject for s in solutions.values()])
            solutions[text] = _solution(recipe, rules, label, loaded, gathered, evaluated, held)
        stages.append(_target(target, solutions[text], loaded, traced, evaluated, held, host))
    return Graph(recipe, loaded, evaluated, sampled, covered, gathered, traced, held, tuple(stages))


def _source(recipe: Recipe, source_sha256: str) -> Stage:
    spec = recipe.model
    return Stage(
        "source", "", (), (), {**spec.model_dump(exclude={"name"}), "sha256": source_sha256},
        lambda _, folder, progress: source.work(spec, folder, progress),
    )  # fmt: skip


def _evaluation(recipe: Recipe, loaded: Stage) -> Stage:
    wanted = recipe.evaluation
    text = wanted.text if wanted.text in EVALUATION_TEXTS else Path(wanted.text)
    return Stage(
        "evaluation", "", (loaded,), (), {**wanted.model_dump(), "sha256": _text_sha256(wanted.text)},
        lambda at, folder, progress: evaluation.work(at(loaded), text, wanted.count, wanted.length, folder, progress),
    )  # fmt: skip


def _samples(recipe: Recipe, loaded: Stage) -> Stage:
    options = recipe.calibration.model_dump() | {"seed": recipe.seed}
    texts = [part.samples for part in recipe.calibration.parts]
    digest = " ".join("" if text == "self" else _text_sha256(text) for text in texts)
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


def _solution(
    recipe: Recipe, rules: tuple[Rule, ...], label: str,
    loaded: Stage, gathered: Stage | None, evaluated: Stage, held: Stage,
) -> Solution:  # fmt: skip
    used = gathered if any(map(_needs_statistics, rules)) else None
    solvers = {registry.module_name("solvers", rule.solver.name) for rule in rules if rule.grid != FLOAT}
    solvers |= {registry.module_name("transforms", t.name) for rule in rules for t in rule.transforms}
    solved = Stage(
        "quantize", label, (loaded, used) if used else (loaded,), tuple(sorted(solvers)),
        {"rules": [rule.model_dump() for rule in rules], "name": recipe.model.name},
        lambda at, folder, progress: quantize.work(
            at(loaded), at(used) if used else None, rules, recipe.model.name, folder, progress
        ),
    )  # fmt: skip
    run = Stage(
        "dequantized", label, (solved, evaluated, held), (), {},
        lambda at, folder, progress: dequantized.work(at(solved), at(evaluated), at(held), folder, progress),
    )  # fmt: skip
    return Solution(rules, solved, run)


def _target(
    target: Target, solution: Solution, loaded: Stage, traced: Stage, evaluated: Stage, held: Stage, host: str
) -> TargetStages:
    solved = solution.quantize
    exporter = registry.module_name("exporters", target.exporter.name)
    exported = Stage(
        "export", target.name, (solved, traced), (exporter,), {"exporter": target.exporter.model_dump()},
        lambda at, folder, progress: export.work(at(solved), at(traced), target.exporter, folder, progress),
    )  # fmt: skip
    plugins = [registry.module_name("runtimes", target.runtime.name)]
    plugins.append(registry.module_name("devices", target.device.name))
    wanted = target.model_dump(include={"name", "runtime", "device", "threads"}) | {"host": host}

    inputs = (loaded, solved, traced, evaluated, held, solution.dequantized)

    def work(at: At, folder: Path, progress: Progress) -> None:
        validation.work(at(exported), validation.Held(*map(at, inputs)), target, folder, progress)

    validated = Stage("validate", target.name, (*inputs, exported), (exporter, *plugins), wanted, work)
    return TargetStages(target, solution, exported, validated)


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
