"""Scales and offsets of a matrix's blocks by search: the ones with the least weighted squared error.

For a block w (width,) with importance h (width,), minimise over scale s (and offset o)

    E(s, o) = Σ h_j (w_j - value(code_j))²,   code_j = the nearest code of w_j

Rounding to the largest magnitude wastes codes on one extreme: a smaller scale clips it and halves the error
of the rest, a larger one can place many weights better. The search tries `candidates` scales evenly between
`low` and `high` times the max-abs scale, every one rounded to the grid's scale dtype first; then takes the
least-squares scale (and minimum) for the codes found, and keeps it where the error falls.

h is the diagonal of the input's second moments: Σ h_j (w_j - v_j)² is then the expected squared error of
the output if inputs were uncorrelated (as llama.cpp's importance matrix, and AWQ's clipping search).

Positive scales only, unless `negative_scales`: a signed grid has one code more below zero than above, and a
negative scale gives it to the larger side; XNNPACK refuses negative scales. A scale is never zero: an
all-zero block gets scale 1, and a block too small for the dtype its least positive number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from calibration.base import SolverOptions
from lilliput.errors import CalibrationError
from lilliput.grid import FLOAT16_TINY, Codes, Float, GridSpec, QuantizedTensor, round_scale

SLAB = 1 << 19  # weights that one step of the search works on: bounds its memory to some 20 MB
FLOAT32_TINY = float(np.finfo(np.float32).tiny)


class SearchOptions(SolverOptions):
    """Options of every solver that searches scales. `candidates` 1 with `refine` 0 is plain max-abs rounding."""

    candidates: int = Field(default=24, ge=1)
    low: float = Field(default=0.65, gt=0)
    high: float = Field(default=1.2, gt=0)
    refine: int = Field(default=2, ge=0)  # least-squares steps after the search
    negative_scales: bool = False


@dataclass(frozen=True)
class Blocks:
    """Scale s and offset o of blocks, tensors of one shape. o is the zero point or the minimum; zeros where neither."""

    spec: GridSpec
    s: Tensor
    o: Tensor

    def codes(self, w: Tensor) -> Tensor:
        """Nearest codes of w, as float32; s and o broadcast against it."""
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
        return Blocks(self.spec, self.s.T.contiguous(), self.o.T.contiguous())

    def spread(self) -> Blocks:
        """With a last axis of one, to stand against the weights of the blocks."""
        return Blocks(self.spec, self.s.unsqueeze(-1), self.o.unsqueeze(-1))


def find_blocks(weight: Float, spec: GridSpec, importance: Float | None, options: SearchOptions) -> Blocks:
    """The best blocks of weight (rows, cols), s and o (rows, n_blocks) float32; importance (cols,) or none."""
    if spec.super_blocks or spec.codebook:
        raise CalibrationError(f"no scale search for grid {spec.name} yet: choose int5-b32 or int4-b32-min-f16")
    cols = weight.shape[1]
    n_blocks, width = spec.blocks(cols), spec.width(cols)
    padding = n_blocks * width - cols
    h = torch.ones(cols) if importance is None else torch.from_numpy(importance).clamp(min=0)
    h = torch.nn.functional.pad(h, (0, padding)).reshape(n_blocks, width)
    found = [
        _search(torch.nn.functional.pad(slab, (0, padding)).reshape(-1, n_blocks, width), h, spec, options)
        for slab in torch.split(torch.from_numpy(weight), max(1, SLAB // (n_blocks * width)))
    ]
    return Blocks(spec, torch.cat([b.s for b in found]), torch.cat([b.o for b in found]))


def tensor_of(blocks: Blocks, codes: Tensor) -> QuantizedTensor:
    """Codes (rows, cols), as float32, and their blocks (rows, n_blocks) as a tensor on the grid."""
    spec = blocks.spec
    offsets = {
        "none": None,
        "zero_point": blocks.o.numpy().astype(np.uint8),
        "minimum": blocks.o.numpy(),
    }[spec.offset]
    array: Codes = codes.numpy().astype(np.int8) if spec.symmetric else codes.numpy().astype(np.uint8)
    return QuantizedTensor(spec, array, blocks.s.numpy(), offsets)


def nearest(weight: Float, blocks: Blocks) -> QuantizedTensor:
    """Every weight (rows, cols) to its nearest code."""
    w, width = torch.from_numpy(weight), blocks.spec.width(weight.shape[1])
    per_weight = (t.repeat_interleave(width, dim=1)[:, : w.shape[1]] for t in (blocks.s, blocks.o))
    return tensor_of(blocks, Blocks(blocks.spec, *per_weight).codes(w))


def _search(w: Tensor, h: Tensor, spec: GridSpec, options: SearchOptions) -> Blocks:
    """Best blocks of w (rows, n_blocks, width) with importance h (n_blocks, width)."""
    best: Blocks | None = None
    least = torch.empty(0)
    for trial in _candidates(w, spec, options):
        error, _ = _error(w, h, trial)
        best, least = (trial, error) if best is None else _better(best, least, trial, error)
    assert best is not None
    for _ in range(options.refine):
        _, q = _error(w, h, best)
        trial = _least_squares(w, h, q, best)
        best, least = _better(best, least, trial, _error(w, h, trial)[0])
    return best


def _error(w: Tensor, h: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Weighted squared error of each block (rows, n_blocks), and the codes."""
    wide = blocks.spread()
    q = wide.codes(w)
    return wide.values(q).sub_(w).square_().mul_(h).sum(-1), q


