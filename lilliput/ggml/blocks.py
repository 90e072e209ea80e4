"""How GGUF stores a matrix: rows of blocks, each with float16 factors, integer scales and codes in bit planes.

    type     weights  bytes  in the order of the file                                         value
    Q4_0     32       18     d, codes                                                          d * (code - 8)
    Q4_1     32       20     d, m, codes                                                       d * code + m
    Q5_0     32       22     d, bit 4, low nibbles                                             d * (code - 16)
    Q5_1     32       24     d, m, bit 4, low nibbles                                          d * code + m
    Q8_0     32       34     d, codes int8                                                     d * code
    IQ4_NL   32       18     d, codebook indices                                               d * codebook
    IQ4_XS   256      136    d, 8 sc, codebook indices                                         d·(sc - 32) * codebook
    Q2_K     256      84     16 sc and m, codes, d, dmin                                       d·sc * code - dmin·m
    Q3_K     256      110    bit 2, low bits, 16 sc, d                                         d·(sc - 32) * (code - 4)
    Q4_K     256      144    d, dmin, 8 sc and m, codes                                        d·sc * code - dmin·m
    Q5_K     256      176    d, dmin, 8 sc and m, bit 4, low nibbles                           d·sc * code - dmin·m
    Q6_K     256      210    low nibbles, high bits, 16 sc int8, d                             d·sc * (code - 32)
    F16, F32

A row is its blocks one after the other; the file holds (rows, bytes) uint8. d, m and dmin are float16, so a grid
with float32 scales does not fit; both other scale dtypes do, exactly. Codes are stored unsigned, of Q8_0 as int8.

Blocks of 32 know no other size. A grid whose blocks are a multiple of 32 columns, or whole rows, is
stored with its scale repeated in each block of 32: the same numbers exactly. `unpack` puts them together
again, for which it must be told the grid.

Source: ggml/src/ggml-common.h (block_*), ggml-quants.c (dequantize_row_*).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as BlockType

from lilliput.errors import ArtifactError, ExportError
from lilliput.ggml.planes import Bytes, Plane, pack_scales, unpack_scales
from lilliput.grid import GGUF_GRIDS, IQ4_CODEBOOK, Codes, Float, GridSpec, QuantizedTensor

BLOCK = 32  # weights in a block of the types without super-blocks
SMALL_GRIDS = "int4-b32-min-f16, int5-b32, int8-b32 or iq4_nl"


@dataclass(frozen=True)
class Layout:
    """A block: which of d, m (or dmin), integer scales and codes stand in the file one after the other."""

    order: tuple[Literal["d", "m", "integers", "codes"], ...]
    codes: tuple[Plane, ...]
    code_bias: int = 0  # stored = code + bias, as a byte
    integers: tuple[Plane, ...] | None = None  # None: by pack_scales
    integer_bias: int = 0


LOW = Plane(0, 4, 16)
LAYOUTS = {
    BlockType.Q4_0: Layout(("d", "codes"), (LOW,), 8),
    BlockType.Q4_1: Layout(("d", "m", "codes"), (LOW,)),
    BlockType.Q5_0: Layout(("d", "codes"), (Plane(4, 1, 1), LOW), 16),
    BlockType.Q5_1: Layout(("d", "m", "codes"), (Plane(4, 1, 1), LOW)),
    BlockType.Q8_0: Layout(("d", "codes"), (Plane(0, 8, 1),)),
    BlockType.IQ4_NL: Layout(("d", "codes"), (LOW,)),
    BlockType.IQ4_XS: Layout(("d", "integers", "codes"), (LOW,), 0, (Plane(4, 2, 1), Plane(0, 4, 1)), 32),
    BlockType.Q2_K: Layout(("integers", "codes", "d", "m"), (Plane(0, 2, 32),), 0, (Plane(0, 4, 16),)),
    BlockType.Q3_K: Layout(
        ("codes", "integers", "d"), (Plane(2, 1, 32), Plane(0, 2, 32)), 4, (Plane(0, 4, 8), Plane(4, 2, 4)), 32
    ),
    BlockType.Q4_K: Layout(("d", "m", "integers", "codes"), (Plane(0, 4, 32),)),
    BlockType.Q5_K: Layout(("d", "m", "integers", "codes"), (Plane(4, 1, 32), Plane(0, 4, 32))),
    BlockType.Q6_K: Layout(("codes", "integers", "d"), (Plane(0, 4, 64), Plane(4, 2, 32)), 32, (Plane(0, 8, 1),)),
}
CODEBOOK = np.array(IQ4_CODEBOOK, np.int8)
INDEX = np.zeros(256, np.uint8)  # of a codebook entry, as a byte
INDEX[CODEBOOK.view(np.uint8)] = np.arange(len(CODEBOOK))


def refusal(spec: GridSpec, cols: int) -> str | None:
    """Why no block type holds the grid exactly, or None."""
    if spec.outliers:
        return f"a GGUF tensor has no columns at 16 bit beside its blocks: choose {replace(spec, outliers=0).name}"
    if spec.super_blocks:
        wide = spec.super_blocks.cols
        if cols % wide:
            return (
                f"{spec.name} has super-blocks of {wide} and rows of {cols} columns do not divide: choose {SMALL_GRIDS}"
            )
        return None
    if spec.offset == "zero_point":
        return "GGUF blocks have no zero points: choose a symmetric grid, or one with -min instead of -zp"
    if spec.offset == "minimum" and spec.bits > 5:
        return f"GGUF holds minima with 5 bits at most, not {spec.bits}: choose int5-b32-min-f16"
    if spec.scale_dtype == "float32":
        return "GGUF stores scales as float16: choose the grid without -f32"
    if spec.block_size % BLOCK:
        return f"GGUF blocks are {BLOCK} weights: a grid's block must be a multiple of it, not {spec.block_size}"
    if cols % BLOCK:
        return f"GGUF blocks are {BLOCK} weights and cannot pad: rows of {cols} columns do not divide"
    return None


def block_type(spec: GridSpec) -> BlockType:
    """The block type that holds a grid which `refusal` lets through."""
    if spec in GGUF_GRIDS.values():
        return BlockType[spec.name.upper()]
    if spec.offset == "minimum":
        return BlockType.Q4_1 if spec.bits <= 4 else BlockType.Q5_1
    return BlockType.Q4_0 if spec.bits <= 4 else BlockType.Q5_0 if spec.bits == 5 else BlockType.Q8_0


def stored(name: str, tensor: QuantizedTensor) -> tuple[BlockType, Bytes]:
    """Type and bytes of tensor `name`. Raises ExportError where no block type holds its grid."""
    refused = refusal(tensor.spec, tensor.shape[1])
    if refused:
        raise ExportError(f"{name} on grid {tensor.spec.name}: {refused}")
    return block_type(tensor.spec), pack(tensor)


def pack(tensor: QuantizedTensor) -> Bytes:
    """(rows, bytes a row) uint8, of type `block_type(tensor.spec)`."""
    kind, spec = block_type(tensor.spec), tensor.spec
    layout, (width, _) = LAYOUTS[kind], gguf.GGML_QUANT_SIZES[kind]
    stored = INDEX[tensor.codes.view(np.uint8)] if spec.codebook else tensor.codes.astype(np.uint8)
    codes = (stored + np.uint8(layout.code_bias)).reshape(tensor.shape[0], -1, width)  # modulo 256
    parts = dict(zip("dm", _factors(tensor), strict=False))
    parts["codes"] = np.concatenate([plane.pack(codes) for plane in layout.codes], axis=-1)
    if spec.super_blocks:
        parts["integers"] = _pack_integers(tensor, layout)
    return np.concatenate([parts[part] for part in layout.order], axis=-1).reshape(tensor.shape[0], -1)


def _factors(tensor: QuantizedTensor) -> Iterator[Bytes]:
    """d, and m or dmin where the grid has it: (rows, file blocks, 2) uint8 each."""
    if tensor.supers is not None:
        yield from (_half(tensor.supers[:, :, i]) for i in range(tensor.supers.shape[2]))
        return
    cols = tensor.shape[1]
    for part in (tensor.scales, tensor.offsets):
        if part is not None:  # each value repeated in every file block of its grid block
            repeated = np.repeat(np.asarray(part, np.float32), tensor.spec.width(cols) // BLOCK, axis=1)
            yield _half(repeated[:, : cols // BLOCK])


def _half(values: Float) -> Bytes:
    """(rows, blocks) float32 → (rows, blocks, 2) uint8 of float16; exact for numbers on the grid."""
    half = values.astype("<f2")
    assert np.array_equal(half.astype(np.float32), values), "scales left the grid"
    return np.ascontiguousarray(half)[..., None].view(np.uint8)


def _pack_integers(tensor: QuantizedTensor, layout: Layout) -> Bytes:
    """(rows, super-blocks, bytes) uint8: the integer scales, then the integer minima."""
    shape = (tensor.shape[0], tensor.spec.supers(tensor.shape[1]), -1)
    parts = [part.astype(np.int16).reshape(shape) for part in tensor.integers() if part is not None]
    stored = (np.concatenate(parts, axis=-1) + layout.integer_bias).astype(np.uint8)
    if layout.integers is None:
        return pack_scales(stored)
    return np.concatenate([plane.pack(stored) for plane in layout.integers], axis=-1)


def unpack(data: Bytes, spec: GridSpec, name: str) -> QuantizedTensor:
    """The inverse of `pack`. Raises ArtifactError where the blocks of tensor `name` do not repeat the grid's scales."""
    kind = block_type(spec)
    parts = _split(data, kind, spec)
    rows, layout = data.shape[0], LAYOUTS[kind]
    unsigned = join(parts["codes"], layout.codes)
    stored = CODEBOOK[unsigned] if spec.codebook else unsigned - np.uint8(layout.code_bias)  # modulo 256, as int8 is
    rowwise = stored.reshape(rows, -1)
    codes: Codes = rowwise.view(np.int8) if spec.symmetric else rowwise.view(np.uint8)
    halves = [parts[part].view("<f2")[..., 0].astype(np.float32) for part in "dm" if part in parts]
    if not spec.super_blocks:
        gathered = [_gather(half, spec, codes.shape[1], name) for half in halves]
        return QuantizedTensor(spec, codes, gathered[0], gathered[1] if len(gathered) == 2 else None)
    supers = np.stack(halves, axis=-1)  # (rows, super-blocks, 1 or 2)
    packed = parts["integers"]
    unsigned = unpack_scales(packed) if layout.integers is None else join(packed, layout.integers)
    integers = (unsigned - np.uint8(layout.integer_bias)).view(np.int8).astype(np.float32)
    products = integers.reshape(*supers.shape[:2], len(halves), -1) * supers[..., None]
    scales, *minima = (products[:, :, i].reshape(rows, -1) for i in range(len(halves)))
    return QuantizedTensor(spec, codes, scales, -minima[0] if minima else None, supers)


