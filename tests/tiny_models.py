"""Tiny random models for tests, made on the spot: Hugging Face folders of every family, and what comes of them.

Sizes are the smallest that every format holds: widths are multiples of 32 (int4-b32), head_dim is 16. The
tokenizer is a byte-level BPE of 320 tokens, trained on TEXT. All is seeded: the same call gives the same numbers.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from lilliput import families
from lilliput.grid import Float, GridSpec, QuantizedTensor, grid, round_scale
from lilliput.model import QuantizedModel, SourceModel, role_of
from lilliput.parity_texts import TEXTS

VOCAB_SIZE = 320
TEXT = (
    "The quick brown fox jumps over the lazy dog. A model is quantized once, and every runtime gets exactly that. "
    "def add(a, b):\n    return a + b\n\nDie Katze schläft auf dem Sofa; 1234567890 mal zwei ist 2469135780.\n"
)
BOS, EOS = "<|start|>", "<|end|>"
LLAMA = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCAB_SIZE, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
# By kind: transformers' model and config classes, and what differs from LLAMA. Windows are shorter than tests' texts.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 32}),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config",
        {"sliding_window": 8, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        {"num_key_value_heads": 1, "head_dim": 32, "sliding_window": 8, "sliding_window_pattern": 2,
         "query_pre_attn_scalar": 24, "rope_theta": 1e5, "num_hidden_layers": 3},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"pad_token_id": 0, "tie_word_embeddings": False}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {"num_hidden_layers": 4, "pad_token_id": 0}),
}  # fmt: skip


def save_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE of VOCAB_SIZE tokens (two of them special, with a chat template) and save it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = (
        "{% for m in messages %}" + BOS + "{{ m['role'] }}\n{{ m['content'] }}" + EOS + "\n{% endfor %}"
        "{% if add_generation_prompt %}" + BOS + "assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)


def tiny(kind: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A random model of KINDS with its tokenizer, as a Hugging Face folder. `overrides` are its config class's."""
    import transformers

    model, config, differences = KINDS[kind]
    made = getattr(transformers, config)(**{**LLAMA, **differences, **overrides})
    return _save(getattr(transformers, model), made, folder, seed)


def tiny_llama(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A random LlamaForCausalLM with its tokenizer, as a Hugging Face folder. `overrides` are LlamaConfig's."""
    return tiny("llama", folder, seed, **overrides)


def tiny_gpt2(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A random GPT2LMHeadModel with its tokenizer, as a Hugging Face folder. `overrides` are GPT2Config's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return _save(GPT2LMHeadModel, GPT2Config(**{**GPT2, **overrides}), folder, seed)


def _save(model_class: Any, config: Any, folder: Path, seed: int) -> Path:
    """Make the model with every parameter random (biases and norms too: transformers starts them at 0 and 1)."""
    import torch

    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.dim() == 1 else 0.8 / parameter.shape[-1] ** 0.5
            parameter.mul_(0 if parameter.dim() > 1 else 1).add_(torch.randn(parameter.shape) * scale)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def source_of(folder: Path) -> SourceModel:
    """A Hugging Face folder of this module as a SourceModel, straight through its family, all in memory."""
    from safetensors.numpy import load_file

    hf = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    _, family = families.family_of(hf)
    config = family.config(hf)
    weights = dict(family.weights(config, lambda name: stored[name], frozenset(stored)))
    return SourceModel(folder.name, config, weights, folder, "0" * 64, str(folder), "Apache-2.0")


def tiny_source(tmp_path: Path, kind: str = "llama", seed: int = 0, **overrides: Any) -> SourceModel:
    """A tiny random SourceModel; kind is "gpt2" or one of KINDS."""
    folder = tmp_path / f"tiny-{kind}"
    return source_of(tiny_gpt2(folder, seed, **overrides) if kind == "gpt2" else tiny(kind, folder, seed, **overrides))


def theirs(source: SourceModel) -> Any:
    """transformers' own model of a `tiny_source`. Soft caps of scores are only in its plain attention."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        source.tokenizer, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def rtn(weight: Float, spec: GridSpec) -> QuantizedTensor:
    """Plain round-to-nearest of (rows, cols) with max-abs scales, on a symmetric grid: a stand-in for solvers."""
    rows, cols = weight.shape
    width, n_blocks = spec.width(cols), spec.blocks(cols)
    padded = np.zeros((rows, n_blocks * width), np.float32)
    padded[:, :cols] = weight
    blocks = padded.reshape(rows, n_blocks, width)
    scales = round_scale(np.abs(blocks).max(-1) / spec.qmax, spec.scale_dtype)
    scales[scales == 0] = 1.0
    codes = np.clip(np.rint(blocks / scales[..., None]), spec.qmin, spec.qmax).astype(np.int8)
    return QuantizedTensor(spec, np.ascontiguousarray(codes.reshape(rows, -1)[:, :cols]), scales)


def quantize(source: SourceModel, linear: str = "int4-b32", table: str = "int8-channel") -> QuantizedModel:
    """Every matrix of `source` by `rtn`: linears on grid `linear`, embedding and head on grid `table`."""
    matrices = {n: w for n, w in source.weights.items() if role_of(n) != "vector"}
    quantized = {n: rtn(w, grid(linear if role_of(n) == "linear" else table)) for n, w in matrices.items()}
    floats = {n: w for n, w in source.weights.items() if n not in matrices}
    provenance = {"source": source.sha256, "solver": "rtn", "license": source.license or ""}
    return QuantizedModel(source.name, source.config, quantized, floats, source.tokenizer, provenance)


def tiny_quantized_model(tmp_path: Path, kind: str = "llama", **overrides: Any) -> QuantizedModel:
    """A tiny random model on the common grids (int4-b32 linears, int8-channel embedding)."""
    return quantize(tiny_source(tmp_path, kind, **overrides))


def sentencepiece_model(**options: object) -> bytes:
    """A SentencePiece BPE model with byte fallback, of 1200 pieces, trained on the texts of parity_texts."""
    import sentencepiece

    model = io.BytesIO()
    settings = {
        "model_type": "bpe", "vocab_size": 1200, "byte_fallback": True, "character_coverage": 0.98,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2, **options,
    }  # fmt: skip
    lines = [line for text in TEXTS for line in text.splitlines() if line.strip()] * 2
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    return model.getvalue()
