"""Scales and offsets of a matrix's blocks by search: the ones with the least weighted squared error.

For a block w (width,) with importance h (width,), minimise over scale s (and offset o)

    E(s, o) = Σ h_j (w_j - value(code_j))²,   code_j = the nearest code of w_j

Rounding to the largest magnitude wastes codes on one extreme: a smaller scale clips it and halves the error
of the rest, a larger one can place many weights better. The search tries `candidates` scales evenly between
`low` and `high` times the max-abs scale, every one rounded to the grid's scale dtype first; then takes the
least-squares scale (and minimum) for the codes found, and keeps it where the error falls.

h is the diagonal of the input's second moments: Σ h_j (w_j - v_j)² is then the expected squared error of
the output if inputs were uncorrelated (as llama.cpp's importance matrix, and AWQ's clipping search).

A signed grid has one code more below zero than above, and a negative scale gives it to the larger side.
`negative_scales` says whether to try them; by default where no exporter that takes the grid refuses them (XNNPACK
does, so not on the grids it runs). A scale is not zero: an all-zero block gets scale 1 (0 where the grid has
no code 0), and a block too small for the dtype its least positive number.

Where the grid has super-blocks, scales and minima are found so first, free of any dtype, minima not above zero;
calibration.super_blocks then makes them integers times factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil, sqrt

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from calibration import super_blocks
from calibration.base import SolverOptions
from calibration.blocks import FLOAT32_TINY, SLAB, round_nonzero
from calibration.blocks import Blocks as Blocks
from calibration.blocks import nearest as nearest
from calibration.blocks import round_to as round_to
from calibration.blocks import tensor_of as tensor_of
from lilliput.grid import Float, GridSpec


class SearchOptions(SolverOptions):
    """Options of every solver that searches scales. `candidates` 1 with `refine` 0 is plain max-abs rounding."""

    candidates: int = Field(default=24, ge=1)
    low: float = Field(default=0.65, gt=0)
    high: float = Field(default=1.2, gt=0)
    refine: int = Field(default=2, ge=0)  # least-squares steps after the search
    negative_scales: bool | None = None  # None: where every format that holds the grid takes them


def find_blocks(weight: Float, spec: GridSpec, importance: Float | None, options: SearchOptions) -> Blocks:
    """The best blocks of weight (rows, cols), s and o (rows, n_blocks) float32; importance (cols,) or none."""
    cols, wide = weight.shape[1], spec.super_blocks
    width = spec.width(cols)
    n_blocks = spec.supers(cols) * (wide.cols // width) if wide else spec.blocks(cols)
    padding = n_blocks * width - cols
    h = torch.ones(cols) if importance is None else torch.from_numpy(importance).clamp(min=0)
    h = pad(h, (0, padding)).reshape(n_blocks, width)
    found = [
        _search(Weighted.of(pad(slab, (0, padding)).reshape(-1, n_blocks, width), h), spec, options)
        for slab in torch.split(torch.from_numpy(weight), max(1, SLAB // (n_blocks * width)))
    ]
    kept = spec.blocks(cols)
    supers = torch.cat([b.supers for b in found if b.supers is not None]) if wide else None
    s, o = (torch.cat([getattr(b, part) for b in found])[:, :kept].contiguous() for part in "so")
    return Blocks(spec, s, o, supers)


def _negative(spec: GridSpec, options: SearchOptions) -> bool:
    """Whether to try negative scales."""
    if options.negative_scales is not None:
        return options.negative_scales
    of_gguf = spec.super_blocks is not None or spec.codebook is not None
    return of_gguf or (spec.scale_dtype == "float16" and spec.block_size > 0)


@dataclass(frozen=True)
class Weighted:
    """Weights w (rows, n_blocks, width) with importance h (n_blocks, width), and what every trial needs of them."""

    w: Tensor
    h: Tensor
    total: Tensor  # (n_blocks,): Σ h
    mean: Tensor  # (rows, n_blocks): Σ hw / Σ h
    hw: Tensor  # h * w
    hc: Tensor  # h * (w - mean)

    @staticmethod
    def of(w: Tensor, h: Tensor) -> Weighted:
        hw, total = h * w, h.sum(-1).clamp(min=FLOAT32_TINY)
        mean = hw.sum(-1) / total
        return Weighted(w, h, total, mean, hw, hw - h * mean.unsqueeze(-1))


def _search(x: Weighted, spec: GridSpec, options: SearchOptions) -> Blocks:
    """Best blocks: the whole range's, the best trial's after least squares, and those that follow from its codes."""
    trials = _candidates(x, spec, options)
    best = next(trials)
    least, q = _error(x, best)
    found, most = _fit(x, q, best)
    for trial in trials:
        fitted, gain = _fit(x, trial.spread().codes(x.w), trial)
        wins = gain > most
        found, most = _where(wins, fitted, found), torch.where(wins, gain, most)
    for _ in range(options.refine + (options.candidates > 1)):
        error, codes = _error(x, found)
        wins = error < least
        best, least = _where(wins, found, best), torch.where(wins, error, least)
        q = torch.where(wins.unsqueeze(-1), codes, q)
        found, _ = _fit(x, q, best)
    return super_blocks.find(x.w, x.h, best, options.refine) if spec.super_blocks else best


def _where(wins: Tensor, mine: Blocks, other: Blocks) -> Blocks:
    return Blocks(mine.spec, torch.where(wins, mine.s, other.s), torch.where(wins, mine.o, other.o))


def _error(x: Weighted, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Weighted squared error of each block (rows, n_blocks), and the codes."""
    wide = blocks.spread()
    q = wide.codes(x.w)
    return wide.values(q).sub_(x.w).square_().mul_(x.h).sum(-1), q


