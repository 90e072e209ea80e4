"""litert-torch's plain export of a causal LM: transformers' own modules, traced with a cache that is handed in.

It is what a user gets who follows the packages' documentation: the model as it is, its cache updated by
index_copy, signatures `prefill_{n}` and `decode`, converted to float32, then quantized by ai-edge-quantizer's own
recipe for dynamic 8 bit (dynamic_wi8_afp32). Inputs and outputs have LiteRT-LM's names, so that Lilliput's
session of the runtime opens the file as it opens ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache

from benchmarks.subjects import CONTEXT, PREFILL

MASKED = -1e4


class GivenCache(Cache):  # type: ignore[misc]
    """Caches (1, kv_heads, CONTEXT, head_dim) of every layer, replaced by updated ones; new positions at `position`."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], position: Tensor) -> None:
        self.k, self.v, self._position = keys, values, position

    def update(self, key: Tensor, value: Tensor, layer: int, _: Any = None) -> tuple[Tensor, Tensor]:
        self.k[layer] = self.k[layer].index_copy(2, self._position, key)
        self.v[layer] = self.v[layer].index_copy(2, self._position, value)
        return self.k[layer], self.v[layer]

    def get_seq_length(self, layer: int = 0) -> int:
        return 0

    def get_max_cache_shape(self, layer: int = 0) -> int:
        return CONTEXT

    @property
    def is_compileable(self) -> bool:
        return True


class Step(nn.Module):
    """tokens (1, T), input_pos (T,), mask (1, 1, T, CONTEXT), caches by name → logits (1, 1, vocab), caches."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model, self.layers = model, model.config.num_hidden_layers

    def forward(self, tokens: Tensor, input_pos: Tensor, mask: Tensor, **caches: Tensor) -> dict[str, Tensor]:
        keys = [caches[f"kv_cache_k_{i}"] for i in range(self.layers)]
        values = [caches[f"kv_cache_v_{i}"] for i in range(self.layers)]
        cache = GivenCache(keys, values, input_pos)
        hidden = self.model.model(
            input_ids=tokens, position_ids=input_pos[None], attention_mask=mask, past_key_values=cache,
            use_cache=True, cache_position=input_pos,
        ).last_hidden_state  # fmt: skip
        outputs = {"logits": self.model.lm_head(hidden[:, -1:])}
        for i in range(self.layers):
            outputs |= {f"kv_cache_k_{i}": cache.k[i], f"kv_cache_v_{i}": cache.v[i]}
        return outputs


def sample_inputs(model: LlamaForCausalLM, count: int) -> dict[str, Tensor]:
    config = model.config
    visible = torch.arange(CONTEXT)[None] <= torch.arange(count)[:, None]
    shape = (1, config.num_key_value_heads, CONTEXT, config.head_dim)
    inputs = {
        "tokens": torch.zeros(1, count, dtype=torch.int64),
        "input_pos": torch.arange(count),
        "mask": torch.where(visible, 0.0, MASKED)[None, None],
    }
    for i in range(config.num_hidden_layers):
        inputs |= {f"kv_cache_k_{i}": torch.zeros(shape), f"kv_cache_v_{i}": torch.zeros(shape)}
    return inputs


def export(hf: Path, destination: Path) -> None:
    """model.tflite, 8-bit. About 70 s and 3 GB for 135M parameters."""
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe

    model = LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager").eval()
    step = Step(model).eval()
    converter = litert_torch.signature(f"prefill_{PREFILL}", step, sample_kwargs=sample_inputs(model, PREFILL))
    converter = converter.signature("decode", step, sample_kwargs=sample_inputs(model, 1))
    floats = destination / "float.tflite"
    converter.convert().export(str(floats))
    eight_bit = quantizer.Quantizer(str(floats))
    eight_bit.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    eight_bit.quantize().export_model(str(destination / "model.tflite"), overwrite=True)
    floats.unlink()
