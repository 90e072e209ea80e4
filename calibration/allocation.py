"""Mixed precision: which grid each matrix gets, so that the model fits a budget of bytes at the least predicted loss.

    options      every matrix on every grid that its format holds: bytes, and predicted KLD (calibration.sensitivity)
    units        matrices that read one input get one grid, since exporters stack them: q, k and v; gate and up
    choice       the least sum of losses within the budget (calibration.knapsack)

Solving every matrix on every grid with the solver itself would cost a whole solve a grid. So each matrix is rounded to
nearest, and its loss multiplied by what the solver makes of it (loss of the solver / loss of RTN): the geometric mean
over LAYERS layers and ROWS rows of each kind of matrix, measured for every grid. What is
chosen is then solved in full.

The prices are corrected by what all matrices give when they are solved on one grid, MIDDLE:

    each matrix   loss of the solver / price: where inputs have outliers a solver gains more than elsewhere
    each role     (linear layers, embedding, head) KLD measured / sum of the losses, on samples that neither the
                  sensitivity nor the solve comes from: errors that add up from layer to layer, and solvers that fit
                  the samples which they see. (SmolLM2, all linear layers on int4-b32: 0.034 on samples that the solve
                  had seen, 0.050 on others of the same text; of the embedding 0.021 on both.)

Solvers minimise what the allocation counts: the second moments that they are given are those that are weighted by
the gradients, for the tied embedding too (calibration.sensitivity.Guided).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from calibration import knapsack, rtn
from calibration.base import InputStatistics, Solver, SolverOptions
from calibration.divergence import divergence
from calibration.knapsack import Option
from calibration.parallel import in_parallel
from calibration.samples import Samples
from calibration.sensitivity import Curvature, Guided, Sensitivity, held_out
from calibration.solve import provenance_of, solve
from calibration.statistics import INPUTS, Statistics, Without, gather
from lilliput import registry
from lilliput.allocated import Choice, kind_of
from lilliput.assignment import assign
from lilliput.errors import CalibrationError
from lilliput.grid import Float, GridSpec, QuantizedTensor, grid
from lilliput.model import DecoderConfig, QuantizedModel, Role, SourceModel, role_of
from lilliput.progress import Progress, silent
from lilliput.recipe_schema import FLOAT, Plugin, Rule
from lilliput.results import Record

LAYERS = 3  # of the model, whose matrices tell what the solver gains over RTN
ROWS = 512  # of such a matrix
HELD = 6  # samples that corrections and finalists are measured on
MIDDLE = "int4-b32"  # the grid that they are measured on
TINY = 1e-6  # the least ratio
GPTQ = Plugin(name="gptq")

Refuses = Callable[[GridSpec, Role, tuple[int, int]], str | None]  # an exporter's


class Price(Record):
    """A matrix on a grid."""

    grid: str
    size_bytes: int
    loss: float  # predicted KLD, nats a token


class GridPrices(Record):
    """Every matrix that a grid can hold, on it."""

    of: dict[str, Price]


class Corrections(Record):
    """What a matrix's prices are multiplied by."""

    of: dict[str, float]


