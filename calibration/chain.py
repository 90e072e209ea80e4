"""The transforms of a chain, `solver: [awq, gptq]`: they fold factors into the float model before any code is chosen.

A site (calibration.folding) is done by the transforms of the rule of its readers, in the recipe's order; each sees
the matrices and statistics as those before it left them. Sites do not depend on each other.

What each step bought is measured on the way, on at most ROWS rows of each matrix and plain rounding to nearest:
tr(D H Dᵀ) at first, after each transform, and after the solver, over tr(W H Wᵀ).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from calibration import rtn
from calibration.base import InputStatistics, Readers, SolverOptions, Transform
from calibration.folding import FoldedStatistics, FoldedWeights, Folds, Site, fold_moments, folds, sites
from calibration.output_error import output_error, sample_rows
from calibration.parallel import in_parallel
from lilliput import registry
from lilliput.errors import CalibrationError
from lilliput.grid import Float, GridSpec, QuantizedTensor, grid, take_rows
from lilliput.model import SolveStep, SourceModel
from lilliput.recipe_schema import FLOAT, Rule

ROWS = 128
PLAIN = rtn.Options(candidates=1, refine=2)


@dataclass(frozen=True, eq=False)
class Prepared:
    """The float model as the solvers get it."""

    weights: Mapping[str, Float]
    statistics: Mapping[str, InputStatistics]
    folds: Folds
    errors: Mapping[str, tuple[float, ...]]  # of a folded site's readers: rounded to nearest, after each transform
    unfolded: tuple[str, ...]  # matrices whose rule names transforms that found no place


def prepare(
    source: SourceModel, assigned: Mapping[str, Rule], statistics: Mapping[str, InputStatistics] | None
) -> Prepared:
    """Fold what the rules' transforms choose. Raises CalibrationError where those of a rule find no place at all."""
    asked = {name: rule for name, rule in assigned.items() if rule.transforms and rule.grid != FLOAT}
    if not asked or statistics is None:
        _check_statistics(asked)
        return Prepared(source.weights, statistics or {}, Folds(), {}, ())
    chosen = [site for site in sites(source.config) if _transforms(site, asked) is not None]
    folded = {name for site in chosen for name in site.readers}
    for rule in asked.values():
        if not any(name in folded for name, its in asked.items() if its is rule):
            raise CalibrationError(
                f"quantize: rule {rule.match!r}: {rule.transforms[0].name} finds no place: the matrices that read one "
                "input (q, k, v; gate, up) need the same transforms, and nothing can be folded into an embedding"
            )
    found = list(in_parallel(lambda site: _fold(site, source, asked, statistics), chosen))
    made = folds([(site, factors) for site, (factors, _) in zip(chosen, found, strict=True)])
    errors = {name: its for _, of_site in found for name, its in of_site.items()}
    weights, moments = FoldedWeights(source.weights, made), FoldedStatistics(statistics, made)
    return Prepared(weights, moments, made, errors, tuple(name for name in asked if name not in folded))


def _check_statistics(asked: Mapping[str, Rule]) -> None:
    for rule in asked.values():
        raise CalibrationError(
            f"quantize: rule {rule.match!r}: transform {rule.transforms[0].name} needs calibration statistics, "
            "there are none"
        )


def _transforms(site: Site, asked: Mapping[str, Rule]) -> Rule | None:
    """The rule whose transforms are done at a site; None where its readers' differ or have none."""
    rules = [asked.get(name) for name in site.readers]
    first = rules[0]
    same = first is not None and all(rule is not None and rule.transforms == first.transforms for rule in rules)
    return first if same else None


def _fold(
    site: Site, source: SourceModel, asked: Mapping[str, Rule], statistics: Mapping[str, InputStatistics]
) -> tuple[Float, dict[str, tuple[float, ...]]]:
    """A site's factors (n,), and each reader's errors: at first, after each transform."""
    rule = _transforms(site, asked)
    assert rule is not None
    specs = tuple(replace(grid(asked[name].grid), outliers=0) for name in site.readers)
    readers = Readers(tuple(source.weights[n] for n in site.readers), specs, statistics[site.readers[0]], site.shared)
    factors = np.ones(site.shared.max() + 1, np.float32)
    errors = [_rounding_errors(readers)]
    for plugin in rule.transforms:
        transform: Transform = registry.load("transforms", plugin.name)()
        options = registry.options("transforms", plugin.name, plugin.options)
        assert isinstance(options, SolverOptions)
        step = transform.factors(readers, options)
        readers, factors = _scaled(readers, step), factors * step
        errors.append(_rounding_errors(readers))
    return factors, {name: tuple(e[i] for e in errors) for i, name in enumerate(site.readers)}


def _scaled(readers: Readers, factors: Float) -> Readers:
    columns = factors[readers.shared]
    weights = tuple(weight * columns for weight in readers.weights)
    return Readers(weights, readers.specs, fold_moments(readers.statistics, columns), readers.shared)


def _rounding_errors(readers: Readers) -> list[float]:
    moments = readers.statistics.second_moments
    return [rounding_error(w, spec, moments) for w, spec in zip(readers.weights, readers.specs, strict=True)]


def rounding_error(weight: Float, spec: GridSpec, moments: Float) -> float:
    """tr(D H Dᵀ) of at most ROWS rows, rounded to nearest."""
    taken, spec = weight[sample_rows(len(weight), ROWS)], replace(spec, outliers=0)
    return output_error(taken - rtn.Solver().solve(taken, spec, None, PLAIN).dequantize(), moments)


@dataclass(frozen=True)
class MatrixErrors:
    """Of one matrix, on at most ROWS rows: tr(W H Wᵀ), and tr(D H Dᵀ) after each step, the solver's last."""

    signal: float
    steps: tuple[float, ...]


def errors_of(name: str, rule: Rule, prepared: Prepared, tensor: QuantizedTensor) -> MatrixErrors | None:
    """None where nothing is known of the matrix's input, or rounding to nearest is all that is done."""
    found = prepared.statistics.get(name)
    if found is None or (rule.solver.name == "rtn" and not rule.transforms):
        return None
    weight, moments = prepared.weights[name], found.second_moments
    taken = sample_rows(len(weight), ROWS)
    earlier = prepared.errors.get(name)
    if earlier is None:
        earlier = (rounding_error(weight, tensor.spec, moments),) * (1 + len(rule.transforms))
    rows = prepared.folds.rows.get(name)
    restored = np.ones((len(taken), 1), np.float32) if rows is None else rows[taken, None]  # as it was before its rows
    signal = output_error(weight[taken] * restored, moments)
    final = output_error((weight[taken] - take_rows(tensor, taken).dequantize()) * restored, moments)
    return MatrixErrors(signal, (*earlier, final))


def steps_of(assigned: Mapping[str, Rule], errors: Mapping[str, MatrixErrors]) -> tuple[SolveStep, ...]:
    """Each rule's relative output error, step by step, over all its matrices."""
    found = []
    for rule in {id(rule): rule for rule in assigned.values()}.values():
        its = [errors[name] for name, other in assigned.items() if other is rule and name in errors]
        signal = sum(matrix.signal for matrix in its)
        if not signal:
            continue
        labels = ("rtn", *(plugin.name for plugin in (*rule.transforms, rule.solver)))
        totals = [sum(values) / signal for values in zip(*(matrix.steps for matrix in its), strict=True)]
        found += [SolveStep(rule.match, rule.grid, *step) for step in zip(labels, totals, strict=True)]
    return tuple(found)
