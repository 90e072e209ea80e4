"""Model families: each module maps one family of checkpoints onto the generic decoder.

A family module offers, for Hugging Face folders and for GGUF files,

    ARCHITECTURES: tuple[str, ...]                       config.json's `architectures` that it reads
    UNUSED: re.Pattern                                   checkpoint tensors that are no parameters (masks, tables)
    def config(hf) -> DecoderConfig                      which config field means what
    def weights(config, read, names) -> Iterator[(name, array)]    which checkpoint weight goes where

    GGUF_ARCHITECTURE: str                               `general.architecture` that it reads
    def gguf_config(fields, shapes) -> DecoderConfig     which metadata key means what (keys without the prefix; the
                                                         tensors of lilliput.rope.GGUF_FACTORS are there as lists)
    def gguf_weights(config, read) -> Iterator[(name, array)]

`read(name)` gives a checkpoint tensor as float32, `names` is the set of tensors that there are, `shapes`
their shapes. `weights` must not look at the numbers: shapes are checked first on arrays without any. The
folder is the registry.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from lilliput.errors import SourceError, did_you_mean
from lilliput.grid import Float
from lilliput.model import DecoderConfig

LAYER_KINDS = ("full_attention", "sliding_attention")
Read = Callable[[str], Float]
Shapes = Mapping[str, tuple[int, ...]]


class Family(Protocol):
    """What a family module offers."""

    ARCHITECTURES: tuple[str, ...]
    UNUSED: re.Pattern[str]
    GGUF_ARCHITECTURE: str

    def config(self, hf: Mapping[str, Any]) -> DecoderConfig: ...

    def weights(self, config: DecoderConfig, read: Read, names: frozenset[str]) -> Iterator[tuple[str, Float]]: ...

    # only of families that are read from GGUF files

    def gguf_config(self, fields: Mapping[str, Any], shapes: Shapes) -> DecoderConfig: ...

    def gguf_weights(self, config: DecoderConfig, read: Read) -> Iterator[tuple[str, Float]]: ...


def known() -> tuple[str, ...]:
    """The names of the families that there are."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> Family:
    """The family module of that name (one of `known()`)."""
    return importlib.import_module(f"{__name__}.{name}")


def family_of(hf: Mapping[str, Any]) -> tuple[str, Family]:
    """The family that reads this config.json. Raises SourceError naming the supported architectures."""
    wanted = (hf.get("architectures") or ["(none named)"])[0]
    families = {name: load(name) for name in known()}
    for name, family in families.items():
        if wanted in family.ARCHITECTURES:
            return name, family
    supported = [a for family in families.values() for a in family.ARCHITECTURES]
    raise SourceError(f"architecture {wanted!r} is not supported: {did_you_mean(wanted, supported)}")


def gguf_family_of(architecture: str) -> Family:
    """The family that reads GGUF files of that `general.architecture`. Raises SourceError naming the known ones."""
    readers = [family for family in map(load, known()) if hasattr(family, "GGUF_ARCHITECTURE")]
    families = {family.GGUF_ARCHITECTURE: family for family in readers}
    if architecture not in families:
        raise SourceError(
            f"GGUF architecture {architecture!r} is not supported: {did_you_mean(architecture, families)}"
        )
    return families[architecture]


def require(fields: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    """Raise SourceError naming the keys that `fields` (config.json, GGUF metadata: `where`) lacks, or that hold no
    positive number."""
    wanted = tuple(keys)
    absent = [key for key in wanted if fields.get(key) is None]
    if absent:
        raise SourceError(f"{where} has no {', '.join(map(repr, absent))}: the file is incomplete, get it anew")
    for key in wanted:
        value = fields[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise SourceError(
                f"{where}: {key} is {value!r}, wanted a positive number: the file is damaged, or not ours"
            )


def windows(kinds: Iterable[str], window: int | None, positions: int | None = None) -> tuple[int, ...]:
    """DecoderConfig.windows of each layer's kind, as transformers' `layer_types` names them. () where no layer has
    one, nor (`positions` given) one that a query could reach past.

    Raises SourceError for another kind.
    """
    names = list(kinds)
    for name in names:
        if name not in LAYER_KINDS:
            raise SourceError(
                f"config.json: layer_types {name!r} is not supported: only {' and '.join(LAYER_KINDS)} are"
            )
    if not window or (positions is not None and window >= positions):
        return ()
    found = tuple(window if name == "sliding_attention" else 0 for name in names)
    return found if any(found) else ()


def checked(config: DecoderConfig, where: str) -> DecoderConfig:
    """The configuration, or SourceError where its sizes do not fit one another."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if not isinstance(kv_heads, int) or kv_heads < 1 or heads % kv_heads:
        raise SourceError(f"{where}: {heads} attention heads over {kv_heads!r} key-value heads, wanted a divisor")
    if config.head_dim < 1 or (config.positions == "rope" and config.head_dim % 2):
        raise SourceError(f"{where}: head_dim {config.head_dim} cannot be rotated in halves, wanted an even number")
    if config.rope_dims % 2 or (config.head_dim - config.rope_dims) % 2 or config.rope_dims > config.head_dim:
        raise SourceError(f"{where}: {config.rope_dims} of {config.head_dim} dimensions cannot be rotated in halves")
    divisors = config.rope_scaling.divisors if config.rope_scaling else ()
    if divisors and 2 * len(divisors) != (config.rope_dims or config.head_dim):
        raise SourceError(
            f"{where}: {len(divisors)} factors of rope_scaling, wanted one for each two of the "
            f"{config.rope_dims or config.head_dim} dimensions that rotate"
        )
    if config.windows and len(config.windows) != config.num_layers:
        raise SourceError(f"{where}: windows of {len(config.windows)} layers, wanted {config.num_layers}")
    if config.positions == "learned" and config.hidden_size % heads:
        raise SourceError(f"{where}: width {config.hidden_size} does not divide into {heads} heads")
    return config


def refuse(fields: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """Raise SourceError for a key that asks for what the decoder does not do: absent, null or an allowed value pass."""
    for key, values in allowed.items():
        if fields.get(key) is not None and fields[key] not in values:
            choices = " or ".join(repr(v) for v in (*values, None))
            raise SourceError(f"{where}: {key} {fields[key]!r} is not supported: only {choices} is")
