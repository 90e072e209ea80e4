"""bitsandbytes' 4-bit folders: indices into 16 levels, NF4's (QLoRA, arXiv:2305.14314) or FP4's, with a scale a block.

    weight                                    (out · in / 2, 1) uint8   two indices a byte, the first in the high nibble
    weight.quant_map                          (16,) float32   the levels
    weight.absmax                             (n_blocks,) float32   the scales; or uint8, quantized once more:
    weight.nested_quant_map                   (256,) float32   levels of the scales
    weight.nested_absmax                      (n_blocks / nested_blocksize,) float32   scales of the scales
    weight.quant_state.bitsandbytes__nf4      JSON in uint8: shape, blocksize, nested_blocksize, nested_offset

    W.flat[i] = quant_map[index[i]] · a[i // blocksize]
    a[b] = absmax[b],  or  nested_quant_map[absmax[b]] · nested_absmax[b // nested_blocksize] + nested_offset

Blocks run through the matrix row by row. The levels are no integers times a scale, so no grid of ONNX, LiteRT or GGUF
holds them. Source: bitsandbytes/functional.py (QuantState, dequantize_4bit).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from lilliput.errors import SourceError
from lilliput.grid import Float
from lilliput.sources.quantized import Parts, Settings
from lilliput.sources.stored import OffGrid, Stored

METHOD = "bitsandbytes"
STATE = "weight.quant_state.bitsandbytes__"
MARK = "weight.absmax"
OTHERS = (
    "weight", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", f"{STATE}nf4", f"{STATE}fp4",
)  # fmt: skip
LEVELS = 16


def check(settings: Settings) -> None:
    pass  # the file tells all


def shape(parts: Parts, settings: Settings) -> tuple[int, int]:
    rows, cols = _state(parts)["shape"]
    return int(rows), int(cols)


def read(parts: Parts, settings: Settings) -> Stored:
    (rows, cols), state = shape(parts, settings), _state(parts)
    levels = parts["weight.quant_map"].astype(np.float32)
    packed = parts["weight"].reshape(-1)
    if levels.shape != (LEVELS,) or packed.dtype != np.uint8 or packed.size != -(-rows * cols // 2):
        raise SourceError(
            f"{parts.module}.weight has {packed.size} bytes of {packed.dtype} for {rows} x {cols} weights of 4 bits: "
            "the file is damaged"
        )
    indices = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: rows * cols]
    scales = np.repeat(_scales(parts, state), int(state["blocksize"]))[: rows * cols]
    if scales.size != rows * cols:
        raise SourceError(f"{parts.module}.weight.absmax has too few scales for {rows} x {cols} weights: get it anew")
    kind = str(state.get("quant_type", "nf4")).upper()
    values = (levels[indices] * scales).reshape(rows, cols)
    return OffGrid(values, f"the levels of {kind} are not evenly spaced, and no grid of the three formats has them")


def _scales(parts: Parts, state: dict[str, Any]) -> Float:
    """(n_blocks,) float32."""
    stored = parts["weight.absmax"].reshape(-1)
    if "weight.nested_absmax" not in parts:
        return stored.astype(np.float32)
    outer = np.repeat(parts["weight.nested_absmax"].astype(np.float32), int(state["nested_blocksize"]))[: stored.size]
    inner = parts["weight.nested_quant_map"].astype(np.float32)[stored]
    found: Float = inner * outer + np.float32(state["nested_offset"])
    return found


def _state(parts: Parts) -> dict[str, Any]:
    end = next((f"{STATE}{kind}" for kind in ("nf4", "fp4") if f"{STATE}{kind}" in parts), f"{STATE}nf4")
    try:
        state = json.loads(parts[end].astype(np.uint8).tobytes())
        rows, cols = state["shape"]
        int(state["blocksize"])
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{parts.module}.{end} holds no quantization state with shape and blocksize ({error}): the file is damaged"
        ) from error
    del rows, cols
    return dict(state)
