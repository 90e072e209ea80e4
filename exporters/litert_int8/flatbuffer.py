"""A `.tflite` file, written operator by operator with LiteRT's own schema.

File layout: the flatbuffer (root at its start, identifier TFL3), then the contents of all large buffers,
each at a multiple of 64 bytes. The flatbuffer's Buffer entries name them by absolute offset and
size (schema.fbs: "offset" and "size" of Buffer), so a runtime maps them into memory without copying, and
the file may grow beyond the 2 GiB that one flatbuffer can address. Offset and size are scalars of fixed width: the
flatbuffer is packed once to learn its length and again with the true offsets.

Buffers are shared: a constant asked for twice by the same name is one buffer, also across subgraphs, which
is how both signatures hold the weights once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from lilliput.errors import ArtifactError

ALIGNMENT = 64
INLINE_BYTES = 1024  # shapes and other small constants stay inside the flatbuffer
SCHEMA_VERSION = 3
IDENTIFIER = b"TFL3"
DESCRIPTION = "Lilliput"

Array = npt.NDArray[Any]

TENSOR_TYPES = {
    "float32": schema.TensorType.FLOAT32,
    "float16": schema.TensorType.FLOAT16,
    "int32": schema.TensorType.INT32,
    "int8": schema.TensorType.INT8,
    "int4": schema.TensorType.INT4,
    "int2": schema.TensorType.INT2,
}

# Version of each operator: what litert-torch 0.10 and ai-edge-quantizer 0.10 write for the same operator.
OPERATOR_VERSIONS = {
    "ADD": 1,
    "BATCH_MATMUL": 1,
    "CAST": 1,
    "CONCATENATION": 1,
    "DEQUANTIZE": 2,
    "DYNAMIC_UPDATE_SLICE": 1,
    "EMBEDDING_LOOKUP": 1,
    "FULLY_CONNECTED": 5,
    "GELU": 1,
    "LOGISTIC": 1,
    "MAXIMUM": 1,
    "MEAN": 1,
    "MINIMUM": 1,
    "MUL": 1,
    "PACK": 1,
    "RESHAPE": 1,
    "RSQRT": 1,
    "SLICE": 1,
    "SOFTMAX": 1,
    "SQUARED_DIFFERENCE": 1,
    "STRIDED_SLICE": 1,
    "SUB": 1,
    "TANH": 1,
    "TRANSPOSE": 1,
}

# The same where the output is int8 (tensorflow/lite/tools/versioning/op_version.cc).
INT8_VERSIONS = {
    "ADD": 2,
    "BATCH_MATMUL": 2,
    "CONCATENATION": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "FULLY_CONNECTED": 5,
    "GATHER": 2,
    "GELU": 2,
    "HARD_SWISH": 1,
    "LOGISTIC": 2,
    "MAXIMUM": 2,
    "MAX_POOL_2D": 2,
    "MEAN": 2,
    "MINIMUM": 2,
    "MUL": 2,
    "PAD": 2,
    "QUANTIZE": 2,
    "RELU": 2,
    "RESHAPE": 1,
    "SOFTMAX": 2,
    "STRIDED_SLICE": 2,
    "SUB": 2,
    "TANH": 2,
    "TRANSPOSE": 2,
}


@dataclass(frozen=True)
class Blocks:
    """Scales of a block-quantized tensor: (rows, n_blocks) float16, and how many columns share one."""

    scales: Array
    block_size: int


class Model:
    """The file in the making: buffers and operator codes that all subgraphs share."""

    def __init__(self) -> None:
        self._buffers: list[Array | None] = [None]  # buffer 0 is the empty one, by the format's rule
        self._named: dict[str, int] = {}
        self._codes: dict[tuple[str, int], int] = {}
        self._graphs: list[Graph] = []
        self._metadata: dict[str, int] = {}

    def graph(self, name: str) -> Graph:
        """A new subgraph; its signature has the same name."""
        self._graphs.append(Graph(self, name))
        return self._graphs[-1]

    def buffer(self, name: str, data: Array) -> int:
        """The index of the buffer of that name, made from `data` (any dtype, C order) if it is new."""
        if name not in self._named:
            self._named[name] = len(self._buffers)
            self._buffers.append(np.ascontiguousarray(data))
        return self._named[name]

    def code(self, operator: str, version: int) -> int:
        return self._codes.setdefault((operator, version), len(self._codes))

    def metadata(self, name: str, text: str) -> None:
        """A named text; its buffer stays inside the flatbuffer, where readers of metadata look for it."""
        self._metadata[name] = self.buffer(name, np.frombuffer(text.encode(), dtype=np.uint8))

    def write(self, path: Path) -> None:
        """Write the file; the same calls give the same bytes."""
        inline = set(self._metadata.values())
        large = {
            i: b for i, b in enumerate(self._buffers) if b is not None and b.nbytes > INLINE_BYTES and i not in inline
        }
        start = _align(len(self._pack(dict.fromkeys(large, (1, 1)))))
        places: dict[int, tuple[int, int]] = {}
        for i, data in large.items():
            places[i] = (start, data.nbytes)
            start = _align(start + data.nbytes)
        with path.open("wb") as file:
            file.write(self._pack(places))
            for i, (offset, _) in places.items():
                file.write(b"\0" * (offset - file.tell()))
                file.write(large[i].data)

    def _pack(self, places: Mapping[int, tuple[int, int]]) -> bytes:
        """The flatbuffer, with large buffers at `places` (offset, size)."""
        model = schema.ModelT()
        model.version, model.description = SCHEMA_VERSION, DESCRIPTION
        model.operatorCodes = [_operator_code(*code) for code in self._codes]
        model.subgraphs = [graph.table() for graph in self._graphs]
        model.signatureDefs = [graph.signature(i) for i, graph in enumerate(self._graphs)]
        model.buffers = [_buffer(data, places.get(i)) for i, data in enumerate(self._buffers)]
        model.metadata = [_metadata(name, buffer) for name, buffer in self._metadata.items()]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())


class Graph:
    """One subgraph: tensors, operators, and the named inputs and outputs of its signature."""

    def __init__(self, model: Model, name: str) -> None:
        self.model, self.name = model, name
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[str] = []
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._constants: dict[str, int] = {}
        self._inputs: dict[str, int] = {}
        self._outputs: dict[str, int] = {}

    def tensor(self, shape: Sequence[int], dtype: str = "float32", name: str | None = None, buffer: int = 0) -> int:
        """A new tensor's index."""
        table = schema.TensorT()
        table.shape, table.type = [int(n) for n in shape], TENSOR_TYPES[dtype]
        table.buffer, table.name, table.hasRank = buffer, name or f"{self.name}/{len(self._tensors)}", True
        table.quantization = schema.QuantizationParametersT()
        self._tensors.append(table)
        self.shapes.append(tuple(int(n) for n in shape))
        self.dtypes.append(dtype)
        return len(self._tensors) - 1

    def input(self, name: str, shape: Sequence[int], dtype: str = "float32", tensor: str | None = None) -> int:
        """A named input of the signature; `tensor` is its tensor's own name."""
        self._inputs[name] = self.tensor(shape, dtype, tensor or f"{self.name}_{name}")
        return self._inputs[name]

    def output(self, name: str, tensor: int) -> None:
        self._outputs[name] = tensor

    def constant(self, name: str, data: Array, dtype: str | None = None, shape: Sequence[int] | None = None) -> int:
        """The tensor of that name, with `data` as its buffer. `dtype` and `shape` where data is packed."""
        if name not in self._constants:
            buffer = self.model.buffer(name, data)
            self._constants[name] = self.tensor(shape or data.shape, dtype or data.dtype.name, name, buffer)
        return self._constants[name]

    def has_constant(self, name: str) -> bool:
        return name in self._constants

    def quantize(self, tensor: int, scales: Array | Blocks) -> None:
        """Say how a tensor of codes is scaled: (rows,) float32 per channel, or per block."""
        parameters = self._tensors[tensor].quantization
        if isinstance(scales, Blocks):
            details = schema.BlockwiseQuantizationT()
            details.scales = self.constant(f"{self._tensors[tensor].name}.scales", scales.scales)
            details.zeroPoints, details.blockSize = -1, scales.block_size
            parameters.details, parameters.detailsType = details, schema.QuantizationDetails.BlockwiseQuantization
        else:
            parameters.scale = scales.astype(np.float32)
            parameters.zeroPoint = np.zeros(scales.size, dtype=np.int64)

    def place(self, tensor: int, scales: Array, zero_points: Array, axis: int = 0) -> None:
        """Say that a tensor of integers is x ≈ scale · (code − zero point), per tensor or along an axis."""
        parameters = self._tensors[tensor].quantization
        parameters.scale, parameters.zeroPoint = scales.astype(np.float32), zero_points.astype(np.int64)
        parameters.quantizedDimension = axis

    def operator(self, code: str, inputs: Sequence[int], outputs: Sequence[int], **options: object) -> None:
        """Append an operator; -1 is an absent input. `options` are fields of the operator's options table."""
        table = schema.OperatorT()
        versions = INT8_VERSIONS if self.dtypes[outputs[0]] == "int8" else OPERATOR_VERSIONS
        table.opcodeIndex = self.model.code(code, versions[code])
        table.inputs, table.outputs = list(inputs), list(outputs)
        if options:
            kind = OPTIONS[code]
            table.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            table.builtinOptions = getattr(schema, f"{kind}T")()
            for field, value in options.items():
                setattr(table.builtinOptions, field, value)
        self._operators.append(table)

    def table(self) -> Any:
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = self.name, self._tensors, self._operators
        graph.inputs, graph.outputs = list(self._inputs.values()), list(self._outputs.values())
        return graph

    def signature(self, index: int) -> Any:
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = self.name, index
        signature.inputs, signature.outputs = _tensor_map(self._inputs), _tensor_map(self._outputs)
        return signature


