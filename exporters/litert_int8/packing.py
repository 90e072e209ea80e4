"""How a `.tflite` file holds a matrix of codes, and how it is read back: pure numpy, no flatbuffer.

    int8 per channel   INT8 (rows, cols), a float32 scale per row in QuantizationParameters.scale
    int4 per channel   INT4 (rows, cols), a float32 scale per row in QuantizationParameters.scale
    int2 per channel   INT2 (rows, cols), likewise
    int4 per block     INT4 (rows, cols), QuantizationParameters.details = BlockwiseQuantization, which
                       names a FLOAT16 tensor (rows, n_blocks) of scales

INT4 codes are two to a byte, INT2 codes four, in row-major order, the first in the lowest bits, in two's complement.
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
    if spec.bits not in (2, 4, 8):
        return f"LiteRT runs 2, 4 and 8 bit weights, {spec.name} has {spec.bits}: choose int4-b32 or int8-channel"
    if shape[1] % (per_byte := 8 // spec.bits):
        return f"LiteRT packs {per_byte} codes in a byte, {shape[1]} columns are no multiple: choose int8-channel"
    return _block_refusal(spec, shape[1]) if spec.block_size else None


def _block_refusal(spec: GridSpec, cols: int) -> str | None:
    if spec.bits != 4:
        channels = f"int{spec.bits}-channel"
        return (
            f"LiteRT has one scale per channel for {spec.bits}-bit weights, {spec.name} has blocks: choose {channels}"
        )
    if spec.block_size % BLOCK_MULTIPLE:
        return f"XNNPACK takes blocks that are multiples of {BLOCK_MULTIPLE}, {spec.name} is not: choose int4-b32"
    if cols % spec.block_size:
        return f"LiteRT has no short block, {spec.block_size} does not divide {cols} columns: choose int8-channel"
    if spec.scale_dtype != "bf16_f16":
        return f"XNNPACK rounds block scales to bfloat16, {spec.name} allows others: choose int4-b{spec.block_size}"
    return None


def pack(codes: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes of 2, 4 or 8 bits, any multiple of a byte of them → (count * bits / 8,) uint8."""
    fields = codes.reshape(-1, 8 // bits).astype(np.uint8) & ((1 << bits) - 1)
    return np.asarray(np.bitwise_or.reduce(fields << _shifts(bits), axis=1), dtype=np.uint8)


def unpack(data: npt.NDArray[np.uint8], bits: int, shape: tuple[int, int]) -> npt.NDArray[np.int8]:
    """(rows * cols * bits / 8,) uint8 → (rows, cols) int8 codes; the inverse of `pack`."""
    fields = (data[:, None] >> _shifts(bits)) & ((1 << bits) - 1)
    sign = 1 << (bits - 1)
    return np.asarray((fields.reshape(shape) ^ sign).astype(np.int16) - sign, dtype=np.int8)


def _shifts(bits: int) -> npt.NDArray[np.uint8]:
    return np.arange(0, 8, bits, dtype=np.uint8)
