"""Folders of compressed-tensors (llm-compressor): integer weights with a scale a group, channel or matrix.

    weight_scale        (out, groups), (out, 1) or (1,)    float16, bfloat16 or float32
    weight_zero_point   the same shape, int8; or packed along the outputs: (out · bits / 32, groups) int32; absent: 0
    weight_g_idx        (in,) int32    the group of each input, with actorder "group"

and the codes, in the format "pack-quantized" or "int-quantized" (or "naive-quantized"):

    weight_packed       (out, in · bits / 32) int32    code + 2^(bits-1), packed along the inputs
    weight_shape        (2,) int64     out and in
    weight              (out, in) int8    the code itself

    W[o, j] = weight_scale[o, g] · (code[o, j] - weight_zero_point[o, g])

with signed codes and zero points in [-2^(bits-1), 2^(bits-1)). Activations that the folder asks to quantize are the
runtime's affair: only weights are read. Source: compressed_tensors/compressors/pack_quantized (helpers.py, base.py),
naive_quantized/base.py, quantization/lifecycle/forward.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lilliput.errors import SourceError
from lilliput.grid import Float
from lilliput.sources.quantized import Parts, Settings, words
from lilliput.sources.stored import Stored, Unsigned, from_unsigned, gathered

METHOD = "compressed-tensors"
MARK = "weight_scale"
OTHERS = ("weight_packed", "weight_shape", "weight", "weight_zero_point", "weight_g_idx")

BITS = (2, 4, 8)
LAYOUTS = ("pack-quantized", "int-quantized", "naive-quantized")
SHUFFLED = "its groups follow the order of activations (actorder), which no grid of contiguous blocks holds"


def check(settings: Settings) -> None:
    groups: dict[str, dict[str, Any]] = dict(settings.get("config_groups") or {})
    layouts = {group.get("format") or settings.get("format") for group in groups.values()} or {settings.get("format")}
    for layout in layouts:
        if layout not in LAYOUTS:
            raise SourceError(
                f"config.json: quantization_config has format {layout!r}, read are {', '.join(LAYOUTS)}: "
                "use the float checkpoint that it was made from"
            )
    for key in ("transform_config", "sparsity_config"):
        if settings.get(key):
            raise SourceError(
                f"config.json: quantization_config has a {key}, which is not read: use the float checkpoint"
            )
    for name, group in groups.items():
        weights = group.get("weights") or {}
        if weights.get("num_bits") not in BITS or weights.get("type", "int") != "int":
            raise SourceError(
                f"config.json: quantization_config has weights of {weights.get('num_bits')} bits of type "
                f"{weights.get('type')!r} in {name}, read are int of {', '.join(map(str, BITS))} bits"
            )


def shape(parts: Parts, settings: Settings) -> tuple[int, int]:
    if "weight_packed" not in parts:
        return parts.matrix("weight")
    rows, cols = (int(size) for size in parts["weight_shape"])
    return rows, cols


def read(parts: Parts, settings: Settings) -> Stored:
    rows, cols = shape(parts, settings)
    bits, codes = _packed(parts, rows, cols) if "weight_packed" in parts else (8, _unsigned(parts["weight"], 8))
    scales = _per_row(parts["weight_scale"].astype(np.float32), rows, parts.module)
    n_groups = scales.shape[1]
    zero_points = _zero_points(parts, bits, rows, n_groups)
    if cols % n_groups:
        raise SourceError(f"{parts.module}: {n_groups} groups do not divide {cols} inputs: the file is damaged")
    size = cols // n_groups
    if "weight_g_idx" in parts:
        groups = parts["weight_g_idx"].astype(np.int64)
        if groups.shape != (cols,) or groups.min() < 0 or groups.max() >= n_groups:
            raise SourceError(f"{parts.module}.weight_g_idx names no group of each of the {cols} inputs")
        if not np.array_equal(groups, np.arange(cols) // size):
            return gathered(bits, groups, codes, scales, zero_points, SHUFFLED)
    return from_unsigned(bits, size, codes, scales, zero_points)


def _packed(parts: Parts, rows: int, cols: int) -> tuple[int, Unsigned]:
    """Bits, and codes (rows, cols) from 0."""
    n_words = parts.matrix("weight_packed")[1]
    parts.want("weight_packed", (rows, n_words))
    bits = next((b for b in BITS if words.count_words(b, cols) == n_words), 0)
    if not bits:
        raise SourceError(
            f"{parts.module}.weight_packed has {n_words} words a row for {cols} inputs, which is no packing of "
            f"{', '.join(map(str, BITS))} bits: the file is damaged"
        )
    return bits, words.unpack(parts["weight_packed"], bits, cols)


def _unsigned(signed: npt.NDArray[np.int8], bits: int) -> Unsigned:
    return np.asarray(signed.astype(np.int16) + (1 << (bits - 1)), np.uint8)


def _per_row(values: Float, rows: int, module: str) -> Float:
    """(rows, groups); one number for a whole matrix is repeated."""
    found = values.reshape(-1, 1) if values.ndim < 2 else values
    if found.shape == (1, 1):
        found = np.repeat(found, rows, axis=0)
    if found.ndim != 2 or found.shape[0] != rows:
        raise SourceError(
            f"{module}.weight_scale has shape {values.shape}, wanted one a group or channel of {rows} outputs: "
            "scales by two-dimensional blocks are not read"
        )
    return found


def _zero_points(parts: Parts, bits: int, rows: int, n_groups: int) -> Unsigned:
    if "weight_zero_point" not in parts:
        return np.full((rows, n_groups), 1 << (bits - 1), np.uint8)
    stored = parts["weight_zero_point"]
    if stored.dtype == np.int32:
        parts.want("weight_zero_point", (words.count_words(bits, rows), n_groups))
        return words.unpack(stored.T, bits, rows).T
    signed = stored.reshape(-1, 1) if stored.ndim < 2 else stored
    return np.broadcast_to(_unsigned(signed, bits), (rows, n_groups))
