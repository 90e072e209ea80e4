"""Solve a model: every matrix on the grid of its rule, by the rule's solver.

Rules are shell patterns over parameter names, the first that matches wins (lilliput.assignment.assign).
Norms, biases and learned positions stay in float, and so does what a rule keeps so; provenance names the
latter. A tied embedding is one parameter: lookup and head get the same codes.

Solver passthrough takes the codes that a quantized source holds (calibration.passthrough); what any other loses of such
a matrix is measured, and is among the model's steps.

A rule's transforms come first, for all matrices (calibration.chain). Matrices do not depend on each other then: as
many are solved at once as torch has threads (calibration.parallel).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from calibration import passthrough
from calibration.base import InputStatistics, Solver, SolverOptions
from calibration.chain import MatrixErrors, errors_of, prepare, steps_of
from calibration.parallel import in_parallel
from calibration.statistics import Statistics
from lilliput import registry
from lilliput.assignment import assign
from lilliput.errors import CalibrationError
from lilliput.grid import Float, QuantizedTensor, grid
from lilliput.model import QuantizedModel, SolveStep, SourceModel, role_of
from lilliput.progress import Progress, silent
from lilliput.recipe_schema import FLOAT, PASSTHROUGH, Rule

Solve = Callable[[Float, InputStatistics | None], QuantizedTensor]


def solve(
    source: SourceModel, rules: Sequence[Rule], statistics: Statistics | None, progress: Progress = silent
) -> QuantizedModel:
    """The quantized model; progress counts matrices. Memory: the codes, and one matrix in float.

    Raises RecipeError where a matrix has no rule, CalibrationError where a rule has no matrix, or where its
    solver needs statistics and there are none.
    """
    check_rules(rules, source)
    assigned = assign(tuple(rules), source.config)
    solvers = {id(rule): _solver(rule, statistics) for rule in _distinct(assigned) if rule.grid != FLOAT}
    prepared = prepare(source, assigned, statistics)

    def one(name: str) -> tuple[str, QuantizedTensor, MatrixErrors | None, SolveStep | None]:
        rule, weight = assigned[name], prepared.weights[name]
        if rule.solver.name == PASSTHROUGH:
            return name, passthrough.keep(source, name, grid(rule.grid), weight), None, None
        tensor = solvers[id(rule)](weight, prepared.statistics.get(name))
        tensor.check(name)
        lost = passthrough.cost(source, name, weight, tensor)
        return name, tensor, errors_of(name, rule, prepared, tensor), lost

    names = [name for name, rule in assigned.items() if rule.grid != FLOAT]
    quantized: dict[str, QuantizedTensor] = {}
    errors: dict[str, MatrixErrors] = {}
    requantized: list[SolveStep] = []
    for name, tensor, found, lost in in_parallel(one, names):
        quantized[name] = tensor
        errors |= {name: found} if found else {}
        requantized += [lost] if lost else []
        progress(len(quantized), len(names))
    floats = {name: prepared.weights[name] for name in source.config.parameter_shapes() if name not in quantized}
    provenance = provenance_of(source, assigned, statistics, prepared.unfolded)
    steps = (*steps_of(assigned, errors), *requantized)
    return QuantizedModel(source.name, source.config, quantized, floats, source.tokenizer, provenance, steps)


def check_rules(rules: Sequence[Rule], source: SourceModel) -> None:
    """Raise CalibrationError for a pattern that fits no matrix: it is misspelt. `head` fits a tied model's too."""
    names = [name for name in source.config.parameter_shapes() if role_of(name) != "vector"]
    for rule in rules:
        if not any(fnmatchcase(name, rule.match) for name in [*names, "head"]):
            raise CalibrationError(
                f"quantize: rule {rule.match!r} matches no matrix of {source.name}: its names are like "
                f"{', '.join(names[:3])}; mend or remove the rule"
            )


def _distinct(assigned: Mapping[str, Rule]) -> list[Rule]:
    """The rules that have a matrix, in the order of their first; a rule holds a dict of options, so it has no hash."""
    return list({id(rule): rule for rule in assigned.values()}.values())


def _solver(rule: Rule, statistics: Statistics | None) -> Solve:
    """A rule's solver on its grid, with its options."""
    solver: Solver = registry.load("solvers", rule.solver.name)()
    options = registry.options("solvers", rule.solver.name, rule.solver.options)
    assert isinstance(options, SolverOptions)
    if solver.needs_statistics and statistics is None:
        raise CalibrationError(
            f"quantize: rule {rule.match!r}: solver {rule.solver.name} needs calibration statistics, there are none"
        )
    spec = grid(rule.grid)
    return lambda weight, found: solver.solve(weight, spec, found, options)


def provenance_of(
    source: SourceModel, assigned: Mapping[str, Rule], statistics: Statistics | None, unfolded: Sequence[str] = ()
) -> dict[str, str]:
    """Where the numbers come from: source, calibration samples, and what was done to which matrices."""
    found = {"source": source.origin, "source_sha256": source.sha256, "license": source.license or "unknown"}
    if statistics is not None:
        samples = statistics.samples
        found["calibration"] = f"{samples.count} x {samples.length} tokens, {samples.description}"
        found["calibration_sha256"] = samples.sha256
    for rule in _distinct(assigned):
        chain = ", then ".join(plugin.described for plugin in (*rule.transforms, rule.solver))
        found[f"rule {rule.match}"] = "kept in float32" if rule.grid == FLOAT else f"{rule.grid} by {chain}"
    in_float = [name for name, rule in assigned.items() if rule.grid == FLOAT]
    if in_float:
        found["matrices_in_float"] = ", ".join(in_float)
    if unfolded:
        found["matrices_not_folded"] = ", ".join(unfolded)
    return found
