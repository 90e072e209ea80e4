"""Model families: each module maps one family of Hugging Face checkpoints onto the generic decoder.

A family module offers

    ARCHITECTURES: tuple[str, ...]                       config.json's `architectures` that it reads
    def config(hf: Mapping) -> DecoderConfig             which config field means what
    def weights(config, read, names) -> Iterator[(name, array)]    which checkpoint weight goes where

`read(name)` gives a checkpoint tensor as float32, `names` is the set of tensors that there are.
The folder is the registry.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from lilliput.errors import SourceError, did_you_mean
from lilliput.grid import Float
from lilliput.model import DecoderConfig

Read = Callable[[str], Float]


class Family(Protocol):
    """What a family module offers."""

    ARCHITECTURES: tuple[str, ...]

    def config(self, hf: Mapping[str, Any]) -> DecoderConfig: ...

    def weights(self, config: DecoderConfig, read: Read, names: frozenset[str]) -> Iterator[tuple[str, Float]]: ...


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
