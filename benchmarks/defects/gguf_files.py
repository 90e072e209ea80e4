"""Defects of GGUF files: bytes changed in place through gguf's own map, or the file written again by gguf's writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from benchmarks.defects.planting import LAYER, Defect, swap_nibbles

FILE = "model.gguf"
Q4_0_BYTES, SCALE_BYTES = 18, 2
DOWN, UP, GATE, OUT, Q, V, K, NORM = (
    f"blk.{LAYER}.{name}.weight"
    for name in ("ffn_down", "ffn_up", "ffn_gate", "attn_output", "attn_q", "attn_v", "attn_k", "ffn_norm")
)
Bytes = npt.NDArray[np.uint8]
Tensors = dict[str, tuple[npt.NDArray[Any], Type]]


def in_place(name: str, change: Callable[[npt.NDArray[Any]], None]) -> Callable[[Path], None]:
    """Plant by changing a tensor's bytes where they lie: (rows, bytes), or floats."""

    def plant(folder: Path) -> None:
        reader = gguf.GGUFReader(folder / FILE, "r+")
        data = next(tensor for tensor in reader.tensors if tensor.name == name).data
        change(data)
        reader.data.flush()

    return plant


def blocks(data: Bytes) -> Bytes:
    """(rows, n_blocks, 18) of a Q4_0 tensor: two bytes of scale, then 16 of codes."""
    return data.reshape(data.shape[0], -1, Q4_0_BYTES)


def _swap(data: Bytes) -> None:
    blocks(data)[..., SCALE_BYTES:] = swap_nibbles(blocks(data)[..., SCALE_BYTES:])


def _zero_block(data: Bytes) -> None:
    blocks(data)[3, 1, SCALE_BYTES:] = 0x88


def _move_scales(data: Bytes) -> None:
    scales = blocks(data)[..., :SCALE_BYTES]
    scales[:] = np.roll(scales.reshape(-1, SCALE_BYTES), 1, axis=0).reshape(scales.shape)


def _nan_scale(data: Bytes) -> None:
    blocks(data)[2, 0, :SCALE_BYTES] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)


def _less_one(data: npt.NDArray[np.float32]) -> None:
    data -= 1


def rewrite(
    change: Callable[[Tensors], None] = lambda tensors: None,
    fields: Mapping[str, object] = {},
    edit: Mapping[str, Callable[[Any], Any]] = {},
) -> Callable[[Path], None]:
    """Plant by writing the file again: `fields` are set (None: left out), `edit` changes values, `change` tensors.

    A key without a prefix is the architecture's own.
    """

    def plant(folder: Path) -> None:
        reader = gguf.GGUFReader(folder / FILE)
        architecture = str(reader.fields["general.architecture"].contents())
        tensors: Tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
        change(tensors)
        writer = gguf.GGUFWriter(folder / "again.gguf", architecture)
        _copy_fields(reader, writer, {_key(k, architecture): v for k, v in fields.items()}, edit)
        for name, (data, kind) in tensors.items():
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (folder / "again.gguf").replace(folder / FILE)

    return plant


def _key(key: str, architecture: str) -> str:
    return key if key.startswith(("tokenizer.", "general.")) else f"{architecture}.{key}"


def _copy_fields(
    reader: gguf.GGUFReader,
    writer: gguf.GGUFWriter,
    fields: Mapping[str, object],
    edit: Mapping[str, Callable[[Any], Any]],
) -> None:
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or fields.get(key, "") is None:
            continue
        value = edit.get(key, lambda v: v)(fields.get(key, field.contents()))
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, field.types[0], inner)


def _numbers(tensors: Tensors, name: str) -> npt.NDArray[np.float32]:
    data, kind = tensors[name]
    return np.asarray(gguf.quants.dequantize(data, kind), np.float32)


def _store(tensors: Tensors, name: str, values: npt.NDArray[np.float32], kind: Type) -> None:
    tensors[name] = gguf.quants.quantize(np.ascontiguousarray(values), kind), kind


def _as(name: str, kind: Type) -> Callable[[Tensors], None]:
    return lambda tensors: _store(tensors, name, _numbers(tensors, name), kind)


def _all_as_f16(tensors: Tensors) -> None:
    for name, (data, _) in list(tensors.items()):
        if data.ndim > 1:
            _store(tensors, name, _numbers(tensors, name), Type.F16)


def _copy_layer(tensors: Tensors) -> None:
    tensors[V] = tensors[V.replace(f"blk.{LAYER}", "blk.0")]


