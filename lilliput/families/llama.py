"""Llama, SmolLM, SmolLM2, Mistral: RMS norm, rotary positions, grouped-query attention, gated SiLU MLP.

Weight names as in transformers' LlamaForCausalLM; matrices are (out, in) there too. Most later families are a Llama
with differences: `plain` reads the config fields that they share, `checkpoint_weights` their weights. Mistral's
layers all have one window. GGUF files hold the
rows of q and k in ggml's interleaved order: of each head, row 2j is the half-split row j, row 2j + 1 the
half-split row head_dim/2 + j (`permute` of llama.cpp's convert_hf_to_gguf.py). It is undone here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lilliput import rope
from lilliput.errors import SourceError
from lilliput.families import Read, Shapes, checked, refuse, require, windows
from lilliput.grid import Float
from lilliput.model import DecoderConfig

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
UNUSED = re.compile(r".*rotary_emb\.inv_freq")  # a table that old checkpoints carry
GGUF_ARCHITECTURE = "llama"

LAYER = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "partial_rotary_factor": (1.0,)}
MISTRAL_SLIDING_WINDOW = 4096  # transformers' MistralConfig, where config.json does not say

GGUF_LAYER = {  # of all families that name their tensors so
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention.o": "attn_output",
    "attention_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "mlp_post_norm": "post_ffw_norm",
}
GGUF_TOP = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
GGUF_REQUIRED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
# Keys (gguf's constants.py) that change the arithmetic, and the values that leave it alone.
GGUF_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,), "logit_scale": (1.0, 0.0),
    "residual_scale": (1.0, 0.0), "embedding_scale": (1.0, 0.0), "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,), "attention.causal": (True,),
}  # fmt: skip


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    found = plain(hf, "llama")
    refuse(hf, NEUTRAL, "config.json")
    bias = bool(hf.get("attention_bias"))
    found = replace(found, attention_bias=bias, output_bias=bias, mlp_bias=bool(hf.get("mlp_bias")))
    if "MistralForCausalLM" in (hf.get("architectures") or ()):
        window = hf.get("sliding_window", MISTRAL_SLIDING_WINDOW)
        found = replace(found, windows=windows(["sliding_attention"] * found.num_layers, window, found.max_positions))
    return checked(found, "config.json")


def plain(hf: Mapping[str, Any], family: str, *, tied: bool = False) -> DecoderConfig:
    """A decoder without biases, by the names that Llama's config.json gave its fields. `tied`: where it does not say.

    Not `checked` yet: the caller changes what is different.
    """
    require(hf, REQUIRED, "config.json")
    heads, positions = hf["num_attention_heads"], rope.from_config(hf)
    return DecoderConfig(
        family=family,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        max_positions=positions.max_positions,
        norm="rms",
        norm_eps=hf["rms_norm_eps"],
        positions="rope",
        activation="silu",
        gated_mlp=True,
        attention_bias=False,
        mlp_bias=False,
        tied_embeddings=bool(hf.get("tie_word_embeddings", tied)),
        rope_theta=positions.theta,
        rope_scaling=positions.scaling,
    )


def checkpoint_name(name: str, layer: Mapping[str, str] = LAYER) -> str:
    """The Hugging Face checkpoint's name of decoder parameter `name`."""
    return _name(name, TOP, layer, "model.layers")


def gguf_name(name: str) -> str:
    """The GGUF file's name of decoder parameter `name`."""
    return _name(name, GGUF_TOP, GGUF_LAYER, "blk")


def _name(name: str, top: Mapping[str, str], layer: Mapping[str, str], prefix: str) -> str:
    bare, suffix = (name.removesuffix(".bias"), ".bias") if name.endswith(".bias") else (name, ".weight")
    if not bare.startswith("layers."):
        return top[bare] + suffix
    _, index, inner = bare.split(".", 2)
    return f"{prefix}.{index}.{layer[inner]}{suffix}"


def weights(config: DecoderConfig, read: Read, names: frozenset[str]) -> Iterator[tuple[str, Float]]:
    return checkpoint_weights(config, read, LAYER)


