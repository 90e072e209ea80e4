"""Families: which config fields mean what, and what is refused by name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tiny_gguf import permute
from tiny_models import GPT2, LLAMA

from lilliput import families
from lilliput.errors import SourceError
from lilliput.families import gemma2, gemma3, gpt2, llama, phi3, qwen3, smollm3

HF_LLAMA: dict[str, Any] = {**LLAMA, "architectures": ["LlamaForCausalLM"]}
HF_MISTRAL: dict[str, Any] = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": None}
HF_GPT2: dict[str, Any] = {**GPT2, "architectures": ["GPT2LMHeadModel"]}
GGUF_LLAMA: dict[str, Any] = {
    "block_count": 2, "context_length": 256, "embedding_length": 64, "feed_forward_length": 128,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


def test_the_folder_is_the_registry() -> None:
    assert families.known() == ("gemma2", "gemma3", "gpt2", "llama", "phi3", "qwen2", "qwen3", "smollm3")
    assert families.family_of(HF_MISTRAL) == ("llama", llama)
    assert families.gguf_family_of("gpt2") is gpt2


def test_an_unknown_architecture_is_refused_with_the_supported_ones() -> None:
    with pytest.raises(SourceError) as caught:
        families.family_of({"architectures": ["LlamaForCausalML"]})
    message = str(caught.value)
    assert "did you mean 'LlamaForCausalLM'?" in message
    assert "known: GPT2LMHeadModel, Gemma2ForCausalLM, Gemma3ForCausalLM, LlamaForCausalLM" in message


def test_an_unknown_gguf_architecture_is_refused_with_the_supported_ones() -> None:
    with pytest.raises(SourceError, match=r"GGUF architecture 'bert' is not supported: known: gemma2, .*, llama, .*"):
        families.gguf_family_of("bert")


def test_llama_config() -> None:
    config = llama.config({**HF_LLAMA, "rope_theta": 1e5})
    assert (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim) == (64, 4, 2, 16)
    assert (config.rope_theta, config.tied_embeddings, config.max_positions) == (1e5, True, 256)
    assert not config.attention_bias
    assert not config.mlp_bias


def test_llama_config_fills_in_what_transformers_fills_in() -> None:
    slim = {k: v for k, v in HF_LLAMA.items() if k not in ("num_key_value_heads", "head_dim", "tie_word_embeddings")}
    config = llama.config(slim)
    assert (config.num_kv_heads, config.head_dim, config.tied_embeddings) == (4, 16, False)


# What config.json of published models says (as far as it is read), their number of parameters, and their features.
PUBLISHED: dict[str, tuple[dict[str, Any], int, set[str]]] = {
    "Llama 3.2 1B": (
        {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
         "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
         "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True,
         "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192}},
        1_235_814_400, {"rope_scaling"},
    ),
    "Qwen 2.5 0.5B": (
        {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
         "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
         "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": True, "use_sliding_window": False,
         "sliding_window": 32768, "max_window_layers": 24},
        494_032_768, set(),
    ),
    "Qwen 3 0.6B": (
        {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
         "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
         "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True},
        596_049_920, {"qk_norm"},
    ),
    "Gemma 2 2B": (
        {"architectures": ["Gemma2ForCausalLM"], "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
         "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
         "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "sliding_window": 4096},
        2_614_341_888, {"attention_softcap", "logit_softcap", "embedding_scale", "post_norms", "sliding_window"},
    ),
    "Gemma 3 270M": (
        {"architectures": ["Gemma3ForCausalLM"], "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
         "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
         "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "sliding_window": 512,
         "rope_theta": 1e6, "rope_local_base_freq": 1e4,
         "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3},
        268_098_176, {"qk_norm", "embedding_scale", "post_norms", "sliding_window", "local_rope"},
    ),
    "Phi 3 mini 4k": (
        {"architectures": ["Phi3ForCausalLM"], "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
         "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "sliding_window": 2047},
        3_821_079_552, {"sliding_window"},
    ),
    "Phi 4 mini": (
        {"architectures": ["Phi3ForCausalLM"], "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192,
         "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
         "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
         "tie_word_embeddings": True, "sliding_window": 262144,
         "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},
        3_836_021_760, {"partial_rope", "rope_scaling"},
    ),
    "SmolLM 3 3B": (
        {"architectures": ["SmolLM3ForCausalLM"], "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
         "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
         "max_position_embeddings": 65536, "rope_theta": 5e6, "no_rope_layers": [1, 1, 1, 0] * 9},
        3_075_098_624, {"rope_free_layers"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_have_the_parameters_that_they_are_said_to_have(model: str) -> None:
    hf, parameters, features = PUBLISHED[model]
    config = families.family_of(hf)[1].config(hf)
    assert sum(math.prod(shape) for shape in config.parameter_shapes().values()) == parameters
    assert config.features == features


@pytest.mark.parametrize("key", llama.REQUIRED)
def test_llama_names_the_missing_key(key: str) -> None:
    with pytest.raises(SourceError, match=f"config.json has no '{key}'"):
        llama.config({k: v for k, v in HF_LLAMA.items() if k != key})


@pytest.mark.parametrize("key", gpt2.REQUIRED)
def test_gpt2_names_the_missing_key(key: str) -> None:
    with pytest.raises(SourceError, match=f"config.json has no '{key}'"):
        gpt2.config({k: v for k, v in HF_GPT2.items() if k != key})


@pytest.mark.parametrize("key", llama.GGUF_REQUIRED)
def test_gguf_llama_names_the_missing_key(key: str) -> None:
    with pytest.raises(SourceError, match=f"GGUF metadata has no '{key}'"):
        llama.gguf_config({k: v for k, v in GGUF_LLAMA.items() if k != key}, {})


@pytest.mark.parametrize(
    "rope", [None, {"rope_type": "default"}, {"type": "default"}, {"rope_type": "default", "rope_theta": 5e5}]
)
def test_default_rope_scaling_is_fine(rope: dict[str, Any] | None) -> None:
    wanted = 5e5 if rope and "rope_theta" in rope else 1e4
    assert llama.config({**HF_LLAMA, "rope_theta": 1e4, "rope_scaling": rope}).rope_theta == wanted
    assert llama.config({**HF_LLAMA, "rope_parameters": rope}).rope_theta == wanted


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "ntk"}, r"rope_scaling 'ntk' is not supported: known: default, linear, dynamic, llama3, yarn"),
        ({"type": "linear"}, "rope_scaling factor is None, wanted a positive number"),
        ({"rope_type": "yarn", "factor": -2}, "rope_scaling factor is -2, wanted a positive number"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_scaling original_max_position_embeddings is None"),
        ({"rope_type": "longrope", "factor": 8.0, "short_factor": "1"}, "short_factor is '1', wanted a list"),
        ({"rope_type": "longrope", "factor": 8.0, "short_factor": [1.0]}, "1 factors of rope_scaling, wanted one for"),
    ],
)
def test_rope_scaling_that_is_not_known_or_incomplete_is_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        llama.config({**HF_LLAMA, "rope_scaling": rope})


def test_kinds_of_rope_that_change_with_the_length_are_exact_up_to_the_positions_that_the_model_is_given() -> None:
    dynamic = llama.config({**HF_LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4.0}})
    assert (dynamic.rope_scaling, dynamic.max_positions) == (None, 256)
    long = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = phi3.config({**HF_LLAMA, "original_max_position_embeddings": 64, "rope_scaling": long})
    assert config.max_positions == 64
    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == pytest.approx((1 + math.log(4) / math.log(64)) ** 0.5)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (gemma3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
        (gemma3, {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        (gemma3, {"layer_types": ["chunked_attention"] * 2}, "layer_types 'chunked_attention' is not supported"),
        (gemma3, {"layer_types": ["sliding_attention"]}, "windows of 1 layers, wanted 2"),
        (gemma2, {"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported"),
        (qwen3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        (phi3, {"partial_rotary_factor": 0.2}, "3 of 16 dimensions cannot be rotated in halves"),
    ],
)
def test_what_no_layer_computes_is_refused(family: families.Family, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        family.config({**LLAMA, **fields})


def test_features_are_what_a_plain_decoder_lacks() -> None:
    assert not llama.config(HF_LLAMA).features
    assert qwen3.config(HF_LLAMA).features == {"qk_norm"}
    assert smollm3.config({**HF_LLAMA, "num_hidden_layers": 4}).features == {"rope_free_layers"}
    assert gemma3.config(HF_LLAMA).features == {
        "qk_norm", "post_norms", "embedding_scale", "attention_scale", "sliding_window", "local_rope",
    }  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "gelu"), ("partial_rotary_factor", 0.5)])
def test_llama_refuses_other_arithmetic(key: str, value: object) -> None:
    with pytest.raises(SourceError, match=f"config.json: {key} {value!r} is not supported: only"):
        llama.config({**HF_LLAMA, key: value})


@pytest.mark.parametrize("window", [None, 256, 4096])
def test_mistral_window_that_changes_nothing_is_fine(window: int | None) -> None:
    assert llama.config({**HF_MISTRAL, "sliding_window": window}).windows == ()


def test_every_layer_of_mistral_has_its_window() -> None:
    assert llama.config({**HF_MISTRAL, "sliding_window": 128}).windows == (128, 128)
    silent = {k: v for k, v in HF_MISTRAL.items() if k != "sliding_window"}  # transformers' MistralConfig has 4096 then
    assert llama.config({**silent, "max_position_embeddings": 8192}).windows == (4096, 4096)


@pytest.mark.parametrize(
    ("key", "value"),
    [("activation_function", "relu"), ("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False)],
)
def test_gpt2_refuses_other_arithmetic(key: str, value: object) -> None:
    with pytest.raises(SourceError, match=f"config.json: {key} {value!r} is not supported: only"):
        gpt2.config({**HF_GPT2, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.scale", 2.0), ("residual_scale", 2.0), ("expert_count", 8), ("logit_scale", 0.5),
        ("rope.dimension_count", 8), ("attention.value_length", 32),
    ],
)  # fmt: skip
def test_gguf_llama_refuses_other_arithmetic_by_key(key: str, value: object) -> None:
    with pytest.raises(SourceError, match=f"GGUF metadata: {key} {value!r} is not supported: only"):
        llama.gguf_config({**GGUF_LLAMA, key: value}, {})


def test_gguf_window_smaller_than_the_context_is_refused() -> None:
    with pytest.raises(SourceError, match=r"attention\.sliding_window 128 is smaller than context_length 256"):
        llama.gguf_config({**GGUF_LLAMA, "attention.sliding_window": 128}, {})


def test_gguf_head_is_tied_where_there_is_no_output() -> None:
    shapes = {"token_embd.weight": (320, 64)}
    assert llama.gguf_config(GGUF_LLAMA, shapes).tied_embeddings
    assert not llama.gguf_config(GGUF_LLAMA, {**shapes, "output.weight": (320, 64)}).tied_embeddings


def test_half_split_undoes_the_permutation_of_ggml() -> None:
    rows = np.arange(4 * 16 * 3, dtype=np.float32).reshape(64, 3)
    assert not np.array_equal(permute(rows, 4), rows)
    assert np.array_equal(llama.half_split(permute(rows, 4), 16), rows)
    assert np.array_equal(llama.half_split(permute(rows[:, 0], 4), 16), rows[:, 0])


@pytest.mark.parametrize("value", ["64", 0, -1, True, [1, 2]])
def test_a_size_that_is_no_positive_number_is_refused(value: object) -> None:
    with pytest.raises(SourceError, match=r"config\.json: hidden_size is .*, wanted a positive number"):
        llama.config({**HF_LLAMA, "hidden_size": value})


@pytest.mark.parametrize("kv_heads", [3, 8, [2, 2]])
def test_key_value_heads_that_do_not_divide_are_refused(kv_heads: object) -> None:
    with pytest.raises(SourceError, match=r"4 attention heads over .* key-value heads, wanted a divisor"):
        llama.config({**HF_LLAMA, "num_key_value_heads": kv_heads})
    with pytest.raises(SourceError, match=r"4 attention heads over .* key-value heads, wanted a divisor"):
        llama.gguf_config({**GGUF_LLAMA, "attention.head_count_kv": kv_heads}, {})


def test_heads_that_do_not_fit_the_width_are_refused() -> None:
    with pytest.raises(SourceError, match="head_dim 15 cannot be rotated in halves"):
        llama.config({**HF_LLAMA, "head_dim": 15})
    with pytest.raises(SourceError, match="width 64 does not divide into 5 heads"):
        gpt2.config({**HF_GPT2, "n_head": 5})
