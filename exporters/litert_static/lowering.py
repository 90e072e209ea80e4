"""A solved network's nodes, lowered to int8 operators of LiteRT, one subgraph.

Layout: a value (N, C, H, W) that convolutions and pools make or read lies as (N, H, W, C) in the file; what else reads
it gets it transposed, unless it works element by element or means over H and W. Inputs of four axes are images:
(N, H, W, C) in the signature. Convolution weights are (out, kh, kw, in), depthwise ones (1, kh, kw, out).

Padding is a PAD of its own before a VALID convolution or pool: the format's SAME puts the odd zero after, torch on both
sides. A PAD of an int8 tensor writes its zero point, which is zero. XNNPACK folds it into the convolution.

A RELU (or CLIP 0..6) whose input nothing else reads and whose input has its own grid is fused into what makes it: the
output's codes are clamped at its zero point, as the two would be one after the other.

What stays in float32 between DEQUANTIZE and QUANTIZE: in_float.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from exporters.litert_int8 import operators as floats
from exporters.litert_int8.flatbuffer import Graph
from exporters.litert_static import in_float
from exporters.litert_static import operators as op
from exporters.litert_static.operators import Int8
from lilliput.activation_grid import ActivationGrid
from lilliput.errors import ExportError
from lilliput.network import Operation, QuantizedNetwork

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
ELEMENTWISE = ("relu", "clip", "gelu", "gelu_tanh", "tanh", "sigmoid", "hardswish")
CLAMPING_OPS = ("conv2d", "linear", "add", "sub", "mul")
IMAGES = "/nhwc"  # ends the name of a constant that lies as images do
BIAS = "{}.bias.codes"  # the tensor of a node's bias


def int8(name: str, grid: ActivationGrid) -> Int8:
    """The grid of a tensor as LiteRT has it: unsigned codes less 128 are the same numbers.

    Raises ExportError for a grid that LiteRT cannot hold.
    """
    if grid.axis is None and (grid.dtype, grid.qmin, grid.qmax) in (("int8", -128, 127), ("uint8", 0, 255)):
        return Int8(float(grid.scale[0]), int(grid.zero_point[0]) - (128 if grid.dtype == "uint8" else 0))
    seen = f"{grid.dtype} codes {grid.qmin}..{grid.qmax}" + ("" if grid.axis is None else f" on axis {grid.axis}")
    raise ExportError(f"{name}: LiteRT's static grids are of 8 bits, 256 codes, one a tensor; seen {seen}")


def int8_codes(model: QuantizedNetwork, name: str) -> npt.NDArray[np.int8]:
    """The codes of a parameter that is an operand, as LiteRT has them."""
    codes = model.constant(name).astype(np.int16)
    return (codes - (128 if model.activations[name].dtype == "uint8" else 0)).astype(np.int8)


def fusions(model: QuantizedNetwork) -> dict[str, str]:
    """Nodes that clamp, by the node whose operator clamps for them."""
    found = {}
    for node in model.network.nodes:
        maker = next((n for n in model.network.nodes if n.name == node.inputs[0] and n.op in CLAMPING_OPS), None)
        clamps = node.op == "relu" or (
            node.op == "clip" and (node.attributes["low"], node.attributes["high"]) == (0, 6)
        )
        if (
            clamps
            and maker
            and len(model.network.consumers(maker.name)) == 1
            and maker.name not in model.network.outputs
        ):
            before, after = (model.activations.get(name) for name in (maker.name, node.name))
            if before is not None and after is not None and before.same_as(after):
                found[maker.name] = node.name
    return found


class Lowering:
    """One subgraph in the making: tensors by value, and which of them lie as (N, H, W, C)."""

    def __init__(self, graph: Graph, model: QuantizedNetwork) -> None:
        self.graph, self.model, self.network = graph, model, model.network
        self.tensors: dict[str, int] = {}
        self.nhwc: set[str] = set()
        self.in_float: list[str] = []  # nodes computed in float32
        self.fused = fusions(model)

    def run(self, float_io: bool) -> None:
        """All nodes, then the outputs. Raises ExportError naming a node that has no lowering."""
        for info in self.network.inputs:
            self._input(info.name, info.dtype, info.shape, float_io)
        for node in self.network.nodes:
            if node.name in self.fused.values():
                continue
            lower = self.LOWERED.get(node.op)
            if in_float.is_in_float(self.model, node):
                self.compute_in_float(node)
            elif lower is None:
                raise ExportError(f"node {node.name!r}: LiteRT has no int8 operator for {node.op!r}")
            else:
                lower(self, node)
        for name in self.network.outputs:
            on_grid = name in self.model.activations and self.network.is_float(name)
            self.graph.output(name, self.real(name) if float_io and on_grid else self.value(name))

    def grid(self, name: str) -> Int8:
        if name not in self.model.activations:
            raise ExportError(
                f"{name}: it stays in float32, LiteRT's int8 products want grids: integer products, or all"
            )
        return int8(name, self.model.activations[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """As it lies in the file."""
        shape = self.network.shape(name)
        return tuple(shape[axis] for axis in TO_NHWC) if name in self.nhwc else shape

    def _made(self, node: Operation) -> tuple[str, int]:
        """The name of what a node's operator writes, and the clamp that it does."""
        clamp = self.fused.get(node.name)
        if clamp is None:
            return node.name, op.NO_ACTIVATION
        relu = next(n for n in self.network.nodes if n.name == clamp).op == "relu"
        return clamp, op.RELU if relu else op.RELU6

    def _input(self, name: str, dtype: str, shape: Sequence[int], float_io: bool) -> None:
        if dtype == "int32":
            self.tensors[name] = self.graph.input(name, shape, "int32", name)
            return
        if len(shape) == 4:
            self.nhwc.add(name)
        laid, grid = self.shape(name), self.grid(name)
        if float_io:
            self.tensors[name] = op.quantized(self.graph, self.graph.input(name, laid), grid, name)
            return
        made = self.tensors[name] = self.graph.input(name, laid, "int8", name)
        self.graph.place(made, np.array([grid.scale], np.float32), np.array([grid.zero_point]))

    def value(self, name: str, images: bool = False) -> int:
        """The tensor of a value or parameter: as images (N, H, W, C), or in the network's own order."""
        if name in self.network.parameters:
            return self._constant(name, images)
        if (name in self.nhwc) == images:
            return self.tensors[name]
        key = f"{name}/{'nhwc' if images else 'nchw'}"
        if key not in self.tensors:
            order = TO_NHWC if images else TO_NCHW
            self.tensors[key] = op.transpose(self.graph, self.tensors[name], order, self.grid(name))
        return self.tensors[key]

    def real(self, name: str) -> int:
        """The float32 tensor of a value or parameter in the network's own order; an integer's own tensor."""
        if name not in self.model.activations:
            if name in self.network.parameters:
                return in_float.constant(self.graph, self.network, name)
            return self.tensors[name]
        key = f"{name}/float32"
        if key not in self.tensors:
            self.tensors[key] = op.dequantized(self.graph, self.value(name))
        return self.tensors[key]

    def compute_in_float(self, node: Operation) -> None:
        read = node.inputs[:1] if node.op == "layer_norm" else node.inputs
        made = in_float.lower(self.graph, self.model, node, [self.real(name) for name in read])
        on_grid = node.name in self.model.activations
        self.tensors[node.name] = op.quantized(self.graph, made, self.grid(node.name), node.name) if on_grid else made
        self.in_float.append(node.name)

    def _constant(self, name: str, images: bool) -> int:
        """A parameter that is an operand: its codes."""
        codes, grid = int8_codes(self.model, name), self.grid(name)
        if images:
            codes = codes.reshape((1,) * (4 - codes.ndim) + codes.shape).transpose(TO_NHWC)
        key = name + IMAGES if images and codes.size > 1 else name
        made = self.graph.constant(key, np.ascontiguousarray(codes))
        self.graph.place(made, np.array([grid.scale], np.float32), np.array([grid.zero_point]))
        return made

    def give(
        self, node: Operation, code: str, inputs: Sequence[int], name: str | None = None, /, **options: object
    ) -> None:
        """An operator whose output is the node's value."""
        name = name or node.name
        self.tensors[name] = op.apply(
            self.graph, code, inputs, self.shape(name), self.grid(name), name, **options
        )  # fmt: skip

    def pick(self, node: Operation, code: str, vectors: Sequence[int]) -> None:
        """An operator that moves or selects numbers of the node's first input: codes on its grid, or integers."""
        source = node.inputs[0]
        if self.network.is_float(node.name):
            self.move(node, code, [self.value(source), *vectors], self.grid(source))
            return
        self.tensors[node.name] = self.graph.tensor(self.network.shape(node.name), "int32", node.name)
        self.graph.operator(code, [self.value(source), *vectors], [self.tensors[node.name]])

    def move(self, node: Operation, code: str, inputs: Sequence[int], written: Int8, **options: object) -> None:
        """An operator that writes the grid `written`, whatever the node's own is: then its codes are put on that."""
        if written == self.grid(node.name):
            self.give(node, code, inputs, **options)
            return
        made = op.apply(self.graph, code, inputs, self.shape(node.name), written, **options)
        self.give(node, "QUANTIZE", [made])

    # one method a kind of node

    def linear(self, node: Operation) -> None:
        name, activation = self._made(node)
        weight, bias = self._weight(node, (0, 1)), self._bias(node)
        inputs = [self.value(node.inputs[0]), weight, bias]
        self.give(node, "FULLY_CONNECTED", inputs, name, fusedActivationFunction=activation, keepNumDims=True)

    def conv2d(self, node: Operation) -> None:
        name, activation = self._made(node)
        self.nhwc.add(name)
        channels, groups = self.network.shape(node.inputs[0])[1], node.attributes["groups"]
        out = self.network.shape(node.inputs[1])[0]
        depthwise = groups == channels and groups != 1
        if groups not in (1, channels):
            raise ExportError(f"node {node.name!r}: {groups} groups of {channels} channels: LiteRT has 1, or one each")
        x = op.padded(
            self.graph, self.value(node.inputs[0], images=True), node.pair("padding"), self.grid(node.inputs[0])
        )
        (stride_h, stride_w), (dilation_h, dilation_w) = node.pair("stride"), node.pair("dilation")
        options: dict[str, object] = {
            "padding": op.VALID, "strideH": stride_h, "strideW": stride_w, "dilationHFactor": dilation_h,
            "dilationWFactor": dilation_w, "fusedActivationFunction": activation,
        }  # fmt: skip
        weight = self._weight(node, (1, 2, 3, 0) if depthwise else (0, 2, 3, 1), 3 if depthwise else 0)
        if depthwise:
            options["depthMultiplier"] = out // channels
        code = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
        self.give(node, code, [x, weight, self._bias(node)], name, **options)

    def _weight(self, node: Operation, order: Sequence[int], axis: int = 0) -> int:
        """Codes with a scale per output channel, laid as the operator wants them."""
        name = node.inputs[1]
        codes = self.model.weights[name].codes.reshape(self.network.shape(name)).transpose(order)
        made = self.graph.constant(name, np.ascontiguousarray(codes.astype(np.int8)))
        scales = self.model.weight_scales(node)
        self.graph.place(made, scales, np.zeros(len(scales), np.int64), axis)
        return made

    def _bias(self, node: Operation) -> int:
        """A node without one gets zeros: the kernels ask for a bias."""
        scales = self.model.bias_scale(node)
        codes = self.model.biases.get(node.name, np.zeros(len(scales), np.int32))
        made = self.graph.constant(BIAS.format(node.name), codes)
        self.graph.place(made, scales, np.zeros(len(scales), np.int64))
        return made

    def matmul(self, node: Operation) -> None:
        a, b = (self.value(name) for name in node.inputs)
        self.give(node, "BATCH_MATMUL", [a, b], adjX=False, adjY=False)

    def binary(self, node: Operation) -> None:
        """Element by element: as images where an operand lies so and the other fits."""
        name, activation = self._made(node)
        images = any(i in self.nhwc for i in node.inputs) and all(self._fits_images(i) for i in node.inputs)
        if images:
            self.nhwc.add(name)
        inputs = [self.value(i, images) for i in node.inputs]
        self.give(node, node.op.upper(), inputs, name, fusedActivationFunction=activation)

    def _fits_images(self, name: str) -> bool:
        return name in self.network.parameters or len(self.network.shape(name)) == 4

    def elementwise(self, node: Operation) -> None:
        source = node.inputs[0]
        images = source in self.nhwc
        if images:
            self.nhwc.add(node.name)
        x = self.value(source, images)
        codes: dict[str, tuple[str, Int8 | None, dict[str, object]]] = {
            "relu": ("RELU", None, {}),
            "gelu": ("GELU", None, {"approximate": False}),
            "gelu_tanh": ("GELU", None, {"approximate": True}),
            "hardswish": ("HARD_SWISH", None, {}),
            "tanh": ("TANH", op.SIGNED_SHARES, {}),
            "sigmoid": ("LOGISTIC", op.SHARES, {}),
        }
        code, fixed, options = codes[node.op]
        self.move(node, code, [x], fixed or self.grid(node.name), **options)

    def clip(self, node: Operation) -> None:
        """MAXIMUM, then MINIMUM, on the node's own grid: it is finer than the input's, and its ends clip too."""
        source, grid = node.inputs[0], self.grid(node.name)
        images = source in self.nhwc
        if images:
            self.nhwc.add(node.name)
        x = op.requantized(self.graph, self.value(source, images), self.grid(source), grid)
        low, high = (self._bound(node.attributes[key], grid) for key in ("low", "high"))
        above = op.apply(self.graph, "MAXIMUM", [x, low], self.graph.shapes[x], grid)
        self.give(node, "MINIMUM", [above, high])

    def _bound(self, bound: object, grid: Int8) -> int:
        """A number as a code of `grid`."""
        assert isinstance(bound, float)
        code = int(np.clip(np.rint(np.float32(bound) / np.float32(grid.scale)) + grid.zero_point, -128, 127))
        made = self.graph.constant(f"int8:{code}:{grid.scale}:{grid.zero_point}", np.array([code], np.int8))
        self.graph.place(made, np.array([grid.scale], np.float32), np.array([grid.zero_point]))
        return made

    def softmax(self, node: Operation) -> None:
        if node.attributes["axis"] != len(self.network.shape(node.name)) - 1:
            raise ExportError(
                f"node {node.name!r}: a softmax over axis {node.attributes['axis']}, LiteRT has the last one"
            )
        self.move(node, "SOFTMAX", [self.value(node.inputs[0])], op.SHARES, beta=1.0)

    def reshape(self, node: Operation) -> None:
        self.pick(node, "RESHAPE", [floats.ints(self.graph, self.network.shape(node.name))])

    def transpose(self, node: Operation) -> None:
        perm = node.attributes["perm"]
        assert isinstance(perm, tuple)
        self.pick(node, "TRANSPOSE", [floats.ints(self.graph, perm)])

    def part(self, node: Operation) -> None:
        shape = self.network.shape(node.inputs[0])
        axis, start, end, step = (node.attributes[key] for key in ("axis", "start", "end", "step"))
        begins, ends, steps = ([value if i == axis else plain for i, plain in enumerate(each)] for value, each in (
            (start, [0] * len(shape)), (end, shape), (step, [1] * len(shape)),
        ))  # fmt: skip
        self.pick(node, "STRIDED_SLICE", [floats.ints(self.graph, v) for v in (begins, ends, steps)])  # type: ignore[arg-type]

    def concat(self, node: Operation) -> None:
        grid = self.grid(node.name)
        parts = [op.requantized(self.graph, self.value(i), self.grid(i), grid) for i in node.inputs]
        self.give(node, "CONCATENATION", parts, axis=node.attributes["axis"], fusedActivationFunction=0)

    def mean(self, node: Operation) -> None:
        axes, source = node.attributes["axes"], node.inputs[0]
        assert isinstance(axes, tuple)
        images = source in self.nhwc and axes == (2, 3) and not node.attributes["keepdims"]
        x = self.value(source, images)
        vector = floats.ints(self.graph, (1, 2) if images else axes)
        self.give(node, "MEAN", [x, vector], keepDims=bool(node.attributes["keepdims"]))

    def max_pool(self, node: Operation) -> None:
        source, grid = node.inputs[0], self.grid(node.inputs[0])
        x = self._lowest_around(node, self.value(source, images=True), grid)
        self.nhwc.add(node.name)
        (height, width), (stride_h, stride_w) = node.pair("kernel"), node.pair("stride")
        self.move(
            node, "MAX_POOL_2D", [x], grid, padding=op.VALID, strideH=stride_h, strideW=stride_w, filterHeight=height,
            filterWidth=width, fusedActivationFunction=op.NO_ACTIVATION,
        )  # fmt: skip

    def avg_pool(self, node: Operation) -> None:
        """A depthwise convolution with equal weights: AVERAGE_POOL_2D would round on the input's coarser grid first."""
        source, channels = node.inputs[0], self.network.shape(node.name)[1]
        x = op.padded(self.graph, self.value(source, images=True), node.pair("padding"), self.grid(source))
        self.nhwc.add(node.name)
        (height, width), (stride_h, stride_w) = node.pair("kernel"), node.pair("stride")
        share = np.full(channels, 1 / (height * width), np.float32)
        weight = self.graph.constant(f"{node.name}.ones", np.ones((1, height, width, channels), np.int8))
        bias = self.graph.constant(f"{node.name}.zeros", np.zeros(channels, np.int32))
        zeros = np.zeros(channels, np.int64)
        self.graph.place(weight, share, zeros, 3)
        self.graph.place(bias, share * np.float32(self.grid(source).scale), zeros)
        self.give(
            node, "DEPTHWISE_CONV_2D", [x, weight, bias], padding=op.VALID, strideH=stride_h, strideW=stride_w,
            depthMultiplier=1, dilationHFactor=1, dilationWFactor=1, fusedActivationFunction=op.NO_ACTIVATION,
        )  # fmt: skip

    def _lowest_around(self, node: Operation, x: int, grid: Int8) -> int:
        if node.pair("padding") == (0, 0):
            return x
        if grid.zero_point != -128:
            raise ExportError(
                f"node {node.name!r}: a padded maximum over numbers below zero, LiteRT pads with zeros: pool without it"
            )
        return op.padded(self.graph, x, node.pair("padding"), grid)

    def embedding(self, node: Operation) -> None:
        table, indices = node.inputs
        self.move(node, "GATHER", [self.value(table), self.tensors[indices]], self.grid(table), axis=0, batchDims=0)

    LOWERED: ClassVar[Mapping[str, Callable[[Lowering, Operation], None]]] = {
        "linear": linear, "conv2d": conv2d, "matmul": matmul, "add": binary, "sub": binary, "mul": binary,
        **dict.fromkeys((name for name in ELEMENTWISE if name != "clip"), elementwise), "clip": clip,
        "softmax": softmax, "reshape": reshape, "transpose": transpose, "slice": part, "concat": concat, "mean": mean,
        "max_pool2d": max_pool, "avg_pool2d": avg_pool, "embedding": embedding,
    }  # fmt: skip
