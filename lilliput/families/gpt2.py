"""GPT-2: layer norm, learned positions, multi-head attention with biases, plain GELU MLP, tied head.

transformers keeps GPT-2's matrices in Conv1D as (in, out), and q, k, v side by side in `c_attn`: both are
undone here. `attn.bias` in old checkpoints is the causal mask, not a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lilliput.errors import SourceError
from lilliput.families import Read
from lilliput.grid import Float
from lilliput.model import DecoderConfig

ARCHITECTURES = ("GPT2LMHeadModel",)

NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
LINEARS = {"attention.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
TOP = {"embedding": "wte.weight", "position_embedding": "wpe.weight", "norm": "ln_f.weight", "norm.bias": "ln_f.bias"}


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    activation = hf.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise SourceError(f"activation_function {activation!r} is not supported in a GPT-2: only 'gelu_new' is")
    for field in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        if hf.get(field):
            raise SourceError(f"{field} is not supported in a GPT-2")
    hidden, heads = hf["n_embd"], hf["n_head"]
    return DecoderConfig(
        family="gpt2",
        vocab_size=hf["vocab_size"],
        hidden_size=hidden,
        intermediate_size=hf.get("n_inner") or 4 * hidden,
        num_layers=hf["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=hf["n_positions"],
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        positions="learned",
        activation="gelu_tanh",
        gated_mlp=False,
        attention_bias=True,
        mlp_bias=True,
        tied_embeddings=hf.get("tie_word_embeddings", True),
    )


def weights(config: DecoderConfig, read: Read, names: frozenset[str]) -> Iterator[tuple[str, Float]]:
    prefix = "transformer." if "transformer.wte.weight" in names else ""
    for name, theirs in TOP.items():
        yield name, read(prefix + theirs)
    if not config.tied_embeddings:
        yield "head", read("lm_head.weight")
    for i in range(config.num_layers):
        yield from _layer(f"layers.{i}.", f"{prefix}h.{i}.", read)


def _layer(ours: str, theirs: str, read: Read) -> Iterator[tuple[str, Float]]:
    for name, norm in NORMS.items():
        yield f"{ours}{name}", read(f"{theirs}{norm}.weight")
        yield f"{ours}{name}.bias", read(f"{theirs}{norm}.bias")
    fused = np.split(read(f"{theirs}attn.c_attn.weight").T, 3)
    biases = np.split(read(f"{theirs}attn.c_attn.bias"), 3)
    for letter, matrix, bias in zip("qkv", fused, biases, strict=True):
        yield f"{ours}attention.{letter}", np.ascontiguousarray(matrix)
        yield f"{ours}attention.{letter}.bias", bias
    for name, conv in LINEARS.items():
        yield f"{ours}{name}", np.ascontiguousarray(read(f"{theirs}{conv}.weight").T)
        yield f"{ours}{name}.bias", read(f"{theirs}{conv}.bias")
