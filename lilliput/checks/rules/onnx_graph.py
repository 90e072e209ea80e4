"""The decoder's graph in an ONNX file: caches, rotary tables, data files, and genai_config.json beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, ValueInfoProto

from lilliput.checks.base import ONNX, NotCheckedError, Rule, Seen
from lilliput.checks.onnx_view import OnnxFile, attribute, place, rotary_tables
from lilliput.checks.opened import Opened

BASE_TOLERANCE = 1e-3  # of a rotary base read back from float32 tables: theirs is 1e-6
UNIT_TOLERANCE = 1e-2  # of the range of cos² + sin²: float16 tables keep 1e-3


def _shape(value: ValueInfoProto) -> list[int | str]:
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims]


def _caches(file: OnnxFile) -> tuple[dict[tuple[int, str], ValueInfoProto], dict[tuple[int, str], ValueInfoProto]]:
    """Inputs and outputs by (layer, key or value)."""
    sides = []
    for values, prefix in ((file.model.graph.input, "past_key_values."), (file.model.graph.output, "present.")):
        named = [(v, v.name.removeprefix(prefix).split(".")) for v in values if v.name.startswith(prefix)]
        sides.append({(int(n[0]), n[1]): v for v, n in named if len(n) == 2 and n[0].isdigit()})
    return sides[0], sides[1]


def caches(opened: Opened) -> Iterator[Seen]:
    file = opened.onnx
    past, present = _caches(file)
    if not past and not present:
        return
    layers = max(layer for layer, _ in {**past, **present}) + 1
    named = file.metadata.get("config", {}).get("num_layers", layers)
    for key in ((layer, kind) for layer in range(max(layers, named)) for kind in ("key", "value")):
        for side, names in (("past_key_values", past), ("present", present)):
            if key not in names:
                yield Seen(f"{side}.{key[0]}.{key[1]}", f"the graph of {max(layers, named)} layers has no such cache")
    yield from _layout(file, past)


def _layout(file: OnnxFile, past: dict[tuple[int, str], ValueInfoProto]) -> Iterator[Seen]:
    """(batch, kv_heads, positions, head_dim), the same for all layers and as attention says."""
    shapes = {key: _shape(value) for key, value in past.items()}
    if not shapes:
        return
    first = next(iter(shapes.values()))
    for (layer, kind), shape in shapes.items():
        if len(shape) != 4 or shape[1::2] != first[1::2]:
            yield Seen(f"past_key_values.{layer}.{kind}", f"is {shape}, the first cache is {first}")
    for node in file.nodes:
        heads = attribute(node, "kv_num_heads", 0)
        if (
            node.op_type == "GroupQueryAttention"
            and len(first) == 4
            and isinstance(first[1], int)
            and heads != first[1]
        ):
            yield Seen(place(node), f"kv_num_heads is {heads}, the caches have {first[1]}")


def rotary(opened: Opened) -> Iterator[Seen]:
    file = opened.onnx
    names = rotary_tables(file)
    if names is None:
        return
    cos, sin = (file.array(name).astype(np.float64) for name in names)
    if cos.shape != sin.shape or np.ptp(cos**2 + sin**2) > UNIT_TOLERANCE:  # long-context scaling may have a factor
        yield Seen(names[0], f"{names[0]} and {names[1]} are no cosines and sines of the same angles")
        return
    config = file.metadata.get("config", {})
    stated, found = config.get("rope_theta"), opened.facts.get("rope_theta")
    if any(config.get(changed) for changed in ("rope_scaling", "rope_dims", "rope_local_theta")):
        raise NotCheckedError("the frequencies of this model are not those of a base alone")
    if stated and found and abs(float(found.value) / stated - 1) > BASE_TOLERANCE:
        yield Seen(names[0], f"is a table of base {float(found.value):.6g}, the file's own metadata says {stated:.6g}")


def data_files(opened: Opened) -> Iterator[Seen]:
    for tensor in opened.onnx.initializers.values():
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        data = opened.onnx.path.parent / entries.get("location", "")
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        if not data.is_file():
            yield Seen(tensor.name, f"its data file {entries.get('location')!r} is not beside the model")
        elif data.stat().st_size < end:
            yield Seen(tensor.name, f"{data.name} has {data.stat().st_size} bytes, its weights end at {end}")


def genai_config(opened: Opened) -> Iterator[Seen]:
    config = read_genai_config(opened.path.parent)
    decoder = config.get("model", {}).get("decoder", {})
    stated = {"num_hidden_layers": "num_layers", "num_key_value_heads": "num_kv_heads"}
    stated["num_attention_heads"] = "num_heads"
    for key, field in stated.items():
        fact = opened.facts.get(field)
        if key in decoder and fact is not None and decoder[key] != fact.value:
            yield Seen(f"genai_config.json: {key}", f"is {decoder[key]}, the graph has {fact.value} ({fact.place})")
    context, fact = config.get("model", {}).get("context_length"), opened.facts.get("context")
    if context and fact is not None and context > int(fact.value):
        yield Seen("genai_config.json: context_length", f"is {context}, {fact.place} holds {fact.value} positions")


def read_genai_config(folder: Path) -> dict[str, Any]:
    """genai_config.json of a folder; empty where there is none that can be read."""
    try:
        loaded: dict[str, Any] = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded


RULES = (
    Rule(
        id="ONNX-KV-CACHE",
        formats=ONNX,
        severity="error",
        summary="a layer without its cache, or a cache laid out otherwise than attention reads it",
        reason="a cache that is not carried on makes a layer forget all but the last token",
        reference="huggingface/optimum#1755",
        fix="export again with past_key_values and present for every layer",
        check=caches,
    ),
    Rule(
        id="ONNX-ROPE-TABLE",
        formats=ONNX,
        severity="error",
        summary="rotary tables of another base than the file's own configuration",
        reason="with a wrong base a model reads near tokens well and loses far ones",
        reference="ggml-org/llama.cpp#2773",
        fix="export again with the source's rope_theta",
        check=rotary,
    ),
    Rule(
        id="ONNX-DATA-FILE",
        formats=ONNX,
        severity="error",
        summary="weights in a data file that is missing or too short",
        reason="models above 2 GB keep weights beside the graph; who copies the .onnx alone has no model",
        reference="https://onnx.ai/onnx/repo-docs/ExternalData.html",
        fix="fetch the data file again, and keep both in one folder",
        check=data_files,
    ),
    Rule(
        id="ONNX-GENAI-CONFIG",
        formats=ONNX,
        severity="error",
        summary="a genai_config.json that does not fit the graph beside it",
        reason="onnxruntime-genai binds caches and lengths by this file, not by the graph",
        reference="https://onnxruntime.ai/docs/genai/reference/config.html",
        fix="write genai_config.json again from the exported graph",
        check=genai_config,
    ),
)
