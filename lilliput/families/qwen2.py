"""Qwen 2 and 2.5: a Llama with biases on q, k and v alone, and with windows in its last layers where they are used.

Weight names are Llama's (transformers' Qwen2ForCausalLM). GGUF files hold q and k as transformers does, in halves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lilliput.families import Read, Shapes, checked, llama, refuse, windows
from lilliput.grid import Float
from lilliput.model import DecoderConfig

ARCHITECTURES = ("Qwen2ForCausalLM",)
UNUSED = re.compile(r".*rotary_emb\.inv_freq")
GGUF_ARCHITECTURE = "qwen2"
SLIDING_WINDOW, FULL_LAYERS = 4096, 28  # transformers' Qwen2Config and Qwen3Config, where config.json does not say


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    refuse(hf, llama.NEUTRAL, "config.json")
    found = llama.plain(hf, "qwen2")
    return checked(replace(found, attention_bias=True, windows=layer_windows(hf, found)), "config.json")


def layer_windows(hf: Mapping[str, Any], config: DecoderConfig) -> tuple[int, ...]:
    """With use_sliding_window the layers from max_window_layers on have a window, or those that layer_types names."""
    if not hf.get("use_sliding_window"):
        return ()
    first = hf.get("max_window_layers", FULL_LAYERS)
    kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(config.num_layers)]
    return windows(hf.get("layer_types") or kinds, hf.get("sliding_window", SLIDING_WINDOW), config.max_positions)


def weights(config: DecoderConfig, read: Read, names: frozenset[str]) -> Iterator[tuple[str, Float]]:
    return llama.checkpoint_weights(config, read, llama.LAYER)


def gguf_config(fields: Mapping[str, Any], shapes: Shapes) -> DecoderConfig:
    found = llama.without_window(llama.gguf_plain(fields, shapes, "qwen2"), fields)
    return checked(found, "GGUF metadata")


def gguf_weights(config: DecoderConfig, read: Read) -> Iterator[tuple[str, Float]]:
    return llama.gguf_parameters(config, read)
