"""Coordinate descent on a solved matrix: what one greedy pass over the columns leaves on the table.

With V the values of the codes and H the (damped) second moments of the input, minimise

    L(V) = tr((V - W) H (V - W)ᵀ)         G = H (V - W)ᵀ is half its gradient

one unknown at a time, all others fixed; L never rises. A round has two parts:

- scales: L is a parabola along the scale of a block (and along its minimum), with basis b = code,
  code - zero_point or 1: the step is -(G·b) / (bᵀ H b), rounded to the grid's scale dtype, taken where L falls.
  In super-blocks it is rounded to the integers, and then the same is done for d, with basis sc·code, and for dmin,
  with basis -m.
- codes: L is a parabola along one weight: the best code is the one nearest to v_j - G_j / H_jj.

(QuantEase, Behdin et al. 2023, arXiv:2309.01885, and CDQuant, Nair and Suggala 2024, arXiv:2406.17542, descend on
codes; the scales are ours.) Layout as in calibration.gptq: matrices are transposed, (cols, rows). Changes are
applied at once within a panel of PANEL columns, to the columns after it by one product a panel; columns before it
are only asked again in the next round. G is computed anew for each round and after its scales' part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from calibration.blocks import Blocks, round_to
from lilliput.grid import GridSpec

PANEL = 64  # columns
Part = Literal["s", "o"]  # of blocks: scales, or minima


@dataclass(frozen=True, eq=False)
class Solution:
    """Codes q (cols, rows) as float32, and blocks of s and o (n_blocks, rows)."""

    q: Tensor
    blocks: Blocks

    def columns(self, block: int) -> slice:
        width = self.blocks.spec.width(len(self.q))
        return slice(block * width, min((block + 1) * width, len(self.q)))

    def values(self) -> Tensor:
        """(cols, rows) float32."""
        grids = (self.blocks.at(b).values(self.q[self.columns(b)]) for b in range(len(self.blocks.s)))
        return torch.cat(list(grids))


def descend(w: Tensor, h: Tensor, solution: Solution, rounds: int) -> Solution:
    """Better codes and scales for w (cols, rows) under h (cols, cols) float32, positive definite."""
    parts: tuple[Part, ...] = ("s", "o") if solution.blocks.spec.offset == "minimum" else ("s",)
    for _ in range(rounds):
        gradient = h @ (solution.values() - w)
        for part in parts:
            solution = _refit(h, gradient, solution, part)
            if solution.blocks.supers is not None:
                solution = _refit_factors(h, gradient, solution, part)
        solution = _sweep(w, h, solution)
    return solution


def _refit(h: Tensor, gradient: Tensor, solution: Solution, part: Part) -> Solution:
    """The best scales (or minima) for the codes, block by block; keeps the gradient (cols, rows)."""
    spec, blocks = solution.blocks.spec, solution.blocks
    parts = getattr(blocks, part).clone()
    for b in range(len(parts)):
        columns = solution.columns(b)
        q = solution.q[columns]
        basis = torch.ones_like(q) if part == "o" else q - blocks.o[b] if spec.offset == "zero_point" else q
        factor = None if blocks.supers is None else _factor(solution, b, part)
        held = partial(_held, spec, part, factor)
        parts[b] = Unknown(parts[b], columns, basis, held, keeps_sign=part == "s").minimum(h, gradient)
    return replace(solution, blocks=replace(blocks, **{part: parts}))


def _factor(solution: Solution, block: int, part: Part) -> Tensor:
    """What a block's integers are multiplied with, (rows,): d, or -dmin."""
    spec, supers = solution.blocks.spec, solution.blocks.supers
    assert spec.super_blocks
    assert supers is not None
    own = supers[block * spec.block_size // spec.super_blocks.cols]
    return own[:, 0] if part == "s" else -own[:, 1]


def _held(spec: GridSpec, part: Part, factor: Tensor | None, x: Tensor) -> Tensor:
    """The number nearest to x (rows,) that the grid holds."""
    if factor is None:
        return round_to(x, spec)
    assert spec.super_blocks
    return factor * (x / factor).round_().clamp_(spec.super_blocks.low if part == "s" else 0, spec.super_blocks.high)


def _refit_factors(h: Tensor, gradient: Tensor, solution: Solution, part: Part) -> Solution:
    """The best d (or dmin) for codes and integers, super-block by super-block; keeps the gradient."""
    blocks, spec = solution.blocks, solution.blocks.spec
    assert spec.super_blocks
    assert blocks.supers is not None
    supers, parts, width = blocks.supers.clone(), getattr(blocks, part).clone(), spec.block_size
    each, index = spec.super_blocks.cols // width, 0 if part == "s" else 1
    for b in range(len(supers)):
        own = slice(b * each, min((b + 1) * each, len(parts)))
        columns = slice(b * spec.super_blocks.cols, min((b + 1) * spec.super_blocks.cols, len(solution.q)))
        old = supers[b, :, index]
        integers = parts[own] / old  # of sign - where they are minima's
        basis = integers.repeat_interleave(width, dim=0)[: columns.stop - columns.start]
        if part == "s":
            basis = basis * solution.q[columns]
        new = Unknown(old, columns, basis, partial(round_to, spec=spec), keeps_sign=True).minimum(h, gradient)
        supers[b, :, index], parts[own] = new, integers * new
    return replace(solution, blocks=replace(blocks, supers=supers, **{part: parts}))


@dataclass(frozen=True)
class Unknown:
    """One number for each row (rows,): the values of `columns` are x * basis + what does not depend on it."""

    x: Tensor
    columns: slice
    basis: Tensor  # (columns, rows)
    held: Callable[[Tensor], Tensor]  # the nearest number that the grid holds
    keeps_sign: bool

    def minimum(self, h: Tensor, gradient: Tensor) -> Tensor:
        """The held number that lowers the loss most, x where none does; the gradient is changed accordingly."""
        slope = (gradient[self.columns] * self.basis).sum(0)
        curve = (h[self.columns, self.columns] @ self.basis).mul_(self.basis).sum(0)
        wanted = self.held(self.x - slope / curve)
        step = wanted - self.x
        better = wanted.isfinite() & (step * (2 * slope + step * curve) < 0)
        if self.keeps_sign:
            better &= wanted * self.x > 0
        gradient.addmm_(h[:, self.columns], self.basis * step.where(better, torch.zeros(())))
        return torch.where(better, wanted, self.x)


def _sweep(w: Tensor, h: Tensor, solution: Solution) -> Solution:
    """The best code of every weight, column by column."""
    v, q = solution.values(), solution.q.clone()
    gradient, width = h @ (v - w), solution.blocks.spec.width(len(w))
    steps = torch.empty(PANEL, w.shape[1])
    for start in range(0, len(w), PANEL):
        panel = slice(start, min(start + PANEL, len(w)))
        inner, slope = h[panel, panel], gradient[panel]
        for j in range(panel.stop - start):
            column = start + j
            grid = solution.blocks.at(column // width)
            q[column] = grid.codes(v[column] - slope[j] / inner[j, j])
            steps[j] = grid.values(q[column]) - v[column]
            slope[j + 1 :].addr_(inner[j, j + 1 :], steps[j])
        gradient[panel.stop :].addmm_(h[panel.stop :, panel], steps[: panel.stop - start])
    return replace(solution, q=q)