def _split(data: Bytes, kind: BlockType, spec: GridSpec) -> dict[str, Bytes]:
    """The parts of each block: (rows, blocks, bytes of the part) uint8, contiguous."""
    width, size = gguf.GGML_QUANT_SIZES[kind]
    layout, blocks = LAYOUTS[kind], data.reshape(data.shape[0], -1, size)
    sizes = {"d": 2, "m": 2, "codes": sum(plane.size(width) for plane in layout.codes)}
    sizes["integers"] = size - sum(sizes[part] for part in layout.order if part != "integers")
    ends = np.cumsum([sizes[part] for part in layout.order])
    return {
        part: np.ascontiguousarray(blocks[:, :, end - sizes[part] : end])
        for part, end in zip(layout.order, ends, strict=True)
    }


def join(packed: Bytes, planes: tuple[Plane, ...]) -> Bytes:
    """(…, bytes of planes one after the other) → (…, n) values of all their bits."""
    shares = np.cumsum([plane.bits for plane in planes]) * packed.shape[-1] // sum(plane.bits for plane in planes)
    pieces = np.split(packed, shares[:-1], axis=-1)
    parts = [plane.unpack(piece) for plane, piece in zip(planes, pieces, strict=True)]
    return np.asarray(np.bitwise_or.reduce(parts), np.uint8)


def _gather(stored: Float, spec: GridSpec, cols: int, name: str) -> Float:
    """(rows, file blocks) → (rows, grid's blocks), where a grid's block is several of the file's."""
    width = spec.width(cols) // BLOCK
    values = np.ascontiguousarray(stored[:, ::width])
    if not np.array_equal(np.repeat(values, width, axis=1)[:, : stored.shape[1]], stored):
        raise ArtifactError(f"{name}: scales differ within blocks of {spec.name}: the file was changed, export it anew")
    return values


def pack_float(values: Float) -> npt.NDArray[np.float16] | Float:
    """A tensor that stays in float: F16 where every value of a matrix is a float16, else F32. Never rounded.

    Vectors are F32 always, as llama.cpp adds and multiplies them so.
    """
    if values.ndim > 1:
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.array_equal(half.astype(np.float32), values):
            return half
    return np.ascontiguousarray(values, np.float32)
