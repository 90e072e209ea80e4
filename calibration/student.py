"""The decoder in training: its forward pass with a gradient, on tensors that an optimizer moves.

It is lilliput.decoder's own modules and arithmetic; two things are its own. Attention is written as matrix products:
on a CPU with AMX its backward pass took a fifth of the fused kernel's time (SmolLM2-135M, 512 tokens). And each layer
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

from lilliput.decoder import Attention, Decoder, Layer, rotate, split_heads

Precision = Literal["auto", "float32", "bfloat16"]
Rope = tuple[Tensor, Tensor] | None


def fastest_precision(device: str) -> Literal["float32", "bfloat16"]:
    """bfloat16 where the processor multiplies it in hardware: on CUDA, and on CPUs with AMX."""
    if device != "cpu":
        return "bfloat16"
    return "bfloat16" if torch.cpu.get_capabilities().get("amx_bf16") else "float32"


@contextmanager
def computing_in(precision: Literal["float32", "bfloat16"], device: str) -> Iterator[None]:
    """Products in that dtype."""
    with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=precision == "bfloat16"):
        yield


def final_hidden(decoder: Decoder, tokens: Tensor, *, checkpointing: bool = False) -> Tensor:
    """tokens (B, T) int from position 0 → hidden states after the last norm (B, T, hidden)."""
    steps = tokens.shape[1]
    rope = decoder.rope(steps)
    if rope is not None:
        rope = rope[0].to(tokens.device), rope[1].to(tokens.device)
    h = decoder.embed(tokens, torch.arange(steps, device=tokens.device))
    for layer in decoder.layers:
        assert isinstance(layer, Layer)
        h = checkpoint(_layer, layer, h, rope, use_reentrant=False) if checkpointing else _layer(layer, h, rope)
    final: Tensor = decoder.norm(h)
    return final


def _layer(layer: Layer, h: Tensor, rope: Rope) -> Tensor:
    h = h + _attention(layer.attention, layer.attention_norm(h), rope)
    y: Tensor = h + layer.mlp(layer.mlp_norm(h))
    return y


def _attention(block: Attention, x: Tensor, rope: Rope) -> Tensor:
    """lilliput.decoder's attention within x (B, T, hidden), as plain products."""
    q, k = split_heads(block.q(x), block.heads), split_heads(block.k(x), block.kv_heads)
    v = split_heads(block.v(x), block.kv_heads)
    if rope is not None:
        q, k = rotate(q, *rope).to(v.dtype), rotate(k, *rope).to(v.dtype)
    group = block.heads // block.kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    steps = x.shape[1]
    future = torch.full((steps, steps), -torch.inf, dtype=v.dtype, device=x.device).triu(1)
    scores = (q * block.head_dim**-0.5) @ k.transpose(-1, -2) + future
    probability = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    y: Tensor = block.o((probability @ v).transpose(1, 2).flatten(2))
    return y
