"""The first layer and operator that diverges, of two runs of one graph, or of a graph and the decoder in torch.

Of two runs the tensors have the same names: the first in the graph's order that differs by more than FIRST, relative
RMS, names its operator. Tensors of other types in the two (codes here, floats there) cannot be compared; the product
that made such a tensor is named for what comes behind it.

A graph and the decoder share no names. A tensor *holds* a value of the decoder (lilliput.file_ladder.values) where it
has as many numbers and, in sorted order, the same ones: whatever was transposed or reshaped is recognised, and two
values are hardly ever alike. Inputs of operators whose weights are a linear's of the decoder have a known value. The
first such input that does not hold its value bounds the place from below, the tensors that hold a value from above; in
between, the first value of the decoder that a tensor has the size of, and none holds, names that tensor's operator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lilliput.file_ladder.found import Place
from lilliput.file_ladder.values import input_of, layer_of
from lilliput.grid import Float

FIRST = 1e-4  # relative RMS: float32 sums in another order stay below 1e-5
HOLDS = 2e-3  # float16 caches and tables pass
MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "RESHAPE", "TRANSPOSE", "SQUEEZE"})


@dataclass(frozen=True)
class Operator:
    """One operator of a file's graph. `parameter` is the decoder's linear whose weight it takes, "" for others;
    tensors are named as in the file, constants left out of `inputs`."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameter: str = ""


@dataclass(frozen=True, eq=False)
class GraphOrder:
    """The operators in the order of computation; `result` is the tensor of the logits."""

    operators: tuple[Operator, ...]
    result: str

    @cached_property
    def makers(self) -> dict[str, Operator]:
        return {name: operator for operator in self.operators for name in operator.outputs}

    def ancestors(self, tensors: Sequence[str]) -> set[str]:
        """The names of all tensors that these are computed from, themselves among them."""
        found, open_ = set[str](), list(tensors)
        while open_:
            name = open_.pop()
            if name not in found:
                found.add(name)
                open_ += self.makers[name].inputs if name in self.makers else ()
        return found

    def moved(self, tensor: str) -> set[str]:
        """The tensor, and those that it is but a transposed or reshaped form of."""
        found, maker = {tensor}, self.makers.get(tensor)
        while maker is not None and maker.kind in MOVES and maker.inputs and maker.inputs[0] not in found:
            found.add(maker.inputs[0])
            maker = self.makers.get(maker.inputs[0])
        return found

    def layer(self, operator: Operator) -> str:
        """The layer of an operator: its own parameter's, or that of the next operator behind it that has one."""
        reached, seen = set(operator.outputs), operator
        for later in self.operators[self.operators.index(operator) :]:
            if later is operator or reached & set(later.inputs):
                seen, reached = later, reached | set(later.outputs)
                if seen.parameter:
                    return layer_of(seen.parameter)
        return "head"


def relative(found: Float, wanted: Float) -> float:
    """RMS of the difference over RMS of what was wanted; infinite where the difference is not finite."""
    a, b = found.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    size, off = float(np.sqrt(np.mean(b**2))), float(np.sqrt(np.mean((a - b) ** 2)))
    if not np.isfinite(off):
        return float("inf") if np.isfinite(size) else 0.0
    return off / size if size else float(off > 0)


def first_of_two(graph: GraphOrder, found: Mapping[str, Float], wanted: Mapping[str, Float]) -> Place | None:
    """The first tensor of one run that is not the other's; None where all that can be compared agree."""
    good = ""
    for operator in graph.operators:
        for name in operator.outputs:
            if not _comparable(name, found, wanted):
                continue
            error = relative(found[name], wanted[name])
            if error > FIRST:
                culprit = _behind_codes(graph, operator, found, wanted)
                return Place(
                    layer=graph.layer(culprit),
                    operator=culprit.kind,
                    node=culprit.name,
                    value=culprit.parameter or name,
                    error=min(error, 1e9),
                    agrees=good,
                )
            good = operator.parameter or name
    return None


def _comparable(name: str, found: Mapping[str, Float], wanted: Mapping[str, Float]) -> bool:
    if name not in found or name not in wanted:
        return False
    a, b = found[name], wanted[name]
    return a.shape == b.shape and a.dtype == b.dtype and a.size > 0 and a.dtype.kind in "fi" and a.dtype.itemsize > 1


