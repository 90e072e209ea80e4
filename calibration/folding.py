"""Folding: factors that move between an input's producer and the matrices that read it; the float model stays the same.

With y = W x and a positive factor s_j for each input j,

    y = Σ_j (W_j s_j) (x_j / s_j)          W' = W diag(s),  x' = x / s

x' needs no operator of its own where what makes x is linear in it (SmoothQuant, arXiv:2211.10438, section 4; AWQ,
arXiv:2306.00978, section 3.2). The decoder has these sites in every layer:

    site     made by (rows ÷ s)                    read by (columns × s)
    norm     attention_norm, and its bias          attention.q, k, v
             mlp_norm, and its bias                mlp.gate, up
    value    attention.v, and its bias             attention.o: attention mixes tokens, not channels. The query
                                                   heads of one KV head share its factors
    inner    mlp.up, and its bias                  mlp.down, where silu(gate) * up makes its input; behind a
                                                   plain MLP's GELU nothing can be folded
    final    norm, and its bias                    head, where it is not the embedding

What is known of x goes with it: second moments H' = H / (s sᵀ), the ends of its range / s. Nothing is stored twice:
a folded matrix is made when it is asked for. A site is folded only where the rules of all its readers name the same
transforms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from calibration.base import InputStatistics
from lilliput.grid import Float
from lilliput.model import DecoderConfig

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Site:
    """One input: the parameters whose rows are divided, the matrices whose columns are multiplied."""

    divided: tuple[str, ...]
    readers: tuple[str, ...]
    shared: Indices  # (cols,): the row of the divided parameters that makes each column


def sites(config: DecoderConfig) -> list[Site]:
    """Every input of the decoder that factors can be folded into, in the order of computation."""
    found = [site for i in range(config.num_layers) for site in _layer_sites(config, f"layers.{i}.")]
    head = () if config.tied_embeddings else (_site(config, "norm", ("head",)),)
    return [*found, *head]


def _layer_sites(config: DecoderConfig, layer: str) -> Iterator[Site]:
    yield _site(config, f"{layer}attention_norm", tuple(f"{layer}attention.{name}" for name in "qkv"))
    yield _site(config, f"{layer}attention.v", (f"{layer}attention.o",), _value_rows(config))
    gate = (f"{layer}mlp.gate",) if config.gated_mlp else ()
    yield _site(config, f"{layer}mlp_norm", (*gate, f"{layer}mlp.up"))
    if config.gated_mlp:
        yield _site(config, f"{layer}mlp.up", (f"{layer}mlp.down",))


def _site(config: DecoderConfig, producer: str, readers: tuple[str, ...], shared: Indices | None = None) -> Site:
    shapes = config.parameter_shapes()
    divided = tuple(name for name in (producer, f"{producer}.bias") if name in shapes)
    return Site(divided, readers, np.arange(shapes[readers[0]][1]) if shared is None else shared)


def _value_rows(config: DecoderConfig) -> Indices:
    """(heads * head_dim,): the row of v behind each column of o."""
    heads = np.arange(config.num_heads) // (config.num_heads // config.num_kv_heads)
    rows: Indices = (heads[:, None] * config.head_dim + np.arange(config.head_dim)).reshape(-1)
    return rows


@dataclass(frozen=True, eq=False)
class Folds:
    """What parameters are multiplied and divided by, both float32; those that are not in it stay."""

    columns: Mapping[str, Float] = field(default_factory=dict)  # matrix → (cols,)
    rows: Mapping[str, Float] = field(default_factory=dict)  # parameter → (rows,)


def folds(chosen: list[tuple[Site, Float]]) -> Folds:
    """Of every site's factors (n,)."""
    columns = {name: factors[site.shared] for site, factors in chosen for name in site.readers}
    rows = {name: factors for site, factors in chosen for name in site.divided}
    return Folds(columns, rows)


def fold_moments(found: InputStatistics, factors: Float) -> InputStatistics:
    """Statistics of x / factors (cols,)."""
    moments = found.second_moments / factors / factors[:, None]
    return InputStatistics(moments, found.minimum / factors, found.maximum / factors, found.count)


class FoldedWeights(Mapping[str, Float]):
    """The parameters of the folded model, each made when asked for."""

    def __init__(self, weights: Mapping[str, Float], made: Folds) -> None:
        self._weights, self._folds = weights, made

    def __getitem__(self, name: str) -> Float:
        weight = self._weights[name]
        if (rows := self._folds.rows.get(name)) is not None:
            weight = weight / rows.reshape(-1, *[1] * (weight.ndim - 1))
        if (columns := self._folds.columns.get(name)) is not None:
            weight = weight * columns
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class FoldedStatistics(Mapping[str, InputStatistics]):
    """The statistics of the folded model's inputs, each made when asked for."""

    def __init__(self, statistics: Mapping[str, InputStatistics], made: Folds) -> None:
        self._statistics, self._folds = statistics, made

    def __getitem__(self, name: str) -> InputStatistics:
        found, columns = self._statistics[name], self._folds.columns.get(name)
        return found if columns is None else fold_moments(found, columns)

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)
