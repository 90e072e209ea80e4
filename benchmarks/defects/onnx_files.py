"""Defects of ONNX files, planted by onnx's own reader and writer."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from benchmarks.defects.planting import BLOCK, LAYER, Defect, pack_neighbours, round_to_nearest, swap_nibbles

DOWN, UP, GATE = (f"layers.{LAYER}.mlp.{name}" for name in ("down", "up", "gate"))
OUT, NORM = f"layers.{LAYER}.attention.o", f"layers.{LAYER}.mlp_norm"
Array = npt.NDArray[Any]


def model(change: Callable[[ModelProto], None]) -> Callable[[Path], None]:
    """Plant by changing the model."""

    def plant(folder: Path) -> None:
        proto = onnx.load(folder / "model.onnx")
        change(proto)
        onnx.save(proto, folder / "model.onnx")

    return plant


def array(proto: ModelProto, name: str) -> Array:
    return np.array(numpy_helper.to_array(_initializer(proto, name)))


def _initializer(proto: ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name == name)


def put(proto: ModelProto, name: str, values: Array) -> None:
    """Replace an initializer, or add it."""
    made = numpy_helper.from_array(np.ascontiguousarray(values), name)
    found = [tensor for tensor in proto.graph.initializer if tensor.name == name]
    if found:
        found[0].CopyFrom(made)
    else:
        proto.graph.initializer.append(made)


def change(name: str, how: Callable[[Array], Array]) -> Callable[[Path], None]:
    """Plant by changing one initializer's numbers."""
    return model(lambda proto: put(proto, name, how(array(proto, name))))


def reader(proto: ModelProto, codes: str) -> NodeProto:
    """The MatMulNBits of a matrix."""
    return next(n for n in proto.graph.node if n.op_type == "MatMulNBits" and n.input[1] == codes)


def set_attribute(proto: ModelProto, codes: str, name: str, value: int) -> None:
    next(a for a in reader(proto, codes).attribute if a.name == name).i = value


