"""Phi 3, 3.5 and Phi 4 mini: a Llama of stacked matrices, whose heads may rotate in part, with long RoPE.

Weight names as in transformers' Phi3ForCausalLM. q, k, v lie in one matrix and gate, up in another; they are taken
apart here: rows of q, then k, then v; rows of gate, then up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lilliput.families import Read, Shapes, checked, llama, refuse, windows
from lilliput.grid import Float
from lilliput.model import DecoderConfig

ARCHITECTURES = ("Phi3ForCausalLM",)
UNUSED = re.compile(r".*rotary_emb\.inv_freq")
GGUF_ARCHITECTURE = "phi3"
ORIGINAL_POSITIONS = 4096  # transformers' Phi3Config, where config.json does not say
OLDER_NAMES = ("su", "yarn")  # of longrope, in Phi 3's first files


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    refuse(hf, {"hidden_act": ("silu",)}, "config.json")
    found = llama.plain({"original_max_position_embeddings": ORIGINAL_POSITIONS, **hf, **_scaling(hf)}, "phi3")
    kinds = ["sliding_attention"] * found.num_layers
    rotating = int(found.head_dim * (hf.get("partial_rotary_factor") or 1.0))
    found = replace(
        found,
        rope_dims=rotating if rotating != found.head_dim else 0,
        windows=windows(kinds, hf.get("sliding_window"), found.max_positions),
    )
    return checked(found, "config.json")


def _scaling(hf: Mapping[str, Any]) -> dict[str, Any]:
    scaling = hf.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    return {"rope_scaling": {**scaling, "rope_type": "longrope"}} if kind in OLDER_NAMES else {}


def weights(config: DecoderConfig, read: Read, names: frozenset[str]) -> Iterator[tuple[str, Float]]:
    parts = {name: f"{name}_proj" for name in ("q", "k", "v", "gate", "up")}
    return llama.checkpoint_weights(config, _unstacked(config, read, parts, ("qkv_proj", "gate_up_proj")), llama.LAYER)


def _unstacked(config: DecoderConfig, read: Read, names: Mapping[str, str], stacks: tuple[str, str]) -> Read:
    """Reads the parts' `names` out of the two stacks."""
    heads, kv_heads, inner = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
        config.intermediate_size,
    )
    rows = {
        "q": (stacks[0], 0, heads),
        "k": (stacks[0], heads, heads + kv_heads),
        "v": (stacks[0], heads + kv_heads, None),
        "gate": (stacks[1], 0, inner),
        "up": (stacks[1], inner, None),
    }
    places = {names[part]: place for part, place in rows.items()}

    def unstacked(name: str) -> Float:
        for part, (stack, begin, end) in places.items():
            if f".{part}." in name:
                return np.ascontiguousarray(read(name.replace(f".{part}.", f".{stack}."))[begin:end])
        return read(name)

    return unstacked


def gguf_config(fields: Mapping[str, Any], shapes: Shapes) -> DecoderConfig:
    found = llama.gguf_plain(fields, shapes, "phi3")
    rotating = fields.get("rope.dimension_count") or found.head_dim
    kinds = ["sliding_attention"] * found.num_layers
    found = replace(
        found,
        rope_dims=rotating if rotating != found.head_dim else 0,
        windows=windows(kinds, fields.get("attention.sliding_window"), found.max_positions),
    )
    return checked(found, "GGUF metadata")


def gguf_weights(config: DecoderConfig, read: Read) -> Iterator[tuple[str, Float]]:
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "gate": "ffn_gate", "up": "ffn_up"}
    return llama.gguf_parameters(config, _unstacked(config, read, names, ("attn_qkv", "ffn_up")))
