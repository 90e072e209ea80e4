"""The static integer grid of an activation.

A static grid is x ≈ scale · (code − zero_point), per tensor or per channel, with the scale in float32 and zero in its
range, so that zero is a code:

    asymmetric   scale = (high − low) / (qmax − qmin)    zero_point = round(qmin − low / scale), within the codes
    symmetric    scale = max(|low|, |high|) / qmax        zero_point = 0, qmin = −qmax

    int8 −128..127, uint8 0..255, int16 −32768..32767, uint16 0..65535; symmetric int8 −127..127, int16 −32767..32767

which are ONNX's QuantizeLinear (onnx.ai, operators) and LiteRT's quantization spec (int8 activations asymmetric, int16
symmetric).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lilliput.errors import CalibrationError
from lilliput.grid import Float

Dtype = Literal["int8", "uint8", "int16", "uint16"]
Double = npt.NDArray[np.float64]
Integer = npt.NDArray[np.int8] | npt.NDArray[np.uint8] | npt.NDArray[np.int16] | npt.NDArray[np.uint16]

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

    def codes(self, x: Float) -> Integer:
        """The codes of x (any shape; channels first where there are some), in the float32 arithmetic of a runtime."""
        shape = (-1, *[1] * (x.ndim - 1)) if self.axis is not None else ()
        steps = np.rint(x.astype(np.float32) / self.scale.reshape(shape)) + self.zero_point.reshape(shape)
        found: Integer = np.clip(steps, self.qmin, self.qmax).astype(self.dtype)
        return found

    def same_as(self, other: ActivationGrid) -> bool:
        """Bit for bit."""
        mine, theirs = ((g.qmin, g.qmax, g.dtype, g.axis) for g in (self, other))
        return (
            mine == theirs
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )


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
