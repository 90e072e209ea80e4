"""Passthrough: the codes that the source holds already, as they are, where the rule's grid is the one they lie on.

Nothing is chosen, so nothing is lost: what the checkpoint's author solved (GPTQ, AWQ, an importance matrix, QAT) lands
in the artifact bit for bit. A grid of the same codes and blocks whose scales are of another dtype is the same grid
where that dtype holds every scale. Anything else is refused: it would be a new solve, which another solver does, and
`cost` says what that loses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, NoReturn

import numpy as np

from calibration.base import InputStatistics, SolverOptions
from calibration.blocks import row_slabs
from lilliput.errors import CalibrationError
from lilliput.grid import Float, GridSpec, QuantizedTensor, narrowest, take_rows
from lilliput.model import SolveStep, SourceModel
from lilliput.recipe_schema import PASSTHROUGH

NO_GRID = "no grid"  # in a SolveStep: the source quantizes the matrix in a way that none of ours holds


class Options(SolverOptions):
    pass


class Solver:
    Options: ClassVar[type[SolverOptions]] = Options
    needs_statistics: ClassVar[bool] = False

    def solve(
        self, weight: Float, spec: GridSpec, statistics: InputStatistics | None, options: SolverOptions
    ) -> NoReturn:
        """Values do not tell which codes they had: calibration.solve calls `keep`, with the source's own."""
        raise CalibrationError(
            f"solver {PASSTHROUGH} takes the codes of a source, and is asked to choose some: name another"
        )


def keep(source: SourceModel, name: str, spec: GridSpec, weight: Float) -> QuantizedTensor:
    """The source's codes of matrix `name`, whose float value is `weight` (rows, cols).

    Raises CalibrationError where the source has none, or none on that grid, or where they stand for another matrix.
    """
    held = source.codes.get(name)
    if held is None:
        why = source.not_passed.get(name, "it is float there")
        raise CalibrationError(
            f"quantize: {name}: the source holds no codes for {spec.name} to pass through ({why}): "
            "name another solver, e.g. gptq"
        )
    stated = restated(held, spec)
    if stated is None:
        raise CalibrationError(
            f"quantize: {name}: the source holds it on {held.spec.name}, the rule wants {spec.name}: give the rule the "
            "source's grid, or another solver, which quantizes it anew"
        )
    if not np.array_equal(stated.dequantize(), weight):
        raise CalibrationError(
            f"quantize: {name}: a transform of another rule folds factors into it, so the source's codes are no longer "
            "its: leave the transform out, or name another solver"
        )
    return stated


def restated(tensor: QuantizedTensor, spec: GridSpec) -> QuantizedTensor | None:
    """The same codes, scales and offsets on `spec`, or None where that is another grid (GridSpec.holds)."""
    seen = tensor.spec
    if seen.super_blocks is None:
        minima = [np.asarray(tensor.offsets, np.float32)] if seen.offset == "minimum" else []
        seen = replace(seen, scale_dtype=narrowest(tensor.scales, *minima))
    return replace(tensor, spec=spec) if spec.holds(seen, tensor.shape[1]) else None


def cost(source: SourceModel, name: str, weight: Float, tensor: QuantizedTensor) -> SolveStep | None:
    """What quantizing a matrix anew loses of what the source held: |W - W'|² / |W|²; None where that was float."""
    held = source.codes.get(name)
    if held is None and name not in source.not_passed:
        return None
    signal = lost = 0.0
    for rows in row_slabs(weight):
        change = weight[rows] - take_rows(tensor, rows).dequantize()
        signal += float(np.square(weight[rows], dtype=np.float64).sum())
        lost += float(np.square(change, dtype=np.float64).sum())
    grid = NO_GRID if held is None else held.spec.name
    return SolveStep(name, tensor.spec.name, "re-quantized", lost / signal if signal else 0.0, source_grid=grid)
