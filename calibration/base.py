"""What a solver and a transform are: a module of this folder with one class `Solver` or `Transform`, and its `Options`.

A solver chooses codes and scales for one matrix on one grid, from the statistics of that matrix's input. A transform
chooses, before it, one factor for every input of the matrices that read it: calibration.folding multiplies their
columns by it and divides what makes the input, so that the float model computes what it did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
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


@dataclass(frozen=True, eq=False)
class Readers:
    """The matrices that read one input x (cols,), and what is known of it.

    Columns with one number in `shared` get one factor: the query heads that read one value head.
    """

    weights: tuple[Float, ...]  # (rows, cols) float32 each
    specs: tuple[GridSpec, ...]
    statistics: InputStatistics
    shared: npt.NDArray[np.intp]  # (cols,): 0 to n - 1

    def pooled(self, per_column: Float, over: np.ufunc = np.maximum) -> Float:
        """(cols,) → (n,): the largest (or other reduction) of the columns that share a factor."""
        found: Float = np.full(self.shared.max() + 1, over.identity or 0, dtype=np.float32)
        over.at(found, self.shared, per_column)
        return found


class Transform(Protocol):
    """One way to choose the factors. Stateless and deterministic."""

    Options: ClassVar[type[SolverOptions]]

    def factors(self, readers: Readers, options: SolverOptions) -> Float:
        """(n,) float32, positive: what columns are multiplied by, and x is divided by."""
        ...


class Solver(Protocol):
    """One way to choose codes. Stateless and deterministic."""

    Options: ClassVar[type[SolverOptions]]
    needs_statistics: ClassVar[bool]

    def solve(
        self, weight: Float, spec: GridSpec, statistics: InputStatistics | None, options: SolverOptions
    ) -> QuantizedTensor:
        """(rows, cols) float32 → a tensor of that shape on `spec`. Statistics are None for tables (embeddings)."""
        ...
