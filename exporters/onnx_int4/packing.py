"""How ONNX Runtime stores an n-bit matrix: the bytes of MatMulNBits, which GatherBlockQuantized reads too.

A (rows, cols) matrix is cut along its columns into blocks of a power of two; the last block is padded:

    codes        (rows, n_blocks, block_size * bits / 8) uint8   unsigned, first code in the low bits
    scales       (rows, n_blocks) float32                        the file may hold float16 (graph.py)
    zero_points  (rows, ceil(n_blocks * bits / 8)) uint8         packed like codes; absent means 2^(bits-1)

so that x = scale * (code - zero_point). A signed code c of a symmetric grid is stored as c + 2^(bits-1) and
needs no zero points. Padding columns hold the zero point: x = 0.

The format knows no per-channel scales: a row of a per-channel grid is stored as blocks which all repeat its
scale, the same numbers exactly, and `unpack` puts the row together again. Blocks of 512 are refused: ONNX
Runtime computes them wrongly (microsoft/onnxruntime issue 28551).

Columns at 16 bit (lilliput.grid, outliers) are two initializers of their own, `columns` (k,) int64 and `values`
(rows, k) float16; their codes stand for 0.

Sources: onnxruntime/core/graph/contrib_ops/contrib_defs.cc (MatMulNBits, GatherBlockQuantized), ORT 1.31.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lilliput.errors import ExportError
from lilliput.grid import Float, GridSpec, Outliers, QuantizedTensor

Bytes = npt.NDArray[np.uint8]
Stored = TypeVar("Stored", Float, Bytes)

BITS = (2, 4, 8)  # MatMulNBits and GatherBlockQuantized read no others
BLOCK_SIZES = (256, 128, 64, 32, 16)  # powers of two from 16; 512 is computed wrongly
ROW_BLOCK_SIZES = (128, 64, 32, 16)  # for per-channel grids; 256 was slower than 128 for SmolLM2's 8-bit head


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix as MatMulNBits takes it."""

    bits: int
    block_size: int
    cols: int
    codes: Bytes  # (rows, n_blocks, block_size * bits / 8)
    scales: Float  # (rows, n_blocks)
    zero_points: Bytes | None  # (rows, ceil(n_blocks * bits / 8))
    outliers: Outliers | None = None

    @property
    def rows(self) -> int:
        return int(self.codes.shape[0])

    @property
    def padded_cols(self) -> int:
        return int(self.codes.shape[1]) * self.block_size


def refusal(spec: GridSpec) -> str | None:
    """Why MatMulNBits cannot hold the grid exactly, or None."""
    if spec.super_blocks or spec.codebook:
        return f"{spec.name} is a grid of GGUF alone: choose int4-b32-zp-f16 or int8-b32"
    if spec.bits not in BITS:
        return f"MatMulNBits holds 2, 4 or 8 bits, not {spec.bits}"
    if spec.offset == "minimum":
        return "MatMulNBits holds zero points, not minima: choose the grid with -zp instead of -min"
    if spec.block_size and spec.block_size not in BLOCK_SIZES:
        choices = ", ".join(str(size) for size in reversed(BLOCK_SIZES))
        return f"MatMulNBits computes right for blocks of {choices} or whole rows, not {spec.block_size}"
    return None


