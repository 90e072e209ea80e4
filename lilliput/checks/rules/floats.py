"""What stayed in float in a file that is said, or seen, to be quantized."""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.checks.base import RUNTIMES, Rule, Seen
from lilliput.checks.comparison import bits_of
from lilliput.checks.opened import Opened, Tensor
from lilliput.model import Role

MOSTLY = 0.5  # share of the linear weights above which a file counts as quantized
LEAST_WEIGHTS = 1024  # of a linear that is worth quantizing


def _linears(opened: Opened) -> list[Tensor]:
    return [tensor for tensor in opened.matrices if tensor.role == "linear"]


def mostly_quantized(opened: Opened) -> bool:
    """Of the linears but the head, which in a small model outweighs them all."""
    linears = [tensor for tensor in _linears(opened) if not _is_last(opened, tensor)]
    total = sum(tensor.weights for tensor in linears)
    return total > 0 and sum(t.weights for t in linears if t.quantized) > MOSTLY * total


def head(opened: Opened) -> Iterator[Seen]:
    """The head is the last linear of an ONNX graph, or of the role; a tied float table is the embedding's finding."""
    if not mostly_quantized(opened):
        return
    for tensor in opened.matrices:
        if not tensor.quantized and (tensor.role == "head" or _is_last(opened, tensor)):
            yield Seen(tensor.name, f"the head is {tensor.dtype}, {tensor.weights:,} weights, beside quantized linears")


def _is_last(opened: Opened, tensor: Tensor) -> bool:
    """Whether an ONNX initializer is the operand of the last matrix product."""
    if opened.format != "onnx":
        return False
    products = [n for n in opened.onnx.nodes if n.op_type in ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits")]
    return bool(products) and tensor.name in {opened.onnx.origin(name) for name in products[-1].input[1:2]}


def _of_role(opened: Opened, role: Role) -> list[Tensor]:
    return [tensor for tensor in opened.matrices if tensor.role == role and not tensor.quantized]


def embedding(opened: Opened) -> Iterator[Seen]:
    """The largest table that is looked up: smaller ones are positions."""
    table = opened.embedding
    if table is not None and not table.quantized and mostly_quantized(opened):
        yield Seen(table.name, f"the embedding is {table.dtype}, {table.weights:,} weights")


def linear(opened: Opened) -> Iterator[Seen]:
    if not mostly_quantized(opened):
        return
    for tensor in _of_role(opened, "linear"):
        if tensor.weights >= LEAST_WEIGHTS and not _is_last(opened, tensor):
            yield Seen(tensor.name, f"a linear is {tensor.dtype}, {tensor.weights:,} weights, where most are quantized")


def claim(opened: Opened) -> Iterator[Seen]:
    """A name, a metadata key or a manifest says a number of bits that most of the weights do not have."""
    if opened.claimed is None:
        return
    matrices = opened.matrices
    total = sum(tensor.weights for tensor in matrices)
    floats = sum(tensor.weights for tensor in matrices if bits_of(tensor.dtype) >= 16)
    if total and floats > MOSTLY * total:
        yield Seen(
            opened.claimed.place,
            f"says {opened.claimed.value}, but {100 * floats / total:.0f} % of the weights are floats",
        )


RULES = (
    Rule(
        id="HEAD-FLOAT",
        formats=RUNTIMES,
        severity="warning",
        summary="a float head beside quantized linears",
        reason="the head is read whole for every token: quantizing it took one model from 91.8 to 194.7 tokens/s",
        reference="onnxruntime/mobius#402",
        fix="quantize the head (int8 costs little), or tie it to the embedding",
        check=head,
    ),
    Rule(
        id="EMBEDDING-FLOAT",
        formats=RUNTIMES,
        severity="warning",
        summary="a float embedding beside quantized linears",
        reason="in small models the embedding is a third of the weights: the file stays far larger than its name says",
        reference="onnxruntime/mobius#402",
        fix="quantize the embedding to 8 bits",
        check=embedding,
    ),
    Rule(
        id="LINEAR-FLOAT",
        formats=RUNTIMES,
        severity="warning",
        summary="a linear that stayed in float where most are quantized",
        reason="quantizers pass over layers that they do not recognise (Conv1D, transposed, shared), without an error",
        reference="huggingface/optimum#1951",
        fix="name the layer in the recipe, or say that it is meant to stay in float",
        check=linear,
    ),
    Rule(
        id="CLAIM-NOT-KEPT",
        formats=RUNTIMES,
        severity="error",
        summary="a file called int8 or int4 whose weights are floats",
        reason="a recipe that matches nothing leaves a float model under a quantized name, without an error",
        reference="google-ai-edge/litert-torch#499",
        fix="read the quantizer's log for how many layers it changed, and apply the recipe again",
        check=claim,
    ),
)
