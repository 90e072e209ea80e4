"""MatMulNBits and its like: attributes that decide which kernel runs, and shapes that a kernel computes wrongly.

Speeds are ONNX Runtime 1.31's on x86-64 with AVX2, one row of a 1024x640 matrix: 4 bits 115 µs at accuracy level 0
and 37 µs at 4; 2 and 8 bits 31 to 64 ms at levels 0 and 1 (they are dequantized anew at each call) and 0.9 to 2.3 ms
at 4; 2 bits in blocks of 16 have no fast kernel at any level; a DequantizeLinear of (N, K) codes behind a Transpose is
not fused and takes 2.7 ms, of (K, N) codes 58 µs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto

from lilliput.checks.base import ONNX, Rule, Seen
from lilliput.checks.onnx_view import BITS_OF_TYPE, OnnxFile, Packed, attribute, place
from lilliput.checks.opened import Opened

FAST_LEVEL = 4
COMPUTED_BITS = (2, 4, 8)
WRONG_BLOCK = 512


def _products(file: OnnxFile) -> Iterator[Packed]:
    return (packed for packed in file.packed if packed.node.op_type == "MatMulNBits")


def accuracy_level(opened: Opened) -> Iterator[Seen]:
    for packed in _products(opened.onnx):
        level = attribute(packed.node, "accuracy_level", 0)
        if packed.bits == 4 and level != FAST_LEVEL:
            yield Seen(place(packed.node), f"accuracy_level is {level}, the fast kernels are those of {FAST_LEVEL}")


def slow_kernel(opened: Opened) -> Iterator[Seen]:
    for packed in _products(opened.onnx):
        level = attribute(packed.node, "accuracy_level", 0)
        if packed.bits in (2, 8) and level != FAST_LEVEL:
            yield Seen(place(packed.node), f"{packed.bits} bits at accuracy_level {level}: dequantized at each call")
        elif packed.bits == 2 and packed.block == 16:
            yield Seen(place(packed.node), "2 bits in blocks of 16 have no fast kernel")


def block_size(opened: Opened) -> Iterator[Seen]:
    for packed in opened.onnx.packed:
        if packed.node.op_type == "MatMulNBits" and packed.block == WRONG_BLOCK:
            yield Seen(place(packed.node), f"block_size is {WRONG_BLOCK}")
        if packed.bits not in COMPUTED_BITS:
            yield Seen(place(packed.node), f"bits is {packed.bits}, kernels are there for {COMPUTED_BITS}")


def operand_shapes(opened: Opened) -> Iterator[Seen]:
    file = opened.onnx
    for packed in file.packed:
        if packed.bits not in COMPUTED_BITS or file.initializers[packed.codes].data_type in BITS_OF_TYPE:
            continue
        wanted = {packed.codes: packed.rows * packed.n_blocks * packed.block * packed.bits // 8}
        wanted[packed.scales] = packed.rows * packed.n_blocks
        zeros = packed.zero_points
        if zeros is not None and file.array(zeros).dtype == np.uint8:
            wanted[zeros] = packed.rows * -(-packed.n_blocks * packed.bits // 8)
        for name, count in wanted.items():
            seen = int(np.prod(file.initializers[name].dims))
            if seen != count:
                yield Seen(name, f"has {seen} elements, {place(packed.node)} wants {count}")


def unfused(opened: Opened) -> Iterator[Seen]:
    """A DequantizeLinear of sub-byte codes whose way to the product leads over a Transpose, or whose blocks lie along
    the wrong axis."""
    file = opened.onnx
    for node in file.nodes:
        stored = file.initializers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if stored is None or stored.data_type not in BITS_OF_TYPE:
            continue
        readers = [n.op_type for n in file.consumers.get(node.output[0], ())]
        if "Transpose" in readers:
            yield Seen(place(node), f"{stored.name} is stored (N, K) and transposed behind its DequantizeLinear")
        elif set(readers) <= {"MatMul"} and readers and _axis(node, len(stored.dims)) != 0:
            yield Seen(place(node), f"blocks of {stored.name} lie along axis {_axis(node, len(stored.dims))}, not 0")


def _axis(node: NodeProto, rank: int) -> int:
    return attribute(node, "axis", 1) % max(rank, 1)


RULES = (
    Rule(
        id="ONNX-ACC-LEVEL",
        formats=ONNX,
        severity="warning",
        summary="a 4-bit MatMulNBits without accuracy_level 4",
        reason="without it activations stay float32: 39.3 instead of 91.8 tokens/s on one model",
        reference="onnxruntime/mobius#402",
        fix="set accuracy_level to 4, and hold the outputs against level 0 (level 4 can flip answers: "
        "microsoft/onnxruntime#29849)",
        check=accuracy_level,
    ),
    Rule(
        id="ONNX-SLOW-KERNEL",
        formats=ONNX,
        severity="warning",
        summary="a MatMulNBits of 2 or 8 bits that has no fast kernel",
        reason="without one the matrix is dequantized anew at each call, 20 to 60 times slower: fewer bits, less speed",
        reference="microsoft/onnxruntime#23004",
        fix="set accuracy_level to 4; for 2 bits take blocks of 32 or more",
        check=slow_kernel,
    ),
    Rule(
        id="ONNX-BLOCK-SIZE",
        formats=ONNX,
        severity="error",
        summary="blocks of 512, or a number of bits that no kernel takes",
        reason="MatMulNBits computes zeros for blocks of 512 on the CPU, without a word",
        reference="microsoft/onnxruntime#28551",
        fix="quantize in blocks of 256 or less, with 2, 4 or 8 bits",
        check=block_size,
    ),
    Rule(
        id="ONNX-OPERANDS",
        formats=ONNX,
        severity="error",
        summary="codes, scales or zero points that have not the size their node asks for",
        reason="zero points packed in another way than MatMulNBits reads them fail at the first run",
        reference="amd/Quark#20",
        fix="pack zero points row by row, two to a byte, each row padded to a whole byte",
        check=operand_shapes,
    ),
    Rule(
        id="ONNX-QDQ-NOT-FUSED",
        formats=ONNX,
        severity="warning",
        summary="an int4 DequantizeLinear that is not fused into MatMulNBits",
        reason="only (K, N) codes in blocks along axis 0 are fused at load; others are dequantized at each call, 44 "
        "times slower",
        reference="microsoft/onnxruntime#21180",
        fix="store the codes (K, N) with axis 0, or write MatMulNBits",
        check=unfused,
    ),
)
