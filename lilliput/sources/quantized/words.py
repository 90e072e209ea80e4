"""int32 words full of n-bit codes: a stream of bits, the first code in the lowest bits of the first word.

Codes of 2, 4 and 8 bits never straddle two words; those of 3 do (32 of them fill three words). GPTQ, AWQ and
compressed-tensors pack so, along different axes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WORD_BITS = 32


def unpack(words: npt.NDArray[np.int32], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """(…, n_words) int32 → (…, count) uint8, the first `count` codes of each row."""
    stream = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)  # (…, bytes)
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (stream[..., None] >> shifts) & np.uint8((1 << bits) - 1)
        return np.asarray(codes.reshape(*words.shape[:-1], -1)[..., :count])
    single = np.unpackbits(stream, axis=-1, bitorder="little")[..., : count * bits]
    grouped = single.reshape(*words.shape[:-1], count, bits)
    return np.packbits(grouped, axis=-1, bitorder="little")[..., 0]


def count_words(bits: int, count: int) -> int:
    """Words that so many codes take."""
    return -(-bits * count // WORD_BITS)
