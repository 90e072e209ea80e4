"""What a QDQ file holds, read from its nodes: weights, constants and biases by their DequantizeLinear, grids by value.

Nothing of the writer is used but the suffixes of the names; codes, scales and zero points are what the file's own nodes
take, so a node that reads another scale than it should is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, numpy_helper

from lilliput.activation_grid import ActivationGrid
from lilliput.errors import ArtifactError
from lilliput.network import QuantizedNetwork

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Dequantized:
    """The operands of a DequantizeLinear or QuantizeLinear."""

    codes: Array | None  # None: a value
    scale: Array
    zero_point: Array | None


@dataclass(frozen=True, eq=False)
class FileContent:
    """By name: `{weight}.codes`, `{constant}.codes`, `{node}.bias`; and values by their own names."""

    stored: Mapping[str, Dequantized]
    floats: Mapping[str, Array]  # float32 initializers by name: among them parameters that have no grid
    values: Mapping[str, tuple[Dequantized, ...]]  # every Q and DQ of a value, its copies in other shapes too


def read(path: Path) -> FileContent:
    """Raises ArtifactError for a file that is no ONNX model."""
    try:
        proto = onnx.load(str(path))
    except Exception as error:  # protobuf and onnx raise many kinds
        raise ArtifactError(f"{path}: not a readable ONNX model ({error})") from error
    arrays = {tensor.name: np.asarray(numpy_helper.to_array(tensor)) for tensor in proto.graph.initializer}
    stored: dict[str, Dequantized] = {}
    values: dict[str, list[Dequantized]] = {}
    for node in proto.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        found = _operands(node, arrays)
        if found.codes is not None:
            stored[node.input[0]] = found
        else:
            values.setdefault(node.name.rpartition("/")[0], []).append(found)
    floats = {name: array for name, array in arrays.items() if array.dtype == np.float32}
    return FileContent(stored, floats, {name: tuple(parts) for name, parts in values.items()})


def _operands(node: NodeProto, arrays: Mapping[str, Array]) -> Dequantized:
    zero_point = arrays[node.input[2]] if len(node.input) > 2 else None
    return Dequantized(arrays.get(node.input[0]), arrays[node.input[1]], zero_point)


def differences(model: QuantizedNetwork, content: FileContent) -> list[str]:
    """What is not the model's, by name."""
    found = []
    for name, tensor in model.weights.items():
        shape = model.network.parameters[name].shape
        zeros = np.zeros(len(tensor.scales), np.int8)
        found += _unequal(name, content, f"{name}.codes", tensor.codes.reshape(shape), tensor.scales[:, 0], zeros)
    for node in model.network.nodes:
        if node.name in model.biases:
            scale = model.bias_scale(node)
            found += _unequal(f"{node.name}: bias", content, f"{node.name}.bias", model.biases[node.name], scale, None)
    for name in sorted(_in_float(model)):
        if not np.array_equal(content.floats.get(name, ()), model.network.parameters[name]):
            found.append(f"{name}: other numbers")
    for name, grid in model.activations.items():
        if name in model.network.parameters:
            found += _unequal(name, content, f"{name}.codes", model.constant(name), grid.scale, grid.zero_point)
            continue
        if any(not _holds(part, grid) for part in content.values.get(name, ())):
            found.append(f"{name}: another grid")
    return found


def _in_float(model: QuantizedNetwork) -> set[str]:
    """Parameters that stay in float32."""
    rounded = {node.inputs[2] for node in model.network.nodes if node.name in model.biases}
    return model.network.parameters.keys() - model.weights.keys() - model.activations.keys() - rounded


def _holds(part: Dequantized, grid: ActivationGrid) -> bool:
    if part.zero_point is None or part.zero_point.dtype != grid.dtype or part.scale.ndim or part.zero_point.ndim:
        return False
    return bool(part.scale == grid.scale[0] and int(part.zero_point) == int(grid.zero_point[0]))


def _unequal(
    what: str, content: FileContent, key: str, codes: Array, scale: Array, zero_point: Array | None
) -> list[str]:
    part = content.stored.get(key)
    if part is None or part.codes is None:
        return [f"{what}: not in the file"]
    zeros = part.zero_point is None if zero_point is None else np.array_equal(_flat(part.zero_point), _flat(zero_point))
    same = (
        part.codes.shape == codes.shape
        and np.array_equal(part.codes.astype(np.int64), codes.astype(np.int64))
        and np.array_equal(_flat(part.scale), _flat(scale))
        and zeros
    )
    return [] if same else [f"{what}: other codes, scales or zero points"]


def _flat(array: Array | None) -> Array:
    return np.zeros(0) if array is None else array.reshape(-1).astype(np.float64)
