"""What LiteRT's GPU delegate does not take of a `.tflite`: such an operator runs on the CPU, with a copy each way.

A file for CPUs is sound with all of this, so these rules only note it; asked for a GPU (`inspect --check --gpu`) they
are errors. Facts, from the delegate's own sources in google-ai-edge/LiteRT:

    operators   those that NewOperationParser (tflite/delegates/gpu/common/model_builder.cc) has a parser for
    types       of values that are no constants: GetOpsToReplace there, with quantized models allowed, as is usual
    forms       CheckGpuDelegateCompatibility (tflite/tools/versioning/gpu_compatibility.cc), without the wider
                broadcasting that only some back ends have; and no tensor has five dimensions

The check is static and of one version: versions of operators, sizes and a phone's driver can refuse more. It is of the
open delegate; the GPU accelerator of LiteRT's CompiledModel is another, and its operators are not all listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lilliput.checks.base import TFLITE, Rule, Seen
from lilliput.checks.opened import Opened
from lilliput.checks.tflite_view import Graph, Operator, TfliteFile

TAKEN = frozenset({
    "ABS", "ADD", "ADD_N", "AVERAGE_POOL_2D", "BATCH_MATMUL", "CAST", "CONCATENATION", "CONV_2D", "COS", "CUMSUM",
    "DENSIFY", "DEPTHWISE_CONV_2D", "DEPTH_TO_SPACE", "DEQUANTIZE", "DIV", "ELU", "EQUAL", "EXP", "FLOOR",
    "FLOOR_DIV", "FLOOR_MOD", "FULLY_CONNECTED", "GATHER", "GELU", "GREATER", "GREATER_EQUAL", "HARD_SWISH",
    "LEAKY_RELU", "LESS", "LESS_EQUAL", "LOG", "LOGICAL_AND", "LOGISTIC", "LSTM", "MAXIMUM", "MAX_POOL_2D", "MEAN",
    "MINIMUM", "MIRROR_PAD", "MUL", "NEG", "NOT_EQUAL", "ONE_HOT", "PACK", "PAD", "PADV2", "POW", "PRELU",
    "QUANTIZE", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "RELU", "RELU6", "RELU_0_TO_1", "RELU_N1_TO_1", "RESHAPE",
    "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "RSQRT", "SELECT", "SELECT_V2", "SIGN", "SIN", "SLICE", "SOFTMAX",
    "SPACE_TO_DEPTH", "SPLIT", "SPLIT_V", "SQRT", "SQUARE", "SQUARED_DIFFERENCE", "STRIDED_SLICE", "SUB", "SUM",
    "TANH", "TILE", "TRANSPOSE", "TRANSPOSE_CONV", "UNPACK", "Convolution2DTransposeBias", "MaxPoolingWithArgmax2D",
    "MaxUnpooling2D", "Resampler",
})  # fmt: skip
TYPES = frozenset({"FLOAT32", "FLOAT16", "INT8", "UINT8"})
COMPARISONS = ("EQUAL", "NOT_EQUAL", "GREATER", "GREATER_EQUAL", "LESS", "LESS_EQUAL")
IN_TOO = {
    "CAST": {"BOOL", "INT32"}, "ONE_HOT": {"INT32"}, "GATHER": {"INT32"}, "SELECT": {"BOOL"}, "SELECT_V2": {"BOOL"},
    "LOGICAL_AND": {"BOOL"},
}  # fmt: skip
OUT_TOO = {"CAST": {"BOOL", "INT32"}, "LOGICAL_AND": {"BOOL"}, **{name: {"BOOL"} for name in COMPARISONS}}
MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class Node:
    """An operator where it stands."""

    file: TfliteFile
    graph: Graph
    operator: Operator

    def shape(self, i: int) -> tuple[int, ...]:
        """Of the i-th input."""
        return self.graph.shape(self.operator.inputs[i])

    def constant(self, index: int) -> bool:
        return self.file.content(self.graph.tensors[index]) is not None

    @property
    def running(self) -> list[int]:
        """Inputs that are there and no constants."""
        return [i for i in self.operator.inputs if i >= 0 and not self.constant(i)]

    @property
    def place(self) -> str:
        return f"{self.graph.name}: {self.graph.tensor_name(self.operator.outputs[0])}"


def nodes(opened: Opened) -> Iterator[Node]:
    for graph in opened.tflite.graphs:
        for operator in graph.operators:
            yield Node(opened.tflite, graph, operator)


def no_parser(node: Node) -> str | None:
    return None if node.operator.name in TAKEN else "has no parser"


def types(node: Node) -> str | None:
    name = node.operator.name
    taken = TYPES | IN_TOO.get(name, set())
    found = [kind for i in node.running if (kind := node.graph.type(i)) not in taken]
    given = TYPES | OUT_TOO.get(name, set())
    found += [kind for i in node.operator.outputs if (kind := node.graph.type(i)) not in given]
    return f"reads or writes {', '.join(dict.fromkeys(found))}" if found else None


def form(node: Node) -> str | None:
    tensors = [i for i in (*node.operator.inputs, *node.operator.outputs) if i >= 0]
    large = [s for i in tensors if len(s := node.graph.shape(i)) > MOST_DIMENSIONS]
    if large:
        return f"has a tensor of {len(large[0])} dimensions, {large[0]}"
    refused = FORMS.get(node.operator.name)
    return refused(node) if refused else None


def _sum(node: Node) -> str | None:
    """Two shapes of several sizes each: alike in number, or one of three ways in which a 4-D tensor takes a smaller."""
    short, long = sorted((node.shape(0), node.shape(1)), key=len)
    if len(short) < 2 or len(short) == len(long):
        return None
    batch = len(long) == 4 and long[0] == 1
    pairs = len(long) == 4 and len(short) == 2 and (long[0], long[3]) == short
    if pairs or (batch and (len(short) == 3 or short == (1, 1))):
        return None
    return f"spreads {short} over {long}"


def _slice(node: Node) -> str | None:
    return None if len(node.shape(0)) in (3, 4) else f"cuts a tensor of {len(node.shape(0))} dimensions"


def _strided_slice(node: Node) -> str | None:
    options = node.operator.options
    masks = [m for m in ("ellipsisMask", "newAxisMask", "shrinkAxisMask") if getattr(options, m, 0)]
    return f"has {', '.join(masks)}" if masks else _slice(node)


def _padding(node: Node) -> str | None:
    shape = node.shape(1)
    if shape not in ((3, 2), (4, 2)):
        return f"has paddings {shape}"
    reflects = node.operator.name != "MIRROR_PAD" or not getattr(node.operator.options, "mode", 0)
    return None if reflects else "mirrors symmetrically"


def _axes(node: Node) -> str | None:
    axes = node.operator.inputs[1]
    fixed = node.constant(axes) and node.graph.type(axes) == "INT32"
    return None if fixed else "reduces over axes that are no int32 constant"


def _gather(node: Node) -> str | None:
    indices = node.operator.inputs[1]
    plain = len(node.graph.shape(indices)) == 1 and node.graph.type(indices) == "INT32"
    return None if plain else f"takes indices {node.graph.type(indices)} {node.graph.shape(indices)}"


def _fully_connected(node: Node) -> str | None:
    options = node.operator.options
    if getattr(options, "weightsFormat", 0):
        return "has shuffled weights"
    if len(node.running) > 2:
        return f"has {len(node.running)} inputs that are no constants"
    kept = getattr(options, "keepNumDims", False)
    sizes = len(node.shape(0)), len(node.graph.shape(node.operator.outputs[0]))
    return f"keeps dimensions, {sizes[0]} to {sizes[1]}" if kept and sizes[0] != sizes[1] else None


def _depthwise(node: Node) -> str | None:
    given, made = node.shape(0), node.graph.shape(node.operator.outputs[0])
    factor = getattr(node.operator.options, "depthMultiplier", 1)
    if len(given) == len(made) == 4 and made[3] == given[3] * factor:
        return None
    return f"makes {made} of {given} with depth multiplier {factor}"


def _softmax(node: Node) -> str | None:
    beta = getattr(node.operator.options, "beta", 1.0)
    return None if beta == 1 else f"has beta {beta:g}"


def _resize(node: Node) -> str | None:
    options = node.operator.options
    both = getattr(options, "alignCorners", False) and getattr(options, "halfPixelCenters", False)
    return "has align_corners and half_pixel_centers" if both else None


FORMS: dict[str, Callable[[Node], str | None]] = {
    "ADD": _sum, "MUL": _sum, "SLICE": _slice, "STRIDED_SLICE": _strided_slice, "PAD": _padding, "PADV2": _padding,
    "MIRROR_PAD": _padding, "MEAN": _axes, "SUM": _axes, "REDUCE_MAX": _axes, "REDUCE_MIN": _axes,
    "REDUCE_PROD": _axes, "GATHER": _gather, "FULLY_CONNECTED": _fully_connected, "DEPTHWISE_CONV_2D": _depthwise,
    "SOFTMAX": _softmax, "RESIZE_BILINEAR": _resize,
}  # fmt: skip


def _together(opened: Opened, look: Callable[[Node], str | None]) -> Iterator[Seen]:
    """One finding for what is alike, at the first place."""
    first, counts = dict[str, str](), dict[str, int]()
    for node in nodes(opened):
        why = look(node)
        if why:
            what = f"{node.operator.name} {why}"
            first.setdefault(what, node.place)
            counts[what] = counts.get(what, 0) + 1
    for what, place in first.items():
        yield Seen(place, what if counts[what] == 1 else f"{what} (and {counts[what] - 1} more)")


def operators(opened: Opened) -> Iterator[Seen]:
    return _together(opened, no_parser)


def values(opened: Opened) -> Iterator[Seen]:
    return _together(opened, lambda node: types(node) if node.operator.name in TAKEN else None)


def forms(opened: Opened) -> Iterator[Seen]:
    return _together(opened, lambda node: form(node) if node.operator.name in TAKEN else None)


RULES = (
    Rule(
        id="GPU-OPERATOR",
        formats=TFLITE,
        severity="note",
        summary="an operator that LiteRT's GPU delegate has no parser for",
        reason="it runs on the CPU, and its values are copied from and to the GPU: slower than the CPU alone, often",
        reference="https://ai.google.dev/edge/litert/performance/gpu",
        fix="write it with operators that the delegate lists, or run the file on the CPU",
        check=operators,
    ),
    Rule(
        id="GPU-TYPE",
        formats=TFLITE,
        severity="note",
        summary="values of a type that LiteRT's GPU delegate does not take",
        reason="it takes float32, float16 and 8-bit values (int32 and bool of a few operators); others stay on the CPU",
        reference="https://github.com/google-ai-edge/LiteRT/blob/main/tflite/delegates/gpu/common/model_builder.cc",
        fix="compute in float or int8; keep positions and token ids out of the part that is for the GPU",
        check=values,
    ),
    Rule(
        id="GPU-FORM",
        formats=TFLITE,
        severity="note",
        summary="an operator of a shape or option that LiteRT's GPU delegate refuses",
        reason="the delegate knows four dimensions, and of some operators only their usual form",
        reference="https://github.com/google-ai-edge/LiteRT/blob/main/tflite/tools/versioning/gpu_compatibility.cc",
        fix="reshape to four dimensions at most, or write the operator in the form that the delegate knows",
        check=forms,
    ),
)
