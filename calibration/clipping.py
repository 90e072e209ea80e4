"""Which range of a tensor its static grid holds: what lies outside is clipped, what lies inside is rounded coarser.

    min_max      everything that was seen
    percentile   all but (100 − p)/2 percent on either side; symmetric: but 100 − p percent of the magnitudes.
                 Interpolated within a bin (ONNX Runtime's PercentileCalibrater takes the bin's lower edge)
    mse          least Σ (x − grid(x))², by searching the upper and the lower end in turn
    entropy      least KL divergence of what is clipped and rounded to LEVELS levels, from what was seen: TensorRT's
                 calibration (Migacz, GTC 2017, s7310) as ONNX Runtime's EntropyCalibrater computes it
                 (onnxruntime/quantization/calibrate.py, get_entropy_threshold): symmetric around zero, per tensor

MSE takes the values of a bin as spread evenly over it. A grid's points are the multiples of its scale s between its
ends, so the squared error over [a, b] within them is the integral

    ∫ (x − s·round(x/s))² dx = s³ [F(b/s) − F(a/s)]      F(u) = round(u)/12 + (u − round(u))³/3

which holds for steps finer than bins (16 bit) and for coarser ones. Exact zeros are left out: they cost nothing.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from calibration.observers import ActivationGrid, Counts, Double, Dtype, Histogram, code_range, grid_of

LEVELS = 128  # of the entropy's coarse distribution
STEPS = 128  # candidates for an end of the range
ROUNDS = 3  # of the search for both ends
SMOOTH = 1e-4


class RangeOptions(BaseModel):
    """How a static grid is made. `axis`: the channels' axis of the tensor, None for one grid a tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["min_max", "percentile", "mse", "entropy"] = "min_max"
    dtype: Dtype = "int8"
    symmetric: bool = False
    axis: int | None = None
    percentile: float = Field(default=99.99, gt=50, le=100)

    @model_validator(mode="after")
    def _fits(self) -> RangeOptions:
        code_range(self.dtype, self.symmetric)
        if self.method == "entropy" and self.axis is not None:
            raise ValueError("method entropy is defined per tensor: leave axis out, or take mse")
        return self


def activation_grid(seen: Histogram, options: RangeOptions) -> ActivationGrid:
    """The grid of what was seen; a channel that saw nothing has the range of zero."""
    ends = [range_ends(seen, channel, options) for channel in range(len(seen.counts))]
    low, high = (np.array(side, np.float64) for side in zip(*ends, strict=True))
    return grid_of(low, high, options.dtype, options.symmetric, options.axis)


