"""Which values of a network share one activation grid.

    reshape, transpose, slice, max_pool2d    move or select codes: output and input share (LiteRT's spec asks it, and
                                             ONNX Runtime moves such nodes below QuantizeLinear)
    concat                                   all inputs and the output share
    embedding                                the rows of the table share the table's
    relu, clip from 0                        share with the operation before, where nothing else reads it: its range is
                                             the clipped one, so that rounding to the grid does the clipping too

A group's range is that of its `sources`: the values that are made anew in it, not those before a clip, which the
grid is to cut.
"""

from __future__ import annotations

from dataclasses import dataclass

from lilliput.network import BIASED_OPS, MATRIX_OPS, SHAPE_OPS, Network, Operation

CLIPPED_BY_GRID = ("conv2d", "linear", "add", "matmul", "mul")


@dataclass(frozen=True)
class Group:
    """Values (and parameters) that share a grid."""

    members: tuple[str, ...]
    sources: tuple[str, ...]


def is_clip_from_zero(node: Operation) -> bool:
    """Whether a node only cuts a range that begins at zero."""
    return node.op == "relu" or (node.op == "clip" and node.attributes["low"] == 0)


def groups(network: Network) -> tuple[Group, ...]:
    """Every float value, and every parameter that is an operand, in one group each; in the order of computation."""
    parent = {name: name for name in _names(network)}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    derived: set[str] = set()
    for node in network.nodes:
        for other in _tied(network, node):
            parent[root(node.name)] = root(other)
        derived |= _derived(network, node)
    found: dict[str, list[str]] = {}
    for name in parent:
        found.setdefault(root(name), []).append(name)
    return tuple(
        Group(tuple(members), tuple(m for m in members if m not in derived) or tuple(members))
        for members in found.values()
    )


def _names(network: Network) -> list[str]:
    names = [info.name for info in network.inputs if info.dtype == "float32"]
    for node in network.nodes:
        for index, name in enumerate(node.inputs):
            special = (index == 1 and node.op in MATRIX_OPS) or (index == 2 and node.op in BIASED_OPS)
            if name in network.parameters and not special:
                names.append(name)
        if network.is_float(node.name):
            names.append(node.name)
    return list(dict.fromkeys(names))


def _tied(network: Network, node: Operation) -> tuple[str, ...]:
    if not network.is_float(node.name):
        return ()
    if node.op in (*SHAPE_OPS, "max_pool2d", "embedding"):
        return node.inputs[:1]
    if node.op == "concat":
        return node.inputs
    return node.inputs if _grid_clips(network, node) else ()


def _derived(network: Network, node: Operation) -> set[str]:
    """Values that set no range: what only moves, and what the grid clips."""
    if node.op in (*SHAPE_OPS, "max_pool2d", "embedding", "concat"):
        return {node.name}
    return {node.inputs[0]} if _grid_clips(network, node) else set()


def _grid_clips(network: Network, node: Operation) -> bool:
    before = next((n for n in network.nodes if n.name == node.inputs[0]), None)
    return (
        is_clip_from_zero(node)
        and before is not None
        and before.op in CLIPPED_BY_GRID
        and len(network.consumers(before.name)) == 1
        and before.name not in network.outputs
    )
