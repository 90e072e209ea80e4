"""Observers: what passes through a tensor, in memory that does not grow, and the static integer grid made of it.

A histogram of a channel has BINS bins of width w = 2^e, edges at the multiples of w, half of them below zero:

    bin i holds  (i − BINS/2)·w ≤ x < (i + 1 − BINS/2)·w

When a value lies outside, e grows and pairs of bins are merged. As edges are multiples of a power of two, merging is
exact: the counts after any batches, in any order or merged from several observers, are those of one pass with the
final width, which is the least that holds the largest magnitude. So at least BINS/4 bins lie within it. The least
and the greatest value are kept as they are, exact zeros are counted apart: they lie on every grid.

A static grid is x ≈ scale · (code − zero_point), per tensor or per channel, with the scale in float32 and zero in its
range, so that zero is a code:

    asymmetric   scale = (high − low) / (qmax − qmin)    zero_point = round(qmin − low / scale), within the codes
    symmetric    scale = max(|low|, |high|) / qmax        zero_point = 0, qmin = −qmax

    int8 −128..127, uint8 0..255, int16 −32768..32767, uint16 0..65535; symmetric int8 −127..127, int16 −32767..32767

which are ONNX's QuantizeLinear (onnx.ai, operators) and LiteRT's quantization spec (int8 activations asymmetric, int16
symmetric). Which low and high: calibration.clipping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lilliput.errors import CalibrationError
from lilliput.grid import Float

Dtype = Literal["int8", "uint8", "int16", "uint16"]
Double = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

BINS = 4096
LEAST_EXPONENT, MOST_SHIFT = -160, 62
RANGES: dict[Dtype, tuple[int, int]] = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
    "uint16": (0, 65535),
}


@dataclass(frozen=True, eq=False)
class ActivationGrid:
    """A static grid: one scale and zero point for the tensor (axis None, arrays of one), or for each channel."""

    scale: Float  # (channels,) float32
    zero_point: npt.NDArray[np.int32]  # (channels,)
    qmin: int
    qmax: int
    dtype: Dtype
    axis: int | None

    def dequantized(self, x: Double) -> Double:
        """(channels, …) → the same on the grid: what the runtime's quantize and dequantize make of it."""
        shape = (-1, *[1] * (x.ndim - 1))
        scale, zero_point = self.scale.reshape(shape).astype(np.float64), self.zero_point.reshape(shape)
        codes = np.clip(np.rint(x / scale) + zero_point, self.qmin, self.qmax)
        on_grid: Double = scale * (codes - zero_point)
        return on_grid


def code_range(dtype: Dtype, symmetric: bool) -> tuple[int, int]:
    """qmin and qmax. Raises CalibrationError for a symmetric grid of unsigned codes: it would lose half of them."""
    low, high = RANGES[dtype]
    if symmetric and low == 0:
        raise CalibrationError(f"a symmetric activation grid has signed codes, seen {dtype}: wanted int8 or int16")
    return (-high, high) if symmetric else (low, high)


def grid_of(low: Double, high: Double, dtype: Dtype, symmetric: bool, axis: int | None) -> ActivationGrid:
    """The grid that holds the ranges (channels,), with zero; one of nothing but zero has scale 1, zero point 0."""
    qmin, qmax = code_range(dtype, symmetric)
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    wide = np.maximum(-low, high) / qmax if symmetric else (high - low) / (qmax - qmin)
    scale = wide.astype(np.float32)
    nothing = scale < np.finfo(np.float32).tiny
    scale[nothing] = 1.0
    zero_point = np.zeros(len(scale), np.int32)
    if not symmetric:
        zero_point = np.clip(np.rint(qmin - low / scale), qmin, qmax).astype(np.int32)
        zero_point[nothing] = 0
    return ActivationGrid(scale, zero_point, qmin, qmax, dtype, axis)


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
