"""Runtimes of versions that are known to compute a feature of the file wrongly: the one installed here, or the one that
a manifest says the file was proven on.

The table is data: a package, the versions from `first` up to but without `fixed`, the feature that they compute
wrongly, and where it was reported. What has no rule of its own because a version mends it stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lilliput.checks.base import ONNX, Format, Rule, Seen
from lilliput.checks.onnx_view import BITS_OF_TYPE, attribute
from lilliput.checks.opened import Opened


@dataclass(frozen=True)
class KnownBad:
    """`feature` gives the places where a file uses what these versions compute wrongly."""

    package: str
    format: Format
    first: tuple[int, ...]
    fixed: tuple[int, ...]
    what: str
    reference: str
    feature: Callable[[Opened], Iterator[str]]


def axis_0_int4(opened: Opened) -> Iterator[str]:
    """int4 DequantizeLinear in blocks along axis 0, read by a MatMul."""
    file = opened.onnx
    for node in file.nodes:
        stored = file.initializers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if stored is None or stored.data_type not in BITS_OF_TYPE or not attribute(node, "block_size", 0):
            continue
        readers = {n.op_type for n in file.consumers.get(node.output[0], ())}
        if attribute(node, "axis", 1) == 0 and readers & {"MatMul", "Gemm"}:
            yield str(node.name or node.output[0])


# 1.31.1 computes all of int4 and uint4, with and without zero points, blocks of 16, 32 and 64 right (checked here).
TABLE = (
    KnownBad(
        "onnxruntime", "onnx", (1, 29), (1, 31), "fuses int4 in blocks along axis 0 into a MatMulNBits of other values",
        "onnxsim/onnxsim#749", axis_0_int4,
    ),
)  # fmt: skip


def numbers(version: str) -> tuple[int, ...]:
    """1.29.0 → (1, 29, 0); what is no number ends it."""
    found = []
    for piece in version.split("."):
        digits = "".join(c for c in piece if c.isdigit())
        if not digits:
            break
        found.append(int(digits))
    return tuple(found)


def known_bad(opened: Opened) -> Iterator[Seen]:
    for entry in TABLE:
        version = opened.runtime_versions.get(entry.package)
        if entry.format != opened.format or version is None or not entry.first <= numbers(version) < entry.fixed:
            continue
        for where in entry.feature(opened):
            yield Seen(where, f"{entry.package} {version} {entry.what} ({entry.reference})")


RULES = (
    Rule(
        id="RUNTIME-KNOWN-BAD",
        formats=ONNX,
        severity="error",
        summary="a feature that the runtime's version is known to compute wrongly",
        reason="the file is right and its results are not: only this version's kernels or fusions are at fault",
        reference="onnxsim/onnxsim#749",
        fix="update the runtime, or run with the optimization level that leaves the pattern alone",
        check=known_bad,
    ),
)
