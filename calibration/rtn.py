"""RTN: round to nearest, with scales by search (calibration.scale_search).

Every weight goes to the nearest code of its block. `weighted` weighs the search by the diagonal of the
input's second moments; without it no statistics are needed.
"""

from __future__ import annotations

from typing import ClassVar

from calibration.base import InputStatistics, SolverOptions
from calibration.scale_search import SearchOptions, find_blocks, nearest
from lilliput.errors import CalibrationError
from lilliput.grid import Float, GridSpec, QuantizedTensor


class Options(SearchOptions):
    weighted: bool = False


class Solver:
    Options: ClassVar[type[SolverOptions]] = Options
    needs_statistics: ClassVar[bool] = False

    def solve(
        self, weight: Float, spec: GridSpec, statistics: InputStatistics | None, options: SolverOptions
    ) -> QuantizedTensor:
        """(rows, cols) float32 → its nearest tensor on `spec`. Raises CalibrationError: `weighted` by nothing."""
        assert isinstance(options, Options)
        if options.weighted and statistics is None:
            raise CalibrationError("solver rtn is asked to weigh by statistics, and there are none: drop `weighted`")
        importance = statistics.second_moments.diagonal().copy() if options.weighted and statistics else None
        return nearest(weight, find_blocks(weight, spec, importance, options))
