"""The decoder's own values, layer by layer, in the order of computation: what a file's graph is held against.

embedded                        (T, hidden)
layers.i.attention_norm         (T, hidden)
layers.i.attention.q|k|v        (T, heads * head_dim)
layers.i.attention.q_rotated    (heads, T, head_dim), normed and rotated as scores take it; k_rotated likewise
layers.i.attention.scores       (heads, T, T), scaled and capped, before the mask
layers.i.attention.weights      (heads, T, T), the softmax over what each position sees
layers.i.attention.attended     (T, heads * head_dim), the input of o
layers.i.attention.o            (T, hidden)
layers.i.attention.added        (T, hidden), the hidden state behind the attention
layers.i.mlp_norm, .mlp.gate, .mlp.up, .mlp.inner (the input of down), .mlp.down, and layers.i: its output
norm, head                      (T, hidden), (T, vocab)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilliput import decoder
from lilliput.grid import Float
from lilliput.model import DecoderConfig, SourceModel

INPUTS = {"attention.o": "attention.attended", "mlp.down": "mlp.inner"}  # linears whose input has no other name


def input_of(parameter: str) -> str:
    """The value that a linear's input is, by the linear's parameter."""
    layer, _, name = parameter.rpartition(".attention.")
    if layer:
        return f"{layer}.attention.attended" if name == "o" else f"{layer}.attention_norm"
    layer, _, name = parameter.rpartition(".mlp.")
    if layer:
        return f"{layer}.mlp.inner" if name == "down" else f"{layer}.mlp_norm"
    return "norm"


def layer_of(value: str) -> str:
    """ "layers.3" of any of its values or parameters; else what stands before the first dot."""
    parts = value.split(".")
    if parts[0] == "layers":
        return ".".join(parts[:2])
    return {"embedded": "embedding", "norm": "head"}.get(parts[0], parts[0])


def decoder_values(config: DecoderConfig, weights: Mapping[str, Float], tokens: Sequence[int]) -> dict[str, Float]:
    """Every value of a forward pass over the tokens, float32, by name in the order of computation."""
    source = SourceModel("ladder", config, weights, tokenizer=Path(), sha256="", origin="")
    model, kept = decoder.build(source), dict[str, Tensor]()
    handles = [
        module.register_forward_hook(_keep(kept, name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | decoder.Norm | decoder.Layer)
    ]
    ids = torch.tensor([list(tokens)])
    with torch.inference_mode():
        h = kept["embedded"] = model.embed(ids, torch.arange(len(tokens)))
        for i, (layer, rope) in enumerate(zip(model.layers, decoder.ropes(config, len(tokens)), strict=True)):
            h = layer(h, rope, _product(kept, f"layers.{i}.attention"))
            kept[f"layers.{i}.attention.added"] = _added(kept, f"layers.{i}", config)
        kept["head"] = model.logits(h)
    for handle in handles:
        handle.remove()
    ordered = [name for name in _order(config) if name in kept]
    return {name: kept[name][0].numpy() for name in ordered}


def _keep(kept: dict[str, Tensor], name: str) -> Any:
    def hook(module: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
        layer, _, linear = name.partition(".attention." if ".attention." in name else ".mlp.")
        group = name[len(layer) + 1 :]
        if group in INPUTS:
            kept[f"{layer}.{INPUTS[group]}"] = given[0]
        if linear == "" and name.startswith("layers.") and name.count(".") == 1:
            kept[f"{name}.input"] = given[0]
        kept[name] = out

    return hook


def _added(kept: dict[str, Tensor], layer: str, config: DecoderConfig) -> Tensor:
    return (
        kept[f"{layer}.input"] + kept[f"{layer}.attention_post_norm" if config.post_norms else f"{layer}.attention.o"]
    )


def _product(kept: dict[str, Tensor], name: str) -> decoder.Product:
    """The decoder's product of attention, keeping what is inside."""

    def product(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, softcap: float) -> Tensor:
        kept[f"{name}.q_rotated"], kept[f"{name}.k_rotated"] = q, k
        group = q.shape[1] // k.shape[1]
        scores = decoder.soft_capped((q * scale) @ k.repeat_interleave(group, dim=1).transpose(-1, -2), softcap)
        kept[f"{name}.scores"] = scores
        hidden = torch.zeros_like(scores) if visible is None else torch.where(visible, 0.0, -torch.inf)
        kept[f"{name}.weights"] = torch.softmax(scores + hidden, dim=-1)
        return decoder.attend(q, k, v, visible, scale, softcap)

    return product


def _order(config: DecoderConfig) -> list[str]:
    attention = ["q", "k", "v", "q_norm", "k_norm", "q_rotated", "k_rotated", "scores", "weights", "attended", "o"]
    inside = ["attention_norm", *(f"attention.{n}" for n in attention), "attention_post_norm", "attention.added"]
    inside += ["mlp_norm", "mlp.gate", "mlp.up", "mlp.inner", "mlp.down", "mlp_post_norm"]
    layers = [n for i in range(config.num_layers) for n in (*(f"layers.{i}.{name}" for name in inside), f"layers.{i}")]
    return ["embedded", *layers, "norm", "head"]
