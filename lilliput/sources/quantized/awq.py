"""AWQ folders, as AutoAWQ writes them (version "gemm"): 4-bit codes with a scale and zero point a group.

    qweight  (in, out / 8) int32         codes, packed along the outputs
    qzeros   (in / group_size, out / 8) int32     zero points, likewise
    scales   (in / group_size, out) float16

    W[o, j] = scales[g, o] · (qweight[j, o] - zero[g, o]),   g = j // group_size

The eight codes of a word, from its lowest bits up, are those of outputs 0, 2, 4, 6, 1, 3, 5, 7.

The factors that AWQ folds into norms and matrices are in the weights already. Source: awq/modules/linear/gemm.py
(from_linear) and awq/utils/packing_utils.py; arXiv:2306.00978.
"""

from __future__ import annotations

import numpy as np

from lilliput.errors import SourceError
from lilliput.sources.quantized import Parts, Settings, words
from lilliput.sources.stored import Stored, Unsigned, block_size_of, from_unsigned

METHOD = "awq"
MARK = "qweight"
OTHERS = ("qzeros", "scales")

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each code of a word
WANTED = {"version": ("gemm",), "bits": (BITS,), "w_bit": (BITS,), "zero_point": (True,)}


def check(settings: Settings) -> None:
    for key, values in WANTED.items():
        seen = settings.get(key)
        seen = seen.lower() if isinstance(seen, str) else seen
        if seen is not None and seen not in values:
            raise SourceError(
                f"config.json: quantization_config has {key} {settings[key]!r}, read is AWQ with {key} {values[0]!r}: "
                "save the checkpoint so"
            )


def shape(parts: Parts, settings: Settings) -> tuple[int, int]:
    cols, n_words = parts.matrix("qweight")
    return n_words * len(ORDER), cols


def read(parts: Parts, settings: Settings) -> Stored:
    rows, cols = shape(parts, settings)
    n_groups = parts.matrix("scales")[0]
    parts.want("scales", (n_groups, rows))
    parts.want("qzeros", (n_groups, rows // len(ORDER)))
    asked = settings.get("group_size", settings.get("q_group_size", 128))
    size = block_size_of(cols, n_groups, int(asked), parts.module)
    codes, zero_points = (_outputs(words.unpack(parts[end], BITS, rows)).T for end in ("qweight", "qzeros"))
    return from_unsigned(BITS, size, codes, parts["scales"].T, zero_points)


def _outputs(codes: Unsigned) -> Unsigned:
    """(…, outputs) from the order of the words to that of the outputs."""
    return codes.reshape(*codes.shape[:-1], -1, len(ORDER))[..., np.argsort(ORDER)].reshape(codes.shape)
