"""Solve a network for static integer arithmetic: weights by the solvers, activations by their ranges, int32 biases.

Weights go per output channel on `weight_grid` and do not depend on the activations' grids, but for one case, so every
target with that grid gets the same codes. The case: a bias must fit 32 bits on its scale, (input's) · (weight's).
Where a channel's weights are so small that it would not, its scale is widened so that the bias has BIAS_MOST steps,
and its row is rounded again.

Activations (grids by group, lilliput.network.ties):

    softmax, sigmoid   [0, 1): scale 2^−bits, zero point qmin; int16 symmetric: 2^−15, zero point 0
    tanh               [−1, 1): scale 2^(1−bits), zero point in the middle
    (LiteRT's quantization spec and QNN's 16-bit operators ask for these; 8 bits of ONNX hold them too)
    what softmax reads its range is cut below `floor − MARGIN`: there every row has a share less than e^−MARGIN
    everything else    the range by `ranges` (calibration.clipping)
    constants          minimum to maximum, at the activations' width; norm weights at 8 bit unsigned (QNN asks for it)

`integer: all` puts every value on a grid, as NPUs ask. `integer: matrices` does so with what linear layers,
convolutions and matrix products read, and with tables, and leaves the rest in float32: runtimes on CPUs compute norms,
softmax and sums in float anyway, and a transformer's residual stream, whose few outliers are a hundred times its usual
values, loses most at 8 bit. `integer: products` adds what those operators make, as LiteRT's int8 kernels ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from calibration import rtn
from calibration.base import InputStatistics, Solver, SolverOptions
from calibration.clipping import RangeOptions, range_ends
from calibration.network_statistics import NetworkStatistics
from calibration.observers import ActivationGrid, Histogram, code_range, grid_of
from calibration.output_error import output_error
from calibration.parallel import in_parallel
from lilliput import registry
from lilliput.errors import CalibrationError
from lilliput.grid import Float, GridSpec, QuantizedTensor, grid
from lilliput.network import BIASED_OPS, MATRIX_OPS, PRODUCT_OPS, Network, Operation, QuantizedNetwork
from lilliput.network.ties import Group, groups
from lilliput.progress import Progress, silent

MARGIN = 16.0
BIAS_MOST = 1 << 30
UNIT_OPS = ("softmax", "sigmoid")
Integer = Literal["all", "products", "matrices"]  # whose values lie on grids


class Narrow(BaseModel):
    """A narrower weight grid, taken by each matrix that holds it: E|Wx|² / E|Dx|² of at least `least_db`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_grid: str = "int4-channel-f32"
    least_db: float = 30.0


class Options(BaseModel):
    """How a network is quantized. `weight_grid` is per channel (block size 0), symmetric."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_grid: str = "int8-channel-f32"
    solver: str = "rtn"
    solver_options: Mapping[str, Any] = Field(default_factory=dict)
    ranges: RangeOptions = RangeOptions(dtype="uint8")
    integer: Integer = "all"
    narrow: Narrow | None = None


def needs_moments(options: Options) -> bool:
    """Whether second moments are read: by the solver, or to know what a narrower grid would lose."""
    return options.narrow is not None or bool(registry.constant("solvers", options.solver, "needs_statistics"))


def solve(
    network: Network, statistics: NetworkStatistics, options: Options, progress: Progress = silent,
    weights: Mapping[str, QuantizedTensor] | None = None,
) -> QuantizedNetwork:  # fmt: skip
    """The solved network; progress counts matrices. `weights` that another target's solve gave are taken as they are.

    Raises CalibrationError where a range or a solver's statistics are missing, GridError where a weight's grid is not
    symmetric per channel.
    """
    activations = activation_grids(network, statistics, options.ranges, options.integer)
    weights = weights if weights is not None else solve_weights(network, statistics, options, progress)
    weights = _widened(network, weights, activations)
    solved = QuantizedNetwork(network, weights, activations, {}, _provenance(weights, statistics, options))
    return QuantizedNetwork(network, weights, activations, biases(solved), solved.provenance)


def _provenance(
    weights: Mapping[str, QuantizedTensor], statistics: NetworkStatistics, options: Options
) -> dict[str, str]:
    ranges = f"{options.ranges.dtype} by {options.ranges.method}, {statistics.samples} batches"
    solver = said_of(options.solver, weights, statistics)
    found = {"weights": f"{options.weight_grid} by {solver}", "activations": ranges}
    for name in _narrower(options):
        held = [weight for weight, tensor in weights.items() if tensor.spec.name == name]
        found[f"weights on {name}"] = f"{len(held)} of {len(weights)}: {', '.join(held) or 'none'}"
    return found


def solve_weights(
    network: Network, statistics: NetworkStatistics, options: Options, progress: Progress = silent
) -> dict[str, QuantizedTensor]:
    """Every weight's matrix on its grid."""
    specs = [_per_channel(name) for name in (options.weight_grid, *_narrower(options))]
    on = solver_of(network, statistics, options.solver, options.solver_options)

    def one(name: str) -> tuple[str, QuantizedTensor]:
        if options.narrow is not None and name in statistics.moments:
            tensor = on(name, specs[1])
            if _sqnr_db(network.matrix(name), tensor, statistics.moments[name]) >= options.narrow.least_db:
                return name, tensor
        return name, on(name, specs[0])

    weights: dict[str, QuantizedTensor] = {}
    for name, tensor in in_parallel(one, list(network.weights)):
        tensor.check(name)
        weights[name] = tensor
        progress(len(weights), len(network.weights))
    return {name: weights[name] for name in network.weights}