class Prices(Record):
    """Every matrix on every grid that can hold it, by the matrix's name, in the order of computation."""

    units: tuple[tuple[str, ...], ...]
    of: dict[str, tuple[Price, ...]]
    weights: dict[str, int]

    @property
    def grids(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(price.grid for found in self.of.values() for price in found))

    @property
    def total_weights(self) -> int:
        return sum(self.weights.values())

    @property
    def least_bytes(self) -> int:
        """What all matrices take at least."""
        return knapsack.least_bytes([[option for _, option in self._options(unit)] for unit in self.units])

    def within(self, budget: int) -> tuple[Choice, ...]:
        """The choice of least loss whose matrices take at most `budget` bytes, at least `least_bytes`."""
        options = [self._options(unit) for unit in self.units]
        chosen = knapsack.choose([[option for _, option in found] for found in options], budget)
        return tuple(
            Choice(name=name, grid=price.grid, weights=self.weights[name], size_bytes=price.size_bytes, loss=price.loss)
            for unit, found, index in zip(self.units, options, chosen, strict=True)
            for name in unit
            for price in self.of[name]
            if price.grid == found[index][0]
        )

    def _options(self, unit: tuple[str, ...]) -> list[tuple[str, Option]]:
        """The grids that all matrices of a unit can be on."""
        found = []
        for price in self.of[unit[0]]:
            prices = [p for name in unit for p in self.of[name] if p.grid == price.grid]
            if len(prices) == len(unit):
                found.append((price.grid, Option(sum(p.size_bytes for p in prices), sum(p.loss for p in prices))))
        return found

    def held_by(self, refuses: Refuses, grids: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> Prices:
        """Only those of `grids` that a format can hold. Raises CalibrationError for a matrix that none holds."""

        def held(name: str, price: Price) -> bool:
            rows, cols = shapes[name]
            return price.grid in grids and refuses(grid(price.grid), role_of(name), (rows, cols)) is None

        of = {name: tuple(price for price in found if held(name, price)) for name, found in self.of.items()}
        kept = Prices(units=self.units, of=of, weights=self.weights)
        for unit in self.units:
            if not kept._options(unit):
                raise CalibrationError(
                    f"quantize: the format can hold {', '.join(unit)} {shapes[unit[0]]} on none of the grids "
                    f"{', '.join(grids)}: give `grids` one that it can hold"
                )
        return kept


def units_of(config: DecoderConfig) -> tuple[tuple[str, ...], ...]:
    """The matrices that get one grid together, in the order of computation."""
    units: dict[str, list[str]] = {}
    for name in config.parameter_shapes():
        if role_of(name) == "linear":
            _, index, inner = name.split(".", 2)
            units.setdefault(f"{index}.{INPUTS[inner]}", []).append(name)
        elif role_of(name) != "vector":
            units[name] = [name]
    return tuple(map(tuple, units.values()))


def price(
    source: SourceModel,
    statistics: Mapping[str, InputStatistics],
    sensitivity: Sensitivity,
    name: str,
    solver: Plugin = GPTQ,
    progress: Progress = silent,
) -> GridPrices:
    """Price every matrix whose columns the grid's blocks fit, not corrected."""
    spec = grid(name)
    shapes = {n: (s[0], s[1]) for n, s in source.config.parameter_shapes().items() if role_of(n) != "vector"}
    held = [n for n, (_, cols) in shapes.items() if _fits(spec, cols)]
    gains = _gains(source, statistics, sensitivity, held, spec, solver)

    def one(n: str) -> tuple[str, Price]:
        rows, cols = shapes[n]
        loss = _rounded(source.weights[n], spec, statistics[n], sensitivity[n]) * gains.get(kind_of(n), 1.0)
        return n, Price(grid=name, size_bytes=round(rows * cols * spec.bits_per_weight(cols) / 8), loss=loss)

    of: dict[str, Price] = {}
    for n, found in in_parallel(one, held):
        of[n] = found
        progress(len(of), len(held))
    return GridPrices(of=of)


def prices(config: DecoderConfig, found: Sequence[GridPrices], corrections: Corrections) -> Prices:
    """The prices on several grids together, corrected."""
    shapes = {n: s for n, s in config.parameter_shapes().items() if role_of(n) != "vector"}

    def corrected(name: str, price: Price) -> Price:
        return price.model_copy(update={"loss": price.loss * corrections.of[name]})

    return Prices(
        units=units_of(config),
        of={n: tuple(corrected(n, prices.of[n]) for prices in found if n in prices.of) for n in shapes},
        weights={n: shape[0] * shape[1] for n, shape in shapes.items()},
    )


def _fits(spec: GridSpec, cols: int) -> bool:
    """Whether a grid's blocks divide rows of `cols` columns."""
    return cols % (spec.super_blocks.cols if spec.super_blocks else spec.width(cols)) == 0


def correct(
    source: SourceModel, statistics: Statistics, sensitivity: Sensitivity, samples: Samples, solver: Plugin = GPTQ
) -> Corrections:
    """What the prices are multiplied by, matrix by matrix. `statistics`, `samples`: all of the calibration."""
    names = [name for name in source.config.parameter_shapes() if role_of(name) != "vector"]
    priced = price(source, Guided(statistics, sensitivity), sensitivity, MIDDLE, solver).of
    found = dict[str, float]()
    with unseen(source, statistics, sensitivity, samples) as (judged, seen):
        for role in dict.fromkeys(map(role_of, names)):
            rules = [Rule(match=name, grid=MIDDLE, solver=solver) for name in names if role_of(name) == role]
            solved = solve(source, [*rules, Rule(match="*", grid=FLOAT)], seen).quantized
            losses = {name: sensitivity[name].loss(source.weights[name], tensor) for name, tensor in solved.items()}
            predicted = sum(losses.values())
            scale = divergence(source, solved, judged) / predicted if predicted > 0 else 1.0
            for name, loss in losses.items():
                guess = priced[name].loss if name in priced else 0.0
                found[name] = scale * (loss / guess if guess > 0 and loss > 0 else 1.0)
    return Corrections(of=found)


@contextmanager
def unseen(
    source: SourceModel, statistics: Statistics, sensitivity: Sensitivity, samples: Samples
) -> Iterator[tuple[Samples, Guided]]:
    """Samples that judge, which the sensitivity does not come from, and the statistics of all others."""
    judged = held_out(samples, sensitivity, HELD)
    with tempfile.TemporaryDirectory(prefix="lilliput-") as scratch:
        yield judged, Guided(Without(statistics, gather(source, judged, Path(scratch))), sensitivity)


def _rounded(weight: Float, spec: GridSpec, statistics: InputStatistics, curvature: Curvature) -> float:
    """Predicted KLD of weights rounded to nearest."""
    options = rtn.Options(weighted=True, candidates=6, low=0.8, high=1.1, refine=1)
    return curvature.loss(weight, rtn.Solver().solve(weight, spec, statistics, options))


def _gains(
    source: SourceModel,
    statistics: Mapping[str, InputStatistics],
    sensitivity: Sensitivity,
    held: Sequence[str],
    spec: GridSpec,
    solver: Plugin,
) -> dict[str, float]:
    """By kind of matrix: predicted loss of the solver / of RTN, the geometric mean over some layers."""
    solves: Solver = registry.load("solvers", solver.name)()
    options = registry.options("solvers", solver.name, solver.options)
    assert isinstance(options, SolverOptions)
    layers = source.config.num_layers
    sampled = {round(i * (layers - 1) / max(1, LAYERS - 1)) for i in range(min(LAYERS, layers))}
    names = [n for n in held if role_of(n) != "linear" or int(n.split(".")[1]) in sampled]

    def one(name: str) -> tuple[str, float | None]:
        whole, found, curvature = source.weights[name], statistics[name], sensitivity[name]
        rows = slice(None, None, max(1, len(whole) // ROWS))
        weight, part = np.ascontiguousarray(whole[rows]), Curvature(curvature.moments, curvature.shares[rows].copy())
        rounded = _rounded(weight, spec, found, part)  # 0 where the source's weights lie on the grid
        return name, part.loss(weight, solves.solve(weight, spec, found, options)) / rounded if rounded else None

    ratios: dict[str, list[float]] = {}
    for name, ratio in in_parallel(one, names):
        if ratio is not None:
            ratios.setdefault(kind_of(name), []).append(max(ratio, TINY))
    return {kind: float(np.exp(np.mean(np.log(values)))) for kind, values in ratios.items()}


def blank(source: SourceModel, rules: Sequence[Rule], statistics: Statistics) -> QuantizedModel:
    """The model that `rules` would give, but for its codes: all zero. A file of it has the size that theirs has."""
    assigned = assign(tuple(rules), source.config)
    shapes, options = source.config.parameter_shapes(), rtn.Options(candidates=1, refine=0)

    def one(name: str) -> tuple[str, QuantizedTensor]:
        zeros = np.zeros(shapes[name], np.float32)
        return name, rtn.Solver().solve(zeros, grid(assigned[name].grid), None, options)

    quantized = dict(in_parallel(one, list(assigned)))
    floats = {name: source.weights[name] for name in shapes if name not in quantized}
    provenance = provenance_of(source, assigned, statistics)
    return QuantizedModel(source.name, source.config, quantized, floats, source.tokenizer, provenance)
