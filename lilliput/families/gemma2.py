"""Gemma 2: as Gemma 3, with soft caps in place of norms of q and k, and a window in every other layer.

It has one rotary base. Weight names as in transformers' Gemma2ForCausalLM, which stores the weights of norms less 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lilliput.families import Read, Shapes, checked, gemma3, llama, refuse, windows
from lilliput.grid import Float
from lilliput.model import DecoderConfig

ARCHITECTURES = ("Gemma2ForCausalLM",)
UNUSED = re.compile(r".*rotary_emb\.inv_freq")
GGUF_ARCHITECTURE = "gemma2"
GGUF_LAYERS_OF_27B = 46
# transformers' Gemma2Config, where config.json does not say
DEFAULTS: dict[str, Any] = {
    "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "max_position_embeddings": 8192,
}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1.0,),
}  # fmt: skip


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    refuse(hf, NEUTRAL, "config.json")
    hf = {**DEFAULTS, **hf}
    found, bias = llama.plain(hf, "gemma2", tied=True), bool(hf.get("attention_bias"))
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(found.num_layers)]
    return checked(
        replace(
            found,
            activation="gelu_tanh",
            attention_bias=bias,
            output_bias=bias,
            post_norms=True,
            embedding_scale=found.hidden_size**0.5,
            attention_scale=hf["query_pre_attn_scalar"] ** -0.5,
            windows=windows(hf.get("layer_types") or kinds, hf["sliding_window"], found.max_positions),
            attention_softcap=hf["attn_logit_softcapping"] or 0.0,
            logit_softcap=hf["final_logit_softcapping"] or 0.0,
        ),
        "config.json",
    )


def weights(config: DecoderConfig, read: Read, names: frozenset[str]) -> Iterator[tuple[str, Float]]:
    return llama.checkpoint_weights(config, read, gemma3.LAYER, added_to_norms=1.0)


def gguf_config(fields: Mapping[str, Any], shapes: Shapes) -> DecoderConfig:
    found = llama.gguf_plain(fields, shapes, "gemma2")
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(found.num_layers)]
    found = replace(
        gemma3.gguf_gemma(found, GGUF_LAYERS_OF_27B),
        windows=windows(kinds, fields.get("attention.sliding_window"), found.max_positions),
        attention_softcap=float(fields.get("attn_logit_softcapping") or DEFAULTS["attn_logit_softcapping"]),
        logit_softcap=float(fields.get("final_logit_softcapping") or DEFAULTS["final_logit_softcapping"]),
    )
    return checked(found, "GGUF metadata")


def gguf_weights(config: DecoderConfig, read: Read) -> Iterator[tuple[str, Float]]:
    return llama.gguf_parameters(config, read)