OPTIONS = {
    "ADD": "AddOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "CAST": "CastOptions",
    "CONCATENATION": "ConcatenationOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "GATHER": "GatherOptions",
    "GELU": "GeluOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "MUL": "MulOptions",
    "PACK": "PackOptions",
    "SOFTMAX": "SoftmaxOptions",
    "STRIDED_SLICE": "StridedSliceOptions",
    "SUB": "SubOptions",
}


def _tensor_map(tensors: Mapping[str, int]) -> list[Any]:
    def entry(name: str, index: int) -> Any:
        table = schema.TensorMapT()
        table.name, table.tensorIndex = name, index
        return table

    return [entry(name, index) for name, index in tensors.items()]


def _metadata(name: str, buffer: int) -> Any:
    table = schema.MetadataT()
    table.name, table.buffer = name, buffer
    return table


def _operator_code(name: str, version: int) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, name)
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)  # the old field is a byte; 127 says "see the new one"
    code.version = version
    return code


def _buffer(data: Array | None, place: tuple[int, int] | None) -> Any:
    table = schema.BufferT()
    if place is not None:
        table.offset, table.size = place
    elif data is not None:
        table.data = np.frombuffer(data.tobytes(), dtype=np.uint8)
    return table


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A constant of a written file: its bytes as they lie there, and its scales."""

    name: str
    type: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]
    scales: Array | Blocks | None


def read_constants(path: Path) -> Iterator[StoredTensor]:
    """Every named constant of the file's first subgraph and of those after it, each once."""
    raw, model = _open(path)
    seen: set[str] = set()
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            name = tensor.name.decode()
            data = _contents(raw, model.buffers[tensor.buffer])
            if data is None or name in seen:
                continue
            seen.add(name)
            yield StoredTensor(name, _type_name(tensor.type), _shape(tensor), data, _scales(raw, model, graph, tensor))


