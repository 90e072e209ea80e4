"""TFLite, alone or in a .litertlm bundle: constant tensors by LiteRT's own schema, each buffer once.

A quantized tensor's type names its bits; its scales lie in its quantization parameters (per channel), or in another
constant tensor that its blockwise details name; their bytes are counted with it. Roles come from the
operators that read a tensor: a table that EMBEDDING_LOOKUP or GATHER reads is the embedding, and the head too
where FULLY_CONNECTED reads it as well; else the head is the FULLY_CONNECTED table of the embedding's shape.

What XNNPACK takes of a file is asked of the interpreter (lilliput.delegation), the one thing here that opens a runtime.
A bundle (lilliput.lm_bundle) holds the model in its TFLiteModel section.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from lilliput import lm_bundle
from lilliput.delegation import delegation
from lilliput.errors import ArtifactError, MissingPackageError
from lilliput.inspection.found import Contents, TensorFound, shortened
from lilliput.model import Role

try:
    from ai_edge_litert import schema_py_generated as schema
except ModuleNotFoundError as missing:
    raise MissingPackageError("ai-edge-litert", "litert", "reading a .tflite file") from missing

MAGIC = b"TFL3"  # the file identifier, at byte 4
SHORTEST_BYTES = 32
TYPE_NAMES = {value: name for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
TYPE_BITS = {
    "INT2": 2,
    "INT4": 4,
    "UINT4": 4,
    "INT8": 8,
    "UINT8": 8,
    "BOOL": 8,
    "FLOAT16": 16,
    "BFLOAT16": 16,
    "INT16": 16,
}
LOOKUPS, MATMULS = ("EMBEDDING_LOOKUP", "GATHER"), ("FULLY_CONNECTED", "BATCH_MATMUL", "CONV_2D")
OPERATOR_NAMES = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}


@dataclass(frozen=True)
class Constant:
    """A constant tensor: its buffer's index, and the operators that read it."""

    name: str
    buffer: int
    type: str
    shape: tuple[int, ...]
    scales: int  # how many, and with how many bytes
    scale_bytes: int
    block_size: int
    readers: frozenset[str]


def read(file: Path) -> Contents:
    """Raises ArtifactError where the file is neither, or is damaged."""
    if file.stat().st_size < SHORTEST_BYTES:
        raise ArtifactError(f"{file}: {file.stat().st_size} bytes are no model: write it again")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            if data[:8] == lm_bundle.MAGIC:
                return _bundle(file, data)
            if data[4:8] != MAGIC:
                raise ArtifactError(f"{file}: begins with neither {MAGIC!r} nor {lm_bundle.MAGIC!r}: not a TFLite file")
            found = _model(bytes(data), "TFLite")
        except lm_bundle.DAMAGES as error:
            raise ArtifactError(f"{file}: is damaged ({type(error).__name__} in its tables): write it again") from error
    return replace(found, metadata={**found.metadata, "XNNPACK takes": _delegation(file)})


def _delegation(file: Path) -> str:
    try:
        return str(delegation(file))
    except (RuntimeError, ValueError) as error:  # the interpreter's own: operators of other packages, sizes not known
        return f"not known, the interpreter does not open it ({shortened(error)})"


def _bundle(file: Path, data: mmap.mmap) -> Contents:
    listed = lm_bundle.sections(data[:])
    models = [section for section in listed if section.kind == lm_bundle.MODEL]
    if not models or listed[-1].end > len(data):
        raise ArtifactError(f"{file}: holds no whole {lm_bundle.MODEL} section: write it again")
    inner = _model(data[models[0].begin : models[0].end], "LiteRT-LM bundle")
    names = ", ".join(f"{section.kind} ({section.end - section.begin:,} bytes)" for section in listed)
    return replace(inner, metadata={"sections": names, **inner.metadata})


def _model(data: bytes, kind: str) -> Contents:
    model = schema.Model.GetRootAs(data, 0)
    constants = _once(_constants(model))
    tensors = tuple(_tensor(constant, constants) for constant in constants if prod(constant.shape) > 1)
    signatures = [model.SignatureDefs(i).SignatureKey().decode() for i in range(model.SignatureDefsLength())]
    description = (model.Description() or b"").decode()
    facts = {"description": description, "signatures": ", ".join(signatures), "operators": _operators(model)}
    return Contents(kind, tensors, {key: shortened(value) for key, value in facts.items()})


