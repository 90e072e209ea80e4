"""Observers: what passes through a tensor, in memory that does not grow.

A histogram of a channel has BINS bins of width w = 2^e, edges at the multiples of w, half of them below zero:

    bin i holds  (i − BINS/2)·w ≤ x < (i + 1 − BINS/2)·w

When a value lies outside, e grows and pairs of bins are merged. As edges are multiples of a power of two, merging is
exact: the counts after any batches, in any order or merged from several observers, are those of one pass with the
final width, which is the least that holds the largest magnitude. So at least BINS/4 bins lie within it. The least
and the greatest value are kept as they are, exact zeros are counted apart: they lie on every grid.

Which range a static grid (lilliput.activation_grid) then holds: calibration.clipping.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lilliput.activation_grid import ActivationGrid as ActivationGrid
from lilliput.activation_grid import Double as Double
from lilliput.activation_grid import Dtype as Dtype
from lilliput.activation_grid import code_range as code_range
from lilliput.activation_grid import grid_of as grid_of
from lilliput.errors import CalibrationError

Counts = npt.NDArray[np.int64]

BINS = 4096
LEAST_EXPONENT, MOST_SHIFT = -160, 62


class Histogram:
    """Counts of the values of each channel. Its size is BINS a channel, whatever passes."""

    def __init__(self, channels: int = 1, bins: int = BINS) -> None:
        assert bins % 2 == 0, "half of the bins are below zero"
        self.counts = torch.zeros(channels, bins, dtype=torch.int64)  # exact zeros too
        self.zeros = torch.zeros(channels, dtype=torch.int64)
        self.exponent = torch.full((channels,), LEAST_EXPONENT, dtype=torch.int32)
        self.minimum, self.maximum = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)

    @property
    def bins(self) -> int:
        return self.counts.shape[1]

    def add(self, x: Tensor, keep: Tensor | None = None) -> None:
        """Count x (channels, n), where `keep` (channels, n) is true. Raises CalibrationError for NaN or infinity."""
        x = x.detach().to("cpu", torch.float32)
        keep = torch.ones_like(x, dtype=torch.bool) if keep is None else keep.cpu()
        if not bool((x.isfinite() | ~keep).all()):
            raise CalibrationError("a tensor has NaN or infinite values that no mask takes out: it has no range")
        if not bool(keep.any()):
            return
        low, high = x.masked_fill(~keep, torch.inf).amin(1), x.masked_fill(~keep, -torch.inf).amax(1)
        self.minimum, self.maximum = torch.minimum(self.minimum, low), torch.maximum(self.maximum, high)
        most = torch.where(keep, x, 0.0).abs().amax(1)
        self._widen(torch.maximum(self.exponent, self._least_exponent(most)))
        at = torch.ldexp(x.double(), -self.exponent[:, None].double()).floor().long() + self.bins // 2
        channel = torch.arange(len(x))[:, None] * self.bins
        self.counts += torch.bincount((at + channel)[keep], minlength=self.counts.numel()).view_as(self.counts)
        self.zeros += ((x == 0) & keep).sum(1)

    def merge(self, other: Histogram) -> None:
        """Add what another observer of the same tensor counted."""
        assert other.counts.shape == self.counts.shape, "the two count other channels or bins"
        exponent = torch.maximum(self.exponent, other.exponent)
        self._widen(exponent)
        self.counts += _regrouped(other.counts, exponent - other.exponent)
        self.zeros += other.zeros
        self.minimum = torch.minimum(self.minimum, other.minimum)
        self.maximum = torch.maximum(self.maximum, other.maximum)

    def edges(self, channel: int) -> Double:
        """The (bins + 1,) edges of a channel's bins."""
        steps = np.arange(self.bins + 1) - self.bins // 2
        edges: Double = np.ldexp(steps.astype(np.float64), int(self.exponent[channel]))
        return edges

    def _least_exponent(self, most: Tensor) -> Tensor:
        """The least e with most < BINS/2 · 2^e, for each channel; nothing but zeros asks for none."""
        _, power = torch.frexp(most)  # most < 2^power
        needed = power - (self.bins // 2 - 1).bit_length()
        return torch.where(most > 0, needed, LEAST_EXPONENT).to(torch.int32)

    def _widen(self, exponent: Tensor) -> None:
        self.counts = _regrouped(self.counts, exponent - self.exponent)
        self.exponent = exponent


def _regrouped(counts: Tensor, shift: Tensor) -> Tensor:
    """Counts (channels, bins) in bins 2^shift times as wide; shift (channels,) int32."""
    if not bool(shift.any()):
        return counts
    half = counts.shape[1] // 2
    steps = (torch.arange(counts.shape[1]) - half).expand_as(counts)
    at = torch.bitwise_right_shift(steps, shift.long().clamp(max=MOST_SHIFT)[:, None]) + half
    return torch.zeros_like(counts).scatter_add_(1, at, counts)
