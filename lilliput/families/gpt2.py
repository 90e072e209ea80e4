"""GPT-2: layer norm, learned positions, multi-head attention with biases, plain GELU MLP, tied head.

transformers keeps GPT-2's matrices in Conv1D as (in, out), and q, k, v side by side in `c_attn`: both are
undone here. `attn.bias` in old checkpoints is the causal mask, not a parameter. GGUF files hold the matrices
as (out, in), q, k and v stacked in `attn_qkv`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lilliput.families import Read, Shapes, checked, refuse, require
from lilliput.grid import Float
from lilliput.model import DecoderConfig

ARCHITECTURES = ("GPT2LMHeadModel",)
UNUSED = re.compile(r".*attn\.(masked_)?bias")  # the causal mask; c_attn.bias does not end so
GGUF_ARCHITECTURE = "gpt2"

NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
LINEARS = {"attention.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
TOP = {"embedding": "wte.weight", "position_embedding": "wpe.weight", "norm": "ln_f.weight", "norm.bias": "ln_f.bias"}
REQUIRED = ("vocab_size", "n_embd", "n_head", "n_layer", "n_positions")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,), "scale_attn_weights": (True,), "add_cross_attention": (False,),
}  # fmt: skip

GGUF_LAYER = {
    "attention_norm": "attn_norm", "attention.o": "attn_output", "mlp_norm": "ffn_norm", "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}  # fmt: skip
GGUF_TOP = {
    "embedding": "token_embd.weight", "position_embedding": "position_embd.weight", "norm": "output_norm.weight",
    "norm.bias": "output_norm.bias", "head": "output.weight",
}  # fmt: skip
GGUF_REQUIRED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_epsilon",
)  # fmt: skip


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    require(hf, REQUIRED, "config.json")
    refuse(hf, NEUTRAL, "config.json")
    config = _config(
        vocab_size=hf["vocab_size"], hidden=hf["n_embd"], intermediate=hf.get("n_inner") or 4 * hf["n_embd"],
        layers=hf["n_layer"], heads=hf["n_head"], positions=hf["n_positions"],
        eps=hf.get("layer_norm_epsilon", 1e-5), tied=hf.get("tie_word_embeddings", True),
    )  # fmt: skip
    return checked(config, "config.json")


def gguf_config(fields: Mapping[str, Any], shapes: Shapes) -> DecoderConfig:
    require(fields, GGUF_REQUIRED, "GGUF metadata")
    config = _config(
        vocab_size=shapes.get("token_embd.weight", (fields.get("vocab_size", 0), 0))[0],
        hidden=fields["embedding_length"], intermediate=fields["feed_forward_length"], layers=fields["block_count"],
        heads=fields["attention.head_count"], positions=fields["context_length"],
        eps=float(fields["attention.layer_norm_epsilon"]), tied="output.weight" not in shapes,
    )  # fmt: skip
    return checked(config, "GGUF metadata")


def _config(
    *, vocab_size: int, hidden: int, intermediate: int, layers: int, heads: int, positions: int, eps: float, tied: bool
) -> DecoderConfig:
    return DecoderConfig(
        family="gpt2",
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=positions,
        norm="layer",
        norm_eps=eps,
        positions="learned",
        activation="gelu_tanh",
        gated_mlp=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied_embeddings=tied,
    )


def weights(config: DecoderConfig, read: Read, names: frozenset[str]) -> Iterator[tuple[str, Float]]:
    prefix = "" if "wte.weight" in names else "transformer."
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
    yield from _split(ours, read(f"{theirs}attn.c_attn.weight").T, "")
    yield from _split(ours, read(f"{theirs}attn.c_attn.bias"), ".bias")
    for name, conv in LINEARS.items():
        yield f"{ours}{name}", np.ascontiguousarray(read(f"{theirs}{conv}.weight").T)
        yield f"{ours}{name}.bias", read(f"{theirs}{conv}.bias")


def _split(ours: str, fused: Float, suffix: str) -> Iterator[tuple[str, Float]]:
    """q, k and v of `fused` (3 * hidden, …). What is no third comes out uneven: the check of shapes names it."""
    for letter, part in zip("qkv", np.array_split(fused, 3), strict=True):
        yield f"{ours}attention.{letter}{suffix}", np.ascontiguousarray(part)


def gguf_weights(config: DecoderConfig, read: Read) -> Iterator[tuple[str, Float]]:
    for name, theirs in GGUF_TOP.items():
        if name != "head" or not config.tied_embeddings:
            yield name, read(theirs)
    for i in range(config.num_layers):
        ours, block = f"layers.{i}.", f"blk.{i}."
        for name, theirs in GGUF_LAYER.items():
            yield f"{ours}{name}", read(f"{block}{theirs}.weight")
            yield f"{ours}{name}.bias", read(f"{block}{theirs}.bias")
        yield from _split(ours, read(f"{block}attn_qkv.weight"), "")
        yield from _split(ours, read(f"{block}attn_qkv.bias"), ".bias")
