"""Escalation, `quantize: auto`: from the cheapest way to quantize upwards, until the gates on accuracy pass.

    rtn     round to nearest: int4-b32 for the linear layers, the tables as in `quantize: int4-b32`
    gptq    the same grids, codes by GPTQ
    awq     the same grids, AWQ's factors and then GPTQ
    mixed   grids by measured sensitivity, at the same bits a weight (lilliput.stages.allocate)
    qat     what the rung below it solves, trained for MINUTES or as the recipe's `recover` says (calibration.qat)

Each rung is a whole run of an ordinary recipe, in which every target has rules of its own; so all that two rungs
share comes from the store, and a target that is content is not solved again. A target goes up while a gate on one of
ACCURACY was measured and does not pass; a gate that bits do not mend (size, speed, a crash) stops it where it is. A
target that no rung contents keeps the one that lost least. A target with a `quantize` of its own stays with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from lilliput import pipeline, planning, report
from lilliput.assignment import assign
from lilliput.grid import grid
from lilliput.model import DecoderConfig, role_of
from lilliput.recipe_schema import Auto, Budget, Recipe, Recover, Rule, RungName, uniform
from lilliput.report import TriedRung, TriedTarget
from lilliput.results import TargetResult
from lilliput.run import Plan, Run, Watcher

ACCURACY = ("mean_kld", "top1_agreement", "perplexity", "perplexity_ratio")
GRID, MINUTES = "int4-b32", 10.0
CHAINS: dict[RungName, tuple[str, tuple[str, ...]]] = {
    "rtn": ("round to nearest", ("rtn",)),
    "gptq": ("GPTQ", ("gptq",)),
    "awq": ("AWQ then GPTQ", ("awq", "gptq")),
}

Watch = Callable[[Plan], AbstractContextManager[Watcher]]
Told = Callable[[TriedRung], None]


@dataclass(frozen=True)
class Rung:
    """How the targets quantize on one rung."""

    name: RungName
    what: str
    quantize: tuple[Rule, ...] | Budget
    recover: Recover | None = None


def rungs(auto: Auto, config: DecoderConfig, training: Recover | None = None) -> tuple[Rung, ...]:
    """The ladder for a model: the mixed rung has as many bits as the uniform ones. `training` is that of qat."""
    ladder: list[Rung] = []
    for name in auto.auto:
        if name == "qat":
            below = ladder[-1] if ladder else _rung("gptq", config)
            wanted = training or Recover(minutes=MINUTES)
            length = f"{wanted.minutes:g} min" if wanted.minutes else f"{wanted.steps} steps"
            ladder.append(Rung(name, f"{below.what}, then {length} of training", below.quantize, wanted))
        else:
            ladder.append(_rung(name, config))
    return tuple(ladder)


def _rung(name: RungName, config: DecoderConfig) -> Rung:
    if name in CHAINS:
        what, chain = CHAINS[name]
        return Rung(name, f"{GRID}, {what}", _uniform(*chain))
    bits = bits_per_weight(_uniform("rtn"), config)
    return Rung(name, f"grids by sensitivity, {bits:.3g} bits a weight", Budget(bits_per_weight=bits))


def _uniform(*chain: str) -> tuple[Rule, ...]:
    """The rules that `quantize: int4-b32` is short for, with these solvers for the linear layers."""
    return tuple(Rule.model_validate(rule) for rule in uniform(GRID, *chain))


def bits_per_weight(rules: tuple[Rule, ...], config: DecoderConfig) -> float:
    """Of all matrices together, scales included."""
    shapes = config.parameter_shapes()
    bits = weights = 0.0
    for name, rule in assign(rules, config).items():
        assert role_of(name) != "vector"
        rows, cols = shapes[name]
        bits, weights = bits + rows * cols * grid(rule.grid).bits_per_weight(cols), weights + rows * cols
    return bits / weights


def concrete(recipe: Recipe, at: Mapping[str, Rung]) -> Recipe:
    """An ordinary recipe: each target on its rung. One with rules of its own keeps the recipe's training."""
    targets = []
    for target in recipe.targets:
        rung = at.get(target.name)
        ways = {"quantize": rung.quantize, "recover": rung.recover} if rung else {"recover": recipe.recover_of(target)}
        targets.append(target.model_copy(update=ways))
    first = next(target.quantize for target in targets if target.quantize)
    return recipe.model_copy(update={"targets": tuple(targets), "quantize": first, "recover": None})