def _constants(model: Any) -> Iterator[Constant]:
    """Every constant of every subgraph; a table that two subgraphs share comes twice."""
    for graph in (model.Subgraphs(i) for i in range(model.SubgraphsLength())):
        readers = _readers(model, graph)
        scales = {_details(graph.Tensors(i)).scales for i in range(graph.TensorsLength()) if _details(graph.Tensors(i))}
        for index in range(graph.TensorsLength()):
            tensor = graph.Tensors(index)
            buffer = model.Buffers(tensor.Buffer())
            if index in scales or not (buffer.DataLength() or buffer.Size()):
                continue
            yield _constant(graph, tensor, readers.get(index, frozenset()))


def _constant(graph: Any, tensor: Any, readers: frozenset[str]) -> Constant:
    parameters, details = tensor.Quantization(), _details(tensor)
    count = parameters.ScaleLength() if parameters else 0
    scale_bytes, block_size = 4 * count, 0
    if details:
        table = graph.Tensors(details.scales)
        count, block_size = prod(_shape(table)), details.blockSize
        scale_bytes = count * TYPE_BITS.get(TYPE_NAMES[table.Type()], 32) // 8
    name = (tensor.Name() or b"").decode(errors="replace")
    kind = TYPE_NAMES[tensor.Type()]
    return Constant(name, tensor.Buffer(), kind, _shape(tensor), count, scale_bytes, block_size, readers)


def _details(tensor: Any) -> Any:
    """Blockwise quantization of a tensor, or None."""
    parameters = tensor.Quantization()
    if not parameters or parameters.DetailsType() != schema.QuantizationDetails.BlockwiseQuantization:
        return None
    return schema.QuantizationDetailsCreator(parameters.DetailsType(), parameters.Details())


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(tensor.Shape(i)) for i in range(tensor.ShapeLength()))


def _name_of(model: Any, operator: Any) -> str:
    code = model.OperatorCodes(operator.OpcodeIndex())
    if code.CustomCode():
        return str(code.CustomCode().decode())
    name: str = OPERATOR_NAMES[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
    return name


def _readers(model: Any, graph: Any) -> dict[int, frozenset[str]]:
    """Tensor index → names of the operators that read it."""
    found: dict[int, set[str]] = {}
    for i in range(graph.OperatorsLength()):
        operator = graph.Operators(i)
        for j in range(operator.InputsLength()):
            found.setdefault(int(operator.Inputs(j)), set()).add(_name_of(model, operator))
    return {index: frozenset(names) for index, names in found.items()}


def _operators(model: Any) -> str:
    counts: dict[str, int] = {}
    for graph in (model.Subgraphs(i) for i in range(model.SubgraphsLength())):
        for i in range(graph.OperatorsLength()):
            name = _name_of(model, graph.Operators(i))
            counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda x: -x[1]))


def _once(constants: Iterator[Constant]) -> list[Constant]:
    """One constant a buffer, with the readers of all."""
    together: dict[int, Constant] = {}
    for constant in constants:
        known = together.get(constant.buffer)
        together[constant.buffer] = (
            constant if known is None else replace(known, readers=known.readers | constant.readers)
        )
    return list(together.values())


def _tensor(constant: Constant, everything: list[Constant]) -> TensorFound:
    bits = TYPE_BITS.get(constant.type, 64 if "64" in constant.type else 32)
    dtype = constant.type.lower()
    if constant.block_size:
        dtype += f" in blocks of {constant.block_size}"
    elif constant.scales:
        dtype += " per channel" if constant.scales > 1 else " per tensor"
    return TensorFound(
        name=constant.name,
        role=_role(constant, everything),
        dtype=dtype,
        shape=constant.shape,
        size_bytes=-(-prod(constant.shape) * bits // 8) + constant.scale_bytes,
        shared=bool(constant.readers & set(LOOKUPS) and constant.readers & set(MATMULS)),
    )


def _role(constant: Constant, everything: list[Constant]) -> Role:
    if len(constant.shape) < 2 or constant.type in ("INT32", "INT64", "BOOL"):
        return "vector"
    tables = [c for c in everything if c.readers & set(LOOKUPS)]
    if constant in tables:  # smaller ones are positions
        return "embedding" if prod(constant.shape) == max(prod(c.shape) for c in tables) else "vector"
    if not constant.readers & set(MATMULS):
        return "vector"
    tied = any(c.readers & set(MATMULS) for c in tables)
    is_head = not tied and any(c.shape == constant.shape for c in tables)
    return "head" if is_head else "linear"
