"""The codes of a quantized checkpoint, matrix by matrix of the decoder.

A family makes the decoder's parameters of the checkpoint's tensors without looking at their numbers: it puts rows in
another order (RoPE's halves), or takes a stacked matrix apart. So it is asked once more with row numbers in place of
weights, and codes, scales and offsets go where the rows went: exact.

Where a family does anything else with a matrix, its codes are not the parameter's: what they stand for is compared
with the float weight of the parameter, number by number, and `not_passed` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

from lilliput.errors import GridError
from lilliput.grid import Float, QuantizedTensor, take_rows
from lilliput.model import role_of
from lilliput.sources import Original
from lilliput.sources.stored import OffGrid, Stored

MOVED = "the decoder holds its numbers in another arrangement than the checkpoint"


@dataclass(frozen=True, eq=False)
class Held:
    """Of the decoder's matrices: those whose codes the checkpoint holds, and why others that it quantizes have none."""

    tensors: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    not_passed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the rows of one of the decoder's matrices are in the checkpoint."""

    name: str
    tensor: str  # the checkpoint's
    order: npt.NDArray[np.intp] | None  # None: not whole rows of one tensor


def held(original: Original, stored: Mapping[str, Stored], weights: Mapping[str, Float]) -> Held:
    """What the checkpoint holds for each matrix: `stored` by its names, `weights` the decoder's float parameters."""
    tensors: dict[str, QuantizedTensor] = {}
    reasons: dict[str, str] = {}
    for rows in rows_of(original):
        if rows.tensor not in stored:
            continue
        found = place(rows, stored[rows.tensor])
        if isinstance(found, QuantizedTensor) and not np.array_equal(found.dequantize(), weights[rows.name]):
            found = MOVED
        if isinstance(found, QuantizedTensor):
            tensors[rows.name] = found
        else:
            reasons[rows.name] = found
    return Held(tensors, reasons)


def grids(original: Original) -> tuple[dict[str, str], dict[str, str]]:
    """The grid of each matrix whose codes the checkpoint holds, and why others that it quantizes have none."""
    names: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for rows in rows_of(original):
        stored = original.stored(rows.tensor)
        if stored is None:
            continue
        found = place(rows, stored)
        if isinstance(found, QuantizedTensor):
            names[rows.name] = found.spec.name
        else:
            reasons[rows.name] = found
    return names, reasons


def place(rows: Rows, stored: Stored) -> QuantizedTensor | str:
    """The codes of one of the decoder's matrices, or why it has none."""
    if isinstance(stored, OffGrid):
        return stored.reason
    if rows.order is None:
        return MOVED
    taken = take_rows(stored, rows.order)
    try:
        taken.check(rows.tensor)
    except GridError as error:
        return str(error)
    return taken


def rows_of(original: Original) -> Iterator[Rows]:
    """The rows of every matrix of the decoder."""
    shapes = {name: shape for name, shape in original.shapes.items() if len(shape) == 2}
    names = list(shapes)
    starts = np.cumsum([0, *(shape[0] for shape in shapes.values())])  # rows numbered through all tensors

    def numbered(name: str) -> Float:
        if name not in shapes:
            return np.broadcast_to(np.float32(0), original.shapes[name])
        start = starts[names.index(name)]
        rows = np.arange(start, start + shapes[name][0], dtype=np.float64)[:, None]
        return cast(Float, np.broadcast_to(rows, shapes[name]))

    for parameter, made in original.parameters(numbered):
        if role_of(parameter) != "vector":
            yield _rows(parameter, np.asarray(made[:, 0]), names, starts)


def _rows(parameter: str, first: npt.NDArray[np.float64], names: list[str], starts: npt.NDArray[np.int64]) -> Rows:
    """From the numbers that ended up in the first column (rows,)."""
    numbers = np.clip(np.rint(first), 0, starts[-1] - 1).astype(np.int64)
    tensor = int(np.searchsorted(starts, numbers[0], side="right")) - 1
    order = numbers - starts[tensor]
    whole = np.array_equal(numbers, first) and (order >= 0).all() and (numbers < starts[tensor + 1]).all()
    return Rows(parameter, names[tensor], order if whole else None)
