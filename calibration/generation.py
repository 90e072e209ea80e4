"""Self-generated samples: text sampled from the float model itself, so that calibration needs no data.

What the model writes lies where its activations lie (LLM-QAT, Liu et al. 2023, arXiv:2305.17888). Every
sample starts from one token of its own, drawn from the vocabulary, so that the samples differ in language
and kind; the rest follows at a temperature. All samples run as one batch, one token a step: a step reads
each weight once for all of them.

Memory: the weights, and the caches of one batch, 2 * layers * (batch, kv_heads, length, head_dim) float32. A batch is
as large as a quarter of the weights' bytes allows, and CACHE_BYTES at most: so a process that samples stays below
twice the weights. (SmolLM2-135M: 5 samples of 512 tokens; a model of a billion parameters: some 30.)

A token is drawn by the inverse of the distribution function: one uniform number and one cumulative sum a
sample, nine times faster than torch.multinomial over a vocabulary of 49,152.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lilliput.decoder import Attention, Decoder, Layer, Rope, attend, ropes
from lilliput.model import DecoderConfig
from lilliput.progress import Progress, silent

CACHE_BYTES = 5 << 28
FLOAT32_BYTES = 4

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `top_k` 0 keeps the whole vocabulary."""

    count: int
    length: int
    seed: int
    temperature: float
    top_k: int
    first_tokens: tuple[int, ...]  # every sample starts with these
    banned: tuple[int, ...]  # never drawn as a sample's own first token


def generate(decoder: Decoder, sampling: Sampling, progress: Progress = silent) -> Tokens:
    """(count, length) int32. The same decoder, sampling and number of threads give the same tokens."""
    config = decoder.config
    batch = batch_size(config, sampling)
    batches = -(-sampling.count // batch)
    generator = torch.Generator().manual_seed(sampling.seed)
    starts = _starts(config.vocab_size, sampling, generator)
    tokens, total = np.empty((sampling.count, sampling.length), np.int32), batches * sampling.length
    for index, begin in enumerate(range(0, sampling.count, batch)):
        steps = _generate(decoder, starts[begin : begin + batch], sampling, generator)
        for position, column in enumerate(steps):
            tokens[begin : begin + batch, position] = column  # copied: kept tensors would split the heap's free blocks
            progress(index * sampling.length + position + 1, total)
    return tokens


def batch_size(config: DecoderConfig, sampling: Sampling) -> int:
    """Samples that run together: as even as their caches' limit allows."""
    per_sample = FLOAT32_BYTES * 2 * config.num_layers * config.num_kv_heads * config.head_dim * sampling.length
    weights_bytes = FLOAT32_BYTES * sum(math.prod(shape) for shape in config.parameter_shapes().values())
    fitting = max(1, min(CACHE_BYTES, weights_bytes // 4) // per_sample)
    return -(-sampling.count // -(-sampling.count // fitting))


def _starts(vocab_size: int, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """(count, prefix + 1) int64: the common first tokens, then one token of the vocabulary a sample, all different."""
    allowed = torch.ones(vocab_size)
    allowed[list(sampling.banned)] = 0
    own = torch.multinomial(
        allowed, sampling.count, replacement=sampling.count > int(allowed.sum()), generator=generator
    )
    prefix = torch.tensor(sampling.first_tokens, dtype=torch.int64).expand(sampling.count, -1)
    return torch.cat([prefix, own[:, None]], dim=1)[:, : sampling.length]


@torch.inference_mode()
def _generate(decoder: Decoder, starts: Tensor, sampling: Sampling, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the samples' tokens position by position, each (batch,) int64."""
    config, batch = decoder.config, len(starts)
    shape = (config.num_layers, 2, batch, config.num_kv_heads, sampling.length, config.head_dim)
    caches, tables = torch.empty(shape), ropes(config, sampling.length)
    token = starts[:, 0]
    for position in range(sampling.length):
        yield token
        at = torch.tensor([position])
        h = decoder.embed(token[:, None], at)
        for layer, cache, rope in zip(decoder.layers, caches, tables, strict=True):
            assert isinstance(layer, Layer)
            h = layer.join(h, _attend(layer.attention, layer.attention_norm(h), cache, position, rope))
        if position + 1 < starts.shape[1]:
            token = starts[:, position + 1]
        else:
            token = _draw(decoder.logits(h[:, 0]), sampling, generator)


def _attend(attention: Attention, x: Tensor, cache: Tensor, position: int, rope: Rope) -> Tensor:
    """One position x (B, 1, hidden) against its cache (2, B, kv_heads, length, head_dim), which it is written into.

    The query heads that share a key head are its queries: no mask, and nothing is repeated.
    """
    here = None if rope is None else (rope[0][position : position + 1], rope[1][position : position + 1])
    q, k, v = attention.project(x, here)
    cache[0, :, :, position], cache[1, :, :, position] = k[:, :, 0], v[:, :, 0]
    q = q.reshape(len(x), attention.kv_heads, -1, attention.head_dim)
    first = max(0, position + 1 - attention.window) if attention.window else 0
    seen = cache[:, :, :, first : position + 1]
    y = attend(q, seen[0], seen[1], None, attention.scale, attention.softcap)
    out: Tensor = attention.o(y.reshape(len(x), 1, -1))
    return out


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """(B, vocab) → (B,) int64."""
    scaled = logits / sampling.temperature
    if not sampling.top_k:
        return _inverse(scaled, generator)[:, 0]
    values, ids = scaled.topk(min(sampling.top_k, scaled.shape[1]), dim=-1)
    return ids.gather(1, _inverse(values, generator))[:, 0]


def _inverse(scaled: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from softmax(scaled), scaled (B, n) → indices (B, 1) int64."""
    distribution = scaled.softmax(-1).cumsum_(-1)
    uniform = torch.rand(len(scaled), 1, generator=generator) * distribution[:, -1:]
    return torch.searchsorted(distribution, uniform, right=True).clamp_(max=scaled.shape[1] - 1)
