"""Super-blocks: scales and minima of blocks as small integers times factors that 256 columns share.

Given the codes q, the weighted error of a block is a quadratic of its scale s and minimum o,

    E(s, o) = Σ h (w - s·q - o)² = s² Σhq² + 2so Σhq + o² Σh - 2s Σhqw - 2o Σhw + Σhw²

so that trials of a super-block's factors d and dmin (s = d·sc, o = -dmin·m) cost sums over blocks, not over
weights. `find` starts from free scales and minima, and then `1 + rounds` times

1. tries factors: `RATIOS` around those that give the largest scale (and minimum) the largest integer. For each,
   integers are the nearest to the best scale for the minimum, and to the best minimum for that scale;
2. solves the factors for these integers by least squares, rounded to float16;
3. rounds the weights to codes anew.

A super-block keeps the round with the least error of rounded weights. d may be negative where integers are signed
(one has a range from -32 to 31); dmin is positive. An integer scale is not 0, as calibration.blocks says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from calibration.blocks import Blocks, round_nonzero, round_to
from lilliput.grid import GridSpec

RATIOS = (1.0, 0.7, 0.76, 0.82, 0.88, 0.94, 1.06, 1.12, 1.2)


@dataclass(frozen=True)
class Factors:
    """d and dmin of super-blocks (rows, n_supers, 1), the integers of their blocks (rows, n_supers, blocks)."""

    spec: GridSpec
    d: Tensor
    sc: Tensor
    dmin: Tensor
    m: Tensor

    @property
    def s(self) -> Tensor:
        return self.d * self.sc

    @property
    def o(self) -> Tensor:
        return -(self.dmin * self.m)

    def blocks(self) -> Blocks:
        """As (rows, n_blocks)."""
        supers = self.d if self.spec.symmetric else torch.cat([self.d, self.dmin], dim=-1)
        return Blocks(self.spec, self.s.flatten(1), self.o.flatten(1), supers)

    def where(self, wins: Tensor, other: Factors) -> Factors:
        """Super-blocks of `self` where wins (rows, n_supers), else of `other`."""
        wide = wins.unsqueeze(-1)
        return Factors(
            self.spec,
            torch.where(wide, self.d, other.d),
            torch.where(wide, self.sc, other.sc),
            torch.where(wide, self.dmin, other.dmin),
            torch.where(wide, self.m, other.m),
        )


@dataclass(frozen=True)
class Sums:
    """Sums over each block's weights, (rows, n_supers, blocks): the coefficients of its quadratic."""

    hqq: Tensor
    hq: Tensor
    h: Tensor
    hqw: Tensor
    hw: Tensor

    def error(self, s: Tensor, o: Tensor) -> Tensor:
        """Of each super-block (rows, n_supers), less the constant."""
        return (s * (s * self.hqq + 2 * (o * self.hq - self.hqw)) + o * (o * self.h - 2 * self.hw)).sum(-1)


def find(w: Tensor, h: Tensor, free: Blocks, rounds: int) -> Blocks:
    """Blocks on the grid for w (rows, n_blocks, width) with importance h (n_blocks, width), near to the free ones."""
    h = h + max(1e-6 * float(h.mean()), 1e-30)  # an input that is always zero still has a nearest code
    empty = w.abs().amax(-1) == 0
    blocks = replace(free, s=free.s.masked_fill(empty, 0), o=free.o.masked_fill(empty, 0))
    q = free.spread().codes(w)
    best, least = None, torch.empty(0)
    for _ in range(1 + rounds):
        factors = _factors(_sums(w, h, q, blocks), blocks)
        blocks = factors.blocks()
        wide = blocks.spread()
        q = wide.codes(w)
        error = wide.values(q).sub_(w).square_().mul_(h).sum(-1).view(factors.sc.shape).sum(-1)
        if best is None:
            best, least = factors, error
        else:
            best, least = factors.where(error < least, best), torch.minimum(error, least)
    assert best is not None
    return _neighbours(w, h, best).blocks()


def _neighbours(w: Tensor, h: Tensor, factors: Factors) -> Factors:
    """Of each block's integers and their neighbours, those with the least error of rounded weights."""
    limits, best = factors.spec.super_blocks, factors
    assert limits
    least = _error(w, h, factors)
    for dsc, dm in product((0, -1, 1), (0,) if factors.spec.symmetric else (0, -1, 1)):
        sc = _integer_scale(factors.sc + dsc, factors.spec)
        trial = replace(factors, sc=sc, m=(factors.m + dm).clamp_(0, limits.high))
        error = _error(w, h, trial)
        wins = error < least
        best = replace(best, sc=torch.where(wins, trial.sc, best.sc), m=torch.where(wins, trial.m, best.m))
        least = torch.minimum(error, least)
    return best


