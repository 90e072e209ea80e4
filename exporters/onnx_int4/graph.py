"""Lower the fused nodes to one ONNX graph, for prefill and decode alike.

    input_ids        (batch_size, sequence_length) int64
    attention_mask   (batch_size, total_sequence_length) int64     1 where a position is valid: past + new ones
    position_ids     (batch_size, sequence_length) int64           only with learned positions
    past_key_values.{i}.key|value, present.{i}.key|value   (batch_size, kv_heads, context, head_dim) float32
    logits           (batch_size, 1, vocab) float32                 of each sequence's last valid position

Prompts of a batch may differ in length: the shorter are padded on the right, as GroupQueryAttention (whose cache has
the valid positions first) and onnxruntime-genai want it.

A caller binds one buffer as past and present: GroupQueryAttention then writes the new keys and values in
place. It takes q, k, v packed and rotates them itself; where heads are normed first it takes them apart, because its
own inputs for that are not implemented on the CPU (ONNX Runtime 1.31). Its local_window_size counts the query's own
position, as a node's window does. The names are onnxruntime-genai's.

A packed matrix `w` lies in the initializers `w.codes`, `w.scales` and `w.zero_points` (packing.py); embedding and
head name the same ones where they are tied. Scales that float16 holds are stored so, and cast once at load.
float matrices stay (out, in), as the decoder names them, and FusedMatMul reads them transposed.

The exact twin computes 4-bit matrices with accuracy_level 0 (float32 activations). For 8 bits ONNX Runtime 1.31
has no such kernel: it dequantizes the matrix anew at each call (84 ms for 28 M weights on two AVX-512 cores, against
0.35 ms). There the twin dequantizes in the graph, from the same initializers, and constant folding does it once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from exporters.onnx_int4.fusion import Fused
from exporters.onnx_int4.packing import Packed
from lilliput.grid import Float, Outliers
from lilliput.model import DecoderConfig, Node

OPSET = 21  # the newest that onnxruntime-genai 0.18 and optimum's checks both read
IR_VERSION = 10  # of opset 21
MICROSOFT = "com.microsoft"
INT32, INT64, FLOAT = TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT


@dataclass(frozen=True, eq=False)
class Parameters:
    """What the nodes name: packed matrices, float arrays, and the stacks of them that fusion made."""

    packed: Mapping[str, Packed]
    floats: Mapping[str, Float]  # also the rotary tables (context, head_dim / 2) that the nodes name
    float16_scales: frozenset[str]  # packed matrices whose scales float16 holds


@dataclass
class Builder:
    """The graph while it grows."""

    parameters: Parameters
    accuracy_level: int
    exact: bool
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)

    def add(self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        """Append a node named after its first output; that output's name."""
        self.nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, array: npt.NDArray[Any]) -> str:
        """An initializer of that name, made once."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def float(self, name: str) -> str:
        return self.constant(name, self.parameters.floats[name])

    def matrix(self, name: str) -> tuple[Packed, list[str]]:
        """A packed matrix and its operands in the order codes, scales[, zero_points]."""
        packed = self.parameters.packed[name]
        operands = [self.constant(f"{name}.codes", packed.codes), self._scales(name, packed.scales)]
        if packed.zero_points is not None:
            operands.append(self.constant(f"{name}.zero_points", packed.zero_points))
        return packed, operands

    def _scales(self, name: str, scales: Float) -> str:
        stored = f"{name}.scales"
        if name not in self.parameters.float16_scales:
            return self.constant(stored, scales)
        cast = f"/{name}.scales"
        if stored not in self.initializers:
            self.add("Cast", [self.constant(stored, scales.astype(np.float16))], [cast], to=FLOAT)
        return cast


def value(name: str) -> str:
    """A traced value's name in the graph: apart from the parameters' names."""
    if not name or name == "logits":
        return name
    if name.removesuffix(".out")[1:].startswith("_cache_"):
        kind = {"k": "key", "v": "value"}[name[0]]
        index = name.removesuffix(".out").rsplit("_", 1)[1]
        return f"present.{index}.{kind}" if name.endswith(".out") else f"past_key_values.{index}.{kind}"
    return {"tokens": "input_ids", "positions": "position_ids"}.get(name, f"/{name}")


def _embedding(b: Builder, node: Node, out: str) -> None:
    table, indices = node.inputs[0], value(node.inputs[1])
    if table in b.parameters.floats:
        b.add("Gather", [b.float(table), indices], [out], axis=0)
        return
    packed, (codes, *rest) = b.matrix(table)
    rows, n_bytes = packed.rows, packed.codes.shape[1] * packed.codes.shape[2]
    shape = b.constant(f"{table}.shape", np.array([rows, n_bytes], np.int64))
    flat = b.add("Reshape", [codes, shape], [f"/{table}.codes"])  # the table is 2D here, 3D in MatMulNBits
    gathered = f"{out}.padded" if packed.padded_cols != packed.cols else out
    attributes = {"bits": packed.bits, "block_size": packed.block_size, "gather_axis": 0, "quantize_axis": 1}
    b.add("GatherBlockQuantized", [flat, indices, *rest], [gathered], MICROSOFT, **attributes)
    if gathered != out:
        _first_columns(b, gathered, out, packed.cols, axis=2)


def _first_columns(b: Builder, x: str, out: str, count: int, axis: int) -> str:
    bounds = (("0", 0), (str(count), count), (str(axis), axis))
    return b.add("Slice", [x, *(b.constant(f"int64.{n}", np.array([i], np.int64)) for n, i in bounds)], [out])


def _linear(b: Builder, node: Node, out: str) -> None:
    x, weight, bias = value(node.inputs[0]), node.inputs[1], [b.float(name) for name in node.inputs[2:]]
    if weight in b.parameters.floats:
        _float_linear(b, [x, b.float(weight)], bias, out)
        return
    kept = b.parameters.packed[weight].outliers
    if kept is None:
        _codes_linear(b, x, weight, bias, out)
        return
    rest, product = _outliers(b, x, weight, kept, out)
    _codes_linear(b, rest, weight, bias, f"{out}.codes")
    b.add("Add", [f"{out}.codes", product], [out])


def _codes_linear(b: Builder, x: str, weight: str, bias: list[str], out: str) -> None:
    packed, operands = b.matrix(weight)
    if b.exact and packed.bits == 8:
        _float_linear(b, [x, _dequantize(b, weight, packed, operands)], bias, out)
        return
    inputs = [x, *operands]
    if bias:
        inputs += [""] * (5 - len(inputs)) + bias
    attributes = {"K": packed.cols, "N": packed.rows, "bits": packed.bits, "block_size": packed.block_size}
    b.add("MatMulNBits", inputs, [out], MICROSOFT, accuracy_level=b.accuracy_level, **attributes)


def _outliers(b: Builder, x: str, weight: str, kept: Outliers, out: str) -> tuple[str, str]:
    """x with 0 in the columns that are kept at 16 bit, and the product of those columns alone.

    An outlier that stayed in x would set the 8-bit scale of its block.
    """
    mask = np.ones(b.parameters.packed[weight].cols, np.float32)
    mask[kept.columns] = 0
    rest = b.add("Mul", [x, b.constant(f"{weight}.rest", mask)], [f"{out}.rest"])
    gathered = b.add("Gather", [x, b.constant(f"{weight}.columns", kept.columns)], [f"{out}.gathered"], axis=-1)
    stored, values = f"{weight}.values", f"/{weight}.values"
    if stored not in b.initializers:
        b.add("Cast", [b.constant(stored, kept.values.astype(np.float16))], [values], to=FLOAT)
    return rest, b.add("FusedMatMul", [gathered, values], [f"{out}.outliers"], MICROSOFT, transB=1)


def _float_linear(b: Builder, inputs: list[str], bias: list[str], out: str) -> None:
    """inputs are x and a matrix (out, in)."""
    product = b.add("FusedMatMul", inputs, [f"{out}.product" if bias else out], MICROSOFT, transB=1)
    if bias:
        b.add("Add", [product, *bias], [out])


def _dequantize(b: Builder, name: str, packed: Packed, operands: list[str]) -> str:
    """(rows, cols) float32 of an 8-bit matrix, in standard operators that fold into a constant at load."""
    rows, n_blocks, _ = packed.codes.shape
    wide = f"/{name}.float"
    if any(made.name == wide for made in b.nodes):
        return wide
    per_block = b.constant(f"{name}.per_block", np.array([rows, n_blocks, 1], np.int64))
    matrix = b.constant(f"{name}.matrix", np.array([rows, packed.padded_cols], np.int64))
    codes = b.add("Cast", [operands[0]], [f"{wide}.codes"], to=FLOAT)
    scales = b.add("Reshape", [operands[1], per_block], [f"{wide}.scales"])
    if packed.zero_points is None:
        zero = b.constant("float.128", np.array(128, np.float32))
    else:
        cast = b.add("Cast", [operands[2]], [f"{wide}.zero_points"], to=FLOAT)
        zero = b.add("Reshape", [cast, per_block], [f"{wide}.zeros"])
    centred = b.add("Sub", [codes, zero], [f"{wide}.centred"])
    scaled = b.add("Mul", [centred, scales], [f"{wide}.scaled"])
    padded = packed.padded_cols != packed.cols
    whole = b.add("Reshape", [scaled, matrix], [f"{wide}.padded" if padded else wide])
    return _first_columns(b, whole, wide, packed.cols, axis=1) if padded else wide


def _norm(b: Builder, node: Node, out: str, op: str) -> None:
    vectors = [b.float(name) for name in node.inputs[1:]]
    b.add(op, [value(node.inputs[0]), *vectors], [out], axis=-1, epsilon=node.attributes["eps"])


def _skip_norm(b: Builder, node: Node, out: str, op: str) -> None:
    vectors = [b.float(name) for name in node.inputs[2:]]
    outputs = [out, "", "", value(node.outputs[1])]
    b.add(op, [*map(value, node.inputs[:2]), *vectors], outputs, MICROSOFT, epsilon=node.attributes["eps"])


def _head_norm(b: Builder, node: Node, out: str) -> None:
    weight, heads = node.inputs[1], int(node.attributes["heads"])
    size = len(b.parameters.floats[weight])
    split = b.constant(f"int64.heads.{heads}x{size}", np.array([0, 0, heads, size], np.int64))  # 0: as it is
    whole = b.constant(f"int64.heads.{heads * size}", np.array([0, 0, heads * size], np.int64))
    x = b.add("Reshape", [value(node.inputs[0]), split], [f"{out}.heads"])
    eps, normed = node.attributes["eps"], f"{out}.normed"
    b.add("SimplifiedLayerNormalization", [x, b.float(weight)], [normed], axis=-1, epsilon=eps)
    b.add("Reshape", [normed, whole], [out])


def _split(b: Builder, node: Node, out: str) -> None:
    """The columns of a stacked linear apart, as many to each output as its attributes say."""
    sizes = [int(size) for size in node.attributes.values()]
    lengths = b.constant(f"int64.{'+'.join(map(str, sizes))}", np.array(sizes, np.int64))
    b.add("Split", [value(node.inputs[0]), lengths], [value(name) for name in node.outputs], axis=-1)


def _attention(b: Builder, node: Node, out: str) -> None:
    tables = [b.float(name) for name in node.inputs[6:]]
    inputs = [*map(value, node.inputs[:5]), "/seqlens_k", "/total_sequence_length", *tables]
    outputs = [out, *map(value, node.outputs[1:])]
    a = node.attributes
    attributes: dict[str, Any] = {
        "num_heads": a["num_heads"],
        "kv_num_heads": a["num_kv_heads"],
        "do_rotary": int(bool(tables)),
    }
    if a["scale"] != a["head_dim"] ** -0.5:
        attributes["scale"] = a["scale"]
    if a["window"]:
        attributes["local_window_size"] = a["window"]
    if a["softcap"]:
        attributes["softcap"] = a["softcap"]
    b.add("GroupQueryAttention", inputs, outputs, MICROSOFT, **attributes)


def _scale(b: Builder, node: Node, out: str) -> None:
    factor = np.float32(node.attributes["factor"])
    b.add("Mul", [value(node.inputs[0]), b.constant(f"float.{factor!r}", np.array(factor))], [out])


def _last(b: Builder, node: Node, out: str) -> None:
    """Of each sequence the row of its last valid token, (batch, 1, hidden): with right padding not the last row."""
    b.add("GatherND", [value(node.inputs[0]), "/last_row"], [out], batch_dims=1)


def _plain(b: Builder, node: Node, out: str, op: str, domain: str = "", **attributes: float) -> None:
    b.add(op, [value(name) for name in node.inputs], [out], domain, **attributes)


LOWERED: Mapping[str, Callable[[Builder, Node, str], None]] = {
    "embedding": _embedding,
    "linear": _linear,
    "rms_norm": partial(_norm, op="SimplifiedLayerNormalization"),
    "layer_norm": partial(_norm, op="LayerNormalization"),
    "skip_rms_norm": partial(_skip_norm, op="SkipSimplifiedLayerNormalization"),
    "skip_layer_norm": partial(_skip_norm, op="SkipLayerNormalization"),
    "head_norm": _head_norm,
    "split": _split,
    "attention": _attention,
    "last": _last,
    "add": partial(_plain, op="Add"),
    "mul": partial(_plain, op="Mul"),
    "scale": _scale,
    "tanh": partial(_plain, op="Tanh"),
    "silu": partial(_plain, op="QuickGelu", domain=MICROSOFT, alpha=1.0),  # x * sigmoid(alpha * x)
    "gelu_tanh": partial(_plain, op="FastGelu", domain=MICROSOFT),
}


def _mask(b: Builder) -> None:
    """From attention_mask: seqlens_k (batch,) = row sums - 1 and total_sequence_length () = its width, both int32;
    and last_row (batch, 1, 1) int64, the input row of each sequence's last valid token.

    A sequence shorter than its batch has its rows' valid tokens first, so its last is at sum - 1 - (width - steps) in
    a prompt; in a later step of one token that is below 0 for it, and the row is 0.
    """
    zero, one = (b.constant(f"int64.{i}", np.array([i], np.int64)) for i in range(2))
    total = b.add("ReduceSum", ["attention_mask", one], ["/mask.sum"], keepdims=0)
    last = b.add("Sub", [total, one], ["/mask.last"])
    b.add("Cast", [last], ["/seqlens_k"], to=INT32)
    width = b.add("Shape", ["attention_mask"], ["/mask.width"], start=1, end=2)
    scalar = b.add("Squeeze", [width], ["/mask.total"])
    b.add("Cast", [scalar], ["/total_sequence_length"], to=INT32)
    steps = b.add("Shape", ["input_ids"], ["/steps"], start=1, end=2)
    past = b.add("Sub", [width, steps], ["/past"])
    row = b.add("Max", [b.add("Sub", [last, past], ["/last_row.signed"]), zero], ["/last_row.flat"])
    axes = b.constant("int64.axes", np.array([1, 2], np.int64))
    b.add("Unsqueeze", [row, axes], ["/last_row"])


def build(
    config: DecoderConfig, fused: Fused, parameters: Parameters, accuracy_level: int, *, exact: bool
) -> ModelProto:
    """The model, without metadata."""
    builder = Builder(parameters, accuracy_level, exact)
    _mask(builder)
    for node in fused.nodes:
        LOWERED[node.op](builder, node, value(node.outputs[0]))
    inputs = {"input_ids": "sequence_length", "attention_mask": "total_sequence_length"}
    if config.positions == "learned":
        inputs["position_ids"] = "sequence_length"
    cache = ["batch_size", config.num_kv_heads, "context", config.head_dim]
    pairs = [(i, kind) for i in range(config.num_layers) for kind in ("key", "value")]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        builder.nodes,
        "decoder",
        [info(name, INT64, ["batch_size", length]) for name, length in inputs.items()]
        + [info(f"past_key_values.{i}.{kind}", FLOAT, cache) for i, kind in pairs],
        [info("logits", FLOAT, ["batch_size", 1, config.vocab_size])]
        + [info(f"present.{i}.{kind}", FLOAT, cache) for i, kind in pairs],
        list(builder.initializers.values()),
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="lilliput")