def solver_of(
    network: Network, statistics: NetworkStatistics, name: str, options: Mapping[str, Any]
) -> Callable[[str, GridSpec], QuantizedTensor]:
    """Solver `name` for a parameter on a grid; round to nearest where it needs moments and there are none: of tables,
    and of grouped convolutions, which have a few weights a channel."""
    solver: Solver = registry.load("solvers", name)()
    solver_options = registry.options("solvers", name, dict(options))
    assert isinstance(solver_options, SolverOptions)

    def on(parameter: str, spec: GridSpec) -> QuantizedTensor:
        weight, found = np.ascontiguousarray(network.matrix(parameter)), statistics.moments.get(parameter)
        if solver.needs_statistics and found is None:
            return rtn.Solver().solve(weight, spec, None, rtn.Options())
        return solver.solve(weight, spec, found, solver_options)

    return on


def said_of(name: str, parameters: Iterable[str], statistics: NetworkStatistics) -> str:
    """Which solver made which parameters, for the report: those that `solver_of` rounds by name."""
    needs = registry.constant("solvers", name, "needs_statistics")
    rounded = [parameter for parameter in parameters if needs and parameter not in statistics.moments]
    return f"{name} ({', '.join(rounded)} by rtn)" if rounded else name


def _narrower(options: Options) -> tuple[str, ...]:
    return (options.narrow.weight_grid,) if options.narrow is not None else ()


def _per_channel(name: str) -> GridSpec:
    spec = grid(name)
    if not spec.symmetric or spec.block_size or spec.outliers or spec.super_blocks:
        raise CalibrationError(
            f"weight grid {spec.name}: static networks want one symmetric scale a channel: int8-channel"
        )
    return spec


def _sqnr_db(weight: Float, tensor: QuantizedTensor, statistics: InputStatistics) -> float:
    """What a matrix's product loses on the calibration inputs."""
    signal = output_error(weight, statistics.second_moments)
    noise = output_error(weight - tensor.dequantize(), statistics.second_moments)
    return float("inf") if noise <= 0 else 10 * float(np.log10(signal / noise)) if signal > 0 else float("-inf")


def activation_grids(
    network: Network, statistics: NetworkStatistics, ranges: RangeOptions, integer: Integer = "all"
) -> dict[str, ActivationGrid]:
    """A grid for each float value and each parameter that is an operand; or for those that matrices read, or make."""
    if ranges.axis is not None:
        raise CalibrationError("static networks want one grid a value: leave axis out")
    norms = {node.inputs[1] for node in network.nodes if node.op == "layer_norm"}
    wanted = {name for node in network.nodes for name in _multiplied(node)}
    if integer == "products":
        wanted |= {node.name for node in network.nodes if node.op in PRODUCT_OPS}
    found: dict[str, ActivationGrid] = {}
    for group in groups(network):
        if integer != "all" and not wanted.intersection(group.members):
            continue
        alone = group.members[0]
        one = _norm_grid(network, alone) if alone in norms else _grid(network, statistics, group, ranges)
        found |= dict.fromkeys(group.members, one)
    return found


def _multiplied(node: Operation) -> tuple[str, ...]:
    """The inputs of a node that its matrix arithmetic reads; a table that it looks up."""
    return node.inputs[:1] if node.op in (*MATRIX_OPS, "embedding") else node.inputs if node.op == "matmul" else ()


def _norm_grid(network: Network, name: str) -> ActivationGrid:
    array = network.parameters[name].astype(np.float64)
    return grid_of(array.min(keepdims=True), array.max(keepdims=True), "uint8", False, None)


