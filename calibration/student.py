"""The decoder in training: its forward pass with a gradient, on tensors that an optimizer moves.

It is lilliput.decoder's own modules and arithmetic, with two choices. Attention is made of matrix products: on a CPU
with AMX its backward pass took a fifth of the fused kernel's time (SmolLM2-135M, 512 tokens). And each layer
may be checkpointed (Chen et al. 2016, arXiv:1604.06174): its activations are computed again in the backward pass, which
costs a third more time and holds one layer's activations instead of all.

Precision: "bfloat16" computes products in bfloat16 (autocast), norms, residuals and softmax in float32; weights are
kept in float32 and rounded as they enter a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lilliput import decoder
from lilliput.decoder import Decoder, Rope, attend_by_products, ropes
from lilliput.model import QuantizedModel, SourceModel

Precision = Literal["auto", "float32", "bfloat16"]


def fastest_precision(device: str) -> Literal["float32", "bfloat16"]:
    """bfloat16 where the processor multiplies it in hardware: on CUDA, and on CPUs with AMX or AVX-512-BF16."""
    if device != "cpu":
        return "bfloat16"
    able = torch.cpu.get_capabilities()
    return "bfloat16" if able.get("amx_bf16") or able.get("avx512_bf16") else "float32"


@contextmanager
def computing_in(precision: Literal["float32", "bfloat16"], device: str) -> Iterator[None]:
    """Products in that dtype."""
    with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=precision == "bfloat16"):
        yield


def final_hidden(model: Decoder, tokens: Tensor, *, checkpointing: bool = False) -> Tensor:
    """tokens (B, T) int from position 0 → hidden states after the last norm (B, T, hidden)."""
    steps = tokens.shape[1]
    h = model.embed(tokens, torch.arange(steps, device=tokens.device))
    for layer, rope in zip(model.layers, ropes(model.config, steps), strict=True):
        here: Rope = None if rope is None else (rope[0].to(tokens.device), rope[1].to(tokens.device))
        if checkpointing:
            h = checkpoint(layer, h, here, attend_by_products, use_reentrant=False)
        else:
            h = layer(h, here, attend_by_products)
    final: Tensor = model.norm(h)
    return final


def student_of(solved: QuantizedModel) -> Decoder:
    """The decoder with the solved model's weights, in memory of its own: they are written over."""
    weights = {name: solved.dequantized(name).copy() for name in solved.config.parameter_shapes()}
    return decoder.build(SourceModel(solved.name, solved.config, weights, solved.tokenizer, sha256="", origin=""))
