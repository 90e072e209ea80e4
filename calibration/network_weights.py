"""Solve a network's weights alone, for runtimes that choose the grids of activations as they run (llama.cpp).

Matrices go on block grids by the solver; tables, of which each text reads a few rows, by round to nearest with its
search of scales. A matrix takes the first of `grids` that the format lets its rows have: a K-quant wants rows of a
multiple of 256 columns, and which grid the others took is said by name. Nothing else is on a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from calibration import network_solve
from calibration.network_statistics import NetworkStatistics
from calibration.parallel import in_parallel
from lilliput.errors import GridError
from lilliput.grid import GridSpec, QuantizedTensor, grid
from lilliput.network import Network, QuantizedNetwork
from lilliput.progress import Progress, silent

Refuses = Callable[[GridSpec, int], str | None]  # why a format cannot hold a grid in rows of so many columns
DEFAULT_GRIDS = ("int8-b32",)


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    grids: tuple[str, ...] = Field(default=DEFAULT_GRIDS, min_length=1)
    solver: str = "gptq"
    solver_options: Mapping[str, Any] = Field(default_factory=dict)


def assign(network: Network, grids: tuple[str, ...], refuses: Refuses) -> dict[str, GridSpec]:
    """Each matrix's and table's grid. Raises GridError where one has none, with the format's reasons."""
    specs, found = [grid(name) for name in grids], {}
    for name in (*network.tables, *network.weights):
        cols = network.matrix(name).shape[1]
        reasons = [refuses(spec, cols) for spec in specs]
        if all(reasons):
            raise GridError(f"{name}: {'; '.join(str(reason) for reason in reasons)}")
        found[name] = specs[reasons.index(None)]
    return found


def solve(
    network: Network, statistics: NetworkStatistics, assigned: Mapping[str, GridSpec], options: Options,
    progress: Progress = silent,
) -> QuantizedNetwork:  # fmt: skip
    """The network with what is assigned on its grids; progress counts matrices."""
    on = network_solve.solver_of(network, statistics, options.solver, options.solver_options)
    weights: dict[str, QuantizedTensor] = {}
    solved = in_parallel(lambda name: on(name, assigned[name]), list(assigned))
    for name, tensor in zip(assigned, solved, strict=True):
        tensor.check(name)
        weights[name] = tensor
        progress(len(weights), len(assigned))
    return QuantizedNetwork(network, weights, {}, {}, _provenance(assigned, statistics, options))


def _provenance(assigned: Mapping[str, GridSpec], statistics: NetworkStatistics, options: Options) -> dict[str, str]:
    names = {spec.name: [name for name in assigned if assigned[name] == spec] for spec in assigned.values()}
    found = {
        "weights": f"{', '.join(names)} by {network_solve.said_of(options.solver, assigned, statistics)}, "
        f"{statistics.samples} batches",
        "activations": "as the runtime has them",
    }
    if len(names) > 1:
        found |= {f"weights on {grid}": f"{len(on)} of {len(assigned)}: {', '.join(on)}" for grid, on in names.items()}
    return found
