"""Qwen 3 (dense): a Llama with an RMS norm of each head of q and k, and head_dim apart from the hidden size.

Weight names as in transformers' Qwen3ForCausalLM. GGUF files hold q and k as transformers does, in halves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lilliput.families import Read, Shapes, checked, llama, qwen2, refuse
from lilliput.grid import Float
from lilliput.model import DecoderConfig

ARCHITECTURES = ("Qwen3ForCausalLM",)
UNUSED = re.compile(r".*rotary_emb\.inv_freq")
GGUF_ARCHITECTURE = "qwen3"
LAYER = {**llama.LAYER, "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
HEAD_DIM = 128  # transformers' Qwen3Config, where config.json does not say


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    refuse(hf, llama.NEUTRAL, "config.json")
    found, bias = (
        llama.plain({**hf, "head_dim": hf.get("head_dim") or HEAD_DIM}, "qwen3"),
        bool(hf.get("attention_bias")),
    )
    found = replace(found, attention_bias=bias, output_bias=bias, qk_norm=True, windows=qwen2.layer_windows(hf, found))
    return checked(found, "config.json")


def weights(config: DecoderConfig, read: Read, names: frozenset[str]) -> Iterator[tuple[str, Float]]:
    return llama.checkpoint_weights(config, read, LAYER)


def gguf_config(fields: Mapping[str, Any], shapes: Shapes) -> DecoderConfig:
    found = llama.without_window(llama.gguf_plain(fields, shapes, "qwen3"), fields)
    return checked(replace(found, qk_norm=True), "GGUF metadata")


def gguf_weights(config: DecoderConfig, read: Read) -> Iterator[tuple[str, Float]]:
    return llama.gguf_parameters(config, read)
