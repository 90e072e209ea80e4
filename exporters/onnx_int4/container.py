"""The file: an ONNX model whose metadata names what its initializers hold; and the way back to the decoder's names.

    lilliput.config    DecoderConfig, JSON
    lilliput.grids     {parameter: grid name}, JSON
    lilliput.stacks    {stacked parameter: its parts from top to bottom}, JSON
    lilliput.context   positions that the KV cache is made for
    lilliput.provenance   what the file was made from (lilliput.provenance), JSON

Weights above 2 GB go to a data file beside the model, as protobuf messages end there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from exporters.onnx_int4 import packing
from exporters.onnx_int4.packing import Packed
from lilliput.artifact import PROVENANCE, canonical
from lilliput.errors import ArtifactError
from lilliput.grid import Float, GridSpec, Outliers, QuantizedTensor, grid
from lilliput.model import DecoderConfig

PROTOBUF_LIMIT_BYTES = 2 * 10**9
EXTERNAL_FROM_BYTES = 1024
# Which input of a node is codes. The exact twin casts 8-bit codes, unpacked, and dequantizes them itself.
CODES_INPUT = {"MatMulNBits": 1, "GatherBlockQuantized": 0, "Cast": 0}


@dataclass(frozen=True)
class Metadata:
    """What the initializers are."""

    config: DecoderConfig
    grids: Mapping[str, GridSpec]
    stacks: Mapping[str, tuple[str, ...]]
    context: int
    provenance: Mapping[str, str]


def write(proto: ModelProto, metadata: Metadata, path: Path) -> None:
    """Write the model; the same model gives the same bytes."""
    texts = {
        "lilliput.config": asdict(metadata.config),
        "lilliput.context": metadata.context,
        "lilliput.grids": {name: spec.name for name, spec in metadata.grids.items()},
        "lilliput.stacks": dict(metadata.stacks),
    }
    props = {key: json.dumps(text, sort_keys=True) for key, text in texts.items()}
    helper.set_model_props(proto, props | {PROVENANCE: canonical(metadata.provenance)})
    external = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > PROTOBUF_LIMIT_BYTES
    onnx.save_model(
        proto,
        str(path),
        save_as_external_data=external,
        location=f"{path.name}.data" if external else None,
        size_threshold=EXTERNAL_FROM_BYTES,
    )


def read_metadata(proto: ModelProto, path: Path) -> Metadata:
    texts = {entry.key: entry.value for entry in proto.metadata_props}
    try:
        grids = {name: grid(spec) for name, spec in json.loads(texts["lilliput.grids"]).items()}
        stacks = {name: tuple(parts) for name, parts in json.loads(texts["lilliput.stacks"]).items()}
        config = DecoderConfig(**json.loads(texts["lilliput.config"]))
        provenance = json.loads(texts[PROVENANCE])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: no model that Lilliput wrote, its metadata lacks or spoils {error}") from error
    return Metadata(config, grids, stacks, int(texts["lilliput.context"]), provenance)


def read(path: Path) -> dict[str, QuantizedTensor | Float]:
    """Every decoder parameter in the file, by name. Raises ArtifactError for a foreign or damaged file."""
    try:
        proto = onnx.load(str(path))
    except Exception as error:  # protobuf and onnx raise many kinds
        raise ArtifactError(f"{path}: not a readable ONNX model ({error})") from error
    return _Reader(proto, read_metadata(proto, path), path).parameters()


class _Reader:
    def __init__(self, proto: ModelProto, metadata: Metadata, path: Path) -> None:
        self.metadata, self.path = metadata, path
        self.initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.nodes = _by_codes(proto)
        self.whole = {part: stack for stack, parts in metadata.stacks.items() for part in parts}

    def parameters(self) -> dict[str, QuantizedTensor | Float]:
        shapes = self.metadata.config.parameter_shapes()
        return {name: self._quantized(name) if name in self.metadata.grids else self._float(name) for name in shapes}

    def _rows(self, name: str) -> tuple[str, slice]:
        """The parameter that holds `name` in the file, and where."""
        stack = self.whole.get(name, name)
        shapes, start = self.metadata.config.parameter_shapes(), 0
        for part in self.metadata.stacks.get(stack, (name,)):
            if part == name:
                break
            start += shapes[part][0]
        return stack, slice(start, start + shapes[name][0])

    def _array(self, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        if name not in self.initializers:
            raise ArtifactError(
                f"{self.path}: initializer {name!r} is missing, {len(self.initializers)} others are there"
            )
        return np.asarray(numpy_helper.to_array(self.initializers[name]))

    def _float(self, name: str) -> Float:
        stack, rows = self._rows(name)
        return np.asarray(self._array(stack)[rows], np.float32)

    def _quantized(self, name: str) -> QuantizedTensor:
        stack, rows = self._rows(name)
        spec, cols = self.metadata.grids[name], self.metadata.config.parameter_shapes()[name][1]
        codes = f"{stack}.codes"
        if codes not in self.nodes:
            raise ArtifactError(f"{self.path}: no node of the graph reads {codes!r}")
        bits, block_size = self.nodes[codes]
        zero_points, columns = f"{stack}.zero_points", f"{stack}.columns"
        kept = None
        if columns in self.initializers:
            values = np.asarray(self._array(f"{stack}.values"), np.float32)[rows]
            kept = Outliers(np.asarray(self._array(columns), np.int64), values)
        packed = Packed(
            bits,
            block_size,
            cols,
            np.asarray(self._array(codes), np.uint8)[rows],
            np.asarray(self._array(f"{stack}.scales"), np.float32)[rows],
            np.asarray(self._array(zero_points), np.uint8)[rows] if zero_points in self.initializers else None,
            kept,
        )
        return packing.unpack(packed, spec, name)


def _by_codes(proto: ModelProto) -> dict[str, tuple[int, int]]:
    """(bits, block_size) as the nodes that read each `.codes` initializer, directly or reshaped, state them."""
    made_by = {output: node for node in proto.graph.node for output in node.output}
    dims = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    found: dict[str, tuple[int, int]] = {}
    for node in proto.graph.node:
        if node.op_type not in CODES_INPUT:
            continue
        codes = node.input[CODES_INPUT[node.op_type]]
        codes = made_by[codes].input[0] if codes in made_by else codes
        if not codes.endswith(".codes"):
            continue
        stated = (
            (8, dims[codes][2])
            if node.op_type == "Cast"
            else (_attribute(node, "bits"), _attribute(node, "block_size"))
        )
        if found.setdefault(codes, stated) != stated:
            raise ArtifactError(f"{codes}: one node states (bits, block) {found[codes]}, another {stated}")
    return found


def _attribute(node: NodeProto, name: str) -> int:
    return int(next(a.i for a in node.attribute if a.name == name))