def start(recipe: Recipe, targets: Iterable[str], model: str | None) -> tuple[Recipe, tuple[Rung, ...], list[str]]:
    """The recipe with these targets and model, its ladder, and the names of the targets that climb it."""
    kept = planning.chosen(recipe, tuple(targets), model)
    assert isinstance(kept.quantize, Auto)
    climbing = [target.name for target in kept.targets if target.quantize is None]
    return kept, rungs(kept.quantize, planning.config_of(kept), kept.recover), climbing


def plans(
    recipe: Recipe, out: Path, targets: Iterable[str] = (), model: str | None = None, fresh: bool = False
) -> tuple[tuple[Rung, Plan], ...]:
    """The plan of each rung, were every target to come that far. Checks what planning checks, on every rung."""
    kept, ladder, climbing = start(recipe, targets, model)
    return tuple(
        (rung, pipeline.plan(concrete(kept, dict.fromkeys(climbing, rung)), out, fresh=fresh)) for rung in ladder
    )


def climb(
    recipe: Recipe,
    out: Path,
    targets: Iterable[str],
    model: str | None,
    fresh: bool,
    watch: Watch,
    told: Told,
) -> Run:
    """Run rung after rung; the last run's report has the table of all. `told` hears of each rung as it is done."""
    kept, ladder, climbing = start(recipe, targets, model)
    at = dict.fromkeys(climbing, ladder[0])
    tried: list[tuple[Rung, TriedRung]] = []
    done: set[str] = set()

    def run() -> Run:
        plan = pipeline.plan(concrete(kept, at), out, fresh=fresh)
        with watch(plan) as watcher:
            return pipeline.run(plan, watcher, done)

    for rung in ladder:
        at |= dict.fromkeys(climbing, rung)
        made = run()
        tried.append((rung, _tried(rung, made, climbing)))
        told(tried[-1][1])
        results = {target.name: target for target in made.report.targets}
        climbing = [name for name in climbing if wants_more(results[name])]
        if not climbing:
            break
    best = {name: _best(name, tried) for name in climbing}
    if any(at[name] is not rung for name, rung in best.items()):
        at |= best
        made = run()
    found = made.report.model_copy(update={"escalation": tuple(step for _, step in tried)})
    report.write(found, out)
    return Run(made.plan, found)


def wants_more(target: TargetResult) -> bool:
    """Whether a gate on accuracy was measured and does not pass."""
    gates = [gate for gate in target.gates if gate.name in ACCURACY]
    return any(gate.verdict != "PASS" and gate.value is not None for gate in gates)


def _tried(rung: Rung, made: Run, climbing: list[str]) -> TriedRung:
    seconds = sum(stage.seconds for stage in made.report.stages if not stage.cached)
    results = [target for target in made.report.targets if target.name in climbing]
    return TriedRung(
        rung=rung.name,
        what=rung.what,
        seconds=seconds,
        targets=tuple(
            TriedTarget(
                name=target.name,
                verdict=target.verdict,
                size_bytes=target.artifact.size_bytes,
                mean_kld=target.accuracy.mean_kld if target.accuracy else None,
            )
            for target in results
        ),
    )


def _best(name: str, tried: list[tuple[Rung, TriedRung]]) -> Rung:
    """The rung on which a target lost least; the cheaper of two alike."""
    losses = [
        (target.mean_kld, index)
        for index, (_, step) in enumerate(tried)
        for target in step.targets
        if target.name == name and target.mean_kld is not None
    ]
    return tried[min(losses)[1]][0]
