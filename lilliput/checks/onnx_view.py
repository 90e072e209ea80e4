"""An ONNX file as rules see it: nodes, initializers, and the numbers of packed matrices.

MatMulNBits and GatherBlockQuantized hold a (rows, cols) matrix as codes of `bits` bits, the first in the low bits of a
byte, in blocks of `block_size` columns; x = scale * (code - zero_point), and a zero point that is not given is
2^(bits-1). DequantizeLinear holds codes of an integer type with a scale a tensor, a channel (`axis`), or a block of
`block_size` along `axis`. Weights in a data file beside the model are read when asked for.

Sources: onnxruntime, docs/ContribOperators.md (MatMulNBits, GatherBlockQuantized); onnx, docs/Operators.md
(DequantizeLinear-21).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from lilliput.checks.base import NotCheckedError
from lilliput.checks.opened import Fact, Part, Tensor
from lilliput.grid import Float
from lilliput.inspection.found import TensorFound
from lilliput.inspection.onnx_file import DEFAULT_BLOCKS, PACKED_OPERANDS, TRANSPARENT
from lilliput.model import DecoderConfig

Array = npt.NDArray[Any]
BITS_OF_TYPE = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT2: 2, TensorProto.UINT2: 2}


@dataclass(frozen=True)
class Packed:
    """A node that holds an n-bit matrix: names of its operands (initializers, looked through casts and reshapes)."""

    node: NodeProto
    bits: int
    block: int
    rows: int
    cols: int
    codes: str
    scales: str
    zero_points: str | None

    @property
    def n_blocks(self) -> int:
        return -(-self.cols // self.block)


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """The model and what its metadata says."""

    path: Path
    model: onnx.ModelProto

    @cached_property
    def initializers(self) -> Mapping[str, TensorProto]:
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    @cached_property
    def producers(self) -> Mapping[str, NodeProto]:
        return {name: node for node in self.nodes for name in node.output if name}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[NodeProto, ...]]:
        found: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @property
    def nodes(self) -> list[NodeProto]:
        return list(self.model.graph.node)

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """Our own metadata that is JSON, parsed; empty in files of others."""
        found = {}
        for entry in self.model.metadata_props:
            if entry.key.startswith("lilliput."):
                with suppress(ValueError):
                    found[entry.key.removeprefix("lilliput.")] = json.loads(entry.value)
        return found

    def origin(self, name: str) -> str | None:
        """The initializer that a value is made of, looked through casts and reshapes; None where there is none."""
        while name not in self.initializers:
            node = self.producers.get(name)
            if node is None or node.op_type not in TRANSPARENT or not node.input:
                return None
            name = node.input[0]
        return name

    def array(self, name: str) -> Array:
        """An initializer's numbers. Raises NotCheckedError where its data file is missing or short."""
        tensor = self.initializers[name]
        if tensor.data_location == TensorProto.EXTERNAL and not tensor.raw_data:
            tensor = TensorProto.FromString(tensor.SerializeToString())
            try:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(self.path.parent))
            except Exception as error:  # onnx raises its own and the disk's errors
                raise NotCheckedError(f"{name} cannot be read from its data file") from error
        try:
            return np.asarray(numpy_helper.to_array(tensor))
        except Exception as error:
            raise NotCheckedError(f"{name} has not the bytes of its shape") from error

    @cached_property
    def packed(self) -> tuple[Packed, ...]:
        """Every node with an n-bit matrix that is stored in the file."""
        return tuple(p for p in map(self._packed, self.nodes) if p is not None)

    def _packed(self, node: NodeProto) -> Packed | None:
        if node.op_type not in PACKED_OPERANDS:
            return None
        names = [node.input[i] if i < len(node.input) else "" for i in PACKED_OPERANDS[node.op_type]]
        codes, scales, zeros = (self.origin(name) if name else None for name in names)
        if codes is None or scales is None:
            return None
        tensor = self.initializers[codes]
        bits = BITS_OF_TYPE.get(tensor.data_type, attribute(node, "bits", 4))
        block = attribute(node, "block_size", DEFAULT_BLOCKS[node.op_type])
        rows = attribute(node, "N", int(tensor.dims[0]) if tensor.dims else 0)
        stored = int(np.prod(tensor.dims[1:])) * (1 if tensor.data_type in BITS_OF_TYPE else 8 // max(bits, 1))
        return Packed(node, bits, block, rows, attribute(node, "K", stored), codes, scales, zeros)

    def dequantized(self, packed: Packed) -> Float:
        """(rows, cols) float32 of a packed matrix. Raises NotCheckedError where the operands do not fit."""
        codes, scales = self.array(packed.codes), self.array(packed.scales).astype(np.float32)
        rows, n_blocks = packed.rows, packed.n_blocks
        try:
            if self.initializers[packed.codes].data_type in BITS_OF_TYPE:
                values = codes.astype(np.float32).reshape(rows, n_blocks, packed.block)
                middle = 0.0
            else:
                flat = codes.astype(np.uint8).reshape(rows, n_blocks, -1)
                values = unpack(flat, packed.bits).astype(np.float32).reshape(rows, n_blocks, packed.block)
                middle = float(1 << (packed.bits - 1))
            zeros: Float | float = middle
            if packed.zero_points is not None:
                zeros = self._zero_points(packed).reshape(rows, n_blocks, 1)
            whole: Float = (values - zeros) * scales.reshape(rows, n_blocks, 1)
        except ValueError as error:
            raise NotCheckedError(f"{packed.codes}: its operands do not fit its node") from error
        return whole.reshape(rows, -1)[:, : packed.cols]

    def _zero_points(self, packed: Packed) -> Float:
        assert packed.zero_points is not None
        stored = self.array(packed.zero_points)
        if stored.dtype != np.uint8:
            return stored.astype(np.float32)
        per_row = unpack(stored.reshape(packed.rows, -1), packed.bits)[:, : packed.n_blocks]
        return per_row.astype(np.float32)

    @cached_property
    def scaled(self) -> Mapping[str, tuple[str, str]]:
        """Stored codes that no DequantizeLinear turns into floats → the initializers of scale and zero point ("": 0):
        right operands (in, out) of integer products, and tables that are gathered before they are dequantized."""
        found = {}
        for node in self.nodes:
            names = self._scaled(node)
            if names is not None and names[0] in self.initializers and names[1] in self.initializers:
                found[names[0]] = names[1], names[2]
        return found

    def _scaled(self, node: NodeProto) -> tuple[str, str, str] | None:
        given = [*node.input, "", "", "", "", ""]
        if node.op_type == "MatMulInteger":
            return given[1], self._scale_behind(node.output[0]), given[3]
        if node.op_type == "MatMulIntegerToFloat":
            return given[1], given[3], given[5]
        if node.op_type == "DynamicQuantizeMatMul":
            return given[1], given[2], given[3]
        maker = self.producers.get(given[0]) if node.op_type == "DequantizeLinear" else None
        if maker is not None and maker.op_type == "Gather":
            return maker.input[0], given[1], given[2]
        return None

    def _scale_behind(self, product: str) -> str:
        """The stored scale that an integer product is multiplied by: product → Cast → Mul by (scale of a) * (scale)."""
        for node in self.consumers.get(product, ()):
            if node.op_type == "Cast":
                return self._scale_behind(node.output[0])
            if node.op_type == "Mul":
                other = next((n for n in node.input if n != product), "")
                maker = self.producers.get(other)
                names = [other, *(maker.input if maker is not None and maker.op_type == "Mul" else ())]
                return next((n for n in names if n in self.initializers), "")
        return ""

    def rescaled(self, codes: str) -> Float:
        """The numbers of `scaled` codes, in their stored shape; scales, where several, lie along the last axis."""
        scale, zero = self.scaled[codes]
        stored = self.array(codes).astype(np.float32)
        shift = self.array(zero).astype(np.float32) if zero in self.initializers else np.float32(0)
        try:
            return np.asarray((stored - shift) * self.array(scale).astype(np.float32), np.float32)
        except ValueError as error:
            raise NotCheckedError(f"{codes}: its scales do not fit its shape") from error

    def dequantize_linear(self, node: NodeProto) -> Float:
        """The numbers of a DequantizeLinear whose inputs are all stored."""
        parts = [self.array(name) for name in node.input if name]
        codes, scale = parts[0].astype(np.float32), parts[1].astype(np.float32)
        zero = parts[2].astype(np.float32) if len(parts) > 2 else np.zeros_like(scale)
        block, axis = attribute(node, "block_size", 0), attribute(node, "axis", 1)
        if block:
            stretch = partial(np.repeat, repeats=block, axis=axis)
            cut = tuple(slice(0, n) for n in codes.shape)
            return np.asarray((codes - stretch(zero)[cut]) * stretch(scale)[cut], np.float32)
        if scale.ndim == 1 and codes.ndim > 1:
            shape = [1] * codes.ndim
            shape[axis] = -1
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        return np.asarray((codes - zero) * scale, np.float32)


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute, or the operator's default."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """(…, n) bytes → (…, n * 8 / bits) codes, the first in the low bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(codes.reshape(*packed.shape[:-1], -1), np.uint8)


def place(node: NodeProto) -> str:
    """A node's name, or its first output's where it has none."""
    return str(node.name or node.output[0])


def tensors(file: OnnxFile, found: tuple[TensorFound, ...]) -> tuple[Tensor, ...]:
    """The tensors that an inspection found, with their numbers."""
    packed = {p.codes: p for p in file.packed}
    quantized = {n.input[0]: n for n in file.nodes if n.op_type == "DequantizeLinear" and _is_stored(file, n)}
    return tuple(_tensor(file, t, packed.get(t.name), quantized.get(t.name)) for t in found if _is_weight(file, t))


def _is_stored(file: OnnxFile, node: NodeProto) -> bool:
    return all(name in file.initializers for name in node.input if name)


def _is_weight(file: OnnxFile, found: TensorFound) -> bool:
    """Not a shape, an index, or a part of another tensor: scales and zero points of a DequantizeLinear."""
    if found.name in {p.codes for p in file.packed}:
        return True
    dequantized = {name for n in file.nodes if n.op_type == "DequantizeLinear" for name in n.input[:1]} | set(
        file.scaled
    )
    if found.name in {name for pair in file.scaled.values() for name in pair}:
        return False
    return found.dtype in ("float", "float16", "double", "bfloat16") or found.name in dequantized


def _tensor(file: OnnxFile, found: TensorFound, packed: Packed | None, node: NodeProto | None) -> Tensor:
    parts = _parts(file, found.name.removesuffix(".codes"), found.shape[0])
    if packed is not None:
        pair = 1 if packed.bits < 8 else 0
        read = partial(file.dequantized, packed)
        return Tensor(found.name, found.role, found.dtype, found.shape, packed.block, read, pair, parts)
    if node is not None:
        read = partial(file.dequantize_linear, node)
        return Tensor(found.name, found.role, found.dtype, found.shape, 0, read, 0, parts)
    if found.name in file.scaled:
        read = partial(file.rescaled, found.name)
        return Tensor(found.name, found.role, found.dtype, found.shape, 0, read, 0, parts)
    return Tensor(found.name, found.role, found.dtype, found.shape, 0, partial(_float, file, found.name), 0, parts)


def _float(file: OnnxFile, name: str) -> Float:
    return np.asarray(file.array(name), np.float32)


def _parts(file: OnnxFile, name: str, rows: int) -> tuple[Part, ...]:
    """Which decoder parameters a tensor holds, by our own metadata: none in files of others."""
    config, stacks = file.metadata.get("config"), file.metadata.get("stacks", {})
    if not config or name.startswith("rope."):
        return ()
    if name not in stacks:
        return (Part(name, rows),) if _is_parameter(name) else ()
    shapes = DecoderConfig(**config).parameter_shapes()
    return tuple(Part(part, shapes[part][0]) for part in stacks[name] if part in shapes)


def _is_parameter(name: str) -> bool:
    return name.split(".", 1)[0] in ("embedding", "position_embedding", "layers", "norm", "head")


def facts(file: OnnxFile) -> dict[str, Fact]:
    """What the graph itself computes with: layers, heads, rotary base."""
    return dict(_facts(file))


def _facts(file: OnnxFile) -> Iterator[tuple[str, Fact]]:
    caches = {v.name: v for v in file.model.graph.input if v.name.startswith("past_key_values.")}
    if caches:
        layers = {name.split(".")[1] for name in caches}
        yield "num_layers", Fact(len(layers), "graph inputs past_key_values.*")
    attention = next((n for n in file.nodes if n.op_type == "GroupQueryAttention"), None)
    if attention is not None:
        yield "num_heads", Fact(attribute(attention, "num_heads", 0), place(attention))
        yield "num_kv_heads", Fact(attribute(attention, "kv_num_heads", 0), place(attention))
    for norm in file.nodes:
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), None)
        if epsilon is not None and "Normalization" in norm.op_type:
            yield "norm_eps", Fact(float(epsilon), place(norm))
            break
    tables = rotary_tables(file)
    if tables is not None:
        yield "context", Fact(int(file.initializers[tables[0]].dims[0]), tables[0])
        with suppress(NotCheckedError):  # a data file that is missing has a rule of its own
            base = rotary_base(file.array(tables[0]), file.array(tables[1]))
            if base is not None:
                yield "rope_theta", Fact(base, tables[0])


def rotary_tables(file: OnnxFile) -> tuple[str, str] | None:
    """The names of the stored tables of cosines and sines, or None."""
    for node in file.nodes:
        begin = {"GroupQueryAttention": 7, "RotaryEmbedding": 2}.get(node.op_type)
        if begin is None or len(node.input) < begin + 2:
            continue
        cos, sin = node.input[begin], node.input[begin + 1]
        if cos in file.initializers and sin in file.initializers:
            return cos, sin
    return None


def rotary_base(cos: Array, sin: Array) -> float | None:
    """The base θ of rotary tables (positions, head_dim / 2): the angle of position 1 in column j is θ^(-2j / head_dim).

    None where there is but one column or one position. Column 1 is the best conditioned: its angle is far from 0.
    """
    if cos.ndim != 2 or cos.shape[0] < 2 or cos.shape[1] < 2:
        return None
    angle = float(np.arctan2(np.float64(sin[1, 1]), np.float64(cos[1, 1])))
    return float(angle ** -cos.shape[1]) if 0 < angle < 1 else None
