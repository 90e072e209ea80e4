"""Rotary frequencies: what a checkpoint's rope_scaling does to θ^(-2i/d), i < d/2, and what multiplies cos and sin.

    linear      every frequency / factor
    llama3      (Llama 3.1) wavelengths above original / low_freq_factor are divided by `factor`, those below
                original / high_freq_factor stay, between them the two are mixed
    yarn        (Peng et al. 2023, arXiv:2309.00071) dimensions that turn less than beta_slow times within the original
                positions are divided by `factor`, those that turn more than beta_fast times stay, a ramp between;
                cos and sin times attention_factor
    longrope    (Ding et al. 2024, arXiv:2402.13753) dimension i / divisors[i]; cos and sin times attention_factor

Read from config.json as transformers reads it (modeling_rope_utils.py, 4.57). Two kinds depend on the sequence's
length there, which a cache of rotated keys cannot follow: `dynamic` changes nothing up to max_position_embeddings, and
longrope has a second table past the original positions. Both are exact up to there, and the model is given no more
positions than that.

The arithmetic is torch's in float32, operation by operation as transformers does it: at position 100,000 the last bit
of a frequency is a hundredth of a radian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from lilliput.errors import SourceError

if TYPE_CHECKING:
    from torch import Tensor

GGUF_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
YARN_BETAS = (32.0, 1.0)  # the paper's


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies differ from the plain ones; fields that its kind does not name above are as by default."""

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = YARN_BETAS[0]
    beta_slow: float = YARN_BETAS[1]
    truncate: bool = True
    divisors: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "divisors", tuple(self.divisors))  # a list, from JSON


