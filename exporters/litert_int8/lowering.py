"""The decoder's nodes, lowered to the operators that XNNPACK runs, one subgraph a signature.

Shapes below: T tokens, H query heads, K KV heads, g = H / K, D head_dim, C context. Batch is 1.

Linears that read the same value (q, k, v; gate, up) become one FULLY_CONNECTED, cut apart afterwards: one
quantization of the activation and one parallel region instead of three.
The parts' names and rows stand in the weight's name, `layers.0.attention.q:576+layers.0.attention.k:192+…`.

Rotary embedding is x * cos + swap(x) * sin, swap exchanging the halves of a head and the sign of the
first half lying in the sin table: the same products and sums as the half-split form, bit for bit.
cos and sin of a step's positions are one lookup in one table (C, 2 D), or in two where some layers have a base of
their own.

Both caches are (1, K, C, D). New entries are written by DYNAMIC_UPDATE_SLICE at input_pos[0]: T positions
from there on, whatever input_pos says of the rest (a start beyond C - T is moved back to it, so a caller must
not prefill past the end).

Attention never repeats the KV heads: queries are grouped per KV head, (1, K, g T, D), for a repeated cache is
a BROADCAST_TO, which no delegate takes. A batch matrix product in XNNPACK repacks its right side at every call;
how fast depends on the layout. One microbenchmark of a decode step, 30 layers, C = 1024, K = 3, D = 64, one core
with AVX-512:

    scores  q @ keys^T    keys (C, D)          2.6 ms      keys (D, C), no transpose     4.3 ms
    y       p @ values    values (C, D)        2.7 ms      values (D, C), transposed     4.0 ms
    the caches as left sides, which are not repacked (the products come out transposed): 3.8 ms and 4.5 ms

LiteRT-LM takes the values in either layout (litert-torch's own default is (D, C)).

What XNNPACK does not take: lookups, the int32 arithmetic of the write position, and the cache updates. Within a layer
both updates lie side by side, so that a graph of L layers has L + 1 delegated parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exporters.litert_int8 import operators as op
from exporters.litert_int8.attention import AttentionLowering
from exporters.litert_int8.flatbuffer import Graph, Model
from exporters.litert_int8.weights import Weights
from lilliput.errors import ExportError
from lilliput.model import DecoderConfig, Node, Signature


def lower(
    model: Model, config: DecoderConfig, weights: Weights, signature: Signature, steps: int, context: int
) -> None:
    """Append `signature`, for `steps` tokens a call, to the file: `decode`, or `prefill_<steps>`.

    Nothing in a trace depends on its number of tokens but shapes. Prefill has no logits, as LiteRT-LM has it.
    """
    name = "decode" if signature.name == "decode" else f"prefill_{steps}"
    outputs = [o.name for o in signature.outputs if signature.name == "decode" or o.name != "logits"]
    nodes = needed(signature.nodes, outputs)
    Lowering(model.graph(name), config, weights, nodes, steps, context).run(outputs)


def needed(nodes: Sequence[Node], outputs: Sequence[str]) -> list[Node]:
    """The nodes that some output depends on, in order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    return kept[::-1]