def _error(w: Tensor, h: Tensor, factors: Factors) -> Tensor:
    """Of rounded weights, (rows, n_supers, blocks)."""
    wide = factors.blocks().spread()
    return wide.values(wide.codes(w)).sub_(w).square_().mul_(h).sum(-1).view(factors.sc.shape)


def _sums(w: Tensor, h: Tensor, q: Tensor, blocks: Blocks) -> Sums:
    limits = blocks.spec.super_blocks
    assert limits
    shape = (len(w), -1, limits.cols // blocks.spec.block_size)
    hq = h * q
    hqq, hqw = (hq * q).sum(-1).view(shape), (hq * w).sum(-1).view(shape)
    if blocks.spec.symmetric:
        zero = torch.zeros(())
        return Sums(hqq, zero, zero, hqw, zero)
    return Sums(hqq, hq.sum(-1).view(shape), h.sum(-1).view(1, *shape[1:]), hqw, (h * w).sum(-1).view(shape))


def _factors(sums: Sums, blocks: Blocks) -> Factors:
    """The best of all trials for these codes, its factors solved by least squares."""
    s, o = blocks.s.view(sums.hqq.shape), blocks.o.view(sums.hqq.shape)
    best, least = None, torch.empty(0)
    for d, dmin in _trials(s, o, blocks.spec):
        factors = _integers(sums, d, dmin, s, o, blocks.spec)
        error = sums.error(factors.s, factors.o)
        if best is None:
            best, least = factors, error
        else:
            best, least = factors.where(error < least, best), torch.minimum(error, least)
    assert best is not None
    solved = _least_squares(sums, best)
    return solved.where(sums.error(solved.s, solved.o) < least, best)


def _trials(s: Tensor, o: Tensor, spec: GridSpec) -> Iterator[tuple[Tensor, Tensor]]:
    """d and dmin (rows, n_supers, 1) of each trial."""
    limits = spec.super_blocks
    assert limits
    largest = s.gather(-1, s.abs().argmax(-1, keepdim=True))
    for r in RATIOS:
        for sign in (1, -1) if limits.low < 0 else (1,):
            d = round_nonzero(largest * (sign * r / limits.high), spec)
            if spec.symmetric:
                yield d, torch.zeros_like(d)
            else:
                deepest = -o.amin(-1, keepdim=True) / limits.high
                yield from ((d, round_nonzero(deepest * ratio, spec)) for ratio in RATIOS)


def _integers(sums: Sums, d: Tensor, dmin: Tensor, s: Tensor, o: Tensor, spec: GridSpec) -> Factors:
    """The integers for factors: scales for the minima o, minima for those scales, scales for those minima."""
    limits = spec.super_blocks
    assert limits
    if spec.symmetric:
        return Factors(spec, d, _integer_scale(_or(sums.hqw / sums.hqq, s) / d, spec), dmin, torch.zeros_like(s))
    sc = _integer_scale(_or((sums.hqw - o * sums.hq) / sums.hqq, s) / d, spec)
    m = ((d * sc * sums.hq - sums.hw) / (sums.h * dmin)).round_().clamp_(0, limits.high)
    sc = _integer_scale(_or((sums.hqw + dmin * m * sums.hq) / sums.hqq, s) / d, spec)
    return Factors(spec, d, sc, dmin, m)


def _or(x: Tensor, fallback: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, fallback)


def _integer_scale(x: Tensor, spec: GridSpec) -> Tensor:
    """Nearest integers in range, but 0 only where no code is."""
    limits = spec.super_blocks
    assert limits
    rounded = x.round().clamp_(limits.low, limits.high)
    if spec.codebook:
        return rounded
    away = torch.where(x < 0, max(limits.low, -1), 1) if limits.low < 0 else torch.ones_like(x)
    return torch.where(rounded == 0, away.to(x.dtype), rounded)


def _least_squares(sums: Sums, factors: Factors) -> Factors:
    """d (and dmin) of the least error for the integers and codes, rounded to float16; else those that were."""
    sc, m, spec = factors.sc, factors.m, factors.spec

    def total(x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)

    dd, dw = total(sc * sc * sums.hqq), total(sc * sums.hqw)
    if spec.symmetric:
        d, dmin = dw / dd, factors.dmin
    else:  # [dd, -dm; -dm, mm] [d; dmin] = [dw; -mw]
        dm, mm, mw = total(sc * m * sums.hq), total(m * m * sums.h), total(m * sums.hw)
        bottom = dd * mm - dm * dm
        d, dmin = (dw * mm - mw * dm) / bottom, (dw * dm - mw * dd) / bottom
    d, dmin = (
        round_to(torch.where(x.isfinite() & (x * old > 0), x, old), spec)
        for x, old in ((d, factors.d), (dmin, factors.dmin))
    )
    d, dmin = torch.where(d == 0, factors.d, d), torch.where(dmin == 0, factors.dmin, dmin)
    return replace(factors, d=d, dmin=dmin)
