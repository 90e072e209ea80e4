"""Twins of an ONNX file: the same graph with other arithmetic, every tensor under its own name.

    floats      no integer product and no rounded activation: DynamicQuantizeLinear divides by its scale and rounds
                nothing, integer products become float ones of (codes - zero point), MatMulNBits has no accuracy_level
                (activations stay float32), activations' QuantizeLinear and DequantizeLinear fall away
    integers    the operators as they are defined: integer products are summed exactly (in float64, whose 53 bits hold
                any sum of products of bytes), MatMulNBits of accuracy_level 4 multiplies activations that are rounded
                to 8 bits, block by block of its weights, scale = max|a| / 127, halves to even

The definition of accuracy_level 4 is only "int8 or better": how ONNX Runtime rounds is MLAS's QuantizeARow_CompInt8
(onnxruntime/core/mlas/lib/sqnbitgemm*), which the twin `integers` follows. What is integer and in no table here stays
as it is, and is listed by name.

Sources: onnx, docs/Operators.md; onnxruntime, docs/ContribOperators.md (MatMulNBits, MatMulIntegerToFloat,
DynamicQuantizeMatMul).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

Arithmetic = Literal["floats", "integers"]
CONTRIBUTED = "com.microsoft"
INT8_LEVEL = 4
PRODUCTS = frozenset({"MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"})
# integer operators that no twin replaces
KEPT = frozenset(
    (
        "QLinearMatMul", "QLinearConv", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearSoftmax", "QGemm",
        "ConvInteger", "QAttention", "DynamicQuantizeLSTM", "QEmbedLayerNormalization",
    )
)  # fmt: skip


@dataclass
class Twin:
    """A graph being rewritten: `kept` are integer operators that stayed, by kind."""

    arithmetic: Arithmetic
    stored: frozenset[str]  # names of initializers and of what constants give
    opset: int
    nodes: list[NodeProto] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)
    floating: set[str] = field(default_factory=set)  # tensors that are codes in the file and floats here
    constants: dict[str, TensorProto] = field(default_factory=dict)

    def add(self, kind: str, inputs: Iterable[str], output: str, domain: str = "", **attributes: object) -> str:
        names = list(inputs)
        self.nodes.append(helper.make_node(kind, names, [output], name=f"ladder/{output}", domain=domain, **attributes))
        return output

    def constant(self, value: float | list[int], dtype: type[np.generic] = np.float32) -> str:
        name = f"ladder/constant/{np.dtype(dtype).name}/{value}"
        self.constants[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def cast(self, name: str, to: int) -> str:
        """A cast of a tensor, made anew each time: the twin is no place to save."""
        return self.add("Cast", [name], f"ladder/{name}/{to}/{len(self.nodes)}", to=to)


def twin(model: onnx.ModelProto, arithmetic: Arithmetic) -> tuple[onnx.ModelProto, dict[str, int]]:
    """A model with the other arithmetic, and the integer operators that it keeps, by kind."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    stored = {t.name for t in graph.initializer} | {n.output[0] for n in graph.node if n.op_type == "Constant"}
    opset = next((o.version for o in made.opset_import if o.domain in ("", "ai.onnx")), 1)
    work = Twin(arithmetic, frozenset(stored), opset)
    for node in graph.node:
        _REWRITES.get(node.op_type, _keep)(work, node)
    del graph.node[:]
    graph.node.extend(work.nodes)
    graph.initializer.extend(work.constants.values())
    del graph.value_info[:]  # types may be others now
    return made, work.kept


def _keep(work: Twin, node: NodeProto) -> None:
    if node.op_type in KEPT:
        work.kept[node.op_type] = work.kept.get(node.op_type, 0) + 1
    work.nodes.append(node)


def _dynamic(work: Twin, node: NodeProto) -> None:
    """DynamicQuantizeLinear: x → codes, scale, zero point."""
    if work.arithmetic == "integers":
        work.nodes.append(node)
        return
    codes, scale, zero = node.output
    work.floating |= {codes, zero}
    unused = [f"ladder/{codes}/unused", scale, f"ladder/{zero}/unused"]
    work.nodes.append(helper.make_node("DynamicQuantizeLinear", list(node.input), unused, name=f"ladder/{codes}/scale"))
    work.add("Div", [node.input[0], scale], codes)
    work.add("Identity", [work.constant(0.0)], zero)


def _integer_product(work: Twin, node: NodeProto) -> None:
    """MatMulInteger: (a - a_zero) @ (b - b_zero), int32."""
    a, b, a_zero, b_zero = [*node.input, "", ""][:4]
    if work.arithmetic == "floats":
        work.floating.add(node.output[0])
    product = _product(work, (a, a_zero), (b, b_zero), node.output[0])
    work.add(
        "Cast", [product], node.output[0], to=TensorProto.FLOAT if work.arithmetic == "floats" else TensorProto.INT32
    )


def _product(work: Twin, left: tuple[str, str], right: tuple[str, str], name: str) -> str:
    """(a - a_zero) @ (b - b_zero) of two pairs, exact where they are integers: float64 in both twins."""
    sides = []
    for operand, zero in (left, right):
        side = work.cast(operand, TensorProto.DOUBLE)
        if zero:
            side = work.add("Sub", [side, work.cast(zero, TensorProto.DOUBLE)], f"ladder/{name}/{len(work.nodes)}")
        sides.append(side)
    return work.add("MatMul", sides, f"ladder/{name}/exact")