class Lowering:
    """One subgraph in the making: values by the trace's names, and the operators that nodes become."""

    def __init__(
        self, graph: Graph, config: DecoderConfig, weights: Weights, nodes: Sequence[Node], steps: int, context: int
    ) -> None:
        self.graph, self.config, self.weights = graph, config, weights
        self.nodes, self.steps, self.context = nodes, steps, context
        self.values: dict[str, int] = {}
        self.parts: dict[str, Part] = {}
        self.positions = graph.input("input_pos", [steps], "int32")
        tokens = graph.input("tokens", [1, steps], "int32")
        self.values["tokens"] = op.reshape(graph, tokens, [steps], "int32")
        self.values["positions"] = self.positions
        mask = graph.input("mask", [1, 1, steps, context])
        self.caches(config.num_layers)
        self.attention = AttentionLowering(graph, config, steps, context, self.positions, mask)

    def caches(self, layers: int) -> None:
        heads, dim = self.config.num_kv_heads, self.config.head_dim
        for i in range(layers):
            self.values[f"k_cache_{i}"] = self.graph.input(f"kv_cache_k_{i}", [1, heads, self.context, dim])
            self.values[f"v_cache_{i}"] = self.graph.input(f"kv_cache_v_{i}", [1, heads, self.context, dim])

    def run(self, outputs: Sequence[str]) -> None:
        for node in self.nodes:
            lowered = getattr(self, f"node_{node.op}", None)
            if lowered is None:
                raise ExportError(f"operator {node.op!r} of the traced decoder has no lowering to LiteRT")
            lowered(node)
        for name in outputs:
            self.graph.output(output_name(name), self.value(name))

    def value(self, name: str) -> int:
        """The tensor of a value; a part of a fused linear is cut out when it is first asked for alone."""
        if name not in self.values:
            part = self.parts[name]
            self.values[name] = op.cut(self.graph, part.fused, 2, part.begin, part.rows)
        return self.values[name]

    def node_embedding(self, node: Node) -> None:
        table, indices = node.inputs
        if table == "position_embedding":
            rows = self.weights.vector(self.graph, [table])
        else:
            rows = self.weights.matrix(self.graph, [table])
        found = op.lookup(self.graph, self.values[indices], rows)
        self.values[node.outputs[0]] = op.reshape(self.graph, found, [1, *self.graph.shapes[found]])

    def node_linear(self, node: Node) -> None:
        if node.outputs[0] in self.parts:
            return
        group = self.siblings(node)
        names = [n.inputs[1] for n in group]
        weight = self.weights.matrix(self.graph, names)
        bias = self.weights.vector(self.graph, [n.inputs[2] for n in group]) if len(node.inputs) > 2 else -1
        fused = op.fully_connected(self.graph, self.value(node.inputs[0]), weight, bias)
        if len(group) == 1:
            self.values[node.outputs[0]] = fused
            return
        begin = 0
        for member in group:
            rows = self.weights.rows(member.inputs[1])
            self.parts[member.outputs[0]] = Part(fused, begin, rows)
            begin += rows

    def siblings(self, node: Node) -> list[Node]:
        """`node` and the linears after it that read the same value, on the same grid, with a bias or without alike."""

        def same(other: Node) -> bool:
            return (
                other.op == "linear"
                and other.inputs[0] == node.inputs[0]
                and len(other.inputs) == len(node.inputs)
                and self.weights.grid(other.inputs[1]) == self.weights.grid(node.inputs[1])
            )

        return [other for other in self.nodes if same(other)]

    def node_rms_norm(self, node: Node) -> None:
        g, x = self.graph, self.value(node.inputs[0])
        square = op.mean(g, op.binary(g, "MUL", x, x))
        self.values[node.outputs[0]] = self.scaled(x, square, node)

    def node_layer_norm(self, node: Node) -> None:
        g, x = self.graph, self.value(node.inputs[0])
        centred = op.binary(g, "SUB", x, op.mean(g, x))
        variance = op.mean(g, op.binary(g, "MUL", centred, centred))
        y = self.scaled(centred, variance, node)
        self.values[node.outputs[0]] = op.binary(g, "ADD", y, self.weights.vector(g, [node.inputs[2]]))

    def scaled(self, x: int, variance: int, node: Node) -> int:
        """x * rsqrt(variance + eps) * weight."""
        g = self.graph
        factor = op.unary(g, "RSQRT", op.binary(g, "ADD", variance, op.scalar(g, float(node.attributes["eps"]))))
        return op.binary(g, "MUL", op.binary(g, "MUL", x, factor), self.weights.vector(g, [node.inputs[1]]))

    def node_add(self, node: Node) -> None:
        self.values[node.outputs[0]] = op.binary(self.graph, "ADD", *(self.value(i) for i in node.inputs))

    def node_mul(self, node: Node) -> None:
        self.values[node.outputs[0]] = op.binary(self.graph, "MUL", *(self.value(i) for i in node.inputs))

    def node_silu(self, node: Node) -> None:
        x = self.value(node.inputs[0])
        self.values[node.outputs[0]] = op.binary(self.graph, "MUL", x, op.unary(self.graph, "LOGISTIC", x))

    def node_gelu_tanh(self, node: Node) -> None:
        self.values[node.outputs[0]] = op.unary(self.graph, "GELU", self.value(node.inputs[0]), approximate=True)

    def node_last(self, node: Node) -> None:
        self.values[node.outputs[0]] = op.cut(self.graph, self.value(node.inputs[0]), 1, self.steps - 1, 1)

    def node_scale(self, node: Node) -> None:
        x, factor = self.value(node.inputs[0]), op.scalar(self.graph, float(node.attributes["factor"]))
        self.values[node.outputs[0]] = op.binary(self.graph, "MUL", x, factor)

    def node_tanh(self, node: Node) -> None:
        self.values[node.outputs[0]] = op.unary(self.graph, "TANH", self.value(node.inputs[0]))

    def node_head_norm(self, node: Node) -> None:
        """Heads stay apart, (1, T, heads, D), for the attention that they go to."""
        heads = self.heads(self.value(node.inputs[0]))
        square = op.mean(self.graph, op.binary(self.graph, "MUL", heads, heads))
        self.values[node.outputs[0]] = self.scaled(heads, square, node)

    def node_attention(self, node: Node) -> None:
        turned, v = self.split(node.inputs[:3])
        caches = self.values[node.inputs[3]], self.values[node.inputs[4]]
        result = self.attention.lower(node, turned, v, caches)
        self.values.update(zip(node.outputs, result, strict=True))

    def heads(self, x: int) -> int:
        """(1, T, heads * D) → (1, T, heads, D); what has heads already stays."""
        shape, dim = self.graph.shapes[x], self.config.head_dim
        return op.reshape(self.graph, x, [1, self.steps, shape[-1] // dim, dim]) if len(shape) == 3 else x

    def split(self, names: Sequence[str]) -> tuple[int, int]:
        """Heads of q and k together, and those of v: out of one fused linear, or put together where they are apart."""
        g, c, parts = self.graph, self.config, [self.parts.get(name) for name in names]
        if parts[0] and all(part is not None and part.fused == parts[0].fused for part in parts):
            heads, turning = self.heads(parts[0].fused), c.num_heads + c.num_kv_heads
            return op.cut(g, heads, 2, 0, turning), op.cut(g, heads, 2, turning, c.num_kv_heads)
        q, k, v = (self.heads(self.value(name)) for name in names)
        return op.concatenate(g, [q, k], 2), v


@dataclass(frozen=True)
class Part:
    """Columns begin to begin + rows of a fused linear's output (1, T, all rows)."""

    fused: int
    begin: int
    rows: int


def output_name(name: str) -> str:
    """`k_cache_3.out` → `kv_cache_k_3`: an updated cache leaves under the name it came in by."""
    return name if name == "logits" else f"kv_cache_{name[0]}_{name.removesuffix('.out').rsplit('_', 1)[1]}"
