"""Gemma 3, text: norms before and behind attention and MLP, of q and k too; windows in five layers of six.

Layers with a window have a rotary base of their own; the embedding is multiplied by sqrt(hidden); the MLP is gated by
GELU; small ones have one KV head. Weight names as in transformers' Gemma3ForCausalLM, which stores the weights of norms
less 1. Its attention passes over attn_logit_softcapping, so that is refused; final_logit_softcapping is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lilliput.errors import SourceError
from lilliput.families import Read, Shapes, checked, llama, refuse, windows
from lilliput.grid import Float
from lilliput.model import DecoderConfig

ARCHITECTURES = ("Gemma3ForCausalLM",)
UNUSED = re.compile(r".*rotary_emb(_local)?\.inv_freq")
GGUF_ARCHITECTURE = "gemma3"
GGUF_LAYERS_OF_27B, GGUF_PATTERN = (
    62,
    6,
)  # llama.cpp's: where scores are scaled otherwise, and every how-manieth is full
LAYER = {
    **llama.LAYER,
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
# transformers' Gemma3TextConfig, where config.json does not say
DEFAULTS: dict[str, Any] = {
    "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6,
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "max_position_embeddings": 131072,
}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False,), "attn_logit_softcapping": (),
    "partial_rotary_factor": (1.0,),
}  # fmt: skip


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    refuse(hf, NEUTRAL, "config.json")
    hf = {**DEFAULTS, **hf}
    found, bias = llama.plain(hf, "gemma3", tied=True), bool(hf.get("attention_bias"))
    pattern = hf["sliding_window_pattern"]
    kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(found.num_layers)]
    return checked(
        replace(
            found,
            activation="gelu_tanh",
            attention_bias=bias,
            output_bias=bias,
            qk_norm=True,
            post_norms=True,
            embedding_scale=found.hidden_size**0.5,
            attention_scale=hf["query_pre_attn_scalar"] ** -0.5,
            windows=windows(hf.get("layer_types") or kinds, hf["sliding_window"]),
            logit_softcap=hf.get("final_logit_softcapping") or 0.0,
            rope_local_theta=float(hf["rope_local_base_freq"]),
        ),
        "config.json",
    )


def weights(config: DecoderConfig, read: Read, names: frozenset[str]) -> Iterator[tuple[str, Float]]:
    return llama.checkpoint_weights(config, read, LAYER, added_to_norms=1.0)


def gguf_config(fields: Mapping[str, Any], shapes: Shapes) -> DecoderConfig:
    found = llama.gguf_plain(fields, shapes, "gemma3")
    pattern = fields.get("attention.sliding_window_pattern") or GGUF_PATTERN
    if not isinstance(pattern, int):
        raise SourceError(f"GGUF metadata: attention.sliding_window_pattern {pattern!r} is not supported: a number is")
    kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(found.num_layers)]
    found = replace(
        gguf_gemma(found, GGUF_LAYERS_OF_27B),
        qk_norm=True,
        windows=windows(kinds, fields.get("attention.sliding_window")),
        logit_softcap=float(fields.get("final_logit_softcapping") or 0.0),
        rope_local_theta=float(fields.get("rope.freq_base_swa") or DEFAULTS["rope_local_base_freq"]),
    )
    return checked(found, "GGUF metadata")


def gguf_gemma(plain: DecoderConfig, layers_of_27b: int) -> DecoderConfig:
    """What Gemmas share. The scale of scores is not in the metadata: llama.cpp knows the 27B model by its layers."""
    per_head = plain.hidden_size // plain.num_heads if plain.num_layers == layers_of_27b else plain.head_dim
    return replace(
        plain,
        activation="gelu_tanh",
        post_norms=True,
        embedding_scale=plain.hidden_size**0.5,
        attention_scale=per_head**-0.5,
    )


def gguf_weights(config: DecoderConfig, read: Read) -> Iterator[tuple[str, Float]]:
    """The norms' ones are in the file."""
    return llama.gguf_parameters(config, read)
