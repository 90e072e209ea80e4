"""AWQ (Lin et al. 2023, arXiv:2306.00978): the inputs that matter get weights that are rounded more finely.

A column that is multiplied by s_j before rounding, while its input is divided by it, is rounded with an error
s_j times smaller as long as the block's scale does not grow. The factors come from a family of one parameter,

    s = a^alpha          a_j = sqrt(E x_j²),  normalised so that sqrt(max s * min s) = 1

(the paper's a is E|x_j|), and alpha in [0, 1] by a grid search for the least output error of all matrices that read
the input, each rounded to nearest on its own grid:

    L(s) = Σ tr(D H' Dᵀ)          D = round(W diag(s)) - W diag(s),  H' = H / (s sᵀ)

Here H is the full matrix of second moments, so that this is the expected error over the calibration text itself; the
paper runs a part of it. alpha 0, no change, is always among the candidates: L never rises.

Clipping: the paper clips each block's range by a search of its own; here every rounding, in the search and after
it, is by calibration.scale_search, whose scales below the max-abs one are that clipping.

Cost: `steps` roundings and products (rows, cols) x (cols, cols) for each matrix, on at most ROWS of its rows.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from calibration import rtn
from calibration.base import Readers, SolverOptions
from calibration.folding import fold_moments
from calibration.output_error import output_error, sample_rows
from lilliput.grid import Float

ROWS = 256


class Options(SolverOptions):
    steps: int = Field(default=20, ge=1)  # candidates of alpha above 0
    candidates: int = Field(default=4, ge=1)  # of the scale search inside


class Transform:
    Options: ClassVar[type[SolverOptions]] = Options

    def factors(self, readers: Readers, options: SolverOptions) -> Float:
        assert isinstance(options, Options)
        variances = readers.statistics.second_moments.diagonal()
        counts = np.bincount(readers.shared)
        inputs = np.sqrt(readers.pooled(variances, np.add) / counts).astype(np.float32)
        trials = (_powers(inputs, step / options.steps) for step in range(options.steps + 1))
        return min(((_error(readers, trial, options), i, trial) for i, trial in enumerate(trials)))[2]


def _powers(inputs: Float, alpha: float) -> Float:
    """inputs^alpha (n,) with sqrt(max * min) = 1; a dead input has the least of the living."""
    live = inputs[inputs > 0]
    powers = np.maximum(inputs, live.min() if len(live) else 1) ** alpha
    factors: Float = (powers / np.sqrt(powers.max() * powers.min())).astype(np.float32)
    return factors


def _error(readers: Readers, factors: Float, options: Options) -> float:
    """L of these factors (n,)."""
    columns, solver = factors[readers.shared], rtn.Solver()
    moments = fold_moments(readers.statistics, columns).second_moments
    total = 0.0
    for weight, spec in zip(readers.weights, readers.specs, strict=True):
        scaled = weight[sample_rows(len(weight), ROWS)] * columns
        rounded = solver.solve(scaled, spec, None, rtn.Options(candidates=options.candidates, refine=1))
        total += output_error(scaled - rounded.dequantize(), moments) * len(weight) / len(scaled)
    return total