def _better(best: Blocks, least: Tensor, trial: Blocks, error: Tensor) -> tuple[Blocks, Tensor]:
    wins = error < least
    kept = Blocks(best.spec, torch.where(wins, trial.s, best.s), torch.where(wins, trial.o, best.o))
    return kept, torch.where(wins, error, least)


def _candidates(w: Tensor, spec: GridSpec, options: SearchOptions) -> Iterator[Blocks]:
    """Trials in a fixed order, the max-abs scale first: it is kept unless another is strictly better."""
    span = np.linspace(options.low, options.high, options.candidates - 1) if options.candidates > 1 else np.empty(0)
    ratios = [1.0, *map(float, span)]
    if spec.symmetric:
        base, zero = w.abs().amax(-1) / spec.qmax, torch.zeros(w.shape[:2])
        signs = (1.0, -1.0) if options.negative_scales else (1.0,)
        yield from (Blocks(spec, _scale(base * (r * sign), spec), zero) for r in ratios for sign in signs)
        return
    low, high = w.amin(-1), w.amax(-1)
    if spec.offset == "zero_point":
        low, high = low.clamp(max=0), high.clamp(min=0)
    for r in ratios:
        s = _scale((high - low) * (r / spec.qmax), spec)
        if spec.offset == "zero_point":
            yield Blocks(spec, s, (-low * r / s).round_().clamp_(0, spec.qmax))
        else:
            middle = (low + high) / 2
            yield Blocks(spec, s, round_to(middle - s * (spec.qmax / 2), spec))


def _least_squares(w: Tensor, h: Tensor, q: Tensor, blocks: Blocks) -> Blocks:
    """The scale (and minimum) with the least error for codes q, rounded to the grid's dtype; the zero point stays."""
    spec = blocks.spec
    if spec.offset == "minimum":
        total = h.sum(-1).clamp(min=FLOAT32_TINY)
        mean_q, mean_w = (q * h).sum(-1) / total, (w * h).sum(-1) / total
        centred = q - mean_q.unsqueeze(-1)
        s = _divide((centred * h * w).sum(-1), (centred.square() * h).sum(-1), blocks.s)
        s = _scale(s, spec)
        return Blocks(spec, s, round_to(mean_w - s * mean_q, spec))
    steps = q - blocks.o.unsqueeze(-1)
    s = _divide((steps * h * w).sum(-1), (steps.square() * h).sum(-1), blocks.s)
    return Blocks(spec, _scale(s, spec), blocks.o)


def _divide(top: Tensor, bottom: Tensor, fallback: Tensor) -> Tensor:
    """top / bottom where that is a usable scale of the fallback's sign, else the fallback."""
    ratio = top / bottom
    usable = ratio.isfinite() & (ratio * fallback.sign() > 0)
    return torch.where(usable, ratio, fallback)


def round_to(x: Tensor, spec: GridSpec) -> Tensor:
    """Scales or minima (any shape) rounded to the grid's scale dtype."""
    return torch.from_numpy(round_scale(x.numpy(), spec.scale_dtype))


def _scale(x: Tensor, spec: GridSpec) -> Tensor:
    """Scales on the grid's dtype, never zero: 1 for an exact zero, the least number for one that rounds to zero."""
    tiny = FLOAT32_TINY if spec.scale_dtype == "float32" else FLOAT16_TINY
    rounded = round_to(x, spec)
    rounded = torch.where(rounded.abs() < tiny, torch.copysign(torch.full_like(x, tiny), x), rounded)
    return torch.where(x == 0, torch.ones_like(x), rounded)
