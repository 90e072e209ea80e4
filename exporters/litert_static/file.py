"""A solved network as a `.tflite`, and what a written file holds of it.

Every tensor has the name of the network's value or parameter, and its grid is in the file. A weight lies as its
operator wants it (exporters.litert_static.lowering); a constant that images are added to or multiplied with lies as
`{name}/nhwc`. `{node}.bias.codes` is a node's int32 bias; a layer norm has `{node}.weight` and `{node}.bias` in
float32, which its codes stand for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporters.litert_int8.flatbuffer import Array, Model, StoredGrid, StoredTensor, read_constants, read_grids
from exporters.litert_static.in_float import norm_vectors
from exporters.litert_static.lowering import BIAS, IMAGES, Lowering, fusions, int8, int8_codes
from lilliput.errors import ExportError
from lilliput.grid import Float
from lilliput.network import BIASED_OPS, QuantizedNetwork

SIGNATURE = "serving_default"
DTYPES = {"int8": np.int8, "int32": np.int32, "float32": np.float32}


@dataclass(frozen=True, eq=False)
class Held:
    """What a file holds: constants by name, in the network's own order, and the grid of every tensor that has one."""

    constants: Mapping[str, Array]
    grids: Mapping[str, StoredGrid]


def write(model: QuantizedNetwork, path: Path, *, float_io: bool = False) -> list[str]:
    """Write the file; the names of the nodes that are computed in float32. Raises ExportError for what does not fit."""
    for name, tensor in model.weights.items():
        if not (tensor.scales > 0).all():
            raise ExportError(f"{name}: a scale that is not positive, which LiteRT's kernels do not take")
    file = Model()
    lowering = Lowering(file.graph(SIGNATURE), model)
    lowering.run(float_io)
    file.write(path)
    return lowering.in_float


def read(path: Path) -> Held:
    """Constants and grids of a written file. Raises ArtifactError where it is no whole `.tflite`."""
    grids = {name.removesuffix(IMAGES): grid for name, grid in read_grids(path).items()}
    found = {tensor.name.removesuffix(IMAGES): tensor for tensor in read_constants(path)}
    return Held({name: _plain(tensor, grids.get(name)) for name, tensor in found.items()}, grids)


def _plain(tensor: StoredTensor, grid: StoredGrid | None) -> Array:
    """(out, kh, kw, in) or depthwise (1, kh, kw, out) → (out, in, kh, kw); images (1, H, W, C) → (1, C, H, W)."""
    array = np.frombuffer(tensor.data.tobytes(), DTYPES[tensor.type]).reshape(tensor.shape)
    if array.ndim != 4 or tensor.type == "float32":
        return array
    return array.transpose(3, 0, 1, 2) if grid is not None and grid.axis == 3 else array.transpose(0, 3, 1, 2)


def differences(model: QuantizedNetwork, path: Path) -> list[str]:
    """What the file holds otherwise than the model says, by name: codes, scales, zero points, norm vectors."""
    held, found = read(path), list[str]()
    for name, codes, scales, zero_points in _wanted(model):
        there, grid = held.constants.get(name), held.grids.get(name)
        if codes is not None and (there is None or not np.array_equal(there.reshape(codes.shape), codes)):
            found.append(f"{name}: other codes")
        if scales is not None and (
            grid is None or not np.array_equal(grid.scales, scales) or not (grid.zero_points == zero_points).all()
        ):
            found.append(f"{name}: another grid")
    return found


def floats_read(model: QuantizedNetwork) -> list[str]:
    """Parameters that operators read in float32, but a layer norm's."""
    read = {name for node in model.network.nodes if node.op not in BIASED_OPS for name in node.inputs}
    return sorted(name for name in read & model.network.parameters.keys() if name not in model.activations)


Wanted = tuple[str, Array | None, Float | None, int]  # name, codes, scales, zero point


def _wanted(model: QuantizedNetwork) -> Iterator[Wanted]:
    """All that a file must hold."""
    for name, tensor in model.weights.items():
        yield name, tensor.codes, tensor.scales[:, 0], 0
    nodes, fused = model.network.nodes, fusions(model)
    norms = [node for node in nodes if node.op == "layer_norm"]
    for node in norms:
        yield from ((f"{node.name}.{part}", vector, None, 0) for part, vector in norm_vectors(model, node).items())
    for node in nodes:
        if node.name in model.biases and node not in norms:
            yield BIAS.format(node.name), model.biases[node.name], model.bias_scale(node), 0
    for name in floats_read(model):
        yield name, model.network.parameters[name], None, 0
    unseen = {*fused, *(node.inputs[1] for node in norms)}  # written clamped, and in float32
    for name, grid in model.activations.items():
        if name not in unseen:
            codes = int8_codes(model, name) if name in model.network.parameters else None
            yield name, codes, grid.scale, int8(name, grid).zero_point
