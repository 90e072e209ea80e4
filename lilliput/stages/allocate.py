"""Choose each matrix's grid for one target, within its budget.

    rules.json         one rule a matrix: what quantize solves by
    allocation.json    the same with bytes and predicted loss (lilliput.allocated.Allocation)

Allocations that predictions cannot tell apart are measured (calibration.finalists).

A budget in bytes is one of the file. What the file holds besides matrices is measured: a file of the same shapes, with
nothing but zeros in its matrices, is written and counted, for the smallest choice first, then for the one that is made.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lilliput import provenance, registry
from lilliput.allocated import Allocation, Choice, Finalist
from lilliput.errors import CalibrationError
from lilliput.progress import Progress, silent
from lilliput.recipe_schema import MEGA, Budget, Rule, Target

if TYPE_CHECKING:
    from calibration.allocation import Prices
    from exporters.base import Exporter
    from lilliput.model import DecoderConfig, SourceModel

RULES, ALLOCATION = "rules.json", "allocation.json"
ROUNDS = 5  # of writing a file and counting: what lies beside the matrices depends on the choice
SPARE = 0.001  # of a budget may be left over


@dataclass(frozen=True)
class Said:
    """What the file will say beside the solved model's own words; it counts too."""

    name: str | None  # of the model, where the recipe gives one
    known: Mapping[str, str]  # lilliput.provenance
    recovered: str | None  # what training notes


@dataclass(frozen=True)
class Held:
    """The folders of what an allocation is made from."""

    source: Path
    traced: Path
    samples: Path
    statistics: Path
    sensitivity: Path
    correction: Path
    prices: tuple[Path, ...]  # by grid


def work(
    held: Held, target: Target, budget: Budget, grids: tuple[str, ...], said: Said, folder: Path, progress: Progress
) -> None:  # fmt: skip
    from calibration import finalists
    from lilliput.source import open_stage

    exporter: Exporter = registry.load("exporters", target.exporter.name)()
    source = open_stage(held.source)
    allowed = _prices(held, source.config).held_by(exporter.refuses, grids, source.config.parameter_shapes())
    sizes = Sizes(source, held, target, budget, said)
    best = _allocated(allowed, sizes, progress)
    others = [_fitting(prices, sizes) for prices in finalists.rivals(allowed, best.choices)]
    rivals = [other for other in others if other is not None]
    found = _best_measured([best, *rivals], sizes) if rivals else best
    (folder / ALLOCATION).write_text(found.model_dump_json(indent=1) + "\n")
    rules = [rule.model_dump(mode="json") for rule in _rules(found.choices, budget)]
    (folder / RULES).write_text(json.dumps(rules, indent=1) + "\n")
    progress(1, 1)


def _prices(held: Held, config: DecoderConfig) -> Prices:
    from calibration.allocation import Corrections, GridPrices, prices
    from lilliput.stages.correction import CORRECTIONS
    from lilliput.stages.price import PRICES

    found = [GridPrices.model_validate_json((folder / PRICES).read_bytes()) for folder in held.prices]
    return prices(config, found, Corrections.model_validate_json((held.correction / CORRECTIONS).read_bytes()))


def rules_in(folder: Path) -> tuple[Rule, ...]:
    """The rules that an allocate stage wrote."""
    return tuple(Rule.model_validate_json(json.dumps(rule)) for rule in json.loads((folder / RULES).read_text()))


def allocation_in(folder: Path) -> Allocation:
    return Allocation.model_validate_json((folder / ALLOCATION).read_bytes())


def _rules(choices: tuple[Choice, ...], budget: Budget) -> tuple[Rule, ...]:
    return tuple(Rule(match=choice.name, grid=choice.grid, solver=budget.solver) for choice in choices)


def _allocated(prices: Prices, sizes: Sizes, progress: Progress) -> Allocation:
    """The best choice by prediction."""
    budget, name = sizes.budget, sizes.target.name
    if budget.limit_bytes is not None:
        return _by_file(prices, budget.limit_bytes, sizes, progress)
    assert budget.bits_per_weight is not None
    choices = _by_bits(prices, budget.bits_per_weight, name)
    return Allocation(target=name, limit_bytes=None, file_bytes=None, choices=choices)