def _transposed(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: _store(tensors, name, _numbers(tensors, name).T, tensors[name][1])


def _in_halves(tensors: Tensors) -> None:
    """q in transformers' order of rows: of each head the even ones, then the odd. Heads have 16 or 64 rows here."""
    data, kind = tensors[Q]
    head_dim = 16 if len(data) == 64 else 64
    pairs = data.reshape(-1, head_dim // 2, 2, data.shape[1])
    tensors[Q] = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(data.shape), kind


def _misaligned(folder: Path) -> None:
    """The last tensor's stated offset moved by four bytes, and the file lengthened so that it can be read."""
    reader = gguf.GGUFReader(folder / FILE, "r+")
    reader.tensors[-1].field.parts[-1][0] += 4
    reader.data.flush()
    with (folder / FILE).open("ab") as file:
        file.write(b"\0" * 4)


def _exchange(tokens: list[str]) -> list[str]:
    """Of the letters that every text has, two have one another's id."""
    made = list(tokens)
    a, e = made.index("a"), made.index("e")
    made[a], made[e] = made[e], made[a]
    return made


def _other_pre(name: str) -> str:
    return "smollm" if name != "smollm" else "qwen2"


def last_tensor(folder: Path) -> str:
    return str(gguf.GGUFReader(folder / FILE).tensors[-1].name)


TOKENIZER = "tokenizer.ggml"
Gguf = partial(Defect, "gguf")
DEFECTS = (
    Gguf("nibbles swapped", "SOURCE-NIBBLES", DOWN, in_place(DOWN, _swap)),
    Gguf("one block zeroed", "WEIGHT-ZERO-BLOCK", f"{DOWN}, row 3, columns 32 to 63",
         in_place(DOWN, _zero_block)),
    Gguf("scales off by one block", "SOURCE-SCALES", GATE, in_place(GATE, _move_scales)),
    Gguf("a scale that is NaN", "WEIGHT-NOT-FINITE", GATE, in_place(GATE, _nan_scale)),
    Gguf("a norm without its 1", "SOURCE-NORM", NORM, in_place(NORM, _less_one)),
    Gguf("embedding in float", "EMBEDDING-FLOAT", "token_embd.weight", rewrite(_as("token_embd.weight", Type.F32))),
    Gguf("a linear in float", "LINEAR-FLOAT", DOWN, rewrite(_as(DOWN, Type.F16))),
    Gguf("named Q4_0, all of it F16", "CLAIM-NOT-KEPT", "general.file_type", rewrite(_all_as_f16)),
    Gguf("another layer's weights", "SOURCE-OTHER-TENSOR", V, rewrite(_copy_layer)),
    Gguf("another layer's weights, without the source", "WEIGHT-TWICE", V, rewrite(_copy_layer)),
    Gguf("a matrix transposed", "SOURCE-TRANSPOSED", OUT, rewrite(_transposed(OUT))),
    Gguf("a matrix of another shape", "GGUF-SHAPE", DOWN, rewrite(_transposed(DOWN))),
    Gguf("rows of q not permuted", "SOURCE-ROW-ORDER", Q, rewrite(_in_halves)),
    Gguf("a layer without its keys", "GGUF-LAYER", K, rewrite(lambda tensors: tensors.pop(K))),
    Gguf("fewer layers stated", "GGUF-LAYER", "block_count", rewrite(fields={"block_count": 1})),
    Gguf("a tensor that is not aligned", "GGUF-ALIGNMENT", "weight", _misaligned),
    Gguf("another rotary base", "SOURCE-ROPE", "rope.freq_base", rewrite(fields={"rope.freq_base": 500000.0})),
    Gguf("another epsilon of norms", "SOURCE-CONFIG", "layer_norm_rms_epsilon",
         rewrite(fields={"attention.layer_norm_rms_epsilon": 1e-3})),
    Gguf("context longer than trained", "SOURCE-CONTEXT", "context_length",
         rewrite(fields={"context_length": 10**6})),
    Gguf("merges lost", "GGUF-MERGES", f"{TOKENIZER}.merges",
         rewrite(edit={f"{TOKENIZER}.merges": lambda merges: merges[: len(merges) // 2]})),
    Gguf("wrong pre-tokenizer", "SOURCE-TOKENIZER", TOKENIZER,
         rewrite(edit={f"{TOKENIZER}.pre": _other_pre})),
    Gguf("no pre-tokenizer", "GGUF-PRE-MISSING", f"{TOKENIZER}.pre", rewrite(fields={f"{TOKENIZER}.pre": None})),
    Gguf("stale tokenizer", "SOURCE-TOKENIZER", TOKENIZER, rewrite(edit={f"{TOKENIZER}.tokens": _exchange})),
    Gguf("vocabulary cut short", "GGUF-VOCABULARY", f"{TOKENIZER}.tokens",
         rewrite(edit={f"{TOKENIZER}.tokens": lambda t: t[:-3], f"{TOKENIZER}.token_type": lambda t: t[:-3]})),
    Gguf("end-of-text missing", "TEXT-END", f"{TOKENIZER}.eos_token_id",
         rewrite(fields={f"{TOKENIZER}.eos_token_id": None})),
    Gguf("another end-of-text", "SOURCE-END", f"{TOKENIZER}.eos_token_id",
         rewrite(fields={f"{TOKENIZER}.eos_token_id": 5})),
    Gguf("chat template lost", "SOURCE-TEMPLATE", "tokenizer.chat_template",
         rewrite(fields={"tokenizer.chat_template": None})),
)  # fmt: skip
