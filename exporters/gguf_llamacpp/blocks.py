"""How GGUF stores a matrix: rows of blocks of 32 weights, each with a float16 scale before its codes.

    type   bytes a block   content                                                 value
    Q4_0   18              d float16, 16 bytes of two codes                         d * (nibble - 8)
    Q4_1   20              d float16, m float16, 16 bytes of two codes              d * nibble + m
    Q8_0   34              d float16, 32 codes int8                                 d * code
    F16    2 a weight
    F32    4 a weight

Byte i of a 4-bit block holds weight i in its low nibble and weight i + 16 in its high one. A row is its
blocks one after the other; the file holds (rows, bytes) uint8. All scales are float16, so a grid with float32
scales does not fit; both other scale dtypes do, exactly.

The format knows no other block size. A grid whose blocks are a multiple of 32 columns, or whole rows, is
stored with its scale repeated in each block of 32: the same numbers exactly. `unpack` puts them together
again, for which it must be told the grid.

Source: ggml/src/ggml-common.h (block_q4_0, block_q4_1, block_q8_0), ggml-quants.c (dequantize_row_*).
"""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as BlockType

from lilliput.errors import ArtifactError
from lilliput.grid import Float, GridSpec, QuantizedTensor

Bytes = npt.NDArray[np.uint8]

BLOCK = 32  # weights in a block of every type here
HALF = 16


def refusal(spec: GridSpec, cols: int) -> str | None:
    """Why no block type holds the grid exactly, or None."""
    if spec.offset == "zero_point":
        return "GGUF blocks have no zero points: choose a symmetric grid, or one with -min instead of -zp"
    if spec.offset == "minimum" and spec.bits > 4:
        return f"GGUF holds minima with 4 bits at most, not {spec.bits}: choose int4-b32-min-f16"
    if spec.scale_dtype == "float32":
        return "GGUF stores scales as float16: choose the grid without -f32"
    if spec.block_size % BLOCK:
        return f"GGUF blocks are {BLOCK} weights: a grid's block must be a multiple of it, not {spec.block_size}"
    if cols % BLOCK:
        return f"GGUF blocks are {BLOCK} weights and cannot pad: rows of {cols} columns do not divide"
    return None


def block_type(spec: GridSpec) -> BlockType:
    """The block type that holds a grid which `refusal` lets through."""
    if spec.offset == "minimum":
        return BlockType.Q4_1
    return BlockType.Q4_0 if spec.bits <= 4 else BlockType.Q8_0


def pack(tensor: QuantizedTensor) -> Bytes:
    """(rows, cols / 32 * bytes a block) uint8, of type `block_type(tensor.spec)`."""
    kind = block_type(tensor.spec)
    parts = [_half(_spread(tensor, tensor.scales))]
    if kind == BlockType.Q4_1:
        parts.append(_half(_spread(tensor, np.asarray(tensor.offsets, np.float32))))
    parts.append(_pack_codes(tensor.codes, kind))
    return np.concatenate(parts, axis=2).reshape(tensor.shape[0], -1)


def _spread(tensor: QuantizedTensor, per_block: Float) -> Float:
    """(rows, grid's blocks) → (rows, cols / 32), each value repeated in every file block of its grid block."""
    cols = tensor.shape[1]
    return np.repeat(per_block, tensor.spec.width(cols) // BLOCK, axis=1)[:, : cols // BLOCK]


def _half(values: Float) -> Bytes:
    """(rows, blocks) float32 → (rows, blocks, 2) uint8 of float16; exact for numbers on the grid."""
    half = values.astype("<f2")
    assert np.array_equal(half.astype(np.float32), values), "scales left the grid"
    return half[..., None].view(np.uint8)


def _pack_codes(codes: npt.NDArray[np.generic], kind: BlockType) -> Bytes:
    """(rows, cols) codes → (rows, blocks, 16 or 32) uint8."""
    rows = codes.shape[0]
    if kind == BlockType.Q8_0:
        return np.ascontiguousarray(codes, np.int8).view(np.uint8).reshape(rows, -1, BLOCK)
    shift = 8 if kind == BlockType.Q4_0 else 0
    nibbles = (codes.astype(np.int16) + shift).astype(np.uint8).reshape(rows, -1, 2, HALF)
    return np.asarray(nibbles[:, :, 0] | (nibbles[:, :, 1] << 4), np.uint8)


def unpack(data: Bytes, spec: GridSpec, name: str) -> QuantizedTensor:
    """The inverse of `pack`. Raises ArtifactError where the blocks of tensor `name` do not repeat the grid's scales."""
    kind = block_type(spec)
    blocks = data.reshape(data.shape[0], -1, gguf.GGML_QUANT_SIZES[kind][1])
    halves = 2 if kind == BlockType.Q4_1 else 1
    stored = np.ascontiguousarray(blocks[:, :, : 2 * halves]).view("<f2").astype(np.float32)  # (rows, blocks, halves)
    cols = blocks.shape[1] * BLOCK
    codes = _unpack_codes(blocks[:, :, 2 * halves :], kind)
    gathered = [_gather(stored[:, :, i], spec, cols, name) for i in range(halves)]
    return QuantizedTensor(spec, codes, gathered[0], gathered[1] if halves == 2 else None)


def _gather(stored: Float, spec: GridSpec, cols: int, name: str) -> Float:
    """The inverse of `_spread`."""
    width = spec.width(cols) // BLOCK
    values = np.ascontiguousarray(stored[:, ::width])
    if not np.array_equal(np.repeat(values, width, axis=1)[:, : stored.shape[1]], stored):
        raise ArtifactError(f"{name}: scales differ within blocks of {spec.name}: the file was changed, export it anew")
    return values


def _unpack_codes(packed: Bytes, kind: BlockType) -> npt.NDArray[np.int8] | npt.NDArray[np.uint8]:
    rows = packed.shape[0]
    if kind == BlockType.Q8_0:
        return np.ascontiguousarray(packed).view(np.int8).reshape(rows, -1)
    nibbles = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(rows, -1)
    return nibbles if kind == BlockType.Q4_1 else (nibbles.astype(np.int8) - 8).astype(np.int8)


def pack_float(values: Float) -> npt.NDArray[np.float16] | Float:
    """A tensor that stays in float: F16 where every value of a matrix is a float16, else F32. Never rounded.

    Vectors are F32 always, as llama.cpp adds and multiplies them so.
    """
    if values.ndim > 1:
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.array_equal(half.astype(np.float32), values):
            return half
    return np.ascontiguousarray(values, np.float32)