@dataclass(frozen=True, eq=False)
class StoredGrid:
    """How a tensor of integers is scaled: x ≈ scale · (code − zero point), along `axis` where there are several."""

    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.int64]
    axis: int


def read_grids(path: Path) -> dict[str, StoredGrid]:
    """Of every tensor of the file that has one, constants and values, by name."""
    _, model = _open(path)
    return {
        tensor.name.decode(): StoredGrid(
            np.asarray(tensor.quantization.scale, np.float32),
            np.asarray(tensor.quantization.zeroPoint, np.int64),
            int(tensor.quantization.quantizedDimension),
        )
        for graph in model.subgraphs
        for tensor in graph.tensors
        if tensor.quantization is not None and tensor.quantization.scale is not None
    }


def _open(path: Path) -> tuple[npt.NDArray[np.uint8], Any]:
    """The file's bytes, mapped, and its flatbuffer. Raises ArtifactError where it is no whole `.tflite`."""
    if not path.is_file() or path.stat().st_size < 8:
        raise ArtifactError(f"{path}: no .tflite file")
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    if raw[4:8].tobytes() != IDENTIFIER:
        raise ArtifactError(f"{path}: not a .tflite file (its identifier is not {IDENTIFIER.decode()})")
    try:
        model = schema.ModelT.InitFromPackedBuf(raw, 0)
    except (struct.error, IndexError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: a damaged .tflite file ({error})") from error
    end = max((b.offset + b.size for b in model.buffers), default=0)
    if end > len(raw):
        raise ArtifactError(f"{path}: truncated: {len(raw)} bytes, its buffers end at {end}")
    return raw, model


def _type_name(number: int) -> str:
    return next((name for name, value in TENSOR_TYPES.items() if value == number), f"type {number}")


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in tensor.shape) if tensor.shape is not None else ()


def _contents(raw: npt.NDArray[np.uint8], buffer: Any) -> npt.NDArray[np.uint8] | None:
    if buffer.offset:
        return raw[buffer.offset : buffer.offset + buffer.size]
    return None if buffer.data is None else np.asarray(buffer.data, dtype=np.uint8)


def _scales(raw: npt.NDArray[np.uint8], model: Any, graph: Any, tensor: Any) -> Array | Blocks | None:
    parameters = tensor.quantization
    if parameters is None:
        return None
    if parameters.detailsType == schema.QuantizationDetails.BlockwiseQuantization:
        scales = graph.tensors[parameters.details.scales]
        data = _contents(raw, model.buffers[scales.buffer])
        assert data is not None
        return Blocks(data.view(np.float16).reshape(_shape(scales)), parameters.details.blockSize)
    return None if parameters.scale is None else np.asarray(parameters.scale, dtype=np.float32)