def _fitting(prices: Prices, sizes: Sizes) -> Allocation | None:
    """As `_allocated`; None where no file is small enough: what is not possible is no rival."""
    try:
        return _allocated(prices, sizes, silent)
    except CalibrationError:
        return None


def _best_measured(found: Sequence[Allocation], sizes: Sizes) -> Allocation:
    """The one of least KLD on samples that its solve had not seen."""
    from calibration import finalists
    from calibration.samples import load
    from calibration.sensitivity import Sensitivity
    from calibration.statistics import Statistics

    held = sizes.held
    statistics, sensitivity, samples = Statistics(held.statistics), Sensitivity(held.sensitivity), load(held.samples)
    rules = [_rules(one.choices, sizes.budget) for one in found]
    losses = finalists.measured(sizes.source, statistics, sensitivity, samples, rules)
    said = tuple(Finalist(tables=a.tables, loss=a.loss, kld=kld) for a, kld in zip(found, losses, strict=True))
    best = min(zip(losses, found, strict=True), key=lambda pair: pair[0])[1]
    return best.model_copy(update={"finalists": said})


def _by_bits(prices: Prices, bits_per_weight: float, name: str) -> tuple[Choice, ...]:
    weights = prices.total_weights
    limit = int(bits_per_weight * weights / 8)
    if limit < prices.least_bytes:
        raise CalibrationError(
            f"target {name!r}: budget of {bits_per_weight:g} bits per weight is too small: the grids "
            f"{', '.join(prices.grids)} take at least {8 * prices.least_bytes / weights:.3f}; raise bits_per_weight "
            "or give smaller grids"
        )
    return prices.within(limit)


@dataclass(frozen=True)
class Sizes:
    """Counts the bytes of a target's file for a choice of grids, by writing one whose matrices are zero."""

    source: SourceModel
    held: Held
    target: Target
    budget: Budget
    said: Said

    def of(self, choices: tuple[Choice, ...]) -> int:
        from calibration.allocation import blank
        from calibration.statistics import Statistics
        from lilliput.stages.export import export

        model = blank(self.source, _rules(choices, self.budget), Statistics(self.held.statistics))
        trained = {"recovered": self.said.recovered} if self.said.recovered else {}
        told = provenance.told({**model.provenance, **trained}, self.said.known, provenance.UNSOLVED)
        model = replace(model, name=self.said.name or model.name, provenance=told)
        with tempfile.TemporaryDirectory(prefix="lilliput-") as scratch:
            return export(model, self.held.traced, self.target.exporter, Path(scratch)).size_bytes


def _by_file(prices: Prices, limit: int, sizes: Sizes, progress: Progress) -> Allocation:
    name = sizes.target.name
    choices = prices.within(prices.least_bytes)
    size = sizes.of(choices)
    if size > limit:
        raise CalibrationError(
            f"target {name!r}: budget of {limit / MEGA:g} MB is too small: with the grids {', '.join(prices.grids)} "
            f"the smallest file is {size / MEGA:.3f} MB; raise budget_mb or give smaller grids"
        )
    allowed, best = limit - (size - prices.least_bytes), list[Allocation]()
    for done in range(ROUNDS):
        progress(done, ROUNDS)
        choices = prices.within(max(allowed, prices.least_bytes))
        if best and choices == best[-1].choices:
            break
        size = sizes.of(choices)
        if size <= limit:
            best.append(Allocation(target=name, limit_bytes=limit, file_bytes=size, choices=choices))
            if limit - size <= SPARE * limit:
                break
        allowed += limit - size
    if not best:
        raise CalibrationError(
            f"target {name!r}: no file of at most {limit / MEGA:g} MB was found in {ROUNDS} rounds, the last has "
            f"{size / MEGA:.3f} MB: give a slightly larger budget_mb"
        )
    return min(best, key=lambda allocation: allocation.loss)
