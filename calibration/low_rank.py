"""A frozen matrix with a low-rank adapter in training: W = base + (alpha / rank) · B A, A (rank, cols), B (rows, rank).

(Hu et al. 2021, arXiv:2106.09685.) A starts random and B at zero, so training starts at the base. With G the gradient
by W and c = alpha / rank:  ∂L/∂A = c · Bᵀ G,  ∂L/∂B = c · G Aᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.grid import QuantizedTensor
from lilliput.model import LowRank
from lilliput.recipe_schema import Recover


class Adapter:
    """A frozen matrix with an adapter in training; stands where calibration.fake_quant.FakeQuant does."""

    def __init__(self, name: str, solved: QuantizedTensor, options: Recover) -> None:
        rows, cols = solved.shape
        self.solved, self.alpha, self.factor = solved, options.alpha, options.alpha / options.rank
        self.base = torch.from_numpy(solved.dequantize()).to(options.device)
        seed = sum(name.encode()) * 65_537 + options.seed
        a = torch.randn(options.rank, cols, generator=torch.Generator().manual_seed(seed)) / cols**0.5
        b = torch.zeros(rows, options.rank)
        self.parameters: dict[str, Tensor] = {"a": a.to(options.device), "b": b.to(options.device)}

    def values(self) -> Tensor:
        """(rows, cols) float32."""
        return torch.addmm(self.base, self.parameters["b"], self.parameters["a"], alpha=self.factor)

    def gradients(self, gradient: Tensor, kinds: frozenset[str] = frozenset("ab")) -> dict[str, Tensor]:
        """From the gradient by the values (rows, cols), those by the parameters."""
        a, b = self.parameters["a"], self.parameters["b"]
        return {"a": self.factor * (b.T @ gradient), "b": self.factor * (gradient @ a.T)}

    def project(self) -> None:
        """Nothing holds an adapter in bounds."""

    def tensor(self) -> QuantizedTensor:
        """The base: no code of it moved."""
        return self.solved

    def adapter(self) -> LowRank:
        """What was trained."""
        a, b = (self.parameters[part].cpu().numpy().copy() for part in "ab")
        return LowRank(a, b, self.alpha)
