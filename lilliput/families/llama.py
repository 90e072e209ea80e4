"""Llama, SmolLM, SmolLM2, Mistral: RMS norm, rotary positions, grouped-query attention, gated SiLU MLP.

Weight names as in transformers' LlamaForCausalLM; matrices are (out, in) there too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lilliput.errors import SourceError
from lilliput.families import Read
from lilliput.grid import Float
from lilliput.model import DecoderConfig

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")

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


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    if hf.get("hidden_act", "silu") != "silu":
        raise SourceError(f"hidden_act {hf['hidden_act']!r} is not supported in a Llama: only 'silu' is")
    for field in ("rope_scaling", "sliding_window"):
        if hf.get(field) is not None:
            raise SourceError(f"{field} {hf[field]!r} is not supported in a Llama: only null is")
    heads = hf["num_attention_heads"]
    return DecoderConfig(
        family="llama",
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        max_positions=hf.get("max_position_embeddings", 2048),
        norm="rms",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        positions="rope",
        activation="silu",
        gated_mlp=True,
        attention_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        tied_embeddings=hf.get("tie_word_embeddings", False),
        rope_theta=hf.get("rope_theta", 10000.0),
    )


def checkpoint_name(name: str) -> str:
    """The checkpoint's name of decoder parameter `name`."""
    bare, suffix = (name.removesuffix(".bias"), ".bias") if name.endswith(".bias") else (name, ".weight")
    if not bare.startswith("layers."):
        return TOP[bare] + suffix
    _, index, inner = bare.split(".", 2)
    return f"model.layers.{index}.{LAYER[inner]}{suffix}"


def weights(config: DecoderConfig, read: Read, names: frozenset[str]) -> Iterator[tuple[str, Float]]:
    for name in config.parameter_shapes():
        yield name, read(checkpoint_name(name))
