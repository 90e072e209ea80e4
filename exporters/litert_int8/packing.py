"""How a `.tflite` file holds a matrix of codes, and how it is read back: pure numpy, no flatbuffer.

    int8 per channel   INT8 (rows, cols), a float32 scale per row in QuantizationParameters.scale
    int4 per channel   INT4 (rows, cols), a float32 scale per row in QuantizationParameters.scale
    int4 per block     INT4 (rows, cols), QuantizationParameters.details = BlockwiseQuantization, which
                       names a FLOAT16 tensor (rows, n_blocks) of scales

INT4 codes are two to a byte in row-major order, the first in the low nibble, in two's complement.
XNNPACK, which computes them, rounds block scales to bfloat16 when it packs: a block grid must be
"bf16_f16". Per-channel scales are float32 there and keep all their bits.

Sources: LiteRT's schema.fbs (BlockwiseQuantization), tflite/delegates/xnnpack (which blocks it takes: whole
multiples of 32 that divide the row), tflite/kernels/embedding_lookup.cc (which reads the same layouts), and
LiteRT's quantization specification (int8 weights in [-127, 127]).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lilliput.grid import GridSpec

BLOCK_MULTIPLE = 32  # XNNPACK's 4-bit kernels walk a row in steps of 32


def refusal(spec: GridSpec, shape: tuple[int, int]) -> str | None:
    """Why a `.tflite` cannot hold such a matrix exactly, or None where it can."""
    if spec.outliers:
        return f"a FULLY_CONNECTED has no columns at 16 bit beside its codes: choose {replace(spec, outliers=0).name}"
    if spec.super_blocks or spec.codebook:
        return f"{spec.name} is a grid of GGUF alone: choose int4-b32 or int8-channel"
    if spec.offset != "none":
        return f"LiteRT weights are symmetric, {spec.name} has a {spec.offset.replace('_', ' ')}: choose int4-b32"
    if spec.bits not in (4, 8):
        return f"LiteRT runs 4 and 8 bit weights, {spec.name} has {spec.bits}: choose int4-b32 or int8-channel"
    if spec.bits == 4 and shape[1] % 2:
        return f"LiteRT packs 4-bit codes in pairs, {shape[1]} columns are odd: choose int8-channel"
    return _block_refusal(spec, shape[1]) if spec.block_size else None


def _block_refusal(spec: GridSpec, cols: int) -> str | None:
    if spec.bits == 8:
        return f"LiteRT has one scale per channel for 8-bit weights, {spec.name} has blocks: choose int8-channel"
    if spec.block_size % BLOCK_MULTIPLE:
        return f"XNNPACK takes blocks that are multiples of {BLOCK_MULTIPLE}, {spec.name} is not: choose int4-b32"
    if cols % spec.block_size:
        return f"LiteRT has no short block, {spec.block_size} does not divide {cols} columns: choose int8-channel"
    if spec.scale_dtype != "bf16_f16":
        return f"XNNPACK rounds block scales to bfloat16, {spec.name} allows others: choose int4-b{spec.block_size}"
    return None


def pack_nibbles(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """int8 codes in [-8, 7] of any even count → (count / 2,) uint8, first code in the low nibble."""
    nibbles = (codes.reshape(-1) & 15).astype(np.uint8)
    return np.asarray(nibbles[0::2] | (nibbles[1::2] << 4), dtype=np.uint8)


def unpack_nibbles(data: npt.NDArray[np.uint8], shape: tuple[int, int]) -> npt.NDArray[np.int8]:
    """(rows * cols / 2,) uint8 → (rows, cols) int8 codes in [-8, 7]; the inverse of `pack_nibbles`."""
    nibbles = np.stack([data & 15, data >> 4], axis=1).reshape(shape).astype(np.int8)
    return np.asarray((nibbles ^ 8) - 8, dtype=np.int8)
