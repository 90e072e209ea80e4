"""A TFLite file, alone or in a .litertlm bundle, as rules see it: subgraphs, constants, and their numbers.

x = scale * (code - zero_point), a scale a tensor, a channel (`quantizedDimension`) or, with BlockwiseQuantization, a
block of columns. 4-bit codes lie two to a byte, the first in the low nibble. A large buffer lies behind the
flatbuffer, at the offset that its entry names. Source: LiteRT's schema.fbs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from lilliput import lm_bundle
from lilliput.checks.base import NotCheckedError
from lilliput.checks.onnx_view import rotary_base
from lilliput.checks.opened import Fact, Part, Tensor
from lilliput.errors import ArtifactError
from lilliput.grid import Float
from lilliput.inspection.found import TensorFound
from lilliput.inspection.tflite_file import OPERATOR_NAMES, TYPE_NAMES

Bytes = npt.NDArray[np.uint8]
NUMPY = {"FLOAT32": "<f4", "FLOAT16": "<f2", "INT8": "i1", "UINT8": "u1", "INT16": "<i2", "INT32": "<i4"}
PACKED = {"INT2": 2, "INT4": 4}  # bits of a code, the first in a byte's lowest
ROOTS = ("embedding", "position_embedding", "layers", "norm", "head")


@dataclass(frozen=True)
class Operator:
    """One operator of a subgraph: its name, indices of tensors (-1: absent), and its options, of the schema's class."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Any = None


@dataclass(frozen=True, eq=False)
class Graph:
    """A subgraph, with the names of its signature."""

    name: str
    tensors: tuple[Any, ...]
    operators: tuple[Operator, ...]
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]

    def shape(self, index: int) -> tuple[int, ...]:
        shape = self.tensors[index].shape
        return tuple(int(n) for n in shape) if shape is not None else ()

    def type(self, index: int) -> str:
        return str(TYPE_NAMES[self.tensors[index].type])

    def tensor_name(self, index: int) -> str:
        return name_of(self.tensors[index])


@dataclass(frozen=True, eq=False)
class TfliteFile:
    """The flatbuffer `data` (of a bundle: its model's section), unpacked."""

    path: Path
    data: Bytes
    model: Any

    @cached_property
    def graphs(self) -> tuple[Graph, ...]:
        signatures = {s.subgraphIndex: s for s in self.model.signatureDefs or ()}
        codes = [_operator_name(code) for code in self.model.operatorCodes]
        return tuple(_graph(graph, codes, signatures.get(i)) for i, graph in enumerate(self.model.subgraphs))

    def content(self, tensor: Any) -> Bytes | None:
        """The bytes of a constant tensor, or None."""
        buffer = self.model.buffers[tensor.buffer]
        if buffer.offset > 1:
            return self.data[buffer.offset : buffer.offset + buffer.size]
        return None if buffer.data is None else np.asarray(buffer.data, np.uint8)

    def codes(self, tensor: Any) -> npt.NDArray[Any]:
        """The stored numbers of a constant, in its shape, not yet scaled. Raises NotCheckedError for other types."""
        kind, shape, raw = TYPE_NAMES[tensor.type], tuple(int(n) for n in tensor.shape), self.content(tensor)
        if raw is None:
            raise NotCheckedError(f"{name_of(tensor)} has no bytes")
        try:
            if kind in PACKED:
                return _unpacked(raw, PACKED[kind])[: int(np.prod(shape))].reshape(shape)
            return raw.view(NUMPY[kind]).reshape(shape)
        except (KeyError, ValueError) as error:
            raise NotCheckedError(f"{name_of(tensor)}: {kind} {shape} has {len(raw)} bytes") from error

    def numbers(self, graph: Graph, tensor: Any) -> Float:
        """A constant dequantized, float32."""
        codes, scales = self.codes(tensor).astype(np.float32), self.scales(graph, tensor)
        if scales is None:
            return codes
        zeros = tensor.quantization.zeroPoint
        blocks = block_size(tensor)
        if blocks:
            whole = np.repeat(scales, blocks, axis=-1)[..., : codes.shape[-1]]
            return np.asarray(codes * whole, np.float32)
        zero = np.zeros_like(scales) if zeros is None else np.asarray(zeros, np.float32)
        shape = [1] * codes.ndim
        if scales.size > 1:
            shape[tensor.quantization.quantizedDimension] = -1
        return np.asarray((codes - zero.reshape(shape)) * scales.reshape(shape), np.float32)

    def scales(self, graph: Graph, tensor: Any) -> Float | None:
        """(n,) float32, or in blocks (rows, n_blocks); None where the tensor is not quantized."""
        parameters = tensor.quantization
        if parameters is None:
            return None
        if block_size(tensor):
            return np.asarray(self.codes(graph.tensors[parameters.details.scales]), np.float32)
        found = parameters.scale
        return None if found is None or not len(found) else np.asarray(found, np.float32)


def name_of(tensor: Any) -> str:
    return (tensor.name or b"").decode(errors="replace")


def block_size(tensor: Any) -> int:
    """Columns of a block, 0 where the tensor has none."""
    parameters = tensor.quantization
    kind = schema.QuantizationDetails.BlockwiseQuantization
    return int(parameters.details.blockSize) if parameters and parameters.detailsType == kind else 0


def _operator_name(code: Any) -> str:
    if code.customCode:
        return str(code.customCode.decode())
    return str(OPERATOR_NAMES[max(code.builtinCode, code.deprecatedBuiltinCode)])


