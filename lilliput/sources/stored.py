"""A matrix as a quantized checkpoint holds it: on a grid of ours, or as values that lie on none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lilliput.errors import SourceError
from lilliput.grid import Float, GridSpec, QuantizedTensor, narrowest

Unsigned = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class OffGrid:
    """What the checkpoint's codes stand for, and why no grid holds them as they are."""

    values: Float  # (rows, cols) float32
    reason: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantize(self) -> Float:
        return self.values


Stored = QuantizedTensor | OffGrid


def from_unsigned(bits: int, block_size: int, codes: Unsigned, scales: Float, zero_points: Unsigned) -> QuantizedTensor:
    """x = scale · (code - zero point), codes (rows, cols) and zero points (rows, n_blocks) in [0, 2^bits).

    Where every zero point is the middle of the codes, the grid is symmetric: x = scale · (code - 2^(bits-1)). An
    8-bit code 0 stands for -128 then, which the symmetric grid leaves out: such a matrix keeps its zero points.
    """
    middle = 1 << (bits - 1)
    block = 0 if scales.shape[1] == 1 else block_size
    scales = np.ascontiguousarray(scales)
    if (zero_points == middle).all() and (bits < 8 or codes.min(initial=middle) > 0):
        signed = (codes.astype(np.int16) - middle).astype(np.int8)
        return QuantizedTensor(GridSpec(bits, block, "none", narrowest(scales)), signed, scales)
    spec = GridSpec(bits, block, "zero_point", narrowest(scales))
    return QuantizedTensor(spec, np.ascontiguousarray(codes), scales, np.ascontiguousarray(zero_points))


def gathered(
    bits: int, groups: npt.NDArray[np.int64], codes: Unsigned, scales: Float, zero_points: Unsigned, why: str
) -> OffGrid:
    """x = scale · (code - zero point) where each column j (cols,) has the scale and zero point of group groups[j]."""
    centred = codes.astype(np.float32) - zero_points[:, groups].astype(np.float32)
    return OffGrid(np.ascontiguousarray(scales[:, groups] * centred), why)


def block_size_of(cols: int, n_blocks: int, asked: int, name: str) -> int:
    """Columns in a block of `n_blocks`, as the settings say (-1: one a row). Raises SourceError where they disagree."""
    size = cols if asked in (-1, 0) else asked
    if size < 1 or -(-cols // size) != n_blocks:
        raise SourceError(
            f"{name}: {n_blocks} scales a row of {cols} columns, wanted blocks of {asked} as quantization_config says: "
            "the two do not belong together"
        )
    return size
