"""The key-value pairs of a GGUF file that say what the model is, and those of our own.

llama.cpp reads `general.*` and `{architecture}.*` (gguf's constants.py names and types them). `context_length` is
what the model was trained for; how much of it an artifact's KV cache holds is chosen where it is opened. Ours, which
llama.cpp passes over:

    lilliput.grids        JSON: the grid's name by decoder parameter, as a block type can hold several grids
    lilliput.provenance   JSON: what the file was made from (lilliput.provenance)
"""

from __future__ import annotations

from collections import Counter

import gguf
from gguf import GGMLQuantizationType as BlockType

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


def add(writer: gguf.GGUFWriter, model: QuantizedModel, weights_by_type: Counter[BlockType]) -> None:
    """Add all but the tokenizer. `weights_by_type` counts the weights of matrices that each type holds."""
    writer.add_type("model")
    writer.add_name(model.name)
    if model.provenance.get("license"):
        writer.add_license(model.provenance["license"])
    _add_architecture(writer, model.config)
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
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
