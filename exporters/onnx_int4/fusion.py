"""Rewrite the traced nodes into the larger operators that ONNX Runtime runs fastest. Values stay the same.

    add, norm              → skip_rms_norm / skip_layer_norm   inputs a, b, weight[, bias]; outputs y, a + b
    add, last, norm        → skip norm over all positions, then last (a norm treats each position alone)
    q, k, v of one x       → one linear of the stacked matrix, and attention of the packed result; where the heads of
                             q and k are normed before it: of its columns, split

Only matrices that the caller calls stackable (all packed on one grid) are stacked; others stay apart, and
attention takes q, k and v by themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from lilliput.model import Node

NORMS = ("rms_norm", "layer_norm")


@dataclass(frozen=True)
class Fused:
    """Nodes in order, and which parameters each stacked parameter is made of, top to bottom."""

    nodes: tuple[Node, ...]
    stacks: Mapping[str, tuple[str, ...]]


def fuse(nodes: Iterable[Node], stackable: Callable[[tuple[str, ...]], bool]) -> Fused:
    """All rewrites above."""
    return stack_qkv(skip_norms(tuple(nodes)), stackable)


def _consumers(nodes: tuple[Node, ...]) -> dict[str, list[Node]]:
    consumers: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        for value in node.inputs:
            consumers[value].append(node)
    return consumers


def skip_norms(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Merge each add with the norm that reads its sum, directly or through `last`."""
    consumers = _consumers(nodes)
    result: list[Node] = []
    swallowed: set[str] = set()  # outputs of nodes that went into an earlier one
    for node in nodes:
        if node.outputs[0] in swallowed:
            continue
        new, gone = _skip_norm(node, consumers) if node.op == "add" else ((node,), ())
        result += new
        swallowed |= set(gone)
    return tuple(result)


def _skip_norm(add: Node, consumers: Mapping[str, list[Node]]) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    """The nodes that stand for `add` and the norm behind it, and the outputs of the nodes they replace."""
    for reader in consumers[add.outputs[0]]:
        if reader.op in NORMS:
            return (_merge(add, reader, reader.outputs[0]),), reader.outputs
        behind = consumers[reader.outputs[0]]
        if reader.op == "last" and [n.op in NORMS for n in behind] == [True]:
            norm = behind[0]
            everywhere = f"{norm.outputs[0]}.all"
            last = replace(reader, inputs=(everywhere,), outputs=norm.outputs)
            return (_merge(add, norm, everywhere), last), reader.outputs + norm.outputs
    return (add,), ()


def _merge(add: Node, norm: Node, output: str) -> Node:
    return Node(f"skip_{norm.op}", add.inputs + norm.inputs[1:], (output, *add.outputs), norm.attributes)


def stack_qkv(nodes: tuple[Node, ...], stackable: Callable[[tuple[str, ...]], bool]) -> Fused:
    """Merge the three linears before each attention where they read one value and are stackable."""
    made_by = {value: node for node in nodes for value in node.outputs}
    instead: dict[str, tuple[Node, ...]] = {}  # by the first output of the node that they stand for
    stacks: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        if node.op != "attention":
            continue
        makers = [made_by[value] for value in node.inputs[:3]]
        parts = [made_by[maker.inputs[0]] if maker.op == "head_norm" else maker for maker in makers]
        if not _one_shape(parts) or not stackable(tuple(p.inputs[1] for p in parts)):
            continue
        weight = f"{parts[0].inputs[1].removesuffix('.q')}.qkv"
        packed = f"{node.outputs[0]}.qkv"
        stacks |= _stack_names(weight, parts)
        inputs = (parts[0].inputs[0], weight, *[f"{weight}.bias"][: len(parts[0].inputs) - 2])
        instead |= {p.outputs[0]: () for p in parts[1:]}
        stacked = Node("linear", inputs, (packed,), {})
        if parts == makers:
            instead[parts[0].outputs[0]] = (stacked,)
            instead[node.outputs[0]] = (replace(node, inputs=(packed, "", "", *node.inputs[3:])),)
        else:
            apart = Node("split", (packed,), tuple(p.outputs[0] for p in parts), _columns(node))
            instead[parts[0].outputs[0]] = (stacked, apart)
    kept = (new for node in nodes for new in instead.get(node.outputs[0], (node,)))
    return Fused(tuple(kept), stacks)


def _columns(attention: Node) -> dict[str, int | float]:
    """Of q, k and v."""
    heads, kv_heads, size = (attention.attributes[name] for name in ("num_heads", "num_kv_heads", "head_dim"))
    return {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size}


def _one_shape(parts: list[Node]) -> bool:
    """Three linears of one value, all with or all without a bias."""
    return all(p.op == "linear" for p in parts) and len({(p.inputs[0], len(p.inputs)) for p in parts}) == 1


def _stack_names(weight: str, parts: list[Node]) -> dict[str, tuple[str, ...]]:
    names = {weight: tuple(p.inputs[1] for p in parts)}
    return names | ({f"{weight}.bias": tuple(p.inputs[2] for p in parts)} if len(parts[0].inputs) > 2 else {})
