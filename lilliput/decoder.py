"""The generic causal decoder: one torch module that every supported family maps onto.

Pre-norm blocks, h += o(attention(norm(h))) then h += mlp(norm(h)), with either RMS or layer norm,
rotary or learned positions, grouped-query attention, gated or plain MLP, tied or own head; and what
DecoderConfig.features names: norms of q and k and behind the blocks, scales, windows, soft caps. Rotary
embedding is in half-split order (Su et al. 2021, arXiv:2104.09864; the order of transformers).

Attention with its cache is one custom operator, `lilliput::attention`, and so is the norm of heads before it,
`lilliput::head_norm`: exporters lower them as a whole. The cache is explicit and functional, so that a trace shows
it: (1, kv_heads, context, head_dim).

Others take parts of a layer: Attention.project (q, k, v as scores want them), `attend` or one's own product in its
place, and Layer.join (what becomes of attention's output).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.model import DecoderConfig, SourceModel
from lilliput.rope import inverse_frequencies

Rope = tuple[Tensor, Tensor] | None  # cos and sin, each (length, head_dim / 2); None: nothing rotates
# q (B, heads, T, D), k, v (B, kv_heads, C, D), visible (T, C) bool or None, scale, softcap → (B, heads, T, D)
Product = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, float], Tensor]


def rotary_tables(config: DecoderConfig, length: int, *, local: bool = False) -> tuple[Tensor, Tensor]:
    """cos and sin, each (length, head_dim / 2) float32, at positions 0 to length - 1, of the layers without a base of
    their own or (`local`) with it. What rotates is multiplied by the scaling's attention factor."""
    theta = config.rope_local_theta if local and config.rope_local_theta is not None else config.rope_theta
    scaling = None if local else config.rope_scaling
    inverse = inverse_frequencies(theta, config.head_dim, config.rope_dims, scaling)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None:
        rotating = slice(0, (config.rope_dims or config.head_dim) // 2)
        cos[:, rotating] *= scaling.attention_factor
        sin[:, rotating] *= scaling.attention_factor
    return cos, sin


def rope_tables(config: DecoderConfig, length: int) -> dict[str, Tensor]:
    """Every table that the attention nodes of a trace name, (length, head_dim / 2) float32."""
    rotations = {config.rotation(i) for i in range(config.num_layers)}
    names = {"global": ("rope.cos", "rope.sin"), "local": ("rope.local_cos", "rope.local_sin")}
    tables: dict[str, Tensor] = {}
    for rotation, pair in names.items():
        if rotation in rotations:
            tables |= dict(zip(pair, rotary_tables(config, length, local=rotation == "local"), strict=True))
    return tables


def layer_ropes(config: DecoderConfig, tables: dict[str, Tensor]) -> list[Rope]:
    """What each layer rotates by, of `rope_tables`."""
    pairs: dict[str | None, Rope] = {
        None: None,
        "global": (tables["rope.cos"], tables["rope.sin"]) if "rope.cos" in tables else None,
        "local": (tables["rope.local_cos"], tables["rope.local_sin"]) if "rope.local_cos" in tables else None,
    }
    return [pairs[config.rotation(i)] for i in range(config.num_layers)]


def ropes(config: DecoderConfig, length: int) -> list[Rope]:
    """What each layer rotates positions 0 to length - 1 by."""
    return layer_ropes(config, rope_tables(config, length))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (…, T, head_dim) by per-position tables (T, head_dim / 2), half-split."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def soft_capped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap); x itself where cap is 0."""
    return (x * (1 / cap)).tanh() * cap if cap else x


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, softcap: float) -> Tensor:
    """A `Product`: torch's fused kernel, or where scores have a soft cap, which it has not, plain products."""
    if softcap:
        return attend_by_products(q, k, v, visible, scale, softcap)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=k.shape[1] != q.shape[1])


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, softcap: float) -> Tensor:
    """A `Product` as matrix products, softmax in float32. It has a gradient under autocast."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = soft_capped((q * scale) @ k.transpose(-1, -2), softcap)
    if visible is not None:
        scores = scores + torch.zeros_like(visible, dtype=scores.dtype).masked_fill(~visible, -torch.inf)
    y: Tensor = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v
    return y


def seen_from(positions: Tensor, slots: int, window: int) -> Tensor:
    """(T, slots) bool: which slots the queries at `positions` (T,) see, of themselves and before."""
    slot, at = torch.arange(slots, device=positions.device), positions[:, None]
    return (slot <= at) & (slot > at - window) if window else slot <= at


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * D) → (B, heads, T, D)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, T, D) → (B, T, heads * D)."""
    return x.transpose(1, 2).flatten(2)