def _candidates(x: Weighted, spec: GridSpec, options: SearchOptions) -> Iterator[Blocks]:
    """Trials in a fixed order, that of the whole range first."""
    if spec.symmetric:
        base, zero = x.w.abs().amax(-1) / spec.qmax, torch.zeros_like(x.mean)
        signs = (1.0, -1.0) if _negative(spec, options) else (1.0,)
        ratios = [1.0, *_span(options, options.candidates - 1)]
        yield from (Blocks(spec, _scale(base * (r * sign), spec), zero) for r in ratios for sign in signs)
        return
    span = _span(options, 1 + ceil(sqrt(options.candidates))) if options.candidates > 1 else []
    least, most = x.w.amin(-1) - x.mean, x.w.amax(-1) - x.mean
    for r_low, r_high in [(1.0, 1.0), *product(span, span)]:
        low, high = x.mean + least * r_low, x.mean + most * r_high
        if spec.offset == "zero_point" or spec.super_blocks:
            low, high = low.clamp(max=0), high.clamp(min=0)
        s = _scale((high - low) / spec.qmax, spec)
        yield Blocks(spec, s, _offset(-low / s if spec.offset == "zero_point" else low, spec))


def _span(options: SearchOptions, count: int) -> list[float]:
    return [float(r) for r in np.linspace(options.low, options.high, count)] if count > 0 else []


def _fit(x: Weighted, q: Tensor, trial: Blocks) -> tuple[Blocks, Tensor]:
    """The scale (and minimum) of least error for codes q, as the grid holds them; by how much they lower the error.

    The error Σ h (w - s·b)², b = code (- zero_point), is least at s = top / bottom, top = Σ hbw, bottom = Σ hb²,
    and lower than without b by s·(2·top - s·bottom). With a minimum o the same holds of b and w less their means,
    the best o is the mean of w - s·b, and another costs Σh times the square of how far it is off.
    """
    spec = trial.spec
    if spec.offset != "minimum":
        return _fit_scale(x, q - trial.o.unsqueeze(-1) if spec.offset == "zero_point" else q, trial)
    hq = q * x.h
    total = hq.sum(-1)
    mean = total / x.total
    s, gain = _divide((q * x.hc).sum(-1), hq.mul_(q).sum(-1) - total * mean, trial)
    best = x.mean - s * mean
    o = _offset(best, spec)
    gain -= x.total * (o - best).square()
    if spec.super_blocks and (above := best > 0).any():  # without a minimum, another scale is better
        other, other_gain = _fit_scale(x, q, trial)
        s = torch.where(above, other.s, s)
        gain = torch.where(above, other_gain - x.total * x.mean.square(), gain)
    return Blocks(spec, s, o), gain


def _fit_scale(x: Weighted, b: Tensor, trial: Blocks) -> tuple[Blocks, Tensor]:
    """`_fit` of the scale alone."""
    s, gain = _divide((b * x.hw).sum(-1), (b.square() * x.h).sum(-1), trial)
    return Blocks(trial.spec, s, trial.o), gain


def _divide(top: Tensor, bottom: Tensor, trial: Blocks) -> tuple[Tensor, Tensor]:
    """The scale top / bottom where that is usable and of the trial's sign, else the trial's; what it gains."""
    ratio = top / bottom
    s = _scale(torch.where(ratio.isfinite() & (ratio * trial.s > 0), ratio, trial.s), trial.spec)
    return s, s * (2 * top - s * bottom)


def _scale(x: Tensor, spec: GridSpec) -> Tensor:
    """A scale that the grid holds, not 0 where it has a code 0; one of a super-block is rounded only later."""
    held = torch.where(x == 0, torch.ones_like(x), x) if spec.super_blocks else round_nonzero(x, spec)
    return held.masked_fill(x == 0, 0) if spec.codebook else held


def _offset(x: Tensor, spec: GridSpec) -> Tensor:
    """A zero point or minimum that the grid holds; a super-block's is rounded only later, and never positive."""
    if spec.offset == "zero_point":
        return x.round().clamp_(0, spec.qmax)
    if spec.offset == "none":
        return x
    return x.clamp(max=0) if spec.super_blocks else round_to(x, spec)
