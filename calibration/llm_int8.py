"""LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339): a few outlier inputs are multiplied at 16 bit beside the codes.

A handful of a transformer's channels hold values far above the others, and they decide most of a layer's output. The
paper splits the product,

    W x = W_o x_o + W_r x_r         o: inputs whose magnitude passes a threshold, at float16;  r: the rest, in codes

Here the number of columns is the grid's ("int8-channel-o8" keeps 8), for a file's shapes are fixed; o are the inputs of
the largest magnitude over the calibration text, so that matrices which read one input keep the same ones.

The rest is solved knowing that W_o makes up for it. For codes V_r the best kept columns are

    W_o* = W_o + (W_r - V_r) H_ro H_oo⁻¹

and with them the error is tr(D_r S D_rᵀ), D_r = V_r - W_r, S = H_rr - H_ro H_oo⁻¹ H_or (Schur's complement): the inner
solver gets S for its second moments, with zeros for o. Then W_o* is rounded to float16.

Cost: the inner solver's, and one factorisation of (k, k).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from calibration import gptq, rtn
from calibration.base import InputStatistics, SolverOptions
from lilliput.errors import CalibrationError
from lilliput.grid import Float, GridSpec, Outliers, QuantizedTensor, round_scale


class Options(SolverOptions):
    inner: Literal["gptq", "rtn"] = "gptq"  # what chooses the codes of the rest
    damping: float = Field(default=0.01, gt=0, le=gptq.MAX_DAMPING)


class Solver:
    Options: ClassVar[type[SolverOptions]] = Options
    needs_statistics: ClassVar[bool] = True

    def solve(
        self, weight: Float, spec: GridSpec, statistics: InputStatistics | None, options: SolverOptions
    ) -> QuantizedTensor:
        """(rows, cols) float32 → a tensor on `spec`. Raises CalibrationError for a grid that keeps no columns."""
        assert isinstance(options, Options)
        if not spec.outliers:
            raise CalibrationError(f"solver llm_int8: grid {spec.name} keeps no columns at 16 bit: try {spec.name}-o8")
        if statistics is None:
            raise CalibrationError(
                "solver llm_int8 needs calibration statistics, and there are none: use rtn for tables"
            )
        columns = outlier_columns(statistics, min(spec.outliers, weight.shape[1]))
        moments = gptq.damped(torch.from_numpy(statistics.second_moments), options.damping)
        rest = np.setdiff1d(np.arange(weight.shape[1]), columns)
        makes_up = torch.linalg.solve(moments[columns][:, columns], moments[columns][:, rest])  # H_oo⁻¹ H_or
        solved = _solve_rest(
            weight, replace(spec, outliers=0), _schur(moments, columns, rest, makes_up), statistics, options
        )
        left = torch.from_numpy(weight[:, rest] - solved.dequantize()[:, rest]).double()
        values = round_scale(weight[:, columns] + (left @ makes_up.T).float().numpy(), "float16")
        return replace(solved, spec=spec, outliers=Outliers(columns, values))


def outlier_columns(statistics: InputStatistics, count: int) -> npt.NDArray[np.int64]:
    """The inputs of largest magnitude, ascending."""
    size = np.maximum(np.abs(statistics.minimum), np.abs(statistics.maximum))
    return np.sort(np.argsort(-size, kind="stable")[:count]).astype(np.int64)


def _schur(moments: Tensor, columns: npt.NDArray[np.int64], rest: npt.NDArray[np.intp], makes_up: Tensor) -> Float:
    """(cols, cols) float32: S, zeros in the kept rows and columns."""
    whole = torch.zeros_like(moments)
    complement = moments[rest][:, rest] - moments[rest][:, columns] @ makes_up
    whole[np.ix_(rest, rest)] = (complement + complement.T) / 2
    found: Float = whole.float().numpy()
    return found


def _solve_rest(
    weight: Float, spec: GridSpec, moments: Float, statistics: InputStatistics, options: Options
) -> QuantizedTensor:
    """The codes, with those of the kept columns at 0."""
    kept = moments.diagonal() == 0
    zeroed = np.where(kept, np.float32(0), weight)
    if options.inner == "rtn":
        return rtn.Solver().solve(zeroed, spec, None, rtn.Options())
    return gptq.Solver().solve(zeroed, spec, replace(statistics, second_moments=moments), gptq.Options())