def values(proto: ModelProto, name: str) -> npt.NDArray[np.float32]:
    """(rows, cols) of a 4-bit or 8-bit matrix without zero points."""
    codes, scales = array(proto, f"{name}.codes"), array(proto, f"{name}.scales").astype(np.float32)
    node = reader(proto, f"{name}.codes")
    bits = next(a.i for a in node.attribute if a.name == "bits")
    whole = codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1)
    dense = (whole.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return np.asarray(dense.reshape(len(codes), -1)[:, : next(a.i for a in node.attribute if a.name == "K")])


def zero_block(codes: Array) -> Array:
    codes[3, 1] = 0x88  # twice the zero point
    return codes


def set_scale(value: float) -> Callable[[Array], Array]:
    def how(scales: Array) -> Array:
        scales[2, 0] = value if np.isnan(value) else scales[2, 0] * value
        return scales

    return how


def move_scales(scales: Array) -> Array:
    return np.roll(scales.reshape(-1), 1).reshape(scales.shape)


def _to_float(proto: ModelProto, name: str) -> None:
    """A matrix as float32, multiplied by MatMul."""
    node = reader(proto, f"{name}.codes")
    put(proto, f"{name}.float", np.ascontiguousarray(values(proto, name).T))
    made = helper.make_node("MatMul", [node.input[0], f"{name}.float"], list(node.output), name=node.name)
    node.CopyFrom(made)


def _dequantize_linear(proto: ModelProto, name: str, axis: int) -> None:
    """A matrix as int4 behind DequantizeLinear: (N, K) and a Transpose for axis 1, (K, N) for axis 0."""
    node, (codes, scales) = reader(proto, f"{name}.codes"), round_to_nearest(values(proto, name))
    stored = codes if axis else codes.T
    made = helper.make_tensor(
        f"{name}.int4", TensorProto.INT4, stored.shape, pack_neighbours(stored).tobytes(), raw=True
    )
    proto.graph.initializer.append(made)
    put(proto, f"{name}.int4.scales", scales if axis else scales.T)
    attributes = {"axis": axis, "block_size": BLOCK}
    steps = [
        helper.make_node(
            "DequantizeLinear", [made.name, f"{name}.int4.scales"], [f"{name}.wide"], f"{name}.dq", **attributes
        )
    ]
    if axis:
        steps.append(helper.make_node("Transpose", [f"{name}.wide"], [f"{name}.turned"], perm=[1, 0]))
    product = helper.make_node("MatMul", [node.input[0], steps[-1].output[0]], list(node.output), name=node.name)
    node.CopyFrom(product)
    nodes = [*steps, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _blocks_of_512(proto: ModelProto, name: str) -> None:
    """The same matrix in padded blocks of 512."""
    node, dense = reader(proto, f"{name}.codes"), values(proto, name)
    rows, cols = dense.shape
    padded = np.pad(dense, [(0, 0), (0, -cols % 512)]).reshape(rows, -1, 512)
    scales = (np.abs(padded).max(-1) / 7).astype(np.float16)
    codes = (np.clip(np.rint(padded / scales.astype(np.float32)[..., None]), -7, 7) + 8).astype(np.uint8)
    put(proto, f"{name}.codes", codes[..., 0::2] | (codes[..., 1::2] << 4))
    put(proto, f"{name}.scales", scales)
    next(a for a in node.attribute if a.name == "block_size").i = 512


def _drop_cache(proto: ModelProto) -> None:
    """One layer's key cache neither comes in nor goes out."""
    for values_, name in (
        (proto.graph.input, f"past_key_values.{LAYER}.key"),
        (proto.graph.output, f"present.{LAYER}.key"),
    ):
        kept = [v for v in values_ if v.name != name]
        del values_[:]
        values_.extend(kept)


def _other_base(proto: ModelProto) -> None:
    """Rotary tables of a base ten times as large."""
    cos = array(proto, "rope.cos")
    positions, half = cos.shape
    base = 10 * 1 / np.arctan2(array(proto, "rope.sin")[1, 1], cos[1, 1]) ** half
    angles = np.arange(positions)[:, None] * base ** (-np.arange(half) / half)
    put(proto, "rope.cos", np.cos(angles).astype(np.float32))
    put(proto, "rope.sin", np.sin(angles).astype(np.float32))


def _another_layer(proto: ModelProto) -> None:
    for part in ("codes", "scales"):
        put(proto, f"{UP}.{part}", array(proto, f"layers.0.mlp.up.{part}"))


def _put_rounded(proto: ModelProto, name: str, dense: npt.NDArray[np.float32]) -> None:
    codes, scales = round_to_nearest(dense)
    packed = pack_neighbours(codes) ^ 0x88  # two's complement → offset binary
    put(proto, f"{name}.codes", packed.reshape(len(dense), -1, BLOCK // 2))
    put(proto, f"{name}.scales", scales.astype(np.float16))


def _kv_heads(proto: ModelProto) -> None:
    node = [n for n in proto.graph.node if n.op_type == "GroupQueryAttention"][LAYER]
    next(a for a in node.attribute if a.name == "kv_num_heads").i += 1


def _without_data(folder: Path) -> None:
    """Weights in a data file that was not copied along."""
    proto = onnx.load(folder / "model.onnx")
    onnx.save(proto, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    (folder / "weights.bin").unlink()


def edit(file: str, change_json: Callable[[Any], None]) -> Callable[[Path], None]:
    """Plant by changing a JSON file."""

    def plant(folder: Path) -> None:
        text = json.loads((folder / file).read_text(encoding="utf-8"))
        change_json(text)
        (folder / file).write_text(json.dumps(text), encoding="utf-8")

    return plant


def genai(key: str, value: object, *path: str) -> Callable[[Path], None]:
    def change_json(text: Any) -> None:
        for part in ("model", *path):
            text = text[part]
        text.pop(key) if value is None else text.update({key: value})

    return edit("genai_config.json", change_json)


def exchange_tokens(text: Any) -> None:
    """A stale tokenizer: of the letters that every text has, two have one another's id."""
    vocabulary = text["model"]["vocab"]
    vocabulary["e"], vocabulary["a"] = vocabulary["a"], vocabulary["e"]


def lose_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    path.write_text(json.dumps(config), encoding="utf-8")


Onnx = partial(Defect, "onnx")
DEFECTS = (
    Onnx("nibbles swapped", "SOURCE-NIBBLES", DOWN, change(f"{DOWN}.codes", swap_nibbles)),
    Onnx("codes as two's complement", "SOURCE-WEIGHTS", DOWN, change(f"{DOWN}.codes", lambda c: c ^ 0x88)),
    Onnx("one block zeroed", "WEIGHT-ZERO-BLOCK", f"{DOWN}.codes, row 3, columns 32 to 63",
         change(f"{DOWN}.codes", zero_block)),
    Onnx("scales off by one block", "SOURCE-SCALES", GATE, change(f"{GATE}.scales", move_scales)),
    Onnx("one scale doubled", "SOURCE-BLOCK", GATE, change(f"{GATE}.scales", set_scale(2.0))),
    Onnx("one scale with a flipped exponent bit", "WEIGHT-SCALE-OUTLIER", f"{GATE}.codes, row 2, columns 0 to 31",
         change(f"{GATE}.scales", set_scale(2048.0))),
    Onnx("a scale that is NaN", "WEIGHT-NOT-FINITE", f"{GATE}.codes",
         change(f"{GATE}.scales", set_scale(float("nan")))),
    Onnx("scales cut short", "ONNX-OPERANDS", f"{GATE}.scales", change(f"{GATE}.scales", lambda s: s[:, 1:])),
    Onnx("accuracy level 0", "ONNX-ACC-LEVEL", "value.linear",
         model(partial(set_attribute, codes=f"{DOWN}.codes", name="accuracy_level", value=0))),
    Onnx("8 bits at accuracy level 0", "ONNX-SLOW-KERNEL", "logits",
         model(partial(set_attribute, codes="embedding.codes", name="accuracy_level", value=0))),
    Onnx("blocks of 512", "ONNX-BLOCK-SIZE", "value.linear", model(partial(_blocks_of_512, name=DOWN))),
    Onnx("head in float", "HEAD-FLOAT", "embedding.float", model(partial(_to_float, name="embedding"))),
    Onnx("a linear in float", "LINEAR-FLOAT", f"{DOWN}.float", model(partial(_to_float, name=DOWN))),
    Onnx("DequantizeLinear that is not fused", "ONNX-QDQ-NOT-FUSED", f"{DOWN}.dq",
         model(partial(_dequantize_linear, name=DOWN, axis=1))),
    Onnx("a layer's cache dropped", "ONNX-KV-CACHE", f"past_key_values.{LAYER}.key", model(_drop_cache)),
    Onnx("KV heads other than the cache's", "ONNX-KV-CACHE", "value.attention", model(_kv_heads)),
    Onnx("another rotary base", "ONNX-ROPE-TABLE", "rope.cos", model(_other_base)),
    Onnx("another rotary base than the source's", "SOURCE-ROPE", "rope.cos", model(_other_base)),
    Onnx("a norm without its 1", "SOURCE-NORM", NORM, change(NORM, lambda norm: norm - 1)),
    Onnx("a norm of another layer", "SOURCE-OTHER-TENSOR", NORM,
         model(lambda proto: put(proto, NORM, array(proto, "layers.0.mlp_norm")))),
    Onnx("another layer's weights", "SOURCE-OTHER-TENSOR", UP, model(_another_layer)),
    Onnx("another layer's weights, without the source", "WEIGHT-TWICE", UP, model(_another_layer)),
    Onnx("a matrix transposed", "SOURCE-TRANSPOSED", OUT,
         model(lambda proto: _put_rounded(proto, OUT, np.ascontiguousarray(values(proto, OUT).T)))),
    Onnx("data file left behind", "ONNX-DATA-FILE", "codes", _without_data),
    Onnx("stale tokenizer", "SOURCE-TOKENIZER", "tokenizer.json", edit("tokenizer.json", exchange_tokens)),
    Onnx("end-of-text missing", "TEXT-END", "genai_config.json", genai("eos_token_id", None)),
    Onnx("end-of-text beyond the vocabulary", "TEXT-END", "genai_config.json", genai("eos_token_id", 10**6)),
    Onnx("end-of-text is not the turn's end", "TEXT-END-OF-TURN", "genai_config.json",
         genai("eos_token_id", 0)),
    Onnx("chat template lost", "SOURCE-TEMPLATE", "chat_template", lose_template),
    Onnx("context longer than the tables", "ONNX-GENAI-CONFIG", "context_length",
         genai("context_length", 10**6)),
    Onnx("KV heads misstated", "ONNX-GENAI-CONFIG", "num_key_value_heads",
         genai("num_key_value_heads", 77, "decoder")),
)  # fmt: skip