def inverse_frequencies(theta: float, head_dim: int, dims: int, scaling: RopeScaling | None) -> Tensor:
    """(head_dim / 2,) float32, radians a position. Of `dims` dimensions that rotate (0: all); the rest has 0."""
    import torch

    rotating = dims or head_dim
    powers = theta ** (torch.arange(0, rotating, 2, dtype=torch.int64).to(torch.float32) / rotating)
    found = _scaled(powers, theta, rotating, scaling)
    return torch.cat([found, torch.zeros(head_dim // 2 - len(found))])


def _scaled(powers: Tensor, theta: float, dims: int, scaling: RopeScaling | None) -> Tensor:
    import torch

    if scaling is None:
        return 1.0 / powers
    if scaling.kind == "linear":
        return 1.0 / powers / scaling.factor
    if scaling.kind == "longrope":
        return 1.0 / (torch.tensor(scaling.divisors, dtype=torch.float32) * powers)
    return _llama3(1.0 / powers, scaling) if scaling.kind == "llama3" else _yarn(powers, theta, dims, scaling)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    import torch

    original, low, high = scaling.original_positions, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / plain
    slow = torch.where(wavelengths > original / low, plain / scaling.factor, plain)
    share = (original / wavelengths - low) / (high - low)
    mixed = (1 - share) * slow / scaling.factor + share * slow
    between = ~(wavelengths < original / high) & ~(wavelengths > original / low)
    return torch.where(between, mixed, slow)


def _yarn(powers: Tensor, theta: float, dims: int, scaling: RopeScaling) -> Tensor:
    import torch

    def turning(times: float) -> float:
        """The dimension that turns so often within the original positions."""
        return dims * math.log(scaling.original_positions / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turning(scaling.beta_fast), turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    width = high - low or 0.001
    kept = 1 - ((torch.arange(dims // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


def full_order(head_dim: int, dims: int) -> npt.NDArray[np.intp]:
    """(head_dim,): order[i] is the row of a checkpoint's head that stands at row i here, where its first `dims` rotate.

    Their two halves begin the two halves of the head, so that the rest pairs up to be turned by 0. Scores stay: q and
    k are reordered alike.
    """
    half, rest = dims // 2, (head_dim - dims) // 2
    own = np.arange(head_dim, dtype=np.intp)
    return np.concatenate([own[:half], own[dims : dims + rest], own[half:dims], own[dims + rest :]])


@dataclass(frozen=True)
class Rope:
    """What config.json says of positions."""

    theta: float
    scaling: RopeScaling | None
    max_positions: int  # for which this is exact


def from_config(hf: Mapping[str, Any], where: str = "config.json") -> Rope:
    """Read rope_theta and rope_scaling (`rope_parameters`, its newer name, holds both).

    Raises SourceError for a kind that is not known, and for numbers that its kind lacks.
    """
    fields = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = fields.get("rope_theta", hf.get("rope_theta"))
    theta = 10000.0 if theta is None else float(theta)
    positions = int(hf["max_position_embeddings"])
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in KINDS:
        raise SourceError(f"{where}: rope_scaling {kind!r} is not supported: known: {', '.join(KINDS)}")
    if kind in ("default", "dynamic"):
        return Rope(theta, None, positions)
    if kind == "longrope":
        return _longrope(hf, fields, theta, where)
    factor = _number(fields, "factor", where)
    if kind == "linear":
        return Rope(theta, RopeScaling("linear", factor), positions)
    original = int(fields.get("original_max_position_embeddings") or positions)
    if kind == "yarn":
        return Rope(theta, _yarn_scaling(fields, factor, original), positions)
    original = int(_number(fields, "original_max_position_embeddings", where))
    low, high = (_number(fields, key, where) for key in ("low_freq_factor", "high_freq_factor"))
    if not low < high:
        raise SourceError(f"{where}: rope_scaling low_freq_factor {low} is not below high_freq_factor {high}")
    return Rope(theta, RopeScaling("llama3", factor, original, low, high), positions)


def gguf_factors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Of a GGUF reader's tensors, by name, those that divide frequencies: fields for `from_gguf`."""
    return {name: tensors[name].data.tolist() for name in GGUF_FACTORS if name in tensors}


def from_gguf(fields: Mapping[str, Any], where: str = "GGUF metadata") -> Rope:
    """Read `rope.*` of a GGUF file, and its tensors of factors where `fields` has them under their names.

    As llama.cpp reads them (llama-model.cpp): yarn's attention factor is 1 + 0.1 ln(factor), times attn_factor; a
    file with short and long factors takes the short ones up to original_context_length.
    """
    theta, positions = float(fields.get("rope.freq_base", 10000.0)), int(fields["context_length"])
    kind = fields.get("rope.scaling.type") or "linear"
    factor = float(fields.get("rope.scaling.factor") or fields.get("rope.scale_linear") or 1.0)
    attention = float(fields.get("rope.scaling.attn_factor") or 1.0)
    original = int(fields.get("rope.scaling.original_context_length") or positions)
    short = fields.get("rope_factors_short.weight")
    divisors = fields.get("rope_freqs.weight") if short is None else short
    if kind not in ("none", "linear", "yarn", "longrope") or (divisors is not None and factor != 1):
        raise SourceError(f"{where}: rope.scaling.type {kind!r}, factor {factor} is not supported beside these tensors")
    if divisors is not None:
        scaling = RopeScaling("longrope", divisors=tuple(map(float, divisors)), attention_factor=attention)
        return Rope(theta, scaling, positions if short is None else original)
    if kind == "yarn" and factor != 1:
        betas = (
            float(fields.get(f"rope.scaling.yarn_beta_{n}") or YARN_BETAS[i]) for i, n in enumerate(("fast", "slow"))
        )
        fast, slow = betas
        magnitude = attention * (0.1 * math.log(factor) + 1.0)
        scaling = RopeScaling("yarn", factor, original, beta_fast=fast, beta_slow=slow, attention_factor=magnitude)
        return Rope(theta, scaling, positions)
    if attention != 1:
        raise SourceError(f"{where}: rope.scaling.attn_factor {attention} is not supported beside {kind!r}")
    return Rope(theta, None if kind == "none" or factor == 1 else RopeScaling("linear", factor), positions)


def _number(fields: Mapping[str, Any], key: str, where: str) -> float:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise SourceError(f"{where}: rope_scaling {key} is {value!r}, wanted a positive number")
    return float(value)


def _yarn_scaling(fields: Mapping[str, Any], factor: float, original: int) -> RopeScaling:
    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention, both = fields.get("attention_factor"), (fields.get("mscale"), fields.get("mscale_all_dim"))
    if attention is None:
        attention = magnitude(both[0]) / magnitude(both[1]) if both[0] and both[1] else magnitude(1.0)
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=float(fields.get("beta_fast") or YARN_BETAS[0]),
        beta_slow=float(fields.get("beta_slow") or YARN_BETAS[1]),
        truncate=bool(fields.get("truncate", True)),
        attention_factor=float(attention),
    )


def _longrope(hf: Mapping[str, Any], fields: Mapping[str, Any], theta: float, where: str) -> Rope:
    positions = int(hf["max_position_embeddings"])
    original = int(hf.get("original_max_position_embeddings") or positions)
    divisors = fields.get("short_factor")
    if not isinstance(divisors, list) or not all(isinstance(d, int | float) and d > 0 for d in divisors):
        raise SourceError(f"{where}: rope_scaling short_factor is {divisors!r}, wanted a list of positive numbers")
    attention = fields.get("attention_factor")
    if attention is None:
        stretch = positions / original if "original_max_position_embeddings" in hf else _number(fields, "factor", where)
        attention = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    scaling = RopeScaling("longrope", divisors=tuple(map(float, divisors)), attention_factor=float(attention))
    return Rope(theta, scaling, original)