def _behind_codes(
    graph: GraphOrder, operator: Operator, found: Mapping[str, Float], wanted: Mapping[str, Float]
) -> Operator:
    """The product that an operator scales: found through tensors that cannot be compared."""
    if operator.parameter:
        return operator
    for name in operator.inputs:
        maker = graph.makers.get(name)
        if maker is not None and not any(_comparable(n, found, wanted) for n in maker.outputs):
            behind = _behind_codes(graph, maker, found, wanted)
            if behind.parameter:
                return behind
    return operator


def first_of_decoder(graph: GraphOrder, found: Mapping[str, Float], values: Mapping[str, Float]) -> Place | None:
    """Where a graph leaves the decoder; None where every known value is there."""
    index = _Index(found)
    held = {value: index.holding(wanted) for value, wanted in values.items()}
    order = list(values)
    bound = _first_bound(graph, found, values, order)
    if bound is None:
        return None
    value, tensor = bound
    before = order[: order.index(value)]
    good = [name for v in before for name in held[v]]
    region = graph.ancestors([tensor]) - graph.ancestors(good)
    inside = [name for o in graph.operators for name in o.outputs if name in region and name in found]
    agreeing, moved = next((v for v in reversed(before) if held[v]), ""), graph.moved(tensor)
    for v in before[before.index(agreeing) + 1 if agreeing else 0 :]:
        sized = [n for n in inside if n not in moved and found[n].size == values[v].size]
        if sized:
            return _place(graph, sized[0], v, found[sized[0]], values[v], agreeing)
    return _place(graph, tensor, value, found[tensor], _rows(values[value], found[tensor]), agreeing)


def _place(graph: GraphOrder, tensor: str, value: str, seen: Float, wanted: Float, agrees: str) -> Place:
    maker = graph.makers.get(tensor, Operator(tensor, "input", (), (tensor,)))
    error = relative(np.sort(seen.ravel()), np.sort(wanted.ravel()))
    return Place(
        layer=layer_of(value), operator=maker.kind, node=maker.name, value=value, error=min(error, 1e9), agrees=agrees
    )


def _first_bound(
    graph: GraphOrder, found: Mapping[str, Float], values: Mapping[str, Float], order: Sequence[str]
) -> tuple[str, str] | None:
    """The first known value, in the decoder's order, whose tensor does not hold it, and that tensor."""
    takes = [o for o in graph.operators if o.parameter not in ("", "embedding") and o.inputs]
    known = [*((input_of(o.parameter), o.inputs[0]) for o in takes), ("head", graph.result)]
    checked = [(value, tensor) for value, tensor in known if value in values and tensor in found]
    for value, tensor in sorted(checked, key=lambda pair: order.index(pair[0])):
        wanted = _rows(values[value], found[tensor])
        if found[tensor].size != wanted.size or not _same(found[tensor], wanted):
            return value, tensor
    return None


def _rows(wanted: Float, seen: Float) -> Float:
    """The last rows where the graph goes on with fewer positions (logits of the last one alone)."""
    width = wanted.shape[-1]
    rows = seen.size // width if seen.size % width == 0 else 0
    return wanted[-rows:] if wanted.ndim == 2 and 0 < rows < len(wanted) else wanted


def _same(seen: Float, wanted: Float) -> bool:
    return relative(np.sort(seen.ravel()), np.sort(wanted.ravel())) < HOLDS


class _Index:
    """Tensors by size, sorted once each."""

    def __init__(self, found: Mapping[str, Float]) -> None:
        self._by_size: dict[int, list[tuple[str, Float]]] = {}
        for name, values in found.items():
            if values.dtype.kind == "f" and values.size > 1:
                self._by_size.setdefault(values.size, []).append((name, np.sort(values.ravel())))

    def holding(self, wanted: Float) -> list[str]:
        ordered = np.sort(wanted.ravel())
        near = float(np.abs(ordered).max(initial=0)) * 0.02
        held = []
        for name, values in self._by_size.get(wanted.size, ()):
            close = (
                abs(float(values[0]) - float(ordered[0])) <= near
                and abs(float(values[-1]) - float(ordered[-1])) <= near
            )
            if close and relative(values, ordered) < HOLDS:
                held.append(name)
        return held