def checkpoint_weights(
    config: DecoderConfig, read: Read, layer: Mapping[str, str], added_to_norms: float = 0.0
) -> Iterator[tuple[str, Float]]:
    """Parameters by the checkpoint's names of a layer's. Gemma stores the weights of its norms less 1.

    Where only a part of each head rotates, rows of q and k are brought into the decoder's order.
    """
    order = rope.full_order(config.head_dim, config.rope_dims) if config.rope_dims else None
    for name in config.parameter_shapes():
        array = read(checkpoint_name(name, layer))
        inner = name.removesuffix(".bias")
        if order is not None and inner.endswith(("attention.q", "attention.k")):
            array = in_order(array, order)
        elif order is not None and inner.endswith(("q_norm", "k_norm")):
            array = array[order]
        yield name, array + np.float32(added_to_norms) if added_to_norms and inner.endswith("norm") else array


def in_order(rows: Float, order: npt.NDArray[np.intp]) -> Float:
    """Rows (heads * head_dim, …), those of every head in that order (head_dim,)."""
    if rows.shape[0] % len(order):
        return rows  # the check of shapes names it
    return np.ascontiguousarray(rows.reshape(-1, len(order), *rows.shape[1:])[:, order]).reshape(rows.shape)


def gguf_config(fields: Mapping[str, Any], shapes: Shapes) -> DecoderConfig:
    found = gguf_plain(fields, shapes, "llama")
    refuse(fields, {"rope.dimension_count": (found.head_dim,)}, "GGUF metadata")
    return checked(without_window(found, fields), "GGUF metadata")


def gguf_plain(fields: Mapping[str, Any], shapes: Shapes, family: str) -> DecoderConfig:
    """A decoder by the metadata that all families share; biases are where the tensors are. Not `checked` yet."""
    require(fields, GGUF_REQUIRED, "GGUF metadata")
    refuse(fields, GGUF_NEUTRAL, "GGUF metadata")
    hidden, heads, positions = fields["embedding_length"], fields["attention.head_count"], rope.from_gguf(fields)
    head_dim = fields.get("attention.key_length") or hidden // heads
    refuse(fields, {"attention.value_length": (head_dim,)}, "GGUF metadata")
    return DecoderConfig(
        family=family,
        vocab_size=shapes.get("token_embd.weight", (fields.get("vocab_size", 0), 0))[0],
        hidden_size=hidden,
        intermediate_size=fields["feed_forward_length"],
        num_layers=fields["block_count"],
        num_heads=heads,
        num_kv_heads=fields.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_positions=positions.max_positions,
        norm="rms",
        norm_eps=float(np.float32(fields["attention.layer_norm_rms_epsilon"])),
        positions="rope",
        activation="silu",
        gated_mlp=True,
        attention_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        tied_embeddings="output.weight" not in shapes,
        rope_theta=positions.theta,
        rope_scaling=positions.scaling,
    )


def without_window(config: DecoderConfig, fields: Mapping[str, Any]) -> DecoderConfig:
    """Raise SourceError for a window that a query can reach past: llama.cpp has none in this architecture."""
    window = fields.get("attention.sliding_window") or 0
    if 0 < window < config.max_positions:
        raise SourceError(
            f"GGUF metadata: attention.sliding_window {window} is smaller than context_length {config.max_positions}, "
            f"and {config.family!r} has no sliding windows in GGUF"
        )
    return config


def gguf_weights(config: DecoderConfig, read: Read) -> Iterator[tuple[str, Float]]:
    return gguf_parameters(config, read, interleaved=True)


def gguf_parameters(config: DecoderConfig, read: Read, *, interleaved: bool = False) -> Iterator[tuple[str, Float]]:
    """Parameters by GGUF_LAYER's names. `interleaved`: rows of q and k are in ggml's order."""
    order = rope.full_order(config.head_dim, config.rope_dims) if config.rope_dims else None
    for name in config.parameter_shapes():
        array, inner = read(gguf_name(name)), name.removesuffix(".bias")
        if inner.endswith(("attention.q", "attention.k")):
            array = half_split(array, config.head_dim) if interleaved else array
            array = array if order is None else in_order(array, order)
        yield name, array


def half_split(rows: Float, head_dim: int) -> Float:
    """Rows (heads * head_dim, …) from interleaved to half-split order within each head."""
    if rows.shape[0] % head_dim:
        return rows  # the check of shapes names it
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])  # (heads, head_dim / 2, 2, …)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
