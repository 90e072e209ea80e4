"""The expected squared error of a layer's output, which every solver lowers: E|D x|² = tr(D H Dᵀ), H = E[x xᵀ]."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lilliput.grid import Float


def output_error(difference: Float, moments: Float) -> float:
    """tr(D H Dᵀ) of D (rows, cols) float32 under H (cols, cols) float32."""
    d = torch.from_numpy(np.ascontiguousarray(difference))
    return float((d @ torch.from_numpy(moments)).mul_(d).sum(dtype=torch.float64))


def sample_rows(rows: int, most: int) -> npt.NDArray[np.intp]:
    """At most that many rows, evenly spaced; all where there are no more."""
    return np.unique(np.linspace(0, rows - 1, min(rows, most)).astype(np.intp))