def _scaled_product(work: Twin, node: NodeProto) -> None:
    """MatMulIntegerToFloat: a, b, a_scale, b_scale[, a_zero, b_zero, bias]."""
    a, b, a_scale, b_scale, a_zero, b_zero, bias = [*node.input, "", "", ""][:7]
    exact = work.cast(_product(work, (a, a_zero), (b, b_zero), node.output[0]), TensorProto.FLOAT)
    scale = work.add("Mul", [a_scale, b_scale], f"ladder/{node.output[0]}/scale")
    _finish(work, exact, scale, bias, node.output[0])


def _finish(work: Twin, product: str, scale: str, bias: str, output: str) -> None:
    if not bias:
        work.add("Mul", [product, scale], output)
        return
    work.add("Add", [work.add("Mul", [product, scale], f"ladder/{output}/scaled"), bias], output)


def _dynamic_product(work: Twin, node: NodeProto) -> None:
    """DynamicQuantizeMatMul: a float, b, b_scale[, b_zero, bias]."""
    a, b, b_scale, b_zero, bias = [*node.input, "", ""][:5]
    output = node.output[0]
    if work.arithmetic == "floats":
        exact = work.cast(_product(work, (a, ""), (b, b_zero), output), TensorProto.FLOAT)
        _finish(work, exact, b_scale, bias, output)
        return
    names = [f"ladder/{output}/{part}" for part in ("codes", "a_scale", "a_zero")]
    work.nodes.append(helper.make_node("DynamicQuantizeLinear", [a], names, name=f"ladder/{output}/rounded"))
    exact = work.cast(_product(work, (names[0], names[2]), (b, b_zero), output), TensorProto.FLOAT)
    _finish(work, exact, work.add("Mul", [names[1], b_scale], f"ladder/{output}/scale"), bias, output)


def _blocks(work: Twin, node: NodeProto) -> None:
    """MatMulNBits: activations stay float32, or are rounded as accuracy_level asks."""
    numbers = {a.name: int(a.i) for a in node.attribute}
    plain = NodeProto()
    plain.CopyFrom(node)
    del plain.attribute[:]
    plain.attribute.extend(a for a in node.attribute if a.name != "accuracy_level")
    if work.arithmetic == "integers" and numbers.get("accuracy_level", 0) == INT8_LEVEL:
        plain.input[0] = _rounded(work, node, numbers["K"], numbers.get("block_size", 32))
    work.nodes.append(plain)


def _rounded(work: Twin, node: NodeProto, cols: int, block: int) -> str:
    """Activations (…, cols) rounded to 127 steps of the largest in each block."""
    given, base = node.input[0], f"ladder/{node.output[0]}/rounded"
    shape = work.add("Shape", [given], f"{base}/shape")
    flat = work.add("Reshape", [given, work.constant([-1, cols], np.int64)], f"{base}/flat")
    padding = -cols % block
    if padding:
        flat = work.add("Pad", [flat, work.constant([0, 0, 0, padding], np.int64)], f"{base}/padded")
    blocks = work.add("Reshape", [flat, work.constant([-1, block], np.int64)], f"{base}/blocks")
    size = work.add("Abs", [blocks], f"{base}/abs")
    if work.opset < 18:
        most = work.add("ReduceMax", [size], f"{base}/max", axes=[1], keepdims=1)
    else:
        most = work.add("ReduceMax", [size, work.constant([1], np.int64)], f"{base}/max", keepdims=1)
    step = work.add("Div", [most, work.constant(127.0)], f"{base}/step")
    step = work.add("Max", [step, work.constant(1e-30)], f"{base}/positive")
    codes = work.add("Round", [work.add("Div", [blocks, step], f"{base}/ratio")], f"{base}/codes")
    values = work.add("Mul", [codes, step], f"{base}/values")
    if padding:
        whole = work.add("Reshape", [values, work.constant([-1, cols + padding], np.int64)], f"{base}/whole")
        values = work.add(
            "Slice", [whole, *(work.constant([n], np.int64) for n in (0, cols, 1))], f"{base}/cut"
        )  # fmt: skip
    return work.add("Reshape", [values, shape], base)


def _quantize(work: Twin, node: NodeProto) -> None:
    if work.arithmetic == "integers" or node.input[0] in work.stored:
        work.nodes.append(node)
        return
    work.floating.add(node.output[0])
    work.add("Identity", node.input[:1], node.output[0])


def _dequantize(work: Twin, node: NodeProto) -> None:
    if node.input[0] in work.floating:
        work.add("Identity", node.input[:1], node.output[0])
    else:
        work.nodes.append(node)


_REWRITES: dict[str, Callable[[Twin, NodeProto], None]] = {
    "DynamicQuantizeLinear": _dynamic,
    "MatMulInteger": _integer_product,
    "MatMulIntegerToFloat": _scaled_product,
    "DynamicQuantizeMatMul": _dynamic_product,
    "MatMulNBits": _blocks,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
}
