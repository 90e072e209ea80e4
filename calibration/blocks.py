"""Blocks: the scales and offsets of a matrix while a solver works on it, as torch tensors.

The arithmetic is lilliput.grid's, `values` there is `dequantize`. Where the grid has super-blocks, s and o are the
products (d·sc, -dmin·m) and `supers` holds d and dmin beside them. Scales are never zero, so that codes can be asked
for; an integer scale of 0 would say no more than code 0 does.

A codebook has no 0: there, and only there, blocks of zeros have scale 0, and any code is as good.
The nearest entry of a codebook is looked up by floor(2·w / s): entries are integers, so every border between two of
them is a multiple of one half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lilliput.grid import FLOAT16_TINY, Codes, Float, GridSpec, QuantizedTensor, round_scale

FLOAT32_TINY = float(np.finfo(np.float32).tiny)
SLAB = 1 << 19  # weights that are worked on at once: bounds the memory of a large matrix to some 20 MB


@dataclass(frozen=True)
class Blocks:
    """Scale s and offset o of blocks, tensors of one shape. o is the zero point or the minimum; zeros where neither."""

    spec: GridSpec
    s: Tensor
    o: Tensor
    supers: Tensor | None = None  # (…, n_supers, 1 or 2), only of all blocks of a matrix

    def codes(self, w: Tensor) -> Tensor:
        """Nearest codes of w, as float32; s and o broadcast against it."""
        if self.spec.codebook:
            return _nearest_entry(w / self.s, self.spec.codebook)
        if self.spec.offset == "minimum":
            q = (w - self.o).div_(self.s).round_()
        else:
            q = (w / self.s).round_()
            if self.spec.offset == "zero_point":
                q += self.o
        return q.clamp_(self.spec.qmin, self.spec.qmax)

    def values(self, q: Tensor) -> Tensor:
        """The numbers that codes stand for, by lilliput.grid's formula."""
        if self.spec.offset == "none":
            return q * self.s
        return (q - self.o) * self.s if self.spec.offset == "zero_point" else q * self.s + self.o

    def at(self, block: int) -> Blocks:
        """One block's, of s and o whose first axis is the blocks."""
        return Blocks(self.spec, self.s[block], self.o[block])

    def transposed(self) -> Blocks:
        """Rows and blocks exchanged."""
        supers = None if self.supers is None else self.supers.transpose(0, 1).contiguous()
        return Blocks(self.spec, self.s.T.contiguous(), self.o.T.contiguous(), supers)

    def spread(self) -> Blocks:
        """With a last axis of one, to stand against the weights of the blocks."""
        return replace(self, s=self.s.unsqueeze(-1), o=self.o.unsqueeze(-1))


@lru_cache
def _entries(codebook: tuple[int, ...]) -> Tensor:
    """The nearest entry for each floor(2x), from twice the least entry on."""
    doubled = torch.arange(2 * codebook[0], 2 * codebook[-1] + 1) + 0.5
    entries = torch.tensor(codebook, dtype=torch.float32)
    return entries[torch.bucketize(doubled, entries[1:] + entries[:-1])]


def _nearest_entry(x: Tensor, codebook: tuple[int, ...]) -> Tensor:
    low, high = 2 * codebook[0], 2 * codebook[-1]
    index = x.mul(2).floor_().nan_to_num_(0).clamp_(low, high).sub_(low).to(torch.int32)
    return _entries(codebook).index_select(0, index.view(-1)).view(x.shape)


def tensor_of(blocks: Blocks, codes: Tensor) -> QuantizedTensor:
    """Codes (rows, cols), of any dtype, and their blocks (rows, n_blocks) as a tensor on the grid."""
    spec = blocks.spec
    offsets = {
        "none": None,
        "zero_point": blocks.o.numpy().astype(np.uint8),
        "minimum": blocks.o.numpy(),
    }[spec.offset]
    array: Codes = codes.numpy().astype(np.int8) if spec.symmetric else codes.numpy().astype(np.uint8)
    supers = None if blocks.supers is None else blocks.supers.contiguous().numpy()
    return QuantizedTensor(spec, array, blocks.s.numpy(), offsets, supers)


def nearest(weight: Float, blocks: Blocks) -> QuantizedTensor:
    """Every weight (rows, cols) to its nearest code."""
    w, width = torch.from_numpy(weight), blocks.spec.width(weight.shape[1])
    codes = torch.from_numpy(np.empty(weight.shape, blocks.spec.code_dtype))
    for rows in row_slabs(weight):
        s, o = (t[rows].repeat_interleave(width, dim=1)[:, : w.shape[1]] for t in (blocks.s, blocks.o))
        codes[rows] = Blocks(blocks.spec, s, o).codes(w[rows]).to(codes.dtype)
    return tensor_of(blocks, codes)


def row_slabs(matrix: npt.NDArray[np.generic]) -> Iterator[slice]:
    """Rows of a matrix (rows, cols), about SLAB numbers at a time."""
    step = max(1, SLAB // matrix.shape[1])
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def round_to(x: Tensor, spec: GridSpec) -> Tensor:
    """Scales or minima (any shape) rounded to the grid's scale dtype; of super-blocks, their factors."""
    return torch.from_numpy(round_scale(x.numpy(), spec.scale_dtype))


def round_nonzero(x: Tensor, spec: GridSpec) -> Tensor:
    """Scales on the grid's dtype, not zero: 1 for an exact zero, the least number for one that rounds to zero."""
    tiny = FLOAT32_TINY if spec.scale_dtype == "float32" else FLOAT16_TINY
    rounded = round_to(x, spec)
    rounded = torch.where(rounded.abs() < tiny, torch.copysign(torch.full_like(x, tiny), x), rounded)
    return torch.where(x == 0, torch.ones_like(x), rounded)
