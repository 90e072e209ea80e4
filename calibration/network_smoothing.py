"""Channels made alike before a network is solved, where one grid a tensor holds both sides of its matrix products.

A few channels of a transformer are many times larger than the others, and an 8-bit grid a tensor then has no codes left
for those. Where float operators stand beside a matrix, a multiplication by a vector takes the difference in magnitude
out of what is rounded; the float network stays the same:

    input    y = W x + b = (W diag(s)) (x / s) + b        x made by a norm or GELU: `{x}/smoothed` = x · (1 / s)
             s_j = a_j^alpha / w_j^(1 − alpha), a_j = max |x_j|, w_j = max |W_j| over all readers: SmoothQuant
             (Xiao et al. 2022, arXiv:2211.10438; calibration.smoothquant). One vector for all readers of x
    output   y = diag(t) (diag(1/t) W x + b / t)          read by a sum or GELU alone: `{y}/restored` = y' · t
             t_j = max |y_j|: a weight's codes do not change, as each row has its own scale

SmoothQuant folds 1 / s into the norm before. Here it stays an operator of its own, so that whatever else reads x, a
post-norm transformer's residual stream above all, reads it as it was. It costs a float multiplication a value.

Magnitudes come of one pass over calibration batches, real tokens alone where the network has a mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from calibration.activations import fitted
from calibration.smoothquant import normalised
from lilliput.errors import CalibrationError
from lilliput.grid import Float
from lilliput.model import TensorInfo
from lilliput.network import Network, Operation
from lilliput.network.run import evaluate

SMOOTHED_OPS = ("layer_norm", "gelu", "gelu_tanh")
RESTORED_FOR = ("add", "gelu", "gelu_tanh")
SMOOTHED, RESTORED = "/smoothed", "/restored"
Peaks = Mapping[str, Float]


class Options(BaseModel):
    """`alpha`: how much of an input's unevenness goes into the weights; 1 all, 0 none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alpha: float = Field(default=0.75, ge=0, le=1)


def smoothed(network: Network, batches: Iterable[Mapping[str, Tensor]], options: Options) -> Network:
    """The same float network with its vectors in place. Raises CalibrationError where there are no batches."""
    readers, made = _read(network), _written(network)
    peaks = channel_peaks(network, batches, {*readers, *made})
    parameters, after = dict(network.parameters), dict[str, list[Operation]]()
    sources: dict[tuple[str, str], str] = {}  # (reader, value) → what it reads now
    for value, nodes in readers.items():
        vector = _input_factors(network, nodes, peaks[value], options.alpha)
        for weight in {node.inputs[1] for node in nodes}:
            parameters[weight] = parameters[weight] * vector
        node = _scaled(parameters, value, SMOOTHED, (1 / vector).astype(np.float32))
        after.setdefault(value, []).append(node)
        sources |= {(reader.name, value): node.name for reader in nodes}
    for value, linear in made.items():
        vector = np.where(peaks[value] > 0, peaks[value], 1.0).astype(np.float32)
        for name in linear.inputs[1:]:
            parameters[name] = parameters[name] / vector.reshape(-1, *[1] * (parameters[name].ndim - 1))
        node = _scaled(parameters, value, RESTORED, vector)
        after.setdefault(value, []).append(node)
        sources |= {(reader.name, value): node.name for reader in network.consumers(value)}
    return _rewritten(network, parameters, after, sources)


def channel_peaks(network: Network, batches: Iterable[Mapping[str, Tensor]], names: set[str]) -> Peaks:
    """The largest magnitude of each channel, the last axis, by value; real tokens alone."""
    found: dict[str, Tensor] = {}
    parameters = {name: torch.from_numpy(array) for name, array in network.parameters.items()}
    keep: Tensor | None = None

    def see(name: str, value: Tensor) -> None:
        if name in names:
            mask = None if keep is None else fitted(keep, value.shape)
            magnitudes = value.abs() if mask is None else value.abs().masked_fill(~mask, 0.0)
            most = magnitudes.flatten(0, -2).amax(0)
            found[name] = torch.maximum(found[name], most) if name in found else most

    for batch in batches:
        keep = batch[network.mask].bool() if network.mask else None
        evaluate(network, parameters, batch, see)
    if names and not found:
        raise CalibrationError(f"{network.name}: there are no calibration samples, wanted at least one")
    return {name: most.numpy() for name, most in found.items()}


def _read(network: Network) -> dict[str, list[Operation]]:
    """The linear layers by what they read, where a norm or GELU makes it and no other node reads their weights."""
    makers = {node.name for node in network.nodes if node.op in SMOOTHED_OPS}
    found: dict[str, list[Operation]] = {}
    for node in network.nodes:
        if node.op == "linear" and node.inputs[0] in makers and len(network.consumers(node.inputs[1])) == 1:
            found.setdefault(node.inputs[0], []).append(node)
    return found


def _written(network: Network) -> dict[str, Operation]:
    """The linear layers by what they make, where sums and GELUs alone read it and they alone read their parameters."""
    return {
        node.name: node
        for node in network.nodes
        if node.op == "linear"
        and node.name not in network.outputs
        and all(reader.op in RESTORED_FOR for reader in network.consumers(node.name))
        and all(len(network.consumers(name)) == 1 for name in node.inputs[1:])
    }


def _input_factors(network: Network, readers: list[Operation], inputs: Float, alpha: float) -> Float:
    """s (cols,), of geometric mean 1."""
    weights = np.max([np.abs(network.matrix(node.inputs[1])).max(0) for node in readers], axis=0)
    return normalised(inputs**alpha, weights ** (1 - alpha))


def _scaled(parameters: dict[str, Float], value: str, suffix: str, vector: Float) -> Operation:
    """value · vector, as a node of its own."""
    name = value + suffix
    parameters[f"{name}.factors"] = vector
    return Operation(name, "mul", (value, f"{name}.factors"), {})


def _rewritten(
    network: Network, parameters: Mapping[str, Float], after: Mapping[str, list[Operation]],
    sources: Mapping[tuple[str, str], str],
) -> Network:  # fmt: skip
    """The nodes in their order, each followed by those made of its value."""
    nodes, values = list[Operation](), dict(network.values)
    for node in network.nodes:
        inputs = tuple(sources.get((node.name, name), name) for name in node.inputs)
        nodes.append(replace(node, inputs=inputs))
        for added in after.get(node.name, ()):
            nodes.append(added)
            values[added.name] = TensorInfo(added.name, "float32", network.shape(node.name))
    counts = [sum(node.name.endswith(suffix) for node in nodes) for suffix in (SMOOTHED, RESTORED)]
    note = (
        f"{counts[0]} inputs and {counts[1]} outputs of linear layers are scaled by channel, in operators of their own"
    )
    return replace(
        network, nodes=tuple(nodes), values=values, parameters=dict(parameters), notes=(*network.notes, note)
    )