@torch.library.custom_op("lilliput::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor,
    num_heads: int, num_kv_heads: int, head_dim: int, scale: float, window: int, softcap: float,
    cos: Tensor | None = None, sin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The `attention` node of lilliput.model.Node, in plain torch."""
    q, k, v = split_heads(q, num_heads), split_heads(k, num_kv_heads), split_heads(v, num_kv_heads)
    if cos is not None and sin is not None:
        q, k = (rotate(x, cos[positions], sin[positions]) for x in (q, k))
    index = positions.to(torch.int64)
    k_cache, v_cache = k_cache.index_copy(2, index, k), v_cache.index_copy(2, index, v)
    visible = seen_from(positions, k_cache.shape[2], window)
    return merge_heads(attend(q, k_cache, v_cache, visible, scale, softcap)), k_cache, v_cache


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor,
    num_heads: int, num_kv_heads: int, head_dim: int, scale: float, window: int, softcap: float,
    cos: Tensor | None = None, sin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k_cache), torch.empty_like(v_cache)


@torch.library.custom_op("lilliput::head_norm", mutates_args=())
def head_norm(x: Tensor, weight: Tensor, eps: float, heads: int) -> Tensor:
    """The `head_norm` node of lilliput.model.Node: x (B, T, heads * D), weight (D,)."""
    return F.rms_norm(x.view(*x.shape[:2], heads, -1), weight.shape, weight, eps).view(x.shape)


@head_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, heads: int) -> Tensor:
    return torch.empty_like(x)


class Norm(nn.Module):
    """Of the hidden state, or (`size`) of a head."""

    def __init__(self, config: DecoderConfig, size: int | None = None) -> None:
        super().__init__()
        size = size or config.hidden_size
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if config.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale, self.window, self.softcap = config.score_scale, config.window(index), config.attention_softcap
        self.q = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=config.attention_bias)
        self.k = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=config.attention_bias)
        self.v = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=config.attention_bias)
        self.q_norm = Norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = Norm(config, self.head_dim) if config.qk_norm else None
        self.o = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.output_bias)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, heads, T, D), k and v (B, kv_heads, T, D) of x (B, T, hidden), normed and rotated; rope of its T
        positions."""
        q, k, v = split_heads(self.q(x), self.heads), split_heads(self.k(x), self.kv_heads), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q, k, split_heads(v, self.kv_heads)

    def forward(self, x: Tensor, rope: Rope, product: Product = attend) -> Tensor:
        """Attend within x (B, T, hidden) alone; rope holds cos and sin of its T positions."""
        visible = seen_from(torch.arange(x.shape[1], device=x.device), x.shape[1], self.window)
        y: Tensor = self.o(merge_heads(product(*self.project(x, rope), visible, self.scale, self.softcap)))
        return y

    def cached(
        self, x: Tensor, cache: tuple[Tensor, Tensor], positions: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend over the cache; rope holds cos and sin of every position."""
        cos, sin = rope or (None, None)
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q = head_norm(q, self.q_norm.weight, self.q_norm.eps, self.heads)
            k = head_norm(k, self.k_norm.weight, self.k_norm.eps, self.kv_heads)
        heads, how = (self.heads, self.kv_heads, self.head_dim), (self.scale, self.window, self.softcap)
        y, k_cache, v_cache = attention(q, k, v, *cache, positions, *heads, *how, cos, sin)
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
    """The layer of that index: layers differ in their windows."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = Norm(config), Attention(config, index)
        self.mlp_norm, self.mlp = Norm(config), MLP(config)
        self.attention_post_norm = Norm(config) if config.post_norms else None
        self.mlp_post_norm = Norm(config) if config.post_norms else None

    def join(self, h: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, of its input h and its attention's output."""
        h = h + (attended if self.attention_post_norm is None else self.attention_post_norm(attended))
        y: Tensor = self.mlp(self.mlp_norm(h))
        return h + (y if self.mlp_post_norm is None else self.mlp_post_norm(y))

    def forward(self, h: Tensor, rope: Rope, product: Product = attend) -> Tensor:
        return self.join(h, self.attention(self.attention_norm(h), rope, product))

    def cached(
        self, h: Tensor, cache: tuple[Tensor, Tensor], positions: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, k_cache, v_cache = self.attention.cached(self.attention_norm(h), cache, positions, rope)
        return self.join(h, y), k_cache, v_cache


class Decoder(nn.Module):
    """The decoder. Build it with `build(source)`; parameters are named as in lilliput.model, plus torch's `.weight`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = Norm(config)
        if not config.tied_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens (B, T) int at positions (T,) → (B, T, hidden)."""
        h: Tensor = self.embedding(tokens)
        if self.config.embedding_scale != 1:
            h = h * self.config.embedding_scale
        return h + self.position_embedding(positions) if self.config.positions == "learned" else h

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states after the last layer (…, hidden) → (…, vocab)."""
        weight = self.embedding.weight if self.config.tied_embeddings else self.head.weight
        return soft_capped(F.linear(self.norm(h), weight), self.config.logit_softcap)

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int from position 0 → hidden states after the last layer (B, T, hidden)."""
        steps = tokens.shape[1]
        h = self.embed(tokens, torch.arange(steps))
        for layer, rope in zip(self.layers, ropes(self.config, steps), strict=True):
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
