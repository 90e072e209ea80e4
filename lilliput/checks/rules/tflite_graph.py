"""TFLite files: signatures, caches, operators that no delegate takes, and grids that XNNPACK changes.

SLOW are the operators that appeared in measured decode steps and ran outside XNNPACK over whole caches: BROADCAST_TO
(transformers' repeat_kv) alone took 280 ms a step, and STABLEHLO_SCATTER (index_copy) copies a cache. Lookups, cache
updates by DYNAMIC_UPDATE_SLICE and the arithmetic of positions stay outside too, and cost next to nothing. With one
KV head, the BROADCAST_TO that litert-torch 0.10 makes of repeat_kv computes wrong values on every kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from lilliput.checks.base import TFLITE, Rule, Seen
from lilliput.checks.opened import Opened
from lilliput.checks.tflite_view import CACHE, Graph, block_size, bundled_model, name_of
from lilliput.grid import round_scale
from lilliput.inspection.tflite_file import TYPE_NAMES
from lilliput.lm_bundle import MAGIC

SLOW = frozenset({"BROADCAST_TO", "STABLEHLO_SCATTER", "SCATTER_ND"})
ALIGNMENT_BYTES = 16  # of a buffer behind the flatbuffer, for vector loads (schema.fbs: force_align 16)
LOWEST_INT8 = -128


def signatures(opened: Opened) -> Iterator[Seen]:
    graphs = [graph for graph in opened.tflite.graphs if _caches(graph)]
    names = [graph.name for graph in graphs]
    if graphs and not any("decode" in name for name in names):
        yield Seen("signatures", f"there are caches in {', '.join(names)}, but no signature decode")
    if graphs and not any("prefill" in name for name in names):
        yield Seen("signatures", f"there are caches in {', '.join(names)}, but no signature prefill")
    for graph in graphs:
        if "decode" in graph.name and not any("logits" in name for name in graph.outputs):
            yield Seen(graph.name, "decode gives no logits")


def _caches(graph: Graph) -> dict[str, int]:
    return {name: i for name, i in graph.inputs.items() if name.startswith(CACHE)}


def caches(opened: Opened) -> Iterator[Seen]:
    """Each cache comes in and goes out of every signature, in one shape; layers are numbered without a gap."""
    graphs = [graph for graph in opened.tflite.graphs if _caches(graph)]
    named = {name: (graph, i) for graph in graphs for name, i in _caches(graph).items()}
    if not named:
        return
    count = 1 + max(int(name.rpartition("_")[2]) for name in named)
    wanted = [f"{prefix}{layer}" for prefix in CACHE for layer in range(count)]
    for graph in graphs:
        for name in wanted:
            if name not in graph.inputs:
                yield Seen(f"{graph.name}: {name}", "is no input of this signature")
            elif name not in graph.outputs:
                yield Seen(f"{graph.name}: {name}", "comes in and does not go out: the layer forgets")
            elif graph.shape(graph.inputs[name]) != (first := named[name][0].shape(named[name][1])):
                yield Seen(f"{graph.name}: {name}", f"is {graph.shape(graph.inputs[name])}, elsewhere {first}")
    parameters = {
        t.parts[0].parameter.split(".")[1] for t in opened.tensors if t.parts and t.name.startswith("layers.")
    }
    if len(parameters) > count:
        yield Seen(wanted[-1], f"is the last cache, but there are weights of {len(parameters)} layers")


def not_delegated(opened: Opened) -> Iterator[Seen]:
    for graph in opened.tflite.graphs:
        slow = Counter(o.name for o in graph.operators if o.name in SLOW and graph.type(o.outputs[0]) == "FLOAT32")
        if not slow:
            continue
        first = next(o for o in graph.operators if o.name in slow)
        what = ", ".join(f"{count} {name}" for name, count in slow.items())
        share = 100 * sum(slow.values()) / len(graph.operators)
        yield Seen(
            f"{graph.name}: {graph.tensor_name(first.outputs[0])}",
            f"{what} run outside the delegate ({share:.0f} % of the operators)",
        )


def int8_range(opened: Opened) -> Iterator[Seen]:
    for graph, tensor in _constants(opened):
        if TYPE_NAMES[tensor.type] != "INT8" or opened.tflite.scales(graph, tensor) is None:
            continue
        zeros = tensor.quantization.zeroPoint
        symmetric = zeros is None or not np.any(np.asarray(zeros))
        lowest = int((opened.tflite.codes(tensor) == LOWEST_INT8).sum())
        if symmetric and lowest and len(tensor.shape) > 1:
            yield Seen(name_of(tensor), f"{lowest} codes are -128, weights lie in [-127, 127]")


def _constants(opened: Opened) -> Iterator[tuple[Graph, Any]]:
    """Every constant tensor of weights, once."""
    wanted, seen = {tensor.name for tensor in opened.tensors}, set[str]()
    for graph in opened.tflite.graphs:
        for tensor in graph.tensors:
            if name_of(tensor) in wanted - seen:
                seen.add(name_of(tensor))
                yield graph, tensor


def block_scales(opened: Opened) -> Iterator[Seen]:
    for graph, tensor in _constants(opened):
        scales = opened.tflite.scales(graph, tensor) if block_size(tensor) else None
        if scales is None:
            continue
        off = int((round_scale(scales, "bf16_f16") != scales).sum())
        if off:
            yield Seen(name_of(tensor), f"{off} of {scales.size} block scales are no bfloat16 numbers")


def int4_embedding(opened: Opened) -> Iterator[Seen]:
    for tensor in opened.matrices:
        if tensor.role == "embedding" and tensor.dtype.startswith("int4") and not tensor.block:
            yield Seen(tensor.name, f"the embedding is {tensor.dtype}: one scale for {tensor.shape[1]} weights")


def buffers(opened: Opened) -> Iterator[Seen]:
    size = len(opened.tflite.data)
    for graph in opened.tflite.graphs:
        for tensor in graph.tensors:
            buffer = opened.tflite.model.buffers[tensor.buffer]
            if buffer.offset <= 1:
                continue
            if buffer.offset + buffer.size > size:
                yield Seen(name_of(tensor), f"its buffer ends at {buffer.offset + buffer.size}, the file at {size}")
            elif buffer.offset % ALIGNMENT_BYTES:
                yield Seen(name_of(tensor), f"its buffer lies at {buffer.offset}, no multiple of {ALIGNMENT_BYTES}")


def bundle(opened: Opened) -> Iterator[Seen]:
    """A bundle beside a .tflite holds the same model."""
    path = opened.path.with_name("bundle.litertlm")
    if opened.path.suffix != ".tflite" or not path.is_file():
        return
    data = np.fromfile(path, np.uint8)
    if data[:8].tobytes() == MAGIC and not np.array_equal(bundled_model(path, data), opened.tflite.data):
        yield Seen(path.name, f"holds another model than {opened.path.name} beside it")


RULES = (
    Rule(
        id="TFLITE-SIGNATURES",
        formats=TFLITE,
        severity="error",
        summary="caches without both a prefill and a decode signature",
        reason="LiteRT-LM calls models by these names, and refuses those without",
        reference="google-ai-edge/litert-torch#148",
        fix="export again with a prefill and a decode signature",
        check=signatures,
    ),
    Rule(
        id="TFLITE-KV-CACHE",
        formats=TFLITE,
        severity="error",
        summary="a layer whose cache does not come in and go out of every signature",
        reason="a cache that is not carried on makes a layer forget all but the last token",
        reference="google-ai-edge/litert-torch#148",
        fix="export again with caches for every layer in every signature",
        check=caches,
    ),
    Rule(
        id="TFLITE-NOT-DELEGATED",
        formats=TFLITE,
        severity="warning",
        summary="float operators over caches that XNNPACK and GPU delegates do not take",
        reason="an expand that becomes BROADCAST_TO, or a scatter into a cache, costs more than the model itself, and "
        "takes it off the GPU",
        reference="google-ai-edge/LiteRT#9191",
        fix="group queries per KV head instead of repeating the cache; write caches by DYNAMIC_UPDATE_SLICE",
        check=not_delegated,
    ),
    Rule(
        id="TFLITE-INT8-RANGE",
        formats=TFLITE,
        severity="warning",
        summary="symmetric int8 weights with the code -128",
        reason="kernels may rely on weights in [-127, 127]",
        reference="https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec",
        fix="quantize weights to [-127, 127]",
        check=int8_range,
    ),
    Rule(
        id="TFLITE-BLOCK-SCALES",
        formats=TFLITE,
        severity="error",
        summary="block scales that XNNPACK rounds when it packs",
        reason="XNNPACK computes blocks with bfloat16 scales: what runs is not what was validated",
        reference="https://github.com/google/XNNPACK",
        fix="round scales to bfloat16 before codes are chosen",
        check=block_scales,
    ),
    Rule(
        id="TFLITE-INT4-EMBEDDING",
        formats=TFLITE,
        severity="warning",
        summary="a 4-bit embedding with one scale for a row",
        reason="such an embedding made a model repeat its first token without end, where 4-bit linears did not",
        reference="google-ai-edge/mediapipe#5727",
        fix="keep the embedding at 8 bits, or in blocks of 32",
        check=int4_embedding,
    ),
    Rule(
        id="TFLITE-BUFFERS",
        formats=TFLITE,
        severity="error",
        summary="a buffer behind the flatbuffer that is cut off or not aligned",
        reason="mapped buffers are read by aligned vector loads; one beyond the end reads nothing",
        reference="https://github.com/google-ai-edge/LiteRT/blob/main/tflite/schema/schema.fbs",
        fix="write the file again, or fetch it whole",
        check=buffers,
    ),
    Rule(
        id="LITERTLM-MODEL",
        formats=TFLITE,
        severity="error",
        summary="a .litertlm bundle that holds another model than the .tflite beside it",
        reason="one was exported again and the other forgotten: what runs is not what was measured",
        reference="google-ai-edge/litert-samples#257",
        fix="build the bundle again from the .tflite",
        check=bundle,
    ),
)
