"""Random tensors on any grid: codes of the whole range, scales of all sizes."""

from __future__ import annotations

import numpy as np

from lilliput.grid import Codes, GridSpec, QuantizedTensor, round_scale


def random_tensor(spec: GridSpec, rows: int, cols: int, seed: int) -> QuantizedTensor:
    """Scales are positive but in super-blocks."""
    random = np.random.default_rng(seed)
    codes = random_codes(spec, rows, cols, random)
    if spec.super_blocks:
        return with_super_blocks(spec, codes, random)
    shape = (rows, spec.blocks(cols))
    scales = round_scale(random.uniform(0.001, 2, shape), spec.scale_dtype)
    if spec.offset == "none":
        return QuantizedTensor(spec, codes, scales)
    if spec.offset == "zero_point":
        return QuantizedTensor(spec, codes, scales, random.integers(0, spec.qmax + 1, shape).astype(np.uint8))
    return QuantizedTensor(spec, codes, scales, round_scale(random.normal(size=shape), spec.scale_dtype))


def random_codes(spec: GridSpec, rows: int, cols: int, random: np.random.Generator) -> Codes:
    """(rows, cols); the first two are the ends of the range."""
    codes: Codes = random.integers(spec.qmin, spec.qmax + 1, (rows, cols)).astype(spec.code_dtype)
    if spec.codebook:
        codes = random.choice(np.array(spec.codebook, np.int8), (rows, cols))
    codes[0, :2] = (spec.qmin, spec.qmax)[:cols]
    return codes


def with_super_blocks(spec: GridSpec, codes: Codes, random: np.random.Generator) -> QuantizedTensor:
    """Integers of the whole range, both ends included, times factors of all sizes and signs; the last are 0."""
    assert spec.super_blocks
    rows, cols = codes.shape
    parts = 1 if spec.symmetric else 2
    shape, low, high = (rows, spec.blocks(cols)), spec.super_blocks.low, spec.super_blocks.high
    sizes = (rows, spec.supers(cols), parts)
    supers = round_scale(random.normal(size=sizes) * 10.0 ** random.integers(-6, 3, sizes), "float16")
    supers[-1, -1] = 0
    wide = np.repeat(supers, spec.super_blocks.cols // spec.block_size, axis=1)[:, : shape[1]]
    integers = random.integers(low, high + 1, shape).astype(np.float32)
    integers[0, :2] = (low, high)[: shape[1]]
    integers[wide[:, :, 0] == 0] = 0
    minima = None
    if parts == 2:
        minima = -random.integers(0, high + 1, shape).astype(np.float32) * wide[:, :, 1]
    tensor = QuantizedTensor(spec, codes, integers * wide[:, :, 0], minima, supers)
    tensor.check("random")
    return tensor
