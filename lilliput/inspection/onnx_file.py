"""ONNX: initializers, and what the nodes that take them say of them.

An n-bit matrix is up to three initializers (codes, scales, zero points) of a MatMulNBits or GatherBlockQuantized
node, whose attributes hold bits, block size and, for MatMulNBits, the logical shape N by K. It is listed once, under
the codes' name. Nodes that only recast or reshape an initializer are looked through. A table that is gathered
from is the embedding, and shared where it is multiplied by as well. External data is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from lilliput.errors import ArtifactError
from lilliput.inspection.found import Contents, TensorFound, shortened
from lilliput.model import Role

GATHERS = frozenset({"Gather", "GatherBlockQuantized"})
INTEGER_MATMULS = frozenset({"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"})
MATMULS = frozenset({"MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "Conv"}) | INTEGER_MATMULS
TRANSPARENT = frozenset({"Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "DequantizeLinear", "Identity"})
PACKED_OPERANDS = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3)}  # codes, scales, zero points
DEFAULT_BLOCKS = {"MatMulNBits": 32, "GatherBlockQuantized": 128}
# bits of an element where they are packed into bytes (onnx.proto: INT4 and below)
SUB_BYTE = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4, onnx.TensorProto.INT2: 2, onnx.TensorProto.UINT2: 2}


class Graph:
    """Which initializer a name stands for, and which operators read each."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._origin = {name: name for name in self.stored}
        self.readers: dict[str, set[str]] = {name: set() for name in self.stored}
        for node in self.nodes:
            self._note(node)

    def _note(self, node: onnx.NodeProto) -> None:
        for name in node.input:
            if (origin := self._origin.get(name)) is not None:
                self.readers[origin].add(node.op_type)
        if node.op_type in TRANSPARENT and node.input and node.input[0] in self._origin:
            self._origin[node.output[0]] = self._origin[node.input[0]]

    def operands(self, node: onnx.NodeProto) -> list[onnx.TensorProto]:
        """The initializers that make up the packed matrix of a node, codes first; none where they are computed."""
        names = [node.input[i] for i in PACKED_OPERANDS[node.op_type] if i < len(node.input)]
        found = [self.stored[self._origin[name]] for name in names if name in self._origin]
        return found if names and names[0] in self._origin else []


def read(file: Path) -> Contents:
    """Raises ArtifactError where the file is no ONNX model."""
    try:
        model = onnx.load(file, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise ArtifactError(f"{file}: not a readable ONNX model ({error}): export it again") from error
    if not model.graph.node:
        raise ArtifactError(f"{file}: an ONNX model without nodes, wanted a graph: export it again")
    graph = Graph(model)
    packed, parts = _packed(graph)
    plain = [_plain(t, graph) for t in graph.stored.values() if t.name not in parts and prod(t.dims) > 1]
    return Contents("ONNX", (*packed, *plain), _metadata(model))


def _packed(graph: Graph) -> tuple[list[TensorFound], set[str]]:
    """Packed matrices, each once, and the names of all initializers that they are made of."""
    found: dict[str, TensorFound] = {}
    parts: set[str] = set()
    last = next((node for node in reversed(graph.nodes) if node.op_type in MATMULS), None)
    for node in graph.nodes:
        if node.op_type not in PACKED_OPERANDS or not (operands := graph.operands(node)):
            continue
        parts |= {tensor.name for tensor in operands}
        tensor = _matrix(node, operands, graph, node is last)
        known = found.get(tensor.name)
        found[tensor.name] = tensor if known is None or known.role == "linear" else known
    return list(found.values()), parts


def _matrix(node: onnx.NodeProto, operands: list[onnx.TensorProto], graph: Graph, is_last: bool) -> TensorFound:
    attributes = {a.name: int(a.i) for a in node.attribute if a.type == onnx.AttributeProto.INT}
    bits, block = attributes.get("bits", 4), attributes.get("block_size", DEFAULT_BLOCKS[node.op_type])
    readers = graph.readers[operands[0].name]
    role: Role = "embedding" if readers & GATHERS else "head" if is_last else "linear"
    return TensorFound(
        name=operands[0].name,
        role=role,
        dtype=f"{bits} bits in blocks of {block}",
        shape=_shape(operands[0], attributes, bits),
        size_bytes=sum(_bytes(tensor) for tensor in operands),
        shared=bool(readers & GATHERS and readers & MATMULS),
    )


def _shape(codes: onnx.TensorProto, attributes: dict[str, int], bits: int) -> tuple[int, ...]:
    """MatMulNBits names its logical shape; a gathered table's is its rows by the codes of a row."""
    if "N" in attributes and "K" in attributes:
        return attributes["N"], attributes["K"]
    per_element = 8 // bits if codes.data_type == onnx.TensorProto.UINT8 else 1
    return int(codes.dims[0]), prod(int(n) for n in codes.dims[1:]) * per_element


def _plain(tensor: onnx.TensorProto, graph: Graph) -> TensorFound:
    shape, readers = tuple(int(n) for n in tensor.dims), graph.readers[tensor.name]
    role: Role = "vector"
    if len(shape) >= 2 and readers & (GATHERS | MATMULS):
        role = "embedding" if readers & GATHERS else "linear"
    return TensorFound(
        name=tensor.name,
        role=role,
        dtype=onnx.TensorProto.DataType.Name(tensor.data_type).lower(),
        shape=shape,
        size_bytes=_bytes(tensor),
        shared=bool(role == "embedding" and readers & MATMULS),
    )


def _bytes(tensor: onnx.TensorProto) -> int:
    """Stored bytes, by type and shape."""
    bits: int | None = SUB_BYTE.get(tensor.data_type)
    if bits is None:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-prod(int(n) for n in tensor.dims) * bits // 8)


def _metadata(model: onnx.ModelProto) -> dict[str, str]:
    return dict(_facts(model))


def _facts(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    operators: dict[str, int] = {}
    for node in model.graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    yield "producer", f"{model.producer_name} {model.producer_version}".strip() or "not named"
    yield "opsets", ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import)
    yield "inputs", shortened(", ".join(i.name for i in model.graph.input))
    yield "outputs", shortened(", ".join(o.name for o in model.graph.output))
    yield "operators", shortened(", ".join(f"{n} {c}" for n, c in sorted(operators.items(), key=lambda x: -x[1])))
    yield from ((p.key, shortened(p.value)) for p in model.metadata_props)
