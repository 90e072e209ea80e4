"""How each torch operator of a traced network becomes nodes: one row in READERS, one function a kind.

An operator without a row is refused by the name of its node, so nothing can be lost on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch.fx import Node as FxNode

from lilliput.errors import SourceError
from lilliput.network import Attribute


class Graph(Protocol):
    """What a reader appends to."""

    def add(self, fx: FxNode, op: str, inputs: Sequence[object], attributes: Mapping[str, Attribute] | None = None,
            *, part: str = "", shape: tuple[int, ...] | None = None) -> str:  # fmt: skip
        """Append a node; the name of its value. Inputs are fx nodes, names or numbers (which become constants)."""
        ...

    def same(self, fx: FxNode, name: object) -> None:
        """The value of `fx` is that of another."""
        ...

    def made(self, fx: FxNode, name: str) -> None:
        """The value of `fx` has this name."""
        ...

    def where(self, fx: FxNode) -> str:
        """The node's name, for messages."""
        ...


Reader = Callable[[Graph, FxNode], None]


def argument(fx: FxNode, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or name."""
    return fx.args[index] if len(fx.args) > index else fx.kwargs.get(name, default)


def shape_of(value: object) -> tuple[int, ...]:
    assert isinstance(value, FxNode)
    return tuple(int(size) for size in value.meta["val"].shape)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    items = [value, value] if isinstance(value, int) else list(value)
    return (items[0], items[-1])


def _refuse(graph: Graph, fx: FxNode, reason: str) -> SourceError:
    return SourceError(f"node {graph.where(fx)!r} ({fx.target}): {reason}")


def _same(graph: Graph, fx: FxNode) -> None:
    graph.same(fx, fx.args[0])


def _dropout(graph: Graph, fx: FxNode) -> None:
    if argument(fx, 2, "train", False) or "native" in str(fx.target):
        raise _refuse(graph, fx, "it drops values: export the model in eval mode")
    graph.same(fx, fx.args[0])


def _plain(graph: Graph, fx: FxNode, op: str, count: int = 1) -> None:
    graph.made(fx, graph.add(fx, op, fx.args[:count]))


def _arithmetic(graph: Graph, fx: FxNode, op: str) -> None:
    if fx.kwargs.get("alpha", 1) != 1 or fx.kwargs.get("rounding_mode") is not None:
        raise _refuse(graph, fx, "it scales or rounds on the side, which the graph does not hold")
    left, right = fx.args[:2]
    if op == "div" and isinstance(right, int | float):
        op, right = "mul", 1.0 / right
    graph.made(fx, graph.add(fx, op, (left, right)))


def _rsub(graph: Graph, fx: FxNode) -> None:
    graph.made(fx, graph.add(fx, "sub", (fx.args[1], fx.args[0])))


def _linear(graph: Graph, fx: FxNode) -> None:
    graph.made(fx, graph.add(fx, "linear", [a for a in fx.args[:3] if a is not None]))


def _conv2d(graph: Graph, fx: FxNode) -> None:
    padding = argument(fx, 4, "padding", 0)
    attributes: dict[str, Attribute] = {
        "stride": _pair(argument(fx, 3, "stride", 1)),
        "padding": _pair(padding) if not isinstance(padding, str) else _same_padding(graph, fx, padding),
        "dilation": _pair(argument(fx, 5, "dilation", 1)),
        "groups": argument(fx, 6, "groups", 1),
    }
    graph.made(fx, graph.add(fx, "conv2d", [a for a in fx.args[:3] if a is not None], attributes))


def _same_padding(graph: Graph, fx: FxNode, padding: str) -> tuple[int, int]:
    if padding == "valid":
        return (0, 0)
    kernel, dilation = shape_of(fx.args[1])[2:], _pair(argument(fx, 5, "dilation", 1))
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(size % 2 for size in total):
        raise _refuse(graph, fx, "padding 'same' of an even kernel is not symmetric: pad explicitly")
    return (total[0] // 2, total[1] // 2)


def _layer_norm(graph: Graph, fx: FxNode) -> None:
    if len(fx.args[1]) != 1:  # type: ignore[arg-type]
        raise _refuse(graph, fx, "it normalizes over several axes, wanted the last one")
    weight, bias = argument(fx, 2, "weight"), argument(fx, 3, "bias")
    if weight is None or bias is None:
        raise _refuse(graph, fx, "it has no weight or no bias, wanted both")
    graph.made(fx, graph.add(fx, "layer_norm", (fx.args[0], weight, bias), {"eps": argument(fx, 4, "eps", 1e-5)}))


def _gelu(graph: Graph, fx: FxNode) -> None:
    kind = fx.kwargs.get("approximate", "none")
    graph.made(fx, graph.add(fx, "gelu" if kind == "none" else "gelu_tanh", fx.args[:1]))


def _clip(graph: Graph, fx: FxNode, low: float | None = None, high: float | None = None) -> None:
    bounds = (low if low is not None else argument(fx, 1, "min_val"), high or argument(fx, 2, "max_val"))
    if bounds[0] is None or bounds[1] is None:
        raise _refuse(graph, fx, "it has one bound only, wanted two")
    graph.made(fx, graph.add(fx, "clip", fx.args[:1], {"low": float(bounds[0]), "high": float(bounds[1])}))


def _silu(graph: Graph, fx: FxNode) -> None:
    gate = graph.add(fx, "sigmoid", fx.args[:1], part="gate")
    graph.made(fx, graph.add(fx, "mul", (fx.args[0], gate)))


def _hardsigmoid(graph: Graph, fx: FxNode) -> None:
    scaled = graph.add(fx, "mul", (fx.args[0], 1 / 6), part="scaled")
    moved = graph.add(fx, "add", (scaled, 0.5), part="moved")
    graph.made(fx, graph.add(fx, "clip", (moved,), {"low": 0.0, "high": 1.0}))


def _softmax(graph: Graph, fx: FxNode) -> None:
    rank = len(shape_of(fx))
    axis: int = argument(fx, 1, "dim")
    graph.made(fx, graph.add(fx, "softmax", fx.args[:1], {"axis": axis % rank}))


def _reshape(graph: Graph, fx: FxNode) -> None:
    if shape_of(fx) == shape_of(fx.args[0]):
        graph.same(fx, fx.args[0])
    else:
        graph.made(fx, graph.add(fx, "reshape", fx.args[:1]))


def _expand(graph: Graph, fx: FxNode) -> None:
    if shape_of(fx) != shape_of(fx.args[0]):
        raise _refuse(graph, fx, "it copies values along an axis: let the operation that reads it broadcast")
    graph.same(fx, fx.args[0])


def _transpose(graph: Graph, fx: FxNode) -> None:
    axes = list(range(len(shape_of(fx))))
    if str(fx.target) == "aten.permute.default":
        axes = [int(axis) % len(axes) for axis in fx.args[1]]  # type: ignore[union-attr, arg-type]
    else:
        a, b = (0, 1) if str(fx.target) == "aten.t.default" else fx.args[1:3]
        axes[a], axes[b] = axes[b], axes[a]  # type: ignore[index]
    if axes == sorted(axes):
        graph.same(fx, fx.args[0])
    else:
        graph.made(fx, graph.add(fx, "transpose", fx.args[:1], {"perm": tuple(axes)}))


def _slice(graph: Graph, fx: FxNode) -> None:
    sizes = shape_of(fx.args[0])
    axis = argument(fx, 1, "dim", 0) % len(sizes)
    start, end, step = slice(argument(fx, 2, "start"), argument(fx, 3, "end"), argument(fx, 4, "step", 1)).indices(
        sizes[axis]
    )
    if shape_of(fx) == sizes:
        graph.same(fx, fx.args[0])
    else:
        graph.made(fx, graph.add(fx, "slice", fx.args[:1], {"axis": axis, "start": start, "end": end, "step": step}))


def _select(graph: Graph, fx: FxNode) -> None:
    """One index of an axis, which goes away: a slice and a reshape."""
    sizes = shape_of(fx.args[0])
    axis, index = argument(fx, 1, "dim") % len(sizes), argument(fx, 2, "index")
    index %= sizes[axis]
    attributes: dict[str, Attribute] = {"axis": axis, "start": index, "end": index + 1, "step": 1}
    kept = (*sizes[:axis], 1, *sizes[axis + 1 :])
    part = fx.args[0] if kept == sizes else graph.add(fx, "slice", fx.args[:1], attributes, part="row", shape=kept)
    graph.made(fx, graph.add(fx, "reshape", (part,)))


def _concat(graph: Graph, fx: FxNode) -> None:
    axis = argument(fx, 1, "dim", 0) % len(shape_of(fx))
    graph.made(fx, graph.add(fx, "concat", fx.args[0], {"axis": axis}))  # type: ignore[arg-type]


def _mean(graph: Graph, fx: FxNode, total: bool = False) -> None:
    sizes = shape_of(fx.args[0])
    given = argument(fx, 1, "dim")
    axes = tuple(sorted(int(axis) % len(sizes) for axis in (given if given else range(len(sizes)))))
    attributes: dict[str, Attribute] = {"axes": axes, "keepdims": int(argument(fx, 2, "keepdim", False))}
    found = graph.add(fx, "mean", fx.args[:1], attributes, part="mean" if total else "")
    if total:
        count = 1
        for axis in axes:
            count *= sizes[axis]
        found = graph.add(fx, "mul", (found, float(count)))
    graph.made(fx, found)


def _max_pool(graph: Graph, fx: FxNode) -> None:
    kernel = _pair(argument(fx, 1, "kernel_size"))
    if _pair(argument(fx, 4, "dilation", 1)) != (1, 1) or argument(fx, 5, "ceil_mode", False):
        raise _refuse(graph, fx, "it dilates or rounds sizes up, wanted neither")
    graph.made(fx, graph.add(fx, "max_pool2d", fx.args[:1], _window(fx, kernel)))


def _avg_pool(graph: Graph, fx: FxNode) -> None:
    kernel = _pair(argument(fx, 1, "kernel_size"))
    padded = _pair(argument(fx, 3, "padding", 0)) != (0, 0)
    if argument(fx, 4, "ceil_mode", False) or argument(fx, 6, "divisor_override") is not None:
        raise _refuse(graph, fx, "it rounds sizes up or divides by another count, wanted neither")
    if padded and not argument(fx, 5, "count_include_pad", True):
        raise _refuse(graph, fx, "it leaves padding out of its means, wanted count_include_pad=True or no padding")
    graph.made(fx, graph.add(fx, "avg_pool2d", fx.args[:1], _window(fx, kernel)))


def _window(fx: FxNode, kernel: tuple[int, int]) -> dict[str, Attribute]:
    stride = argument(fx, 2, "stride", None) or kernel
    return {"kernel": kernel, "stride": _pair(stride), "padding": _pair(argument(fx, 3, "padding", 0))}


def _adaptive_avg_pool(graph: Graph, fx: FxNode) -> None:
    sizes, wanted = shape_of(fx.args[0])[2:], shape_of(fx)[2:]
    if wanted == (1, 1):
        graph.made(fx, graph.add(fx, "mean", fx.args[:1], {"axes": (2, 3), "keepdims": 1}))
        return
    if any(size % out for size, out in zip(sizes, wanted, strict=True)):
        raise _refuse(graph, fx, f"{sizes} is not a multiple of its output {wanted}")
    kernel = (sizes[0] // wanted[0], sizes[1] // wanted[1])
    graph.made(fx, graph.add(fx, "avg_pool2d", fx.args[:1], {"kernel": kernel, "stride": kernel, "padding": (0, 0)}))


def _to(graph: Graph, fx: FxNode) -> None:
    assert isinstance(fx.args[0], FxNode)
    before, after = fx.args[0].meta["val"].dtype, fx.meta["val"].dtype
    integers = (torch.int32, torch.int64)
    if before == after or (before in integers and after in integers):
        graph.same(fx, fx.args[0])
    elif before in integers and after == torch.float32:
        graph.made(fx, graph.add(fx, "cast", fx.args[:1]))
    else:
        raise _refuse(graph, fx, f"it casts {before} to {after}, wanted int32 to float32")


def _embedding(graph: Graph, fx: FxNode) -> None:
    graph.made(fx, graph.add(fx, "embedding", fx.args[:2]))


def _attention(graph: Graph, fx: FxNode) -> None:
    """softmax(q kᵀ · scale + mask) v, with the scale on q."""
    q, k, v = fx.args[:3]
    mask, causal = argument(fx, 3, "attn_mask"), argument(fx, 5, "is_causal", False)
    if causal or argument(fx, 6, "scale") is not None or fx.kwargs.get("enable_gqa"):
        raise _refuse(graph, fx, "it is causal, grouped or scaled by its own factor, wanted plain attention")
    if isinstance(mask, FxNode) and mask.meta["val"].dtype == torch.bool:
        raise _refuse(graph, fx, "its mask is boolean, wanted one that is added (attn_implementation='eager')")
    q_shape, k_shape = shape_of(q), shape_of(k)
    turned = (*range(len(k_shape) - 2), len(k_shape) - 1, len(k_shape) - 2)
    keys_shape, scores_shape = (*k_shape[:-2], k_shape[-1], k_shape[-2]), (*q_shape[:-1], k_shape[-2])
    scaled = graph.add(fx, "mul", (q, q_shape[-1] ** -0.5), part="scaled", shape=q_shape)
    keys = graph.add(fx, "transpose", (k,), {"perm": turned}, part="keys", shape=keys_shape)
    scores = graph.add(fx, "matmul", (scaled, keys), part="scores", shape=scores_shape)
    if mask is not None:
        scores = graph.add(fx, "add", (scores, mask), part="masked", shape=scores_shape)
    axis = len(scores_shape) - 1
    shares = graph.add(fx, "softmax", (scores,), {"axis": axis}, part="shares", shape=scores_shape)
    graph.made(fx, graph.add(fx, "matmul", (shares, v)))


READERS: Mapping[str, Reader] = {
    **dict.fromkeys(
        ("contiguous.default", "clone.default", "detach.default", "alias.default", "lift_fresh_copy.default"), _same
    ),
    **dict.fromkeys(("dropout.default", "native_dropout.default"), _dropout),
    **dict.fromkeys(
        (
            "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unsqueeze.default",
            "squeeze.dim", "squeeze.dims", "squeeze.default",
        ),
        _reshape,
    ),
    **dict.fromkeys(("transpose.int", "permute.default", "t.default"), _transpose),
    **dict.fromkeys(("add.Tensor", "add.Scalar"), partial(_arithmetic, op="add")),
    **dict.fromkeys(("sub.Tensor", "sub.Scalar"), partial(_arithmetic, op="sub")),
    **dict.fromkeys(("mul.Tensor", "mul.Scalar"), partial(_arithmetic, op="mul")),
    **dict.fromkeys(("div.Tensor", "div.Scalar"), partial(_arithmetic, op="div")),
    "rsub.Scalar": _rsub,
    "expand.default": _expand,
    "embedding.default": _embedding,
    "linear.default": _linear,
    "conv2d.default": _conv2d,
    "conv2d.padding": _conv2d,
    "matmul.default": partial(_plain, op="matmul", count=2),
    "bmm.default": partial(_plain, op="matmul", count=2),
    "layer_norm.default": _layer_norm,
    "softmax.int": _softmax,
    "_softmax.default": _softmax,
    "scaled_dot_product_attention.default": _attention,
    "relu.default": partial(_plain, op="relu"),
    "tanh.default": partial(_plain, op="tanh"),
    "sigmoid.default": partial(_plain, op="sigmoid"),
    "hardswish.default": partial(_plain, op="hardswish"),
    "gelu.default": _gelu,
    "silu.default": _silu,
    "hardsigmoid.default": _hardsigmoid,
    "hardtanh.default": _clip,
    "clamp.default": _clip,
    "relu6.default": partial(_clip, low=0.0, high=6.0),
    "slice.Tensor": _slice,
    "select.int": _select,
    "cat.default": _concat,
    "mean.dim": _mean,
    "mean.default": _mean,
    "sum.dim_IntList": partial(_mean, total=True),
    "max_pool2d.default": _max_pool,
    "avg_pool2d.default": _avg_pool,
    "adaptive_avg_pool2d.default": _adaptive_avg_pool,
    "to.dtype": _to,
    "_to_copy.default": _to,
}  # fmt: skip
