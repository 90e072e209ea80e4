"""GPTQ folders, as AutoGPTQ and GPTQModel write them: codes of 2, 3, 4 or 8 bits with a scale and zero point a group.

    qweight  (in · bits / 32, out) int32     codes, packed along the inputs
    qzeros   (groups, out · bits / 32) int32     zero points, packed along the outputs
    scales   (groups, out) float16
    g_idx    (in,) int32     the group of each input; absent: input j is in group j // group_size

    W[o, j] = scales[g, o] · (qweight[j, o] - zero[g, o]),   g = g_idx[j]

`checkpoint_format` "gptq" (the first, and the default) stores each zero point less one, modulo 2^bits; "gptq_v2"
stores it as it is. With `desc_act` inputs are quantized in the order of their activations, and a group's inputs lie
anywhere in the row: unless its groups are static, no grid of contiguous blocks holds such a matrix. The bits are those
that the shapes tell, since GPTQModel's `dynamic` gives modules others than the settings say.

Source: auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py (pack, forward); gptqmodel/utils/model.py
(convert_gptq_v1_to_v2_format).
"""

from __future__ import annotations

import numpy as np

from lilliput.errors import SourceError
from lilliput.sources.quantized import Parts, Settings, words
from lilliput.sources.stored import Stored, block_size_of, from_unsigned, gathered

METHOD = "gptq"
MARK = "qweight"
OTHERS = ("qzeros", "scales", "g_idx")

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
SHUFFLED = "its groups follow the order of activations (GPTQ's desc_act), which no grid of contiguous blocks holds"


def check(settings: Settings) -> None:
    layout = settings.get("checkpoint_format") or "gptq"
    if layout not in FORMATS or settings.get("is_marlin_format"):
        raise SourceError(
            f"config.json: quantization_config has checkpoint_format {layout!r}, read are {' and '.join(FORMATS)}: "
            "save the checkpoint in one of them"
        )
    if settings.get("bits") not in BITS:
        raise SourceError(f"config.json: quantization_config has bits {settings.get('bits')!r}, read are {BITS}")


def shape(parts: Parts, settings: Settings) -> tuple[int, int]:
    n_words, rows = parts.matrix("qweight")
    cols = parts.shape("g_idx")[0] if "g_idx" in parts else n_words * words.WORD_BITS // settings["bits"]
    return rows, cols


def read(parts: Parts, settings: Settings) -> Stored:
    (rows, cols), bits = shape(parts, settings), _bits(parts, settings)
    n_groups = parts.matrix("scales")[0]
    parts.want("scales", (n_groups, rows))
    parts.want("qzeros", (n_groups, words.count_words(bits, rows)))
    codes = words.unpack(parts["qweight"].T, bits, cols)  # (rows, cols)
    zero_points = words.unpack(parts["qzeros"], bits, rows).T  # (rows, groups)
    if (settings.get("checkpoint_format") or "gptq") == "gptq":
        zero_points = (zero_points + np.uint8(1)) & np.uint8((1 << bits) - 1)
    scales = np.ascontiguousarray(parts["scales"].T)
    size = _group_size(parts, settings, cols, n_groups)
    groups = parts["g_idx"].astype(np.int64) if "g_idx" in parts else np.arange(cols) // size
    if not np.array_equal(groups, np.arange(cols) // size):
        if groups.min() < 0 or groups.max() >= n_groups:
            raise SourceError(f"{parts.module}.g_idx names groups that are not among the {n_groups} of scales")
        return gathered(bits, groups, codes, scales, zero_points, SHUFFLED)
    return from_unsigned(bits, size, codes, scales, zero_points)


def _bits(parts: Parts, settings: Settings) -> int:
    (n_words, _), cols = parts.matrix("qweight"), shape(parts, settings)[1]
    bits = n_words * words.WORD_BITS // max(cols, 1)
    if bits not in BITS or words.count_words(bits, cols) != n_words:
        raise SourceError(
            f"{parts.module}.qweight has {n_words} words a column for {cols} inputs, which is no packing of "
            f"{', '.join(map(str, BITS))} bits: the file is damaged"
        )
    return bits


def _group_size(parts: Parts, settings: Settings, cols: int, n_groups: int) -> int:
    """By the settings; by the shapes where `dynamic` may have given this module another."""
    if settings.get("dynamic") and cols % n_groups == 0:
        return cols // n_groups
    return block_size_of(cols, n_groups, int(settings.get("group_size") or -1), parts.module)
