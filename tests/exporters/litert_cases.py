"""Tiny models on the grids that LiteRT holds, their export, and what torch computes from the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from tiny_models import rtn, tiny_source

from exporters.litert_int8 import Exporter, Options
from lilliput.artifact import Artifact
from lilliput.decoder import Decoder, build
from lilliput.grid import Float, grid
from lilliput.model import QuantizedModel, SourceModel, role_of
from lilliput.trace import trace
from targets.runtimes.litert_cpu import Runtime

CONTEXT, CHUNK = 48, 8
TOKENS = [7, 300, 12, 12, 45, 1, 99, 210, 6, 30, 31, 32, 250, 8, 9, 10, 11, 200, 201, 5]

MODELS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "grouped": ("llama", {}),
    "one kv head": ("llama", {"num_key_value_heads": 1}),
    "own head": ("llama", {"tie_word_embeddings": False}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gpt2": ("gpt2", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "final_logit_softcapping": 3.0}),
    "phi3": (
        "phi3",
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 128, "sliding_window": 8,
         "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.25, 1.5, 2.0, 3.0, 4.0],
                          "long_factor": [2.0] * 6}},
    ),
    "smollm3": ("smollm3", {"use_sliding_window": True, "sliding_window": 8}),
    "yarn": ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    "llama3": (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 64}},
    ),
}  # fmt: skip
RULES: Mapping[str, Mapping[str, str]] = {
    "common": {"linear": "int4-b32", "embedding": "int8-channel", "head": "int8-channel"},
    "eight bit": {"linear": "int8-channel", "embedding": "int8-channel", "head": "int8-channel"},
    "four bit": {"linear": "int4-b64", "embedding": "int4-b32", "head": "int4-channel"},
    "two bit": {"linear": "int2-channel", "embedding": "int2-channel-f32", "head": "int2-channel"},
    "float tables": {"linear": "int4-channel-f32", "embedding": "float", "head": "float"},
    "float linears": {"linear": "float", "embedding": "int8-channel", "head": "int8-channel"},
    "layers apart": {"linear": "int4-b32", "layers.1.attention.v": "int8-channel", "layers.1.mlp.up": "float",
                     "embedding": "int8-channel", "head": "int8-channel"},
}  # fmt: skip


def solved(folder: Path, model: str, rules: str) -> QuantizedModel:
    """A tiny model of MODELS, its matrices on the grids that RULES name, by name or else by role."""
    kind, overrides = MODELS[model]
    source = tiny_source(folder, kind, **overrides)
    rule = RULES[rules]
    grids = {n: rule.get(n) or rule.get(role_of(n), "float") for n in source.weights}
    quantized = {n: rtn(w, grid(grids[n])) for n, w in source.weights.items() if grids[n] != "float"}
    floats = {n: w for n, w in source.weights.items() if n not in quantized}
    return QuantizedModel(source.name, source.config, quantized, floats, source.tokenizer, {})


def export(
    model: QuantizedModel, folder: Path, *, exact: bool = False, bundle: bool = False,
    prefill_lengths: tuple[int, ...] = (4,),
) -> Artifact:  # fmt: skip
    folder.mkdir()
    with torch.device("meta"):
        traced = trace(Decoder(model.config), CONTEXT, CHUNK)
    return Exporter().export(
        model, traced, Options(bundle=bundle, prefill_lengths=prefill_lengths), folder, exact=exact
    )


def reference(model: QuantizedModel, tokens: list[int]) -> Float:
    """Logits (T, vocab) of the dequantized weights in torch."""
    weights = {name: model.dequantized(name) for name in model.config.parameter_shapes()}
    decoder = build(SourceModel(model.name, model.config, weights, model.tokenizer, "", ""))
    with torch.no_grad():
        return np.asarray(decoder(torch.tensor([tokens]))[0].numpy())


def logits(artifact: Artifact, tokens: list[int], prompt: int, *, exact: bool) -> Float:
    """Logits after the first `prompt` tokens and after each token behind them."""
    session = Runtime().open(artifact, threads=1, exact=exact)
    seen = [session.prefill(tokens[:prompt]), *(session.decode(token) for token in tokens[prompt:])]
    session.close()
    return np.stack(seen)
