"""bitsandbytes' 8-bit folders (LLM.int8(), arXiv:2208.07339): int8 codes with a scale a row.

    weight          (out, in) int8
    SCB             (out,) float32     the largest magnitude of each row
    weight_format   () uint8           0: rows one after the other

    W[o, j] = weight[o, j] · SCB[o] / 127

The columns that LLM.int8() multiplies at 16 bit are chosen by the activations at run time, from these same codes.
Source: bitsandbytes/nn/modules.py (Linear8bitLt), functional.py (int8_vectorwise_dequant).
"""

from __future__ import annotations

import numpy as np

from lilliput.errors import SourceError
from lilliput.sources.quantized import Parts, Settings
from lilliput.sources.stored import Stored, from_unsigned

METHOD = "bitsandbytes"
MARK = "SCB"
OTHERS = ("weight", "weight_format")

LARGEST = np.float32(127)


def check(settings: Settings) -> None:
    pass  # the file tells all


def shape(parts: Parts, settings: Settings) -> tuple[int, int]:
    return parts.matrix("weight")


def read(parts: Parts, settings: Settings) -> Stored:
    rows, _ = shape(parts, settings)
    codes = parts["weight"]
    if codes.dtype != np.int8 or ("weight_format" in parts and int(parts["weight_format"].reshape(-1)[0]) != 0):
        raise SourceError(
            f"{parts.module}.weight is {codes.dtype} in the order of a processor's tiles, wanted int8 row by row: "
            "save the checkpoint with a newer bitsandbytes"
        )
    parts.want("SCB", (rows,))
    scales = (parts["SCB"].astype(np.float32) / LARGEST).reshape(rows, 1)
    unsigned = (codes.astype(np.int16) + 128).astype(np.uint8)
    return from_unsigned(8, 0, unsigned, scales, np.full((rows, 1), 128, np.uint8))
