"""Defects of TFLite files: bytes changed where they lie, or the flatbuffer unpacked, changed and packed again."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from benchmarks.defects.onnx_files import exchange_tokens
from benchmarks.defects.planting import LAYER, Defect, pack_neighbours, round_to_nearest, swap_nibbles
from lilliput import lm_bundle

FILE, BUNDLE = "model.tflite", "bundle.litertlm"
DOWN, OUT, NORM = f"layers.{LAYER}.mlp.down", f"layers.{LAYER}.attention.o", f"layers.{LAYER}.mlp_norm"
GATE_UP = f"layers.{LAYER}.mlp.gate"  # the first of the two that lie in one tensor
Array = npt.NDArray[Any]


def repacked(change: Callable[[Any], None]) -> Callable[[Path], None]:
    """Plant by unpacking the flatbuffer, changing it, and packing it with all buffers inside.

    The bundle beside it, which would still hold the sound model, goes.
    """

    def plant(folder: Path) -> None:
        (folder / BUNDLE).unlink(missing_ok=True)
        raw = np.fromfile(folder / FILE, np.uint8)
        model = schema.ModelT.InitFromPackedBuf(raw, 0)
        for buffer in model.buffers:
            if buffer.offset:
                buffer.data, buffer.offset, buffer.size = raw[buffer.offset : buffer.offset + buffer.size], 0, 0
        change(model)
        builder = flatbuffers.Builder(1 << 20)
        builder.ForceDefaults(False)
        builder.Finish(model.Pack(builder), b"TFL3")
        (folder / FILE).write_bytes(bytes(builder.Output()))

    return plant


def find(model: Any, name: str) -> tuple[Any, Any]:
    """(subgraph, tensor) of the constant whose name begins so."""
    return next((g, t) for g in model.subgraphs for t in g.tensors if (t.name or b"").decode().startswith(name))


def buffer_of(model: Any, tensor: Any) -> Any:
    return model.buffers[tensor.buffer]


def change(name: str, how: Callable[[Array], Array]) -> Callable[[Path], None]:
    """Plant by changing the bytes of one constant."""

    def apply(model: Any) -> None:
        buffer = buffer_of(model, find(model, name)[1])
        buffer.data = np.ascontiguousarray(how(np.array(buffer.data, np.uint8))).view(np.uint8).reshape(-1)

    return repacked(apply)


def scales(name: str, how: Callable[[Array], Array]) -> Callable[[Path], None]:
    """Plant by changing the block scales, float16, of one constant."""
    return change(f"{name}", how)


def _scales_name(model: Any, name: str) -> str:
    graph, tensor = find(model, name)
    return str(graph.tensors[tensor.quantization.details.scales].name.decode())


def block_scales(name: str, how: Callable[[Array], Array]) -> Callable[[Path], None]:
    def apply(model: Any) -> None:
        graph, tensor = find(model, name)
        buffer = buffer_of(model, graph.tensors[tensor.quantization.details.scales])
        values = np.array(buffer.data, np.uint8).view(np.float16)
        buffer.data = how(values).astype(np.float16).view(np.uint8)

    return repacked(apply)


def _zero_block(data: Array) -> Array:
    data[16:32] = 0  # the second block of the first row
    return data


def _off_the_grid(values: Array) -> Array:
    values[3] = np.nextafter(values[3], np.float16(np.inf))  # float16 has more bits than bfloat16
    return values


def _embedding_in_float(model: Any) -> None:
    _to_float(model, "embedding")


def _to_float(model: Any, name: str) -> None:
    """A per-channel int8 table as float32, in every subgraph."""
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.name and tensor.name.decode() == name and tensor.type == schema.TensorType.INT8:
                buffer = buffer_of(model, tensor)
                codes = np.array(buffer.data, np.uint8).view(np.int8).reshape(tensor.shape).astype(np.float32)
                values = codes * np.asarray(tensor.quantization.scale, np.float32)[:, None]
                tensor.type, tensor.quantization = schema.TensorType.FLOAT32, schema.QuantizationParametersT()
                made = schema.BufferT()
                made.data = values.view(np.uint8).reshape(-1)
                model.buffers.append(made)
                tensor.buffer = len(model.buffers) - 1


def _roll_channels(model: Any) -> None:
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.name == b"embedding":
                tensor.quantization.scale = np.roll(np.asarray(tensor.quantization.scale, np.float32), 1)


def _lowest_code(data: Array) -> Array:
    data[100] = 0x80
    return data


def _rename_decode(model: Any) -> None:
    next(s for s in model.signatureDefs if s.signatureKey == b"decode").signatureKey = b"step"


def _drop_cache_output(model: Any) -> None:
    signature = next(s for s in model.signatureDefs if s.signatureKey == b"decode")
    signature.outputs = [o for o in signature.outputs if o.name != f"kv_cache_k_{LAYER}".encode()]


def _drop_layer(model: Any) -> None:
    """The last layer's caches come in and go out of no signature."""
    for signature in model.signatureDefs:
        for side in ("inputs", "outputs"):
            kept = [t for t in getattr(signature, side) if not t.name.decode().endswith(f"_{LAYER}")]
            setattr(signature, side, kept)


