"""Small unsigned integers in bytes, as every GGUF block type lays them out.

A plane holds bits [low, low + bits) of each value. It goes in groups of `width` bytes: byte b of a group holds the
values b, b + width, b + 2·width, … of that group's 8 / bits · width values, the first in its lowest bits.

    Plane(0, 4, 16)   two nibbles a byte, value i low and value i + 16 high: the codes of Q4_0
    Plane(4, 1, 1)    bit 4 of eight neighbours a byte: the high bits of Q5_0
    Plane(0, 8, 1)    a byte a value

The integer scales of Q4_K and Q5_K are no planes: see `pack_scales`.

Source: ggml/src/ggml-quants.c (dequantize_row_*, get_scale_min_k4).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Plane:
    low: int
    bits: int
    width: int

    def size(self, values: int) -> int:
        """Bytes that so many values take."""
        return values * self.bits // 8

    def pack(self, values: Bytes) -> Bytes:
        """(…, n) → (…, n * bits / 8)."""
        bits = (values >> self.low) & ((1 << self.bits) - 1)
        groups = bits.reshape(*values.shape[:-1], -1, 8 // self.bits, self.width)
        joined = np.bitwise_or.reduce(groups << self._shifts, axis=-2)
        return np.asarray(joined.reshape(*values.shape[:-1], -1), np.uint8)

    def unpack(self, packed: Bytes) -> Bytes:
        """(…, bytes) → (…, n) with these bits set and no others."""
        groups = packed.reshape(*packed.shape[:-1], -1, 1, self.width) >> self._shifts
        bits = (groups & ((1 << self.bits) - 1)).astype(np.uint8)
        return np.asarray(bits.reshape(*packed.shape[:-1], -1) << self.low, np.uint8)

    @property
    def _shifts(self) -> Bytes:
        """(8 / bits, 1) uint8."""
        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]


def pack_scales(values: Bytes) -> Bytes:
    """(…, 16) of 6 bits, eight scales then eight minima → (…, 12), the layout of Q4_K and Q5_K.

    Bytes 0-3 are scales 0-3, bytes 4-7 minima 0-3, bytes 8-11 the low nibbles of scales (low) and minima (high)
    4-7; the high two bits of those stand in bytes 0-3 and 4-7.
    """
    halves = values.reshape(*values.shape[:-1], 2, 2, 4)
    first, second = halves[..., 0, :], halves[..., 1, :]  # (…, scale or minimum, 4)
    whole = (first | ((second >> 4) << 6)).reshape(*values.shape[:-1], 8)
    nibbles = (second[..., 0, :] & 15) | ((second[..., 1, :] & 15) << 4)
    return np.concatenate([whole, nibbles], axis=-1)


def unpack_scales(packed: Bytes) -> Bytes:
    """The inverse of `pack_scales`."""
    whole = packed[..., :8].reshape(*packed.shape[:-1], 2, 4)
    nibbles = np.stack([packed[..., 8:] & 15, packed[..., 8:] >> 4], axis=-2)
    return np.stack([whole & 63, nibbles | ((whole >> 6) << 4)], axis=-2).reshape(*packed.shape[:-1], 16)
