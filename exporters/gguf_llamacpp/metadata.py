"""The key-value pairs of a GGUF file that say what the model is, and those of our own.

llama.cpp reads `general.*` and `{architecture}.*` (gguf's constants.py names and types them). `context_length` is
what the model was trained for; how much of it an artifact's KV cache holds is chosen where it is opened. Ours, which
llama.cpp passes over:

    lilliput.grids        JSON: the grid's name by decoder parameter, as a block type can hold several grids
    lilliput.provenance   JSON: what the file was made from (lilliput.provenance)
"""

from __future__ import annotations

import math
from collections import Counter

import gguf
from gguf import GGMLQuantizationType as BlockType

from exporters.gguf_llamacpp.architectures import window_pattern
from exporters.gguf_llamacpp.tensors import long_rope
from exporters.gguf_llamacpp.vocabulary.files import read as read_files
from exporters.gguf_llamacpp.vocabulary.special import model_name
from lilliput.artifact import PROVENANCE, canonical
from lilliput.model import DecoderConfig, QuantizedModel

GRIDS = "lilliput.grids"
FILE_TYPES = {
    BlockType.F32: gguf.LlamaFileType.ALL_F32,
    BlockType.F16: gguf.LlamaFileType.MOSTLY_F16,
    BlockType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    BlockType.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    BlockType.Q5_0: gguf.LlamaFileType.MOSTLY_Q5_0,
    BlockType.Q5_1: gguf.LlamaFileType.MOSTLY_Q5_1,
    BlockType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    BlockType.IQ4_NL: gguf.LlamaFileType.MOSTLY_IQ4_NL,
    BlockType.IQ4_XS: gguf.LlamaFileType.MOSTLY_IQ4_XS,
    BlockType.Q2_K: gguf.LlamaFileType.MOSTLY_Q2_K,
    BlockType.Q3_K: gguf.LlamaFileType.MOSTLY_Q3_K_M,
    BlockType.Q4_K: gguf.LlamaFileType.MOSTLY_Q4_K_M,
    BlockType.Q5_K: gguf.LlamaFileType.MOSTLY_Q5_K_M,
    BlockType.Q6_K: gguf.LlamaFileType.MOSTLY_Q6_K,
}


def add(
    writer: gguf.GGUFWriter, model: QuantizedModel, config: DecoderConfig, weights_by_type: Counter[BlockType]
) -> None:
    """Add all but the tokenizer. `config` is the model's as its architecture computes it; `weights_by_type` counts the
    weights of matrices that each type holds."""
    writer.add_type("model")
    writer.add_name(model_name(model.name, read_files(model.tokenizer)))
    if model.provenance.get("license"):
        writer.add_license(model.provenance["license"])
    _add_architecture(writer, config)
    writer.add_file_type(FILE_TYPES[weights_by_type.most_common(1)[0][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(GRIDS, canonical({name: tensor.spec.name for name, tensor in model.quantized.items()}))
    writer.add_string(PROVENANCE, canonical(model.provenance))


def _add_architecture(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.norm == "layer":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.positions == "rope":
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_rope_dimension_count(config.rope_dims or config.head_dim)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        _add_scaling(writer, config)
    _add_windows(writer, config)
    if config.attention_softcap:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap:
        writer.add_final_logit_softcapping(config.logit_softcap)


def _add_scaling(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    """How frequencies are scaled, where tensors (tensors.rope_tensors) do not say it.

    llama.cpp multiplies yarn's attention factor by 1 + 0.1 ln(factor) itself (llama-context.cpp, ggml's rope_yarn).
    """
    scaling = config.rope_scaling
    if scaling is None:
        return
    if scaling.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_positions)
        writer.add_rope_scaling_attn_factors(scaling.attention_factor / (1 + 0.1 * math.log(scaling.factor)))
    if long_rope(config):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(config.max_positions)
        writer.add_rope_scaling_attn_factors(scaling.attention_factor)


def _add_windows(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    """Gemma 2 always has a window: one that no position reaches past where the model has none."""
    if not any(config.windows):
        if config.family == "gemma2":
            writer.add_sliding_window(config.max_positions)
        return
    writer.add_sliding_window(max(config.windows))
    pattern = window_pattern(config)
    if config.family != "gemma2":
        writer.add_sliding_window_pattern(pattern)
    if config.rope_local_theta is not None:
        writer.add_rope_freq_base_swa(config.rope_local_theta)
