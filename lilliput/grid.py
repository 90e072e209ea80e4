"""The grid: which numbers a runtime's weight format can hold, and a tensor that lies on one.

A weight matrix is (rows, cols) = (output channels, input channels), as in `y = x @ W.T`. It is cut
along its columns into blocks of `block_size` (the last block may be short); each block has one
scale and, where the grid is not symmetric, one offset:

    offset "none"        x = scale * code                    codes signed,   int8
    offset "zero_point"  x = scale * (code - zero_point)     codes unsigned, zero_point uint8
    offset "minimum"     x = scale * code + minimum          codes unsigned, minimum in scale_dtype

all in float32. Scales (and minima) are rounded to the dtype that the file stores before any code is
chosen. "bf16_f16" is the set of numbers that bfloat16 *and* float16 hold exactly: XNNPACK computes
4-bit blocks with bfloat16 scales, GGUF and ONNX store float16.

Signed 8-bit codes stop at -127 (LiteRT's quantization spec asks for it: int8 weights lie in
[-127, 127]); signed 4-bit codes use all of [-8, 7], which the three formats hold.

A grid may keep a few columns at 16 bit beside the codes, LLM.int8()'s outliers (arXiv:2208.07339): "int8-channel-o8"
keeps 8. Their codes stand for 0, their values are float16 numbers.

Grids of GGUF alone have names of their own (GGUF_GRIDS). In those with super-blocks a block's scale is an integer
times the float16 d of its super-block of 256 columns, and its minimum a negated integer times another float16,
dmin: x = (d·sc)·code - (dmin·m). All products are exact in float32, so scales and offsets keep the formulas above.
In those with a codebook a code is one of 16 unevenly spaced integers.

    grid     codes            blocks  sc               m        bits a weight
    q2_k     0..3             16      0..15            0..15    2.625
    q3_k     -4..3            16      -32..31                   3.4375
    q4_k     0..15            32      0..63            0..63    4.5
    q5_k     0..31            32      0..63            0..63    5.5
    q6_k     -32..31          16      -128..127                 6.5625
    iq4_nl   IQ4_CODEBOOK     32      (float16 scale)           4.5
    iq4_xs   IQ4_CODEBOOK     32      -32..31                   4.25

Source: ggml/src/ggml-common.h (block_q2_K to block_q6_K, block_iq4_nl, block_iq4_xs, kvalues_iq4nl).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lilliput.errors import GridError, did_you_mean

Float = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8] | npt.NDArray[np.uint8]

Offset = Literal["none", "zero_point", "minimum"]
ScaleDtype = Literal["bf16_f16", "float16", "float32"]

WIDTHS: tuple[ScaleDtype, ...] = ("bf16_f16", "float16", "float32")  # each holds all that those before it hold
FLOAT16_MAX = 65504.0
FLOAT16_TINY = 2.0**-24


@dataclass(frozen=True)
class SuperBlocks:
    """`cols` columns share float16 factors; a block's integer scale lies in [low, high], its minimum in [0, high]."""

    low: int
    high: int
    cols: int = 256

    @property
    def integer_bits(self) -> int:
        return (self.high - self.low).bit_length()


