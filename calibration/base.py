"""What a solver is: a module of this folder with one class `Solver` and its pydantic `Options`.

A solver chooses codes and scales for one matrix on one grid, from the statistics of that matrix's input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from lilliput.grid import Float, GridSpec, QuantizedTensor


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Statistics of a linear layer's input x (cols,) over `count` calibration tokens."""

    second_moments: Float  # (cols, cols) float32: mean of x xᵀ
    minimum: Float  # (cols,) float32
    maximum: Float  # (cols,) float32
    count: int


class SolverOptions(BaseModel):
    """Base of every solver's options: unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Solver(Protocol):
    """One way to choose codes. Stateless and deterministic."""

    Options: ClassVar[type[SolverOptions]]
    needs_statistics: ClassVar[bool]

    def solve(
        self, weight: Float, spec: GridSpec, statistics: InputStatistics | None, options: SolverOptions
    ) -> QuantizedTensor:
        """(rows, cols) float32 → a tensor of that shape on `spec`. Statistics are None for tables (embeddings)."""
        ...