def _graph(graph: Any, codes: list[str], signature: Any) -> Graph:
    operators = tuple(
        Operator(codes[o.opcodeIndex], tuple(map(int, o.inputs)), tuple(map(int, o.outputs)), o.builtinOptions)
        for o in graph.operators or ()
    )
    name = signature.signatureKey if signature else graph.name or b""
    return Graph(
        name.decode() if isinstance(name, bytes) else str(name),
        tuple(graph.tensors),
        operators,
        _names(graph, signature.inputs if signature else None, graph.inputs),
        _names(graph, signature.outputs if signature else None, graph.outputs),
    )


def _names(graph: Any, listed: Any, indices: Any) -> dict[str, int]:
    if listed:
        return {_string(entry.name): int(entry.tensorIndex) for entry in listed}
    return {name_of(graph.tensors[i]): int(i) for i in (indices if indices is not None else ())}


def _string(text: Any) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)


def open_file(path: Path) -> TfliteFile:
    """Raises ArtifactError where the file is neither a TFLite model nor a bundle of one, or is damaged."""
    try:
        data: Bytes = np.fromfile(path, np.uint8)
        if data[:8].tobytes() == lm_bundle.MAGIC:
            data = bundled_model(path, data)
        return TfliteFile(path, data, schema.ModelT.InitFromPackedBuf(data, 0))
    except (struct.error, IndexError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: is damaged ({type(error).__name__} in its tables): write it again") from error


def bundled_model(path: Path, data: Bytes) -> Bytes:
    """The bytes of the model in a bundle."""
    for section in lm_bundle.sections(data.tobytes()):
        if section.kind == lm_bundle.MODEL:
            return np.ascontiguousarray(data[section.begin : section.end])
    raise ArtifactError(f"{path}: holds no {lm_bundle.MODEL} section: write it again")


def tensors(file: TfliteFile, found: tuple[TensorFound, ...]) -> tuple[Tensor, ...]:
    """The weights that an inspection found, each once, with their numbers."""
    wanted, made = {t.name: t for t in found}, dict[str, Tensor]()
    for graph in file.graphs:
        for tensor in graph.tensors:
            name = name_of(tensor)
            kind = TYPE_NAMES[tensor.type]
            if name in wanted and name not in made and kind in (*NUMPY, *PACKED) and kind != "INT32":
                made[name] = _tensor(file, graph, tensor, wanted[name])
    return tuple(made.values())


def _tensor(file: TfliteFile, graph: Graph, tensor: Any, found: TensorFound) -> Tensor:
    kind = TYPE_NAMES[tensor.type]
    scaled = tensor.quantization is not None and (
        block_size(tensor) or (tensor.quantization.scale is not None and len(tensor.quantization.scale))
    )
    dtype = found.dtype if scaled or "FLOAT" not in kind else kind
    return Tensor(
        found.name,
        found.role,
        dtype,
        found.shape,
        block_size(tensor),
        partial(file.numbers, graph, tensor),
        1 if kind == "INT4" else 0,
        _parts(found.name, found.shape[0] if found.shape else 1),
    )


def _unpacked(raw: Bytes, bits: int) -> npt.NDArray[np.int8]:
    """The codes of bytes, in order, in two's complement."""
    fields = raw[:, None] >> np.arange(0, 8, bits, dtype=np.uint8) & ((1 << bits) - 1)
    sign = 1 << (bits - 1)
    return np.asarray((fields.reshape(-1) ^ sign).astype(np.int8) - sign, np.int8)


def _parts(name: str, rows: int) -> tuple[Part, ...]:
    """Our own names say which parameters a constant holds: `a:2+b:3`, or a plain name."""
    if name.split(".", 1)[0].split(":", 1)[0] not in ROOTS or name.endswith(".scales"):
        return ()
    if ":" not in name:
        return (Part(name, rows),)
    pieces = [piece.rpartition(":") for piece in name.split("+")]
    return tuple(Part(part, int(count)) for part, _, count in pieces)


CACHE = ("kv_cache_k_", "kv_cache_v_")  # litert-torch's and LiteRT-LM's names of the caches


def facts(file: TfliteFile) -> dict[str, Fact]:
    """What the graph computes with, by field of DecoderConfig."""
    return dict(_facts(file))


def _facts(file: TfliteFile) -> Iterator[tuple[str, Fact]]:
    for graph in file.graphs:
        caches = {name: i for name, i in graph.inputs.items() if name.startswith(CACHE[0])}
        if not caches:
            continue
        yield "num_layers", Fact(len(caches), f"inputs {CACHE[0]}* of {graph.name}")
        if "logits" in graph.outputs:
            yield "vocab_size", Fact(graph.shape(graph.outputs["logits"])[-1], f"output logits of {graph.name}")
    table = rotary_table(file)
    if table is not None:
        yield "context", Fact(table.shape[0], "rope")
        half = table.shape[1] // 4  # cosines of head_dim, then sines of head_dim
        base = rotary_base(table[:, :half], np.abs(table[:, 2 * half : 3 * half]))
        if base is not None:
            yield "rope_theta", Fact(base, "rope")


def rotary_table(file: TfliteFile) -> Float | None:
    """Our own table of cosines and sines (context, 2 head_dim), where the file has it."""
    for graph in file.graphs:
        for tensor in graph.tensors:
            if name_of(tensor) == "rope" and file.content(tensor) is not None:
                return np.asarray(file.codes(tensor), np.float32)
    return None
