"""Rotary frequencies of real models' settings against transformers' own functions, and configurations as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from tiny_models import LLAMA
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lilliput import rope
from lilliput.decoder import rope_tables, rotary_tables
from lilliput.families import gemma3, llama, phi3
from lilliput.model import DecoderConfig

LONG = {"short_factor": [1 + i / 50 for i in range(48)], "long_factor": [1 + i for i in range(48)]}
# theta, head_dim, positions, rope_scaling, and what else config.json says
SETTINGS: dict[str, tuple[float, int, int, dict[str, Any] | None, dict[str, Any]]] = {
    "SmolLM2": (1e5, 64, 8192, None, {}),
    "Llama 3.2": (
        5e5, 64, 131072,
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192}, {},
    ),
    "Qwen 2.5 long": (
        1e6, 128, 32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, {},
    ),
    "YaRN with mscale": (
        1e4, 64, 163840,
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
         "mscale": 1.0, "mscale_all_dim": 0.5}, {},
    ),
    "YaRN, not truncated": (
        1.5e5, 64, 131072,
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}, {},
    ),
    "Gemma 3 4B": (1e6, 256, 131072, {"rope_type": "linear", "factor": 8.0}, {}),
    "dynamic": (1e4, 128, 4096, {"type": "dynamic", "factor": 2.0}, {}),
    "Phi 4 mini": (
        1e4, 128, 131072, {"rope_type": "longrope", **LONG},
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 4096},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_frequencies_are_transformers_bit_for_bit(case: str) -> None:
    theta, head_dim, positions, scaling, more = SETTINGS[case]
    fields = {"rope_theta": theta, "max_position_embeddings": positions, "rope_scaling": scaling, **more}
    theirs = LlamaConfig(
        head_dim=head_dim, hidden_size=head_dim, num_attention_heads=1, **json.loads(json.dumps(fields))
    )
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    wanted, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    found = rope.from_config(fields)
    dims = int(head_dim * more.get("partial_rotary_factor", 1))
    ours = rope.inverse_frequencies(found.theta, head_dim, dims, found.scaling)
    assert torch.equal(ours[: dims // 2], wanted)
    assert not ours[dims // 2 :].any()
    assert (found.scaling.attention_factor if found.scaling else 1.0) == factor


def test_what_does_not_rotate_comes_out_as_it_went_in() -> None:
    """Its cosine is 1, whatever multiplies the others."""
    scaling = {"rope_type": "longrope", "short_factor": [2.0] * 4, "long_factor": [2.0] * 4}
    more = {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 64, "rope_scaling": scaling}
    config = phi3.config({**LLAMA, **more})
    cos, sin = rotary_tables(config, 5)
    assert cos.shape == (5, 8)
    assert (cos[:, 4:] == 1).all()
    assert not sin[:, 4:].any()
    assert cos[0, 0] == pytest.approx(config.rope_scaling.attention_factor if config.rope_scaling else 0)


def test_layers_name_their_tables() -> None:
    config = gemma3.config({**LLAMA, "num_hidden_layers": 6, "sliding_window": 8})
    assert [config.rotation(i) for i in range(6)] == ["local"] * 5 + ["global"]
    tables = rope_tables(config, 7)
    assert set(tables) == {"rope.cos", "rope.sin", "rope.local_cos", "rope.local_sin"}
    assert not torch.equal(tables["rope.cos"], tables["rope.local_cos"])
    assert set(rope_tables(llama.config(LLAMA), 7)) == {"rope.cos", "rope.sin"}


@pytest.mark.parametrize(
    "config",
    [
        gemma3.config({**LLAMA, "sliding_window": 8, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        phi3.config(
            {**LLAMA, "rope_scaling": {"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [2.0] * 8}}
        ),
    ],
    ids=lambda config: config.family,
)
def test_a_configuration_survives_json(config: DecoderConfig) -> None:
    again = DecoderConfig(**json.loads(json.dumps(asdict(config))))
    assert again == config
    assert hash(again) == hash(config)
