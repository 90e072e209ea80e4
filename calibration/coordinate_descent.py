"""Coordinate descent on a solved matrix: what one greedy pass over the columns leaves on the table.

With V the values of the codes and H the (damped) second moments of the input, minimise

    L(V) = tr((V - W) H (V - W)ᵀ)         G = H (V - W)ᵀ is half its gradient

one unknown at a time, all others fixed; L never rises. A round has two parts:

- scales: L is a parabola along the scale of a block (and along its minimum), with basis b = code,
  code - zero_point or 1: the step is -(G·b) / (bᵀ H b), rounded to the grid's scale dtype, taken where L falls.
- codes: L is a parabola along one weight: the best code is the one nearest to v_j - G_j / H_jj.

(QuantEase, Behdin et al. 2023, arXiv:2309.01885, and CDQuant, Nair and Suggala 2024, arXiv:2406.17542, descend on
codes; the scales are ours.) Layout as in calibration.gptq: matrices are transposed, (cols, rows). Changes are
applied at once within a panel of PANEL columns, to the columns after it by one product a panel; columns before it
are only asked again in the next round, which computes G anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from calibration.scale_search import Blocks, round_to

PANEL = 64  # columns


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
    for _ in range(rounds):
        solution = _refit(w, h, solution, "s")
        if solution.blocks.spec.offset == "minimum":
            solution = _refit(w, h, solution, "o")
        solution = _sweep(w, h, solution)
    return solution


def _refit(w: Tensor, h: Tensor, solution: Solution, part: Literal["s", "o"]) -> Solution:
    """The best scales (or minima) for the codes, block by block."""
    spec, blocks = solution.blocks.spec, solution.blocks
    gradient = h @ (solution.values() - w)
    parts = getattr(blocks, part).clone()
    for b in range(len(parts)):
        columns = solution.columns(b)
        q = solution.q[columns]
        basis = torch.ones_like(q) if part == "o" else q - blocks.o[b] if spec.offset == "zero_point" else q
        slope, curve = (gradient[columns] * basis).sum(0), (h[columns, columns] @ basis).mul_(basis).sum(0)
        wanted = round_to(parts[b] - slope / curve, spec)
        step = torch.where(wanted.isfinite(), wanted, parts[b]) - parts[b]
        keeps_sign = (parts[b] + step) * parts[b] > 0 if part == "s" else torch.tensor(True)
        step = torch.where(keeps_sign & (step * (2 * slope + step * curve) < 0), step, torch.zeros_like(step))
        parts[b] += step
        gradient.addmm_(h[:, columns], basis * step)
    return replace(solution, blocks=replace(blocks, **{part: parts}))


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
