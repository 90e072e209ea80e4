"""Which Hugging Face modules are a TextEncoder: BERT, RoBERTa and XLM-RoBERTa.

They differ in the first position of a text, which RoBERTa and its like count from padding_idx + 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lilliput.grid import Float
from lilliput.network.encoder import Gives, TextEncoder

KINDS = ("bert", "roberta", "xlm-roberta")


def describe(model: nn.Module, gives: Gives, first_position: int, tokenizer: Path, within: str) -> TextEncoder | None:
    """`within` is the path of `model` in the traced module. None for a model of another kind, or with other parts."""
    config: Any = model.config
    kind = str(config.model_type)
    plain = getattr(config, "position_embedding_type", "absolute") == "absolute" and not config.is_decoder
    if kind not in KINDS or not plain:
        return None
    name: str = model.base_model_prefix  # type: ignore[assignment]
    base: Any = getattr(model, name, model)
    embeddings = base.embeddings
    types = getattr(embeddings, "token_type_embeddings", None)
    return TextEncoder(
        kind=kind, prefix=f"{within}." if base is model else f"{within}.{name}.", head=f"{within}.",
        layers=config.num_hidden_layers, heads=config.num_attention_heads, hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        norm_eps=float(config.layer_norm_eps), activation=str(config.hidden_act),
        gives=gives, positions=_array(embeddings.position_embeddings.weight[first_position:]),
        token_types=None if types is None else _array(types.weight),
        labels=tuple(config.id2label[i] for i in range(config.num_labels)) if gives == "logits" else (),
        tokenizer=tokenizer,
    )  # fmt: skip


def _array(weight: Tensor) -> Float:
    array: Float = weight.detach().float().numpy().copy()
    return array