def stored_block(spec: GridSpec, cols: int) -> int:
    """The block size in the file: the grid's own, or for a per-channel grid the one of fewest bytes a row."""
    if spec.block_size:
        return spec.block_size
    return min(ROW_BLOCK_SIZES, key=lambda size: -(-cols // size) * (size * spec.bits / 8 + 2))


def pack_bits(values: Bytes, bits: int) -> Bytes:
    """Codes (…, n) uint8 below 2^bits → (…, ceil(n * bits / 8)) uint8, the first code in the low bits."""
    per_byte = 8 // bits
    missing = -values.shape[-1] % per_byte
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    packed = np.zeros((*padded.shape[:-1], padded.shape[-1] // per_byte), np.uint8)
    for i in range(per_byte):
        packed |= padded[..., i::per_byte] << np.uint8(i * bits)
    return packed


def unpack_bits(packed: Bytes, bits: int, count: int) -> Bytes:
    """The inverse of pack_bits: (…, n_bytes) uint8 → (…, count) uint8."""
    per_byte = 8 // bits
    values = np.empty((*packed.shape[:-1], packed.shape[-1] * per_byte), np.uint8)
    for i in range(per_byte):
        values[..., i::per_byte] = (packed >> np.uint8(i * bits)) & np.uint8((1 << bits) - 1)
    return values[..., :count]


def pack(tensor: QuantizedTensor) -> Packed:
    """The bytes of a tensor whose grid `refusal` accepts."""
    spec, (rows, cols) = tensor.spec, tensor.shape
    block_size = stored_block(spec, cols)
    n_blocks = -(-cols // block_size)
    middle = 1 << (spec.bits - 1)
    scales = np.broadcast_to(tensor.scales, (rows, n_blocks)).astype(np.float32)
    if tensor.offsets is None:
        unsigned, zero_points = (tensor.codes.astype(np.int16) + middle).astype(np.uint8), None
        padding = np.full((rows, 1), middle, np.uint8)
    else:
        unsigned = tensor.codes.astype(np.uint8)
        spread = np.broadcast_to(tensor.offsets, (rows, n_blocks)).astype(np.uint8)
        padding, zero_points = spread[:, -1:], pack_bits(spread, spec.bits)
    padded = np.concatenate([unsigned, np.repeat(padding, n_blocks * block_size - cols, axis=1)], axis=1)
    codes = pack_bits(padded.reshape(rows, n_blocks, block_size), spec.bits)
    return Packed(spec.bits, block_size, cols, codes, scales, zero_points, tensor.outliers)


def unpack(packed: Packed, spec: GridSpec, name: str) -> QuantizedTensor:
    """The tensor on grid `spec` that `pack` packed. Raises ExportError where the bytes are no such tensor."""
    wanted = (spec.bits, stored_block(spec, packed.cols), spec.symmetric)
    seen = (packed.bits, packed.block_size, packed.zero_points is None)
    if seen != wanted:
        raise ExportError(f"{name}: the file holds (bits, block, symmetric) {seen}, {spec.name} wants {wanted}")
    unsigned = unpack_bits(packed.codes, spec.bits, packed.block_size).reshape(packed.rows, -1)[:, : packed.cols]
    scales = _gather(packed.scales, spec, name)
    if packed.zero_points is None:
        signed = (unsigned.astype(np.int16) - (1 << (spec.bits - 1))).astype(np.int8)
        return QuantizedTensor(spec, signed, scales, outliers=packed.outliers)
    zero_points = unpack_bits(packed.zero_points, spec.bits, packed.scales.shape[1])
    offsets = _gather(zero_points, spec, name)
    return QuantizedTensor(spec, np.ascontiguousarray(unsigned), scales, offsets, outliers=packed.outliers)


def _gather(stored: Stored, spec: GridSpec, name: str) -> Stored:
    """Undo the spreading of a per-channel grid over (rows, n_blocks)."""
    if spec.block_size:
        return stored
    if not np.array_equal(stored, np.broadcast_to(stored[:, :1], stored.shape)):
        raise ExportError(f"{name}: the blocks of a row differ in scale or zero point, {spec.name} wants them equal")
    return np.ascontiguousarray(stored[:, :1])


def take(packed: Packed, start: int, stop: int) -> Packed:
    """Rows start to stop of a stacked matrix."""
    zero_points = None if packed.zero_points is None else packed.zero_points[start:stop]
    return Packed(
        packed.bits, packed.block_size, packed.cols, packed.codes[start:stop], packed.scales[start:stop], zero_points
    )
