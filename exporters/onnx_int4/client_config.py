"""config.json, which clients that know models by their Hugging Face configuration open a folder by.

optimum's ORTModelForCausalLM and Transformers.js read the sizes of the cache, the vocabulary and the tokens that begin
and end a text from it; the arithmetic (rotation, windows, scales) is in the graph. Field names are those of
transformers' configuration classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exporters.onnx_int4.genai import special_tokens
from lilliput import families
from lilliput.model import DecoderConfig, QuantizedModel

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
MODEL_TYPES = {"gemma3": "gemma3_text"}  # where it is not the family's name


def write(model: QuantizedModel, context: int, folder: Path) -> None:
    """config.json and generation_config.json of a model whose cache holds `context` positions."""
    bos, eos = special_tokens(model.tokenizer)
    tokens = {"bos_token_id": bos, "eos_token_id": eos if len(eos) > 1 else eos[0]}
    _dump(_config(model.config, context) | tokens, folder / CONFIG_FILE)
    _dump(tokens, folder / GENERATION_FILE)


def _config(config: DecoderConfig, context: int) -> dict[str, Any]:
    family = config.family
    found = {
        "architectures": [families.load(family).ARCHITECTURES[0]],
        "model_type": MODEL_TYPES.get(family, family),
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
        "dtype": "float32",
        "use_cache": True,
    }
    return found | (_gpt2(config, context) if family == "gpt2" else _llama_like(config, context))


def _llama_like(config: DecoderConfig, context: int) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }


def _gpt2(config: DecoderConfig, context: int) -> dict[str, Any]:
    return {
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": context,
        "layer_norm_epsilon": config.norm_eps,
    }


def _dump(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