def _other_base(data: Array) -> Array:
    """A table of a base ten times as large: cosines and signed sines side by side."""
    floats = data.view(np.float32)
    width = next(w for w in (128, 32) if len(floats) % w == 0 and np.allclose(floats[: w // 2], 1))
    table, half = floats.reshape(-1, width), width // 4
    base = 10 * float(np.arctan2(abs(table[1, 2 * half + 1]), table[1, 1])) ** -half
    angles = np.arange(len(table))[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles) * np.sign(table[1, 2 * half])
    other = np.sin(angles) * np.sign(table[1, 3 * half])
    return np.concatenate([cos, cos, sin, other], axis=1).astype(np.float32)


def _another_layer(model: Any) -> None:
    """The mlp.down of layer 0 in the place of the other's: codes and scales."""
    graph, wrong = find(model, DOWN)
    _, right = find(model, "layers.0.mlp.down")
    buffer_of(model, wrong).data = np.array(buffer_of(model, right).data)
    pair = [graph.tensors[t.quantization.details.scales] for t in (wrong, right)]
    buffer_of(model, pair[0]).data = np.array(buffer_of(model, pair[1]).data)


def _transposed(model: Any) -> None:
    graph, tensor = find(model, OUT)
    rows, cols = (int(n) for n in tensor.shape)
    raw = np.array(buffer_of(model, tensor).data, np.uint8)
    codes = ((np.stack([raw & 15, raw >> 4], 1).reshape(rows, cols).astype(np.int8)) ^ 8) - 8
    held = buffer_of(model, graph.tensors[tensor.quantization.details.scales])
    factors = np.array(held.data, np.uint8).view(np.float16).astype(np.float32).reshape(rows, -1)
    dense = codes * np.repeat(factors, cols // factors.shape[1], axis=1)
    turned, made = round_to_nearest(np.ascontiguousarray(dense.T, np.float32))
    buffer_of(model, tensor).data = pack_neighbours(turned)
    bits = np.ascontiguousarray(made, np.float32).view(np.uint32) & 0xFFFF0000  # bfloat16 numbers
    held.data = bits.view(np.float32).astype(np.float16).view(np.uint8).reshape(-1)


def _repeat_cache(model: Any) -> None:
    """A BROADCAST_TO behind decode's first cache, as transformers' repeat_kv becomes one."""
    graph = model.subgraphs[next(s for s in model.signatureDefs if s.signatureKey == b"decode").subgraphIndex]
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = schema.BuiltinOperator.BROADCAST_TO, 127, 2
    model.operatorCodes.append(code)
    cache = next(i for i, t in enumerate(graph.tensors) if t.name == b"decode_kv_cache_k_0")
    shape, wide = schema.TensorT(), schema.TensorT()
    shape.name, shape.type, shape.shape = b"wide_shape", schema.TensorType.INT32, [4]
    wide.name, wide.type, wide.shape = b"repeated_keys", schema.TensorType.FLOAT32, list(graph.tensors[cache].shape)
    content = schema.BufferT()
    content.data = np.asarray(wide.shape, np.int32).view(np.uint8)
    model.buffers.append(content)
    shape.buffer = len(model.buffers) - 1
    graph.tensors += [shape, wide]
    operator = schema.OperatorT()
    operator.opcodeIndex = len(model.operatorCodes) - 1
    operator.inputs, operator.outputs = [cache, len(graph.tensors) - 2], [len(graph.tensors) - 1]
    graph.operators.append(operator)


def _other_shape(model: Any) -> None:
    """A cache that decode takes shorter than prefill does."""
    graph = model.subgraphs[next(s for s in model.signatureDefs if s.signatureKey == b"decode").subgraphIndex]
    cache = next(t for t in graph.tensors if t.name == f"decode_kv_cache_v_{LAYER}".encode())
    cache.shape = [*[int(n) for n in cache.shape[:2]], int(cache.shape[2]) - 1, int(cache.shape[3])]


def _truncated(folder: Path) -> None:
    (folder / BUNDLE).unlink()
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:-64])


def _called_int8(folder: Path) -> None:
    """A float model under a quantized name: every matrix dequantized."""

    def floats(model: Any) -> None:
        _to_float(model, "embedding")
        for graph in model.subgraphs:
            for tensor in graph.tensors:
                if tensor.type == schema.TensorType.INT4:
                    _blocks_to_float(model, graph, tensor)

    repacked(floats)(folder)
    (folder / FILE).rename(folder / "model_int8.tflite")


def _blocks_to_float(model: Any, graph: Any, tensor: Any) -> None:
    rows, cols = (int(n) for n in tensor.shape)
    raw = np.array(buffer_of(model, tensor).data, np.uint8)
    codes = ((np.stack([raw & 15, raw >> 4], 1).reshape(rows, cols).astype(np.int8)) ^ 8) - 8
    factors = buffer_of(model, graph.tensors[tensor.quantization.details.scales]).data
    wide = np.array(factors, np.uint8).view(np.float16).astype(np.float32).reshape(rows, -1)
    made = schema.BufferT()
    made.data = (codes * np.repeat(wide, cols // wide.shape[1], axis=1)).astype(np.float32).view(np.uint8).reshape(-1)
    model.buffers.append(made)
    tensor.buffer, tensor.type = len(model.buffers) - 1, schema.TensorType.FLOAT32
    tensor.quantization = schema.QuantizationParametersT()


def bundle(kind: str, change_section: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Plant by changing one section of the bundle, in no more bytes than it has."""

    def plant(folder: Path) -> None:
        data = bytearray((folder / BUNDLE).read_bytes())
        section = next(s for s in lm_bundle.sections(bytes(data)) if s.kind == kind)
        changed = change_section(bytes(data[section.begin : section.end]))
        assert len(changed) <= section.end - section.begin, "a section cannot grow"
        data[section.begin : section.begin + len(changed)] = changed
        (folder / BUNDLE).write_bytes(bytes(data))

    return plant


def _stale(section: bytes) -> bytes:
    text = json.loads(zlib.decompress(section[lm_bundle.LENGTH_BYTES :]))
    exchange_tokens(text)
    plain = json.dumps(text, separators=(",", ":"), ensure_ascii=False).encode()
    return len(plain).to_bytes(lm_bundle.LENGTH_BYTES, "little") + zlib.compress(plain, 9)


def _without_stops(section: bytes) -> bytes:
    from litert_lm_builder.runtime.proto import llm_metadata_pb2

    message = llm_metadata_pb2.LlmMetadata()
    message.ParseFromString(section)
    for token in message.stop_tokens:
        token.token_str = "?" * len(token.token_str)  # the same length: offsets stay
    return bytes(message.SerializeToString(deterministic=True))


def _another_model(section: bytes) -> bytes:
    return section[:-1] + bytes([section[-1] ^ 1])


Tflite = partial(Defect, "tflite")
DEFECTS = (
    Tflite("nibbles swapped", "SOURCE-NIBBLES", DOWN, change(DOWN, swap_nibbles)),
    Tflite("one block zeroed", "WEIGHT-ZERO-BLOCK", f"{DOWN}, row 0, columns 32 to 63",
           change(DOWN, _zero_block)),
    Tflite("scales off by one block", "SOURCE-SCALES", GATE_UP,
           block_scales(GATE_UP, lambda values: np.roll(values, 1))),
    Tflite("scales of channels off by one", "SOURCE-SCALES", "embedding", repacked(_roll_channels)),
    Tflite("a block scale that is no bfloat16", "TFLITE-BLOCK-SCALES", DOWN,
           block_scales(DOWN, _off_the_grid)),
    Tflite("the code -128", "TFLITE-INT8-RANGE", "embedding", change("embedding", _lowest_code)),
    Tflite("embedding in float", "EMBEDDING-FLOAT", "embedding", repacked(_embedding_in_float)),
    Tflite("named int8, all of it float", "CLAIM-NOT-KEPT", "model_int8.tflite", _called_int8,
           file="model_int8.tflite"),
    Tflite("no decode signature", "TFLITE-SIGNATURES", "signatures", repacked(_rename_decode)),
    Tflite("a layer's cache does not go out", "TFLITE-KV-CACHE", f"decode: kv_cache_k_{LAYER}",
           repacked(_drop_cache_output)),
    Tflite("the last layer's caches dropped", "TFLITE-KV-CACHE", "kv_cache_v_", repacked(_drop_layer)),
    Tflite("a cache of another length", "TFLITE-KV-CACHE", f"kv_cache_v_{LAYER}", repacked(_other_shape)),
    Tflite("a repeated cache", "TFLITE-NOT-DELEGATED", "decode: repeated_keys", repacked(_repeat_cache)),
    Tflite("another rotary base", "SOURCE-ROPE", "rope", change("rope", _other_base)),
    Tflite("a norm without its 1", "SOURCE-NORM", NORM,
           change(NORM, lambda data: data.view(np.float32) - np.float32(1))),
    Tflite("another layer's weights", "SOURCE-OTHER-TENSOR", DOWN, repacked(_another_layer)),
    Tflite("a matrix transposed", "SOURCE-TRANSPOSED", OUT, repacked(_transposed)),
    Tflite("file cut off", "TFLITE-BUFFERS", "", _truncated),
    Tflite("a bundle with another model", "LITERTLM-MODEL", BUNDLE, bundle(lm_bundle.MODEL, _another_model)),
    Tflite("a stale tokenizer in the bundle", "SOURCE-TOKENIZER", BUNDLE, bundle(lm_bundle.TOKENIZER, _stale)),
    Tflite("stop tokens lost", "TEXT-END", BUNDLE, bundle(lm_bundle.METADATA, _without_stops)),
)  # fmt: skip
