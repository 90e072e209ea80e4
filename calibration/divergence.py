"""Mean KLD of a model with some matrices quantized, measured on samples: both models go side by side, layer by layer.

Memory: one layer of each, and the hidden states of the samples twice; logits a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from calibration.samples import Samples
from calibration.statistics import batches, embed, load_part
from lilliput.decoder import Layer, Norm, ropes, soft_capped
from lilliput.grid import Float, QuantizedTensor
from lilliput.model import SourceModel

SLAB = 1 << 22  # logits at a time


class Changed(Mapping[str, Float]):
    """A model's weights, those on a grid in place of their float ones."""

    def __init__(self, weights: Mapping[str, Float], quantized: Mapping[str, QuantizedTensor]) -> None:
        self._weights, self._quantized = weights, quantized

    def __getitem__(self, name: str) -> Float:
        return self._quantized[name].dequantize() if name in self._quantized else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@torch.inference_mode()
def divergence(source: SourceModel, quantized: Mapping[str, QuantizedTensor], samples: Samples) -> float:
    """Mean over all positions of KLD(float ‖ quantized), nats a token."""
    changed = SourceModel(
        source.name, source.config, Changed(source.weights, quantized), source.tokenizer, source.sha256, source.origin
    )
    config = source.config
    sides = [(model, embed(model, samples)) for model in (source, changed)]
    for i, rope in enumerate(ropes(config, samples.tokens.shape[1])):
        for model, hidden in sides:
            with torch.device("meta"):
                layer = Layer(config, i)
            load_part(layer, model, f"layers.{i}.")
            for batch in batches(hidden):
                batch.copy_(layer(batch, rope))
    (p_head, p_hidden), (q_head, q_hidden) = (_head(model, hidden) for model, hidden in sides)
    step, total = max(1, SLAB // config.vocab_size), 0.0
    for p_rows, q_rows in zip(torch.split(p_hidden, step), torch.split(q_hidden, step), strict=True):
        logits = F.linear(p_rows, p_head), F.linear(q_rows, q_head)
        p, q = (soft_capped(rows, config.logit_softcap).log_softmax(-1) for rows in logits)
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return total / len(p_hidden)


def _head(model: SourceModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The head's matrix, and its inputs (tokens, hidden)."""
    norm = load_part(Norm(model.config), model, "norm.")
    weight = model.weights["embedding" if model.config.tied_embeddings else "head"]
    return torch.from_numpy(np.require(weight, requirements="W")), norm(hidden.flatten(0, 1))
