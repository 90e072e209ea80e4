"""Grids that ONNX Runtime holds, random tensors and tiny models on them."""

from __future__ import annotations

import numpy as np

from lilliput.grid import Float, Outliers, QuantizedTensor, grid, round_scale

GRIDS = (
    "int4-b32", "int4-b64", "int4-b128", "int4-b16", "int4-channel", "int4-b32-zp-f16", "int4-b64-zp",
    "int8-b32", "int8-channel", "int8-channel-zp-f32", "int8-b32-zp-f16", "int2-b64", "int4-b32-f32",
)  # fmt: skip


def random_tensor(name: str, rows: int, cols: int) -> QuantizedTensor:
    """Every code of the grid, random scales and zero points."""
    spec, rng = grid(name), np.random.default_rng(len(name) * rows * cols)
    blocks = (rows, spec.blocks(cols))
    codes = rng.integers(spec.qmin, spec.qmax + 1, (rows, cols)).astype(spec.code_dtype)
    scales = round_scale(rng.uniform(1e-3, 0.1, blocks), spec.scale_dtype)
    offsets = None if spec.symmetric else rng.integers(0, spec.qmax + 1, blocks).astype(np.uint8)
    return QuantizedTensor(spec, codes, scales, offsets)


def quantize(weight: Float, name: str) -> QuantizedTensor:
    """Round to nearest on any grid without minima: max-abs scales, or the range with zero points."""
    spec, (rows, cols) = grid(name), weight.shape
    columns = np.arange(spec.outliers) * 7
    outliers = Outliers(columns, round_scale(weight[:, columns], "float16")) if spec.outliers else None
    weight = weight.copy()
    weight[:, columns] = 0
    width, n_blocks = spec.width(cols), spec.blocks(cols)
    padded = np.zeros((rows, n_blocks * width), np.float32)
    padded[:, :cols] = weight
    blocks = padded.reshape(rows, n_blocks, width)
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    spread = np.maximum(-low, high) / spec.qmax if spec.symmetric else (high - low) / spec.qmax
    scales = round_scale(np.maximum(spread, 1e-4), spec.scale_dtype)
    zeros = np.zeros_like(scales) if spec.symmetric else np.clip(np.rint(-low / scales), 0, spec.qmax)
    codes = np.clip(np.rint(blocks / scales[..., None]) + zeros[..., None], spec.qmin, spec.qmax)
    packed = np.ascontiguousarray(codes.reshape(rows, -1)[:, :cols]).astype(spec.code_dtype)
    offsets = None if spec.symmetric else zeros.astype(np.uint8)
    return QuantizedTensor(spec, packed, scales, offsets, outliers=outliers)
