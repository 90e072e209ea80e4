"""The weights against the float source's (lilliput.checks.comparison): each kind of difference is a rule of its own."""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.checks.base import RUNTIMES, Check, NotCheckedError, Rule, Seen
from lilliput.checks.opened import Opened


def _of(*kinds: str) -> Check:
    def check(opened: Opened) -> Iterator[Seen]:
        return (Seen(d.place, d.what) for d in opened.comparison.differences if d.kind in kinds)

    return check


def unlike(opened: Opened) -> Iterator[Seen]:
    """Also says what could not be compared: in files that name no parameters, matrices like none of the source's
    (q, k and v in one, say)."""
    yield from _of("unlike", "missing")(opened)
    left = [tensor.name for tensor in opened.matrices if tensor.name not in opened.comparison.compared]
    if left:
        raise NotCheckedError(f"{len(left)} matrices are like none of the source's, {', '.join(left[:3])} first")


RULES = (
    Rule(
        id="SOURCE-BLOCK",
        formats=RUNTIMES,
        severity="warning",
        summary="blocks that are not the source's, or scaled otherwise, in a matrix that is",
        reason="a region that was not written, or was overwritten, loads silently and drops part of a matrix",
        reference="ikawrakow/ik_llama.cpp#2437",
        fix="export the file again and compare its sha256",
        check=_of("block"),
        needs="source",
    ),
    Rule(
        id="SOURCE-SCALES",
        formats=RUNTIMES,
        severity="error",
        summary="scales of other blocks than the codes",
        reason="scales in another order than codes leave a model that speaks, and loses on every benchmark",
        reference="google-ai-edge/litert-samples#257",
        fix="check the order in which the exporter writes scales: row by row, block by block",
        check=_of("scales"),
        needs="source",
    ),
    Rule(
        id="SOURCE-OTHER-TENSOR",
        formats=RUNTIMES,
        severity="error",
        summary="a tensor that holds another one's numbers",
        reason="an index that a converter got wrong gives one layer another's weights",
        reference="huggingface/optimum#1755",
        fix="check how the converter maps names to layers",
        check=_of("other"),
        needs="source",
    ),
    Rule(
        id="SOURCE-TRANSPOSED",
        formats=RUNTIMES,
        severity="error",
        summary="a matrix that is the source's transposed",
        reason="Conv1D keeps matrices (in, out): a square one that is not turned loads, and computes nonsense",
        reference="huggingface/optimum#1755",
        fix="turn the matrix, or leave it where the format wants (in, out)",
        check=_of("transposed", "shape"),
        needs="source",
    ),
    Rule(
        id="SOURCE-NIBBLES",
        formats=RUNTIMES,
        severity="error",
        summary="4-bit codes whose nibbles are swapped",
        reason="formats differ in which code of a byte is first; the wrong one exchanges columns",
        reference="microsoft/onnxruntime#24828",
        fix="pack the first code into the low nibble (GGUF: columns i and i + 16 share a byte)",
        check=_of("nibbles"),
        needs="source",
    ),
    Rule(
        id="SOURCE-ROW-ORDER",
        formats=RUNTIMES,
        severity="error",
        summary="rows of q or k in another order than the runtime rotates",
        reason="llama.cpp rotates neighbours, transformers halves: rows that are not permuted give gibberish",
        reference="ggml-org/llama.cpp#3018",
        fix="permute the rows of q and k (codes and scales alike) once",
        check=_of("rows"),
        needs="source",
    ),
    Rule(
        id="SOURCE-NORM",
        formats=RUNTIMES,
        severity="error",
        summary="norm weights without the 1 of families like Gemma, or with it twice",
        reason="Gemma stores norm weights as differences from 1; a converter must add it, and only once",
        reference="ggml-org/llama.cpp#5631",
        fix="add 1 to the source's norm weights at conversion",
        check=_of("norm"),
        needs="source",
    ),
    Rule(
        id="SOURCE-WEIGHTS",
        formats=RUNTIMES,
        severity="error",
        summary="a tensor that is not the source's, nor any simple change of it",
        reason="conversions that corrupt weights were reported for norms and matrices of many models",
        reference="ggml-org/llama.cpp#22565",
        fix="export again from this source; if it is another model, give that one",
        check=unlike,
        needs="source",
    ),
)
