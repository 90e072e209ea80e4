"""HQQ: Half-Quadratic Quantization (Badri and Shaji, Mobius Labs, November 2023), which needs no data.

Squared error lets a few outliers of a block pull its scale and offset. HQQ minimises a norm that forgives them,

    min  Σ |w - v|^p        p < 1,  v the values of the nearest codes

by half-quadratic splitting: an auxiliary e takes what is meant to stay error, and each half has a closed form. With the
step as the unit, d = (w - v) / s:

    e ← sign(d) max(0, |d| - |d|^(p-1) / beta)       the generalised soft threshold: only large errors pass
    offset, scale ← least squares of w - s e for the codes, rounded to what the grid stores
    beta ← kappa beta

Their code keeps the scale and moves a zero point in float; here zero points are integers and minima are stored, so the
offset is rounded, and the scale (all there is on a symmetric grid) is fitted too. A block keeps the best of all steps
by Σ |w - v|^p, the searched scale of calibration.scale_search, where it begins, included.

beta is in units of the step, so that a weight's size does not matter. Cost: `steps` roundings of the matrix.
Grids with super-blocks or codebooks are refused: their scales are not free.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from calibration.base import InputStatistics, SolverOptions
from calibration.blocks import SLAB, Blocks, nearest, round_nonzero, round_to
from calibration.scale_search import SearchOptions, find_blocks
from lilliput.errors import CalibrationError
from lilliput.grid import Float, GridSpec, QuantizedTensor


class Options(SearchOptions):
    norm: float = Field(default=0.7, gt=0, le=1)  # p
    beta: float = Field(default=10.0, gt=0)
    kappa: float = Field(default=1.01, ge=1)
    steps: int = Field(default=20, ge=0)


class Solver:
    Options: ClassVar[type[SolverOptions]] = Options
    needs_statistics: ClassVar[bool] = False

    def solve(
        self, weight: Float, spec: GridSpec, statistics: InputStatistics | None, options: SolverOptions
    ) -> QuantizedTensor:
        """(rows, cols) float32 → a tensor on `spec`; statistics are not looked at."""
        assert isinstance(options, Options)
        if spec.super_blocks or spec.codebook:
            raise CalibrationError(f"solver hqq chooses free scales, grid {spec.name} has none: use rtn or gptq")
        start = find_blocks(weight, spec, None, options)
        width, n_blocks = spec.width(weight.shape[1]), spec.blocks(weight.shape[1])
        padded = pad(torch.from_numpy(weight), (0, n_blocks * width - weight.shape[1])).reshape(-1, n_blocks, width)
        real = pad(torch.ones(weight.shape[1]), (0, n_blocks * width - weight.shape[1])).reshape(n_blocks, width)
        rows = max(1, SLAB // (n_blocks * width))
        parts = zip(*(torch.split(t, rows) for t in (padded, start.s, start.o)), strict=True)
        found = [_descend(w, real, Blocks(spec, s, o), options) for w, s, o in parts]
        return nearest(weight, Blocks(spec, torch.cat([b.s for b in found]), torch.cat([b.o for b in found])))


def _descend(w: Tensor, real: Tensor, blocks: Blocks, options: Options) -> Blocks:
    """The best blocks (rows, n_blocks) on the way, for w (rows, n_blocks, width); `real` is 0 where w is padding."""
    best, beta = blocks, options.beta
    q, least = _measure(w, real, blocks, options.norm)
    for _ in range(options.steps):
        step = blocks.spread()
        d = (w - step.values(q)) / step.s
        e = d.sign() * (d.abs() - d.abs().pow(options.norm - 1) / beta).clamp_(min=0)
        blocks = _fit(w - step.s * torch.where(d == 0, d, e), real, q, blocks)
        q, error = _measure(w, real, blocks, options.norm)
        wins = error < least
        best = Blocks(best.spec, torch.where(wins, blocks.s, best.s), torch.where(wins, blocks.o, best.o))
        least, beta = torch.where(wins, error, least), beta * options.kappa
    return best


def _measure(w: Tensor, real: Tensor, blocks: Blocks, norm: float) -> tuple[Tensor, Tensor]:
    """Nearest codes, and Σ |w - v|^p of each block."""
    wide = blocks.spread()
    q = wide.codes(w)
    return q, (w - wide.values(q)).abs_().pow_(norm).mul_(real).sum(-1)


def _fit(target: Tensor, real: Tensor, q: Tensor, blocks: Blocks) -> Blocks:
    """Offset and scale of least squares for codes q, one after the other; as they were where that is unusable."""
    spec, s, o = blocks.spec, blocks.s, blocks.o
    count = real.sum(-1)
    if spec.offset == "zero_point":
        o = ((q - target / s.unsqueeze(-1)) * real).sum(-1).div(count).round_().clamp_(0, spec.qmax)
    elif spec.offset == "minimum":
        o = round_to(((target - q * s.unsqueeze(-1)) * real).sum(-1) / count, spec)
    base = (q - o.unsqueeze(-1) if spec.offset == "zero_point" else q) * real
    goal = target - o.unsqueeze(-1) if spec.offset == "minimum" else target
    wanted = (base * goal).sum(-1) / base.square().sum(-1)
    usable = wanted.isfinite() & (wanted * s > 0)
    return Blocks(spec, torch.where(usable, round_nonzero(torch.where(usable, wanted, s), spec), s), o)
