"""Fake quantization: a matrix in training whose forward values are exactly those that ship.

What is trained is not the weight but its place on the grid, in units that mean the same on every grid:

    position  u  (rows, cols)       in steps:     code q = clamp(round(u), qmin, qmax)
    stretch   t  (rows, n_blocks)   logarithmic:  scale s = round_scale(s₀ · exp(t)), s₀ the solved scale
    shift     v  (rows, n_blocks)   in steps:     minimum m = round_scale(m₀ + s₀ · v), only on "minimum" grids

so that a learning rate of 0.01 is a hundredth of a step, or one per cent of a scale, at 2 bits as at 8. The value is
lilliput.grid's own formula in float32, on scales that are rounded before: it equals the dequantized weight bit for bit.

Rounding has no gradient: it passes straight through (Bengio et al. 2013, arXiv:1308.3432). With g the gradient by the
values, and d = q, or q − z where the grid has zero points:

    ∂L/∂u = g · s          ∂L/∂t = s · Σ_block g · d          ∂L/∂v = s₀ · Σ_block g

∂L/∂t is the step size gradient of LSQ (Esser et al. 2019, arXiv:1902.08153) where the position, not the weight, is
held: a scale that moves changes no code. Zero points, and the scales of super-blocks (lilliput.grid: products of
integers and a shared factor), stay as they were solved: a step of one moves a whole block. Codebooks are refused. No
gradient is cut where u leaves the grid; u is put back on its edge after each step (`project`), so that no weight is
stuck there.

A position starts in the middle of its solved code's cell. Leaving it takes gradients that agree over many steps: noise,
which a step of Adam makes as large as a signal, does not change codes that a solver chose together.

torchao's fake quantizers (torchao.quantization.qat, 0.18) do not fit: their scale is derived anew from each step's
largest weight, or learned without rounding to the dtype that ships (`range_learning`); they know neither "bf16_f16" nor
float minima. A test holds our values against theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from calibration.blocks import FLOAT32_TINY
from lilliput.errors import CalibrationError
from lilliput.grid import FLOAT16_MAX, FLOAT16_TINY, GridSpec, QuantizedTensor, ScaleDtype

BFLOAT16_MAX = 65280.0  # the largest number that bfloat16 and float16 both hold
ALL = frozenset("utv")
EDGE = 0.49  # of a step: how far a position may lie outside the outermost codes


class FakeQuant:
    """A matrix in training. `parameters` are the tensors that an optimizer may move, by the names above."""

    def __init__(self, solved: QuantizedTensor, device: str = "cpu") -> None:
        """Start at `solved`."""
        if solved.spec.codebook:
            raise CalibrationError(
                f"{solved.spec.name} cannot be trained: its codes are no even steps; use another grid"
            )
        self.spec: GridSpec = solved.spec
        self.supers = solved.supers
        self.width, self.cols = solved.spec.width(solved.shape[1]), solved.shape[1]
        codes = torch.from_numpy(solved.codes).to(device, torch.float32)
        self.base = torch.from_numpy(solved.scales).to(device)  # s₀
        offsets = None if solved.offsets is None else torch.from_numpy(solved.offsets).to(device)
        self.zero_points = offsets.float() if offsets is not None and self.spec.offset == "zero_point" else None
        self.minima = offsets if self.spec.offset == "minimum" else None  # m₀
        self.parameters: dict[str, Tensor] = {"u": codes}
        if self.spec.super_blocks is None:
            self.parameters["t"] = torch.zeros_like(self.base)
        if self.minima is not None and self.spec.super_blocks is None:
            self.parameters["v"] = torch.zeros_like(self.base)

    def _spread(self, per_block: Tensor) -> Tensor:
        """(rows, n_blocks) over the columns: (rows, cols)."""
        return per_block.repeat_interleave(self.width, dim=1)[:, : self.cols]

    def _block_sums(self, x: Tensor) -> Tensor:
        """(rows, cols) → (rows, n_blocks); the last block may be short."""
        padding = self.base.shape[1] * self.width - self.cols
        return F.pad(x, (0, padding)).reshape(len(x), -1, self.width).sum(-1)

    def codes(self) -> Tensor:
        """(rows, cols) float32, whole numbers."""
        return self.parameters["u"].round().clamp_(self.spec.qmin, self.spec.qmax)

    def scales(self) -> Tensor:
        """(rows, n_blocks) float32, on the grid's dtype; never zero, and of the solved sign."""
        tiny = FLOAT32_TINY if self.spec.scale_dtype == "float32" else FLOAT16_TINY
        if "t" not in self.parameters:
            return self.base
        exact = self.base * self.parameters["t"].exp()
        rounded = round_scale(exact, self.spec.scale_dtype)
        return torch.where(rounded.abs() < tiny, torch.copysign(torch.full_like(exact, tiny), self.base), rounded)

    def minimum(self) -> Tensor | None:
        """(rows, n_blocks) float32, on the grid's dtype."""
        if self.minima is None or "v" not in self.parameters:
            return self.minima
        return round_scale(self.minima + self.base * self.parameters["v"], self.spec.scale_dtype)

    def values(self) -> Tensor:
        """(rows, cols) float32: what the codes, scales and offsets stand for."""
        codes, scales, minimum = self.codes(), self._spread(self.scales()), self.minimum()
        if self.zero_points is not None:
            codes -= self._spread(self.zero_points)
        codes *= scales
        return codes if minimum is None else codes.add_(self._spread(minimum))

    def gradients(self, gradient: Tensor, kinds: frozenset[str] = ALL) -> dict[str, Tensor]:
        """From the gradient by the values (rows, cols), those by the parameters of these kinds."""
        scales, found = self.scales(), {}
        if "u" in kinds:
            found["u"] = gradient * self._spread(scales)
        if "t" in kinds and "t" in self.parameters:
            steps = self.codes()
            if self.zero_points is not None:
                steps -= self._spread(self.zero_points)
            found["t"] = self._block_sums(steps.mul_(gradient)).mul_(scales)
        if "v" in kinds and "v" in self.parameters:
            found["v"] = self._block_sums(gradient).mul_(self.base)
        return found

    def project(self) -> None:
        """Put positions that left the grid back on its edge."""
        self.parameters["u"].clamp_(self.spec.qmin - EDGE, self.spec.qmax + EDGE)

    def tensor(self) -> QuantizedTensor:
        """The codes, scales and offsets of now."""
        spec, minimum = self.spec, self.minimum()
        codes = self.codes().to(torch.int8 if spec.symmetric else torch.uint8).cpu().numpy()
        offsets = None if minimum is None else minimum.cpu().numpy()
        if self.zero_points is not None:
            offsets = self.zero_points.to(torch.uint8).cpu().numpy()
        return QuantizedTensor(spec, codes, self.scales().cpu().numpy(), offsets, self.supers)


def round_scale(x: Tensor, dtype: ScaleDtype) -> Tensor:
    """lilliput.grid.round_scale on tensors: the nearest number that the dtype holds, as float32; saturates."""
    if dtype == "float32":
        return x
    half = x.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float()
    return half if dtype == "float16" else half.clamp(-BFLOAT16_MAX, BFLOAT16_MAX).bfloat16().float()
