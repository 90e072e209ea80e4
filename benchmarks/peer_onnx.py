"""ONNX Runtime's own quantizers (onnxruntime.quantization.matmul_nbits_quantizer) on the graph of our ONNX files.

The float graph is what our exporter writes where only the embedding, which is also the head, is on a grid (the one of
our own files). Its linears are FusedMatMul on (out, in) matrices, which the quantizers do not know: they are
rewritten to MatMul on (in, out), the same product. All quantize them to 4 bits, in blocks of 32 but for one:

    DEFAULT    ONNX Runtime's kernels, symmetric and with zero points
    RTN        neural-compressor's round to nearest, symmetric and with zero points
    HQQ        Half-Quadratic Quantization; zero points are float32, so that MatMulNBits knows no accuracy level for it.
               In blocks of 64 its file has the bytes of the others' blocks of 32; of 32 it weighs a fifth more
    k_quant    llama.cpp's k-quant search, with zero points

accuracy_level is that of our files where a quantizer has the option. Scales are float32, as the weights were.

MatMulNBits with float zero points dequantizes its matrix at every call, minutes for a text. So HQQ's file has a twin
with the matrices dequantized as the operator's definition reads, scale * (code - zero_point). The twin is what is
scored: its activations are float32, which favours HQQ. The bytes are the file's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from benchmarks.subjects import CONTEXT
from exporters.onnx_int4.packing import unpack_bits
from lilliput.errors import MeasurementError
from lilliput.grid import Float
from lilliput.model import SourceModel

BITS, BLOCK_SIZE, ACCURACY_LEVEL = 4, 32, 4
PREFILL = 128  # of the trace; the graph takes any


@dataclass(frozen=True)
class Variant:
    algorithm: str
    symmetric: bool
    block_size: int = BLOCK_SIZE

    @property
    def name(self) -> str:
        block = "" if self.block_size == BLOCK_SIZE else f"-b{self.block_size}"
        return f"{self.algorithm}{block}-{'symmetric' if self.symmetric else 'zero-points'}"


VARIANTS = (
    Variant("DEFAULT", True),
    Variant("DEFAULT", False),
    Variant("RTN", True),
    Variant("RTN", False),
    Variant("HQQ", False),
    Variant("HQQ", False, 64),
    Variant("k_quant", False),
)


def float_graph(source: SourceModel, folder: Path) -> ModelProto:
    """The model with float32 linears as plain MatMul; `folder` (exists) is written to."""
    from calibration.solve import solve
    from exporters.onnx_int4 import Exporter, Options
    from lilliput import decoder
    from lilliput.recipe_schema import Rule
    from lilliput.trace import trace

    rules = [
        Rule.model_validate({"match": "layers.*", "grid": "float32"}),
        Rule.model_validate({"match": "*", "grid": "int8-channel", "solver": "rtn"}),
    ]
    traced = trace(decoder.build(source), CONTEXT, PREFILL)
    artifact = Exporter().export(solve(source, rules, None), traced, Options(), folder)
    model = onnx.load(str(artifact.path))
    plain_matmul(model)
    return model


def plain_matmul(model: ModelProto) -> None:
    """Rewrite every FusedMatMul(x, weight, transB=1) of a constant weight to MatMul(x, transposed weight)."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "FusedMatMul":
            weight = weights[node.input[1]]
            transposed = numpy_helper.to_array(weight).T
            weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(transposed), weight.name))
            node.op_type, node.domain = "MatMul", ""
            del node.attribute[:]


def quantize(model: ModelProto, variant: Variant) -> ModelProto:
    """Let ONNX Runtime quantize `model`, which may be changed.

    Raises MeasurementError where a linear stays in float: the quantizers say nothing then.
    """
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    wanted, block = len(linears(model)), variant.block_size
    configs = {
        "DEFAULT": lambda: nbits.DefaultWeightOnlyQuantConfig(block, variant.symmetric, ACCURACY_LEVEL, bits=BITS),
        "RTN": nbits.RTNWeightOnlyQuantConfig,
        "HQQ": lambda: nbits.HQQWeightOnlyQuantConfig(block_size=block, bits=BITS),
        "k_quant": nbits.KQuantWeightOnlyQuantConfig,
    }
    quantizer = nbits.MatMulNBitsQuantizer(
        model, BITS, block, variant.symmetric, ACCURACY_LEVEL, algo_config=configs[variant.algorithm]()
    )
    quantizer.process()
    made: ModelProto = quantizer.model.model
    found = sum(node.op_type == "MatMulNBits" and attributes(node)["bits"] == BITS for node in made.graph.node)
    if found != wanted or linears(made):
        raise MeasurementError(f"{variant.name}: {found} of {wanted} linears are MatMulNBits of {BITS} bits")
    return made


def linears(model: ModelProto) -> list[str]:
    """Names of the nodes that multiply by a constant float matrix."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in constants]


def attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def dequantized(model: ModelProto) -> ModelProto:
    """The same with every 4-bit MatMulNBits as MatMul on the float matrix that it stands for."""
    twin = ModelProto()
    twin.CopyFrom(model)
    arrays = {tensor.name: tensor for tensor in twin.graph.initializer}
    gone = set()
    for node in twin.graph.node:
        if node.op_type != "MatMulNBits" or attributes(node)["bits"] != BITS:
            continue
        matrix = _matrix(node, [numpy_helper.to_array(arrays[name]) for name in node.input[1:]])
        gone |= set(node.input[1:])
        name = f"{node.input[1]}.float"
        twin.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(matrix.T), name))
        del node.input[1:]
        node.input.append(name)
        node.op_type, node.domain = "MatMul", ""
        del node.attribute[:]
    kept = [tensor for tensor in twin.graph.initializer if tensor.name not in gone]
    del twin.graph.initializer[:]
    twin.graph.initializer.extend(kept)
    return twin


def _matrix(node: NodeProto, operands: list[np.ndarray[Any, Any]]) -> Float:
    """(N, K) float32 of codes, scales and zero points."""
    rows, cols = attributes(node)["N"], attributes(node)["K"]
    block = attributes(node)["block_size"]
    codes = unpack_bits(operands[0], BITS, block).astype(np.float32)  # (N, n_blocks, block)
    n_blocks = codes.shape[1]
    scales = operands[1].reshape(rows, n_blocks, 1)
    zero: np.ndarray[Any, Any] = np.full((1, 1, 1), 1 << (BITS - 1))
    if len(operands) > 2:
        packed = operands[2].dtype == np.uint8
        flat = unpack_bits(operands[2].reshape(rows, -1), BITS, n_blocks) if packed else operands[2]
        zero = flat.reshape(rows, n_blocks, 1)
    matrix: Float = (scales * (codes - zero)).reshape(rows, -1)[:, :cols].astype(np.float32)
    return matrix


def make(source: SourceModel, folder: Path) -> None:
    """{variant}.onnx for all VARIANTS, and the twin of those whose zero points are floats."""
    import tempfile

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        floats = float_graph(source, Path(scratch)).SerializeToString()
    for variant in VARIANTS:
        made = quantize(ModelProto.FromString(floats), variant)
        onnx.save_model(made, str(folder / f"{variant.name}.onnx"))
        if variant.algorithm == "HQQ":
            onnx.save_model(dequantized(made), str(folder / f"{variant.name}.twin.onnx"))
