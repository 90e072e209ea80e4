"""Numbers that no healthy file holds, found without the source.

Thresholds. Zero blocks: rounding with a scale of its own gives a block at least one code that is not 0, so a zero
block in a row that is not zero is a hole. Pruned models have many, by intent: above MANY of a matrix's blocks nothing
is said. Block types with integer scales inside super-blocks are looked at by whole super-block. Scales: the largest
weight of a block against the median of its matrix stays below 40 in SmolLM2-135M (its embedding), and below 3 in
random weights; published outliers of larger models reach 100, so OUTLIER is 1000: a flipped exponent bit, no outlier.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lilliput.checks.base import EVERY, RUNTIMES, Rule, Seen
from lilliput.checks.opened import Opened, Tensor
from lilliput.grid import Float

MANY = 0.01
OUTLIER = 1000.0
LEAST_WEIGHTS = 256  # of a matrix whose double is no chance


def _largest(tensor: Tensor) -> Float:
    """The largest weight of each block: (rows, n_blocks)."""
    values = tensor.matrix()
    rows, cols = values.shape
    width = tensor.block or cols
    padded = np.pad(np.abs(values), [(0, 0), (0, -cols % width)])
    return np.asarray(padded.reshape(rows, -1, width).max(-1))


def _place(tensor: Tensor, row: int, block: int) -> str:
    if not tensor.block:
        return f"{tensor.name}, row {row}"
    return f"{tensor.name}, row {row}, columns {block * tensor.block} to {(block + 1) * tensor.block - 1}"


def not_finite(opened: Opened) -> Iterator[Seen]:
    for tensor in opened.tensors:
        values = tensor.read()
        bad = ~np.isfinite(values)
        if bad.any():
            first = ", ".join(str(int(i)) for i in np.argwhere(bad)[0])
            yield Seen(
                tensor.name, f"{int(bad.sum())} of {values.size} values are NaN or infinite, the first at {first}"
            )


def zero_block(opened: Opened) -> Iterator[Seen]:
    for tensor in opened.matrices:
        if not tensor.quantized:
            continue
        largest = _largest(tensor)
        holes = (largest == 0) & (largest.max(1, keepdims=True) > 0)
        count = int(holes.sum())
        if 0 < count <= max(1, MANY * largest.size):
            row, block = (int(i) for i in np.argwhere(holes)[0])
            others = f", and {count - 1} more blocks of this matrix" if count > 1 else ""
            yield Seen(_place(tensor, row, block), f"all weights are 0 in a row that is not{others}")


def scale_outlier(opened: Opened) -> Iterator[Seen]:
    for tensor in opened.matrices:
        if not tensor.quantized:
            continue
        largest = _largest(tensor)
        middle = float(np.median(largest))
        if middle <= 0 or not np.isfinite(largest).all():
            continue
        ratio = largest / middle
        if ratio.max() > OUTLIER:
            row, block = (int(i) for i in np.unravel_index(int(ratio.argmax()), ratio.shape))
            yield Seen(_place(tensor, row, block), f"{ratio.max():.3g} times as large as the matrix's other blocks")


def twice(opened: Opened) -> Iterator[Seen]:
    """Decoder parameters where the file names them, so that a stacked q, k and v is three; else whole tensors."""
    seen: dict[bytes, str] = {}
    for tensor in opened.matrices:
        if tensor.role != "linear" or tensor.weights < LEAST_WEIGHTS:
            continue
        values = np.ascontiguousarray(tensor.matrix())
        begin = 0
        for name, rows in [(p.parameter, p.rows) for p in tensor.parts] or [(tensor.name, len(values))]:
            key = values[begin : begin + rows].tobytes()
            begin += rows
            if key in seen:
                shown = name if len(tensor.parts) < 2 else f"{tensor.name} ({name})"
                yield Seen(shown, f"holds the very numbers of {seen[key]}")
            seen.setdefault(key, name)


RULES = (
    Rule(
        id="WEIGHT-NOT-FINITE",
        formats=EVERY,
        severity="error",
        summary="NaN or infinite weights or scales",
        reason="one such value makes every output NaN; runtimes load the file without a word",
        reference="ggml-org/llama.cpp#6884",
        fix="quantize again from a source without NaN; check the importance matrix for zeros",
        check=not_finite,
    ),
    Rule(
        id="WEIGHT-ZERO-BLOCK",
        formats=RUNTIMES,
        severity="error",
        summary="an isolated block of zeros in a row that is not zero",
        reason="a region that was not written, or was overwritten, loads silently and drops part of a matrix",
        reference="ikawrakow/ik_llama.cpp#2437",
        fix="fetch or export the file again and compare its sha256",
        check=zero_block,
    ),
    Rule(
        id="WEIGHT-SCALE-OUTLIER",
        formats=RUNTIMES,
        severity="error",
        summary="a block whose weights are 1000 times those of its matrix",
        reason="a damaged scale multiplies 32 weights at once; the model still loads, and speaks nonsense",
        reference="ggml-org/llama.cpp#7311",
        fix="fetch or export the file again and compare its sha256",
        check=scale_outlier,
    ),
    Rule(
        id="WEIGHT-TWICE",
        formats=RUNTIMES,
        severity="warning",
        summary="two matrices with the very same numbers",
        reason="an index that a converter got wrong gives one layer another's weights (models that repeat layers by "
        "design do so too)",
        reference="huggingface/optimum#1755",
        fix="compare with the source: lilliput inspect FILE --check --source MODEL",
        check=twice,
    ),
)
