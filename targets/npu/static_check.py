"""What an NPU would most likely take, read from a QDQ file alone: for machines without its compiler.

A node passes where its operator is one that the HTP runs in integers, every float it reads comes from DequantizeLinear,
every float it makes goes to QuantizeLinear, and its shapes are fixed. This knows nothing of sizes, ranks and pairs of
types that the compiler also looks at, and its result says that it is a static check.

Operators: ONNX Runtime's documentation of the QNN provider, "Supported ONNX operators"; those below are the ones that
exporters.onnx_qdq writes, and each was given to the compiler once (tests/targets/test_qnn_npu.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import GraphProto, NodeProto

from lilliput.errors import ArtifactError
from targets.npu import Coverage, Soc

INTEGER_OPERATORS = frozenset(
    (
        "Add", "AveragePool", "Clip", "Concat", "Conv", "Div", "Gather", "Gelu", "Gemm", "HardSwish",
        "LayerNormalization", "MatMul", "MaxPool", "Mul", "ReduceMean", "Relu", "Reshape", "Sigmoid", "Slice",
        "Softmax", "Sub", "Tanh", "Transpose",
    )
)  # fmt: skip
EDGES = ("QuantizeLinear", "DequantizeLinear")


def check(path: Path, chip: Soc) -> Coverage:
    """Raises ArtifactError for a file that is no ONNX model."""
    try:
        graph = onnx.shape_inference.infer_shapes(onnx.load(str(path))).graph
    except Exception as error:  # protobuf and onnx raise many kinds
        raise ArtifactError(f"{path}: not a readable ONNX model ({error})") from error
    reading = _Reading(graph)
    taken: Counter[str] = Counter()
    elsewhere = []
    for node in graph.node:
        reason = next(reading.objections(node), None)
        if reason is None:
            taken[node.op_type] += 1
        else:
            elsewhere.append(f"{node.name or node.output[0]} ({node.op_type}: {reason})")
    on_npu = taken.total()
    return Coverage(
        method="static", soc=chip.name, nodes=len(graph.node), on_npu=on_npu, operators=dict(sorted(taken.items())),
        elsewhere=tuple(elsewhere),
    )  # fmt: skip


class _Reading:
    def __init__(self, graph: GraphProto) -> None:
        self.made_by = {output: node.op_type for node in graph.node for output in node.output}
        self.read_by: dict[str, set[str]] = {}
        for node in graph.node:
            for name in node.input:
                self.read_by.setdefault(name, set()).add(node.op_type)
        infos = [*graph.input, *graph.value_info, *graph.output]
        self.types = {info.name: info.type.tensor_type for info in infos}

    def objections(self, node: NodeProto) -> Iterator[str]:
        """Why an NPU would not take a node."""
        if any(self._is_open(name) for name in [*node.input, *node.output]):
            yield "shape not fixed"
        if node.op_type in EDGES or self._is_integer(node) or node.op_type == "Cast":
            return
        if node.op_type not in INTEGER_OPERATORS:
            yield "operator not known to run there"
        if any(self.made_by[name] not in EDGES for name in node.input if name in self.made_by and self._is_float(name)):
            yield "reads a float that is on no grid"
        if any(not self.read_by.get(name, set()) <= {"QuantizeLinear"} for name in node.output):
            yield "makes a float that goes on no grid"

    def _is_open(self, name: str) -> bool:
        kind = self.types.get(name)
        return kind is not None and any(not size.HasField("dim_value") for size in kind.shape.dim)

    def _is_float(self, name: str) -> bool:
        kind = self.types.get(name)
        return kind is None or kind.elem_type == onnx.TensorProto.FLOAT

    def _is_integer(self, node: NodeProto) -> bool:
        """A reshape of token ids, or of a mask."""
        return node.op_type in ("Reshape", "Transpose", "Slice", "Concat") and not self._is_float(node.output[0])