def range_ends(seen: Histogram, channel: int, options: RangeOptions) -> tuple[float, float]:
    """The least and the greatest value that a channel's grid is to hold."""
    counts, edges = seen.counts[channel].numpy(), seen.edges(channel)
    if not counts.sum():
        return 0.0, 0.0
    low, high = float(seen.minimum[channel]), float(seen.maximum[channel])
    if options.method == "min_max":
        return low, high
    if options.method == "percentile":
        ends = percentile(counts, edges, options.percentile, options.symmetric)
    elif options.method == "entropy":
        ends = entropy(counts, edges)
    else:
        apart = counts.copy()
        apart[len(counts) // 2] -= int(seen.zeros[channel])
        ends = mse(apart, edges, (low, high), options)
    return max(low, ends[0]), min(high, ends[1])


def percentile(counts: Counts, edges: Double, percent: float, symmetric: bool) -> tuple[float, float]:
    """The ends that leave out 100 − percent of the values."""
    if symmetric:
        half = len(counts) // 2
        magnitudes = counts[half:] + counts[:half][::-1]
        end = _quantile(magnitudes, edges[half:], percent / 100)
        return -end, end
    outside = (100 - percent) / 200
    return _quantile(counts, edges, outside), _quantile(counts, edges, 1 - outside)


def _quantile(counts: Counts, edges: Double, share: float) -> float:
    """The least value below which `share` of the counts lie, but for rounding of the share itself."""
    filled, wanted = np.flatnonzero(counts), share * counts.sum()
    through = np.cumsum(counts[filled])
    place = int(np.searchsorted(through, wanted - 1e-9 * through[-1]))
    at = filled[place]
    part = 1 - (through[place] - wanted) / counts[at]
    return float(edges[at] + min(max(part, 0.0), 1.0) * (edges[at + 1] - edges[at]))


def mse(counts: Counts, edges: Double, seen: tuple[float, float], options: RangeOptions) -> tuple[float, float]:
    """The ends of least squared error: coordinate descent, each end over STEPS parts of what was seen."""
    filled = np.flatnonzero(counts)
    if not len(filled):
        return 0.0, 0.0
    weights, low_edges, high_edges = counts[filled].astype(np.float64), edges[filled], edges[filled + 1]
    parts = np.arange(1, STEPS + 1) / STEPS

    def best(lows: Double, highs: Double) -> tuple[float, float]:
        errors = squared_errors(weights, low_edges, high_edges, grid_of(lows, highs, *form))
        least = int(np.argmin(errors))
        return float(lows[least]), float(highs[least])

    form = (options.dtype, options.symmetric, None)
    if options.symmetric:
        ends = max(-seen[0], seen[1]) * parts
        return best(-ends, ends)
    low, high = min(seen[0], 0.0), max(seen[1], 0.0)
    found = best(low * parts, high * parts)  # both at once, then each by itself
    for _ in range(ROUNDS):
        found = best(np.full(STEPS, found[0]), high * parts)
        found = best(low * np.append(parts, 0.0), np.full(STEPS + 1, found[1]))
    return found


def squared_errors(weights: Double, low: Double, high: Double, grid: ActivationGrid) -> Double:
    """Σ of squared errors of bins [low, high) with these counts, on each channel of `grid` (a candidate each)."""
    scale = grid.scale.astype(np.float64)[:, None]
    zero_point = grid.zero_point[:, None]
    least, most = scale * (grid.qmin - zero_point), scale * (grid.qmax - zero_point)
    a, b = (np.clip(edge[None], least - scale / 2, most + scale / 2) for edge in (low, high))
    inside = scale**3 * (_rounding(b / scale) - _rounding(a / scale))
    above = (np.maximum(high, most + scale / 2) - most) ** 3 - (np.maximum(low, most + scale / 2) - most) ** 3
    below = (least - np.minimum(low, least - scale / 2)) ** 3 - (least - np.minimum(high, least - scale / 2)) ** 3
    errors: Double = ((inside + above / 3 + below / 3) / (high - low)) @ weights
    return errors


def _rounding(u: Double) -> Double:
    """F of the module's docstring: its derivative is (u − round(u))²."""
    nearest = np.rint(u)
    integral: Double = nearest / 12 + (u - nearest) ** 3 / 3
    return integral


def entropy(counts: Counts, edges: Double, levels: int = LEVELS) -> tuple[float, float]:
    """The ends of least divergence among the ranges around zero that have at least `levels` bins."""
    zero, size = len(counts) // 2, len(counts)
    halves = range(levels // 2, zero + 1)
    divergences = [_divergence(counts, zero - half, min(zero + half + 1, size), levels) for half in halves]
    half = halves[int(np.argmin(divergences))]
    return float(edges[zero - half]), float(edges[min(zero + half + 1, size)])


def _divergence(counts: Counts, start: int, end: int, levels: int) -> float:
    """KL(p ‖ q): p the counts within [start, end) with all others in its end bins, q their coarse copy.

    As in ONNX Runtime: levels have size // levels bins each, shares are whole numbers, what is left over stays empty.
    """
    inner = counts[start:end]
    p = inner.copy()
    p[0] += counts[:start].sum()
    p[-1] += counts[end:].sum()
    width = len(inner) // levels
    level = np.add.reduceat(inner, np.arange(0, width * levels, width))
    level[-1] = inner[width * (levels - 1) :].sum()
    filled = (p[: width * levels].reshape(levels, width) != 0).sum(axis=1)
    q = np.zeros_like(p)
    q[: width * levels] = np.repeat(level // np.maximum(filled, 1) * (filled > 0), width)
    smooth_p, smooth_q = _smoothed(p), _smoothed(q)
    if smooth_p is None or smooth_q is None:
        return np.inf
    return float((smooth_p * np.log(smooth_p / smooth_q)).sum())


def _smoothed(counts: Counts) -> Double | None:
    """A distribution without zeros: SMOOTH counts in each empty bin, taken from the others; None where all are."""
    empty = counts == 0
    if empty.all():
        return None
    moved = SMOOTH * empty.sum() / (~empty).sum()
    found = np.where(empty, SMOOTH, counts - moved)
    share: Double = found / found.sum()
    return share
