"""What a text encoder is beside its graph, for formats that name an architecture and hold no graph (GGUF's `bert`).

A traced network keeps of a table what its fixed shape reads. Here the tables are whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lilliput.grid import Float

Gives = Literal["mean", "first", "hidden", "logits"]
OUTPUTS: dict[Gives, str] = {"mean": "embedding", "first": "embedding", "hidden": "hidden_states", "logits": "logits"}


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """An encoder with norms behind its sums, learned positions and GELU or the like between two linear layers.

    `prefix` begins the names of its parameters in the network; what a classifier has behind it begins with `head`.
    """

    kind: str  # config.json's model_type
    prefix: str
    head: str
    layers: int
    heads: int
    hidden_size: int
    intermediate_size: int
    norm_eps: float
    activation: str  # as transformers names it
    gives: Gives
    positions: Float  # (most positions, hidden), the first that a text has first
    token_types: Float | None  # (types, hidden); row 0 is added to every token
    labels: tuple[str, ...]  # of a classifier
    tokenizer: Path  # a folder that transformers' AutoTokenizer opens
