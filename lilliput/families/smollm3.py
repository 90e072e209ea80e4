"""SmolLM 3: a Llama whose every fourth layer does not rotate.

Weight names are Llama's (transformers' SmolLM3ForCausalLM).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lilliput.families import Read, Shapes, checked, llama, refuse, windows
from lilliput.grid import Float
from lilliput.model import DecoderConfig

ARCHITECTURES = ("SmolLM3ForCausalLM",)
UNUSED = re.compile(r".*rotary_emb\.inv_freq")
GGUF_ARCHITECTURE = "smollm3"
ROPE_THETA, INTERVAL = 2e6, 4  # transformers' SmolLM3Config, where config.json does not say


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    refuse(hf, llama.NEUTRAL, "config.json")
    found, bias = llama.plain({"rope_theta": ROPE_THETA, **hf}, "smollm3", tied=True), bool(hf.get("attention_bias"))
    interval = hf.get("no_rope_layer_interval", INTERVAL)
    rotates = hf.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(found.num_layers)]
    free = tuple(i for i, does in enumerate(rotates) if not does)
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    kinds = ["sliding_attention" if i in free else "full_attention" for i in range(found.num_layers)]
    return checked(
        replace(
            found,
            attention_bias=bias,
            output_bias=bias,
            mlp_bias=bool(hf.get("mlp_bias")),
            rope_free_layers=free,
            windows=windows(hf.get("layer_types") or kinds, window, found.max_positions),
        ),
        "config.json",
    )


def weights(config: DecoderConfig, read: Read, names: frozenset[str]) -> Iterator[tuple[str, Float]]:
    return llama.checkpoint_weights(config, read, llama.LAYER)


def gguf_config(fields: Mapping[str, Any], shapes: Shapes) -> DecoderConfig:
    """llama.cpp knows no other interval."""
    found = llama.without_window(llama.gguf_plain(fields, shapes, "smollm3"), fields)
    refuse(fields, {"rope.dimension_count": (found.head_dim,)}, "GGUF metadata")
    free = tuple(i for i in range(found.num_layers) if (i + 1) % INTERVAL == 0)
    return checked(replace(found, rope_free_layers=free), "GGUF metadata")


def gguf_weights(config: DecoderConfig, read: Read) -> Iterator[tuple[str, Float]]:
    return llama.gguf_parameters(config, read, interleaved=True)
