"""Networks on disk: a folder with the graph as JSON and the arrays as safetensors.

    network.json             nodes, values, inputs, outputs, mask, notes
    parameters.safetensors   {name} float32
    quantized.json           grids of weights, activation grids, provenance             only of a QuantizedNetwork
    codes.safetensors        {weight}.codes int8, {weight}.scales float32, {node}.bias int32

Written in sorted order without timestamps: the same network gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from lilliput.activation_grid import ActivationGrid
from lilliput.errors import ArtifactError
from lilliput.grid import QuantizedTensor, grid
from lilliput.model import TensorInfo
from lilliput.network import Network, Operation, QuantizedNetwork


def save(network: Network, folder: Path) -> None:
    """Write into `folder` (made if absent)."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_arrays(network.parameters, folder / "parameters.safetensors")
    tree = {
        "name": network.name,
        "inputs": [asdict(info) for info in network.inputs],
        "outputs": network.outputs,
        "nodes": [asdict(node) for node in network.nodes],
        "values": [asdict(info) for _, info in sorted(network.values.items())],
        "mask": network.mask,
        "notes": network.notes,
    }
    _write_json(tree, folder / "network.json")


def load(folder: Path) -> Network:
    """Read what `save` wrote. Raises ArtifactError for a folder that it did not write."""
    try:
        tree = json.loads((folder / "network.json").read_text())
        nodes = tuple(
            Operation(n["name"], n["op"], tuple(n["inputs"]), {k: _attribute(v) for k, v in n["attributes"].items()})
            for n in tree["nodes"]
        )
        values = {v["name"]: _info(v) for v in tree["values"]}
        inputs, outputs = tuple(_info(v) for v in tree["inputs"]), tuple(tree["outputs"])
        parameters = load_file(folder / "parameters.safetensors")
    except (OSError, KeyError, ValueError) as error:
        raise ArtifactError(f"{folder}: not a network that lilliput wrote ({error})") from error
    return Network(tree["name"], inputs, outputs, nodes, values, parameters, tree["mask"], tuple(tree["notes"]))


def save_quantized(model: QuantizedNetwork, folder: Path) -> None:
    """Write the network and what was solved into `folder` (made if absent)."""
    save(model.network, folder)
    arrays: dict[str, np.ndarray[Any, Any]] = {f"{node}.bias": codes for node, codes in model.biases.items()}
    for name, tensor in model.weights.items():
        arrays |= {f"{name}.codes": tensor.codes, f"{name}.scales": tensor.scales}
    _write_arrays(arrays, folder / "codes.safetensors")
    tree = {
        "weights": {name: tensor.spec.name for name, tensor in model.weights.items()},
        "activations": {name: _grid_tree(grid) for name, grid in model.activations.items()},
        "biases": sorted(model.biases),
        "provenance": dict(model.provenance),
    }
    _write_json(tree, folder / "quantized.json")


def load_quantized(folder: Path) -> QuantizedNetwork:
    """Read what `save_quantized` wrote."""
    tree, arrays = json.loads((folder / "quantized.json").read_text()), load_file(folder / "codes.safetensors")
    weights = {
        name: QuantizedTensor(grid(spec), arrays[f"{name}.codes"], arrays[f"{name}.scales"])
        for name, spec in tree["weights"].items()
    }
    activations = {name: _grid(part) for name, part in tree["activations"].items()}
    biases = {name: arrays[f"{name}.bias"] for name in tree["biases"]}
    return QuantizedNetwork(load(folder), weights, activations, biases, tree["provenance"])


def _write_arrays(arrays: Mapping[str, np.ndarray[Any, Any]], path: Path) -> None:
    save_file({name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}, path)


def _write_json(tree: object, path: Path) -> None:
    path.write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n")


def _info(tree: Any) -> TensorInfo:
    return TensorInfo(tree["name"], tree["dtype"], tuple(tree["shape"]))


def _attribute(value: Any) -> int | float | tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else value


def _grid_tree(grid: ActivationGrid) -> dict[str, Any]:
    """Scales as float64, which holds float32 exactly."""
    scale, zero_point = [float(s) for s in grid.scale], [int(z) for z in grid.zero_point]
    ends = {"qmin": grid.qmin, "qmax": grid.qmax, "dtype": grid.dtype, "axis": grid.axis}
    return {"scale": scale, "zero_point": zero_point, **ends}


def _grid(tree: Any) -> ActivationGrid:
    scale, zero_point = np.array(tree["scale"], np.float32), np.array(tree["zero_point"], np.int32)
    return ActivationGrid(scale, zero_point, tree["qmin"], tree["qmax"], tree["dtype"], tree["axis"])
