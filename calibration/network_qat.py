"""A network solved by training: what calibration.static_qat trained takes the place of what rounding found.

The trained layers' codes, scales and input grids stand as they are; values that no layer reads (what a mean or the
output makes) get their ranges from a pass of the trained model. Values that share a grid (lilliput.network.ties) share
the trained one. Biases are rounded on the scales that come of both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from calibration import network_solve
from calibration.network_statistics import gather
from calibration.observers import ActivationGrid
from calibration.static_qat import StaticFakeQuant, StaticModel
from lilliput.errors import CalibrationError
from lilliput.network import MATRIX_OPS, Network, QuantizedNetwork
from lilliput.network.ties import groups
from lilliput.network.trace import trace


def dequantized(model: nn.Module, trained: StaticModel) -> nn.Module:
    """The float model with the trained layers' weights, as their codes stand for them, and biases; in eval mode."""
    student = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, shipped in trained.layers.items():
            layer, part = student.get_submodule(name), trained.module.get_submodule(name)
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            assert isinstance(part, StaticFakeQuant)
            layer.weight.copy_(torch.from_numpy(shipped.weight.dequantize()).view_as(layer.weight))
            if layer.bias is not None and part.layer.bias is not None:
                layer.bias.copy_(part.layer.bias)
    return student


def solved(
    model: nn.Module, trained: StaticModel, batches: Sequence[Mapping[str, Tensor]], options: network_solve.Options,
    name: str,
) -> QuantizedNetwork:  # fmt: skip
    """The network of the trained model on its grids; `batches` are inputs by name, of one example each.

    Raises CalibrationError where two layers that share a grid were trained on different ones.
    """
    network = trace(dequantized(model, trained), batches[0], name=name)
    found = network_solve.solve(network, gather(network, batches), options)
    weights = {**found.weights, **{f"{layer}.weight": part.weight for layer, part in trained.layers.items()}}
    activations = {**found.activations, **_trained_grids(network, trained)}
    provenance = {**found.provenance, "weights": f"{options.weight_grid} by QAT"}
    made = replace(found, weights=weights, activations=activations, provenance=provenance)
    return replace(made, biases=network_solve.biases(made))


def _trained_grids(network: Network, trained: StaticModel) -> dict[str, ActivationGrid]:
    """The grids of layers' inputs, for every value that shares them."""
    wanted: dict[str, ActivationGrid] = {}
    for node in network.nodes:
        if node.op in MATRIX_OPS:
            wanted[node.inputs[0]] = trained.layers[node.inputs[1].removesuffix(".weight")].input
    shared: dict[str, ActivationGrid] = {}
    for group in groups(network):
        grids = [wanted[member] for member in group.members if member in wanted]
        if any(not grid.same_as(grids[0]) for grid in grids):
            raise CalibrationError(
                f"{', '.join(group.members)} share a grid, but QAT trained several: train them as one"
            )
        if grids:
            shared |= dict.fromkeys(group.members, grids[0])
    return shared