def _grid(network: Network, statistics: NetworkStatistics, group: Group, ranges: RangeOptions) -> ActivationGrid:
    makers = {node.name: node.op for node in network.nodes}
    ops = {makers.get(name, "") for name in group.sources}
    if ops <= {*UNIT_OPS} or ops == {"tanh"}:
        return fixed_grid("tanh" if ops == {"tanh"} else "softmax", ranges)
    low, high = _range(network, statistics, group, ranges)
    floors = [statistics.floors[name] for name in group.members if name in statistics.floors]
    if floors:
        low = max(low, min(floors) - MARGIN)
    return grid_of(np.array([low]), np.array([high]), ranges.dtype, ranges.symmetric, None)


def fixed_grid(op: str, ranges: RangeOptions) -> ActivationGrid:
    """The grid of an operator whose range is known."""
    qmin, qmax = code_range(ranges.dtype, ranges.symmetric)
    bits = 8 if "8" in ranges.dtype else 16
    half = op == "tanh" or ranges.symmetric
    middle = 0 if qmin < 0 else 1 << (bits - 1)
    zero_point = middle if op == "tanh" else (0 if ranges.symmetric else qmin)
    scale = np.array([2.0 ** (1 - bits if half else -bits)], np.float32)
    return ActivationGrid(scale, np.array([zero_point], np.int32), qmin, qmax, ranges.dtype, None)


def _range(network: Network, statistics: NetworkStatistics, group: Group, ranges: RangeOptions) -> tuple[float, float]:
    seen = Histogram()
    fixed: list[tuple[float, float]] = []
    for name in group.sources:
        if name in network.parameters:
            array = network.parameters[name]
            fixed.append((float(array.min()), float(array.max())))
        elif name in statistics.histograms:
            seen.merge(statistics.histograms[name])
        else:
            raise CalibrationError(f"value {name!r} of {network.name} was not observed: calibrate again")
    ends = [*fixed, *([range_ends(seen, 0, ranges)] if int(seen.counts.sum()) else [])]
    if not ends:
        raise CalibrationError(f"value {group.members[0]!r} of {network.name} saw no number: every sample masks it")
    return min(low for low, _ in ends), max(high for _, high in ends)


@dataclass(frozen=True)
class _Bias:
    """A node's bias, and what its scale is made of."""

    node: str
    weight: str
    values: npt.NDArray[np.float64]  # (out,)
    input_scale: float


def _bias_parts(network: Network, activations: Mapping[str, ActivationGrid]) -> list[_Bias]:
    return [
        _Bias(
            node.name, node.inputs[1], network.parameters[node.inputs[2]].astype(np.float64),
            float(activations[node.inputs[0]].scale[0]),
        )
        for node in network.nodes
        if node.op in BIASED_OPS and len(node.inputs) > 2 and node.inputs[0] in activations
    ]  # fmt: skip


def _widened(
    network: Network, weights: Mapping[str, QuantizedTensor], activations: Mapping[str, ActivationGrid]
) -> dict[str, QuantizedTensor]:
    """The weights, with scales of channels whose bias would not fit made as wide as it needs."""
    found = dict(weights)
    for bias in _bias_parts(network, activations):
        if bias.weight not in found:
            continue
        tensor = found[bias.weight]
        least = np.abs(bias.values) / (bias.input_scale * BIAS_MOST)
        rows = np.flatnonzero(np.abs(tensor.scales[:, 0]) < least)
        if len(rows):
            scales, codes = tensor.scales.copy(), tensor.codes.copy()
            scales[rows, 0] = least[rows].astype(np.float32)
            steps = np.rint(network.matrix(bias.weight)[rows] / scales[rows])
            codes[rows] = np.clip(steps, tensor.spec.qmin, tensor.spec.qmax).astype(codes.dtype)
            found[bias.weight] = QuantizedTensor(tensor.spec, codes, scales)
    return found


def _is_integer(model: QuantizedNetwork, node: Operation) -> bool:
    """Whether a node's input and weight are both on grids."""
    weight = node.inputs[1] in model.weights or node.inputs[1] in model.activations
    return weight and node.inputs[0] in model.activations


def biases(model: QuantizedNetwork) -> dict[str, npt.NDArray[np.int32]]:
    """Every node's bias on its scale, int32. Raises CalibrationError where one does not fit."""
    found = {}
    for node in model.network.nodes:
        if node.op in BIASED_OPS and len(node.inputs) > 2 and _is_integer(model, node):
            values = model.network.parameters[node.inputs[2]].astype(np.float64)
            steps = np.rint(values / model.bias_scale(node).astype(np.float64))
            if np.abs(steps).max(initial=0) > np.iinfo(np.int32).max:
                raise CalibrationError(f"node {node.name!r}: its bias does not fit 32 bits on its scale")
            found[node.name] = steps.astype(np.int32)
    return found