@dataclass(frozen=True)
class GridSpec:
    """The numbers that a format can hold. `block_size` 0 is one block per row (per-channel)."""

    bits: int
    block_size: int
    offset: Offset = "none"
    scale_dtype: ScaleDtype = "bf16_f16"
    super_blocks: SuperBlocks | None = None
    codebook: tuple[int, ...] | None = None  # ascending; the codes are its entries
    outliers: int = 0  # columns kept at 16 bit

    @property
    def symmetric(self) -> bool:
        return self.offset == "none"

    @property
    def qmin(self) -> int:
        if self.codebook:
            return self.codebook[0]
        if not self.symmetric:
            return 0
        return -127 if self.bits == 8 else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        if self.codebook:
            return self.codebook[-1]
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def code_dtype(self) -> type[np.int8] | type[np.uint8]:
        return np.int8 if self.symmetric else np.uint8

    def blocks(self, cols: int) -> int:
        """How many blocks a row of `cols` columns has."""
        return 1 if self.block_size == 0 else -(-cols // self.block_size)

    def width(self, cols: int) -> int:
        """Columns in a full block of a row of `cols` columns."""
        return self.block_size or cols

    def supers(self, cols: int) -> int:
        """How many super-blocks a row of `cols` columns has; 0 where the grid has none."""
        return -(-cols // self.super_blocks.cols) if self.super_blocks else 0

    def holds(self, other: GridSpec, cols: int) -> bool:
        """Whether numbers on `other`, in rows of `cols` columns, are on this grid with the very same codes, scales and
        offsets: the dtype of scales may be wider, and a block that is the whole row may be called so."""
        whole = self.blocks(cols) == other.blocks(cols) == 1
        stated = replace(other, scale_dtype=self.scale_dtype, block_size=(self if whole else other).block_size)
        return stated == self and WIDTHS.index(other.scale_dtype) <= WIDTHS.index(self.scale_dtype)

    def bits_per_weight(self, cols: int) -> float:
        """Stored bits a weight, its share of scale and offset included."""
        if self.super_blocks:
            parts = 1 if self.symmetric else 2
            return self.bits + parts * (
                (self.super_blocks.integer_bits * self.blocks(cols) + 16 * self.supers(cols)) / cols
            )
        scale = 32 if self.scale_dtype == "float32" else 16
        offset = {"none": 0, "zero_point": self.bits, "minimum": scale}[self.offset]
        return self.bits + ((scale + offset) * self.blocks(cols) + 16 * self.outliers) / cols

    @property
    def name(self) -> str:
        """The grid's name in a recipe; the inverse of `grid(name)`."""
        if self.super_blocks or self.codebook:
            return next(name for name, spec in GGUF_GRIDS.items() if spec == self)
        block = f"b{self.block_size}" if self.block_size else "channel"
        tail = {"none": "", "zero_point": "-zp", "minimum": "-min"}[self.offset]
        scale = {"bf16_f16": "", "float16": "-f16", "float32": "-f32"}[self.scale_dtype]
        return f"int{self.bits}-{block}{tail}{scale}" + (f"-o{self.outliers}" if self.outliers else "")


GRID_NAME = re.compile(r"int([2-8])-(channel|b(\d+))(-zp|-min)?(-f16|-f32)?(-o([1-9]\d*))?")
COMMON_GRIDS = (
    "int4-b32", "int4-b64", "int4-b128", "int4-b32-zp-f16", "int4-b32-min-f16", "int5-b32", "int5-b32-min-f16",
    "int8-channel", "int8-b32",
)  # fmt: skip
IQ4_CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
GGUF_GRIDS = {
    "q2_k": GridSpec(2, 16, "minimum", "float16", SuperBlocks(0, 15)),
    "q3_k": GridSpec(3, 16, "none", "float16", SuperBlocks(-32, 31)),
    "q4_k": GridSpec(4, 32, "minimum", "float16", SuperBlocks(0, 63)),
    "q5_k": GridSpec(5, 32, "minimum", "float16", SuperBlocks(0, 63)),
    "q6_k": GridSpec(6, 16, "none", "float16", SuperBlocks(-128, 127)),
    "iq4_nl": GridSpec(4, 32, "none", "float16", codebook=IQ4_CODEBOOK),
    "iq4_xs": GridSpec(4, 32, "none", "float16", SuperBlocks(-32, 31), IQ4_CODEBOOK),
}


def grid(name: str) -> GridSpec:
    """The grid of that name, e.g. "int4-b32", "int4-b64-zp-f16", "int8-channel", "q4_k".

    Raises GridError for a name that is no key of GGUF_GRIDS and not of the form
    `int<bits>-<channel|b<size>>[-zp|-min][-f16|-f32][-o<columns>]`, and for columns at 16 bit beside minima.
    """
    if name in GGUF_GRIDS:
        return GGUF_GRIDS[name]
    match = GRID_NAME.fullmatch(name)
    if match is None or match[3] == "0":
        raise GridError(f"unknown grid {name!r}: {did_you_mean(name, (*COMMON_GRIDS, *GGUF_GRIDS))}")
    offset: Offset = {None: "none", "-zp": "zero_point", "-min": "minimum"}[match[4]]  # type: ignore[assignment]
    dtype: ScaleDtype = {None: "bf16_f16", "-f16": "float16", "-f32": "float32"}[match[5]]  # type: ignore[assignment]
    if match[7] and offset == "minimum":
        raise GridError(f"grid {name!r}: columns at 16 bit need a code for 0, which minima do not give: choose -zp")
    return GridSpec(int(match[1]), int(match[3] or 0), offset, dtype, outliers=int(match[7] or 0))


def round_scale(values: npt.ArrayLike, dtype: ScaleDtype) -> Float:
    """Round (any shape) to the nearest number that the dtype holds, as float32; saturates, never infinite."""
    x = np.asarray(values, dtype=np.float32)
    if dtype == "float32":
        return x
    half = np.clip(x, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16).astype(np.float32)
    return half if dtype == "float16" else _round_bfloat16(np.clip(half, -65280.0, 65280.0))


def narrowest(*parts: Float) -> ScaleDtype:
    """The narrowest dtype that holds all of these scales and minima: the formats of others do not name it."""
    return next(d for d in WIDTHS if all(np.array_equal(round_scale(p, d), p) for p in parts))


def _round_bfloat16(x: Float) -> Float:
    """Round to nearest even at bfloat16's 8 significant bits.

    From a float16 the result is a float16 again: it has no more significant bits, and its spacing is no finer.
    """
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded & 0xFFFF0000).astype(np.uint32).view(np.float32)


@dataclass(frozen=True, eq=False)
class Outliers:
    """The columns of a matrix that are kept at 16 bit."""

    columns: npt.NDArray[np.int64]  # (k,) ascending
    values: Float  # (rows, k) float32, all of them float16 numbers


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A (rows, cols) matrix on a grid. Immutable; raises GridError if the parts do not fit the grid."""

    spec: GridSpec
    codes: Codes  # (rows, cols) int8, or uint8 where the grid has an offset
    scales: Float  # (rows, n_blocks) float32, already on the grid's scale dtype
    offsets: npt.NDArray[np.uint8] | Float | None = None  # (rows, n_blocks): zero points uint8, or minima float32
    supers: Float | None = None  # (rows, n_supers, 1 or 2) float32: d, and dmin where the grid has minima
    outliers: Outliers | None = None

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != self.spec.code_dtype:
            raise GridError(
                f"{self.spec.name} codes are {self.codes.dtype} {self.codes.shape}, "
                f"wanted {np.dtype(self.spec.code_dtype)} (rows, cols)"
            )
        wanted = (self.codes.shape[0], self.spec.blocks(self.codes.shape[1]))
        if self.scales.shape != wanted:
            raise GridError(f"{self.spec.name} scales are {self.scales.shape}, wanted {wanted}")
        if self.spec.symmetric != (self.offsets is None):
            raise GridError(f"{self.spec.name} wants {'no ' if self.spec.symmetric else ''}offsets")
        if self.offsets is not None and self.offsets.shape != wanted:
            raise GridError(f"{self.spec.name} offsets are {self.offsets.shape}, wanted {wanted}")
        n_supers = self.spec.supers(self.codes.shape[1])
        supers = (self.codes.shape[0], n_supers, 1 if self.spec.symmetric else 2) if n_supers else None
        if (None if self.supers is None else self.supers.shape) != supers:
            seen = "none" if self.supers is None else self.supers.shape
            raise GridError(f"{self.spec.name} super-block factors are {seen}, wanted {supers or 'none'}")
        kept = None if self.outliers is None else (self.outliers.columns.shape, self.outliers.values.shape)
        count = min(self.spec.outliers, self.codes.shape[1])
        if kept != (((count,), (self.codes.shape[0], count)) if count else None):
            raise GridError(
                f"{self.spec.name} keeps {count} columns at 16 bit, seen {kept[0][0] if kept else 'none'}: "
                "solver llm_int8 chooses them, on a grid whose name ends with -o<columns>"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    @property
    def size_bytes(self) -> int:
        """Bytes that a format without overhead stores."""
        rows, cols = self.shape
        return round(rows * cols * self.spec.bits_per_weight(cols) / 8)

    def per_weight(self, per_block: npt.NDArray[np.generic]) -> Float:
        """Spread a (rows, n_blocks) array over the columns: (rows, cols) float32."""
        width, cols = self.spec.width(self.shape[1]), self.shape[1]
        return np.repeat(per_block.astype(np.float32), width, axis=1)[:, :cols]

    def dequantize(self) -> Float:
        """(rows, cols) float32, computed in float32 as the formula above reads."""
        values = self._of_codes()
        if self.outliers is not None:
            values[:, self.outliers.columns] = self.outliers.values
        return values

    def _of_codes(self) -> Float:
        codes, scale = self.codes.astype(np.float32), self.per_weight(self.scales)
        if self.offsets is None:
            return scale * codes
        offset = self.per_weight(self.offsets)
        return scale * (codes - offset) if self.spec.offset == "zero_point" else scale * codes + offset

    def per_block(self, per_super: Float) -> Float:
        """Spread a (rows, n_supers) array over the blocks of each super-block: (rows, n_blocks)."""
        assert self.spec.super_blocks
        width = self.spec.super_blocks.cols // self.spec.block_size
        return np.repeat(per_super, width, axis=1)[:, : self.scales.shape[1]]

    def integers(self) -> tuple[Float, Float | None]:
        """The integers sc, and m where the grid has minima, (rows, n_blocks) as float32; 0 where the factor is 0."""
        assert self.supers is not None
        parts = [self.scales] if self.offsets is None else [self.scales, -np.asarray(self.offsets, np.float32)]
        factors = [self.per_block(self.supers[:, :, i]) for i in range(len(parts))]
        found = [np.divide(p, f, out=np.zeros_like(p), where=f != 0) for p, f in zip(parts, factors, strict=True)]
        return found[0], found[1] if len(found) == 2 else None

    def check(self, name: str) -> None:
        """Raise GridError if a code, scale or offset of tensor `name` does not lie on the grid."""
        if self.codes.size and not (self.spec.qmin <= self.codes.min() and self.codes.max() <= self.spec.qmax):
            raise GridError(f"{name}: codes leave [{self.spec.qmin}, {self.spec.qmax}] of {self.spec.name}")
        if self.spec.codebook and not np.isin(self.codes, self.spec.codebook).all():
            raise GridError(f"{name}: codes are not all in the codebook of {self.spec.name}")
        if self.outliers is not None:
            self._check_outliers(name, self.outliers)
        if self.supers is not None:
            self._check_integers(name)
            stored = [self.supers]
        else:
            stored = self._stored_scales()
        for part in stored:
            if not np.isfinite(part).all() or not np.array_equal(round_scale(part, self.spec.scale_dtype), part):
                raise GridError(f"{name}: scales are not all {self.spec.scale_dtype} numbers, as {self.spec.name} asks")

    def _check_outliers(self, name: str, kept: Outliers) -> None:
        inside = (
            (kept.columns >= 0).all() and (kept.columns < self.shape[1]).all() and (np.diff(kept.columns) > 0).all()
        )
        if not inside or self._of_codes()[:, kept.columns].any():
            raise GridError(
                f"{name}: columns at 16 bit {kept.columns.tolist()} are out of order, or have codes beside 0"
            )
        if not np.array_equal(kept.values, round_scale(kept.values, "float16")):
            raise GridError(f"{name}: columns at 16 bit hold numbers that are no float16")

    def _stored_scales(self) -> list[Float]:
        return [self.scales] if self.spec.offset != "minimum" else [self.scales, np.asarray(self.offsets)]

    def _check_integers(self, name: str) -> None:
        """Scales and minima are the super-blocks' factors times integers in range."""
        limits, factors = self.spec.super_blocks, np.asarray(self.supers)
        assert limits
        signs = (1, -1)
        for i, (found, part) in enumerate(zip(self.integers(), self._stored_scales(), strict=False)):
            assert found is not None
            low = limits.low if i == 0 else 0
            product = signs[i] * found * self.per_block(factors[:, :, i])
            if not (
                np.array_equal(product, part) and np.array_equal(found, np.rint(found))
                and (found >= low).all() and (found <= limits.high).all()
            ):  # fmt: skip
                what = ("scales", "minima")[i]
                raise GridError(
                    f"{name}: {what} are not integers in [{low}, {limits.high}] times a super-block's factor"
                )

    @property
    def kept(self) -> tuple[npt.NDArray[np.int64] | None, Float | None]:
        """Columns and values of the outliers."""
        return (None, None) if self.outliers is None else (self.outliers.columns, self.outliers.values)

    def same_as(self, other: QuantizedTensor) -> bool:
        """Bit for bit: the grid's arithmetic, codes, scales, offsets and super-blocks' factors."""
        if self.spec.offset != other.spec.offset or self.spec.blocks(self.shape[1]) != other.spec.blocks(
            other.shape[1]
        ):
            return False
        mine, theirs = ((t.codes, t.scales, t.offsets, t.supers, *t.kept) for t in (self, other))
        return all(
            np.array_equal(a, b) if a is not None and b is not None else a is b
            for a, b in zip(mine, theirs, strict=True)
        )


def concatenate_rows(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Stack matrices of the same grid and width row-wise (fused q/k/v or gate/up): exact."""
    specs = {p.spec for p in parts}
    if len(specs) != 1 or len({p.shape[1] for p in parts}) != 1:
        raise GridError(
            f"cannot stack matrices of {sorted(s.name for s in specs)} and shapes {[p.shape for p in parts]}"
        )

    def stacked(arrays: list[Any]) -> Any:
        return None if arrays[0] is None else np.concatenate(arrays)

    outliers = [p.outliers for p in parts if p.outliers is not None]
    if any(not np.array_equal(outliers[0].columns, o.columns) for o in outliers):
        raise GridError("cannot stack matrices that keep different columns at 16 bit")
    kept = Outliers(outliers[0].columns, stacked([o.values for o in outliers])) if outliers else None
    codes, scales, offsets, supers = (
        stacked([getattr(p, field) for p in parts]) for field in ("codes", "scales", "offsets", "supers")
    )
    return QuantizedTensor(parts[0].spec, codes, scales, offsets, supers, kept)


def take_rows(tensor: QuantizedTensor, order: npt.NDArray[np.intp] | slice) -> QuantizedTensor:
    """The matrix with its rows in another order (RoPE permutation), or some of them: exact."""
    kept = None if tensor.outliers is None else Outliers(tensor.outliers.columns, tensor.outliers.values[order])
    offsets = None if tensor.offsets is None else tensor.offsets[order]
    supers = None if tensor.supers is None else tensor.supers[order]
    return QuantizedTensor(tensor.spec, tensor.codes[order], tensor.scales[order], offsets, supers, kept)
