"""The generic causal decoder: one torch module that every supported family maps onto.

Pre-norm blocks, h += o(attention(norm(h))) then h += mlp(norm(h)), with either RMS or layer norm,
rotary or learned positions, grouped-query attention, gated or plain MLP, tied or own head. Rotary
embedding is in half-split order (Su et al. 2021, arXiv:2104.09864; the order of transformers).

Attention with its cache is one custom operator, `lilliput::attention`: exporters lower it as a whole.
Its cache is explicit and functional, so that a trace shows it: (1, kv_heads, context, head_dim).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.model import DecoderConfig, SourceModel


def rotary_tables(config: DecoderConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each (length, head_dim / 2) float32, at positions 0 to length - 1."""
    half = config.head_dim // 2
    inverse = 1.0 / config.rope_theta ** (torch.arange(half, dtype=torch.float32) * 2 / config.head_dim)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (…, T, head_dim) by per-position tables (T, head_dim / 2), half-split."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Causal attention of q (B, heads, T, D) at `positions` (T,) over k, v (B, kv_heads, C, D) → (B, T, heads * D)."""
    batch, heads, steps, dim = q.shape
    visible = torch.arange(k.shape[2]) <= positions[:, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=k.shape[1] != heads)
    return y.transpose(1, 2).reshape(batch, steps, heads * dim)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * D) → (B, heads, T, D)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


@torch.library.custom_op("lilliput::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor,
    num_heads: int, num_kv_heads: int, head_dim: int, cos: Tensor | None = None, sin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The `attention` node of lilliput.model.Node, in plain torch."""
    q, k, v = split_heads(q, num_heads), split_heads(k, num_kv_heads), split_heads(v, num_kv_heads)
    if cos is not None and sin is not None:
        q, k = (rotate(x, cos[positions], sin[positions]) for x in (q, k))
    index = positions.to(torch.int64)
    k_cache, v_cache = k_cache.index_copy(2, index, k), v_cache.index_copy(2, index, v)
    return attend(q, k_cache, v_cache, positions), k_cache, v_cache


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor,
    num_heads: int, num_kv_heads: int, head_dim: int, cos: Tensor | None = None, sin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k_cache), torch.empty_like(v_cache)


class Norm(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if config.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=config.attention_bias)
        self.k = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=config.attention_bias)
        self.v = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=config.attention_bias)
        self.o = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attend within x (B, T, hidden) alone; rope holds cos and sin of its T positions."""
        q, k, v = (
            split_heads(self.q(x), self.heads),
            split_heads(self.k(x), self.kv_heads),
            split_heads(self.v(x), self.kv_heads),
        )
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y: Tensor = self.o(attend(q, k, v, torch.arange(x.shape[1])))
        return y

    def cached(
        self, x: Tensor, cache: tuple[Tensor, Tensor], positions: Tensor, tables: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend over the cache; tables hold cos and sin of every position."""
        cos, sin = tables or (None, None)
        y, k_cache, v_cache = attention(
            self.q(x), self.k(x), self.v(x), *cache, positions, self.heads, self.kv_heads, self.head_dim, cos, sin
        )
        return self.o(y), k_cache, v_cache


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.activation = config.activation
        if config.gated_mlp:
            self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.gate(x) if hasattr(self, "gate") else self.up(x)
        inner = F.silu(inner) if self.activation == "silu" else F.gelu(inner, approximate="tanh")
        y: Tensor = self.down(inner * self.up(x) if hasattr(self, "gate") else inner)
        return y


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm, self.attention = Norm(config), Attention(config)
        self.mlp_norm, self.mlp = Norm(config), MLP(config)

    def forward(self, h: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        h = h + self.attention(self.attention_norm(h), rope)
        y: Tensor = h + self.mlp(self.mlp_norm(h))
        return y

    def cached(
        self, h: Tensor, cache: tuple[Tensor, Tensor], positions: Tensor, tables: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, k_cache, v_cache = self.attention.cached(self.attention_norm(h), cache, positions, tables)
        h = h + y
        return h + self.mlp(self.mlp_norm(h)), k_cache, v_cache


class Decoder(nn.Module):
    """The decoder. Build it with `build(source)`; parameters are named as in lilliput.model, plus torch's `.weight`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = Norm(config)
        if not config.tied_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens (B, T) int at positions (T,) → (B, T, hidden)."""
        h: Tensor = self.embedding(tokens)
        return h + self.position_embedding(positions) if self.config.positions == "learned" else h

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states after the last layer (…, hidden) → (…, vocab)."""
        weight = self.embedding.weight if self.config.tied_embeddings else self.head.weight
        return F.linear(self.norm(h), weight)

    def rope(self, length: int) -> tuple[Tensor, Tensor] | None:
        return rotary_tables(self.config, length) if self.config.positions == "rope" else None

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int from position 0 → hidden states after the last layer (B, T, hidden)."""
        steps = tokens.shape[1]
        h, rope = self.embed(tokens, torch.arange(steps)), self.rope(steps)
        for layer in self.layers:
            h = layer(h, rope)
        return h

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int from position 0 → logits (B, T, vocab)."""
        return self.logits(self.hidden(tokens))


def torch_name(name: str) -> str:
    """A parameter's name in the torch module: bare names of lilliput.model carry `.weight` there."""
    return name if name.endswith(".bias") else f"{name}.weight"


def build(source: SourceModel) -> Decoder:
    """The decoder with the source's float32 weights, in eval mode. Memory: the weights once."""
    with torch.device("meta"):
        decoder = Decoder(source.config)
    names = source.config.parameter_shapes()
    state = {torch_name(name): torch.from_numpy(np.require(source.weights[name], requirements="W")) for name in names}
    decoder.load_state_dict(state, assign=True)
    return decoder.eval().requires_grad_(False)
