"""Hugging Face folders whose matrices are quantized: config.json's `quantization_config` says how.

A format is a module of this folder; which of them read a folder says its METHOD, `quantization_config.quant_method`:

    METHOD: str
    MARK: str                                   ends the name of one tensor of every quantized matrix
    OTHERS: tuple[str, ...]                     ends of the names of its further tensors, those that are there
    def check(settings)                         raises SourceError for a variant that is not read
    def shape(parts, settings) -> (rows, cols)
    def read(parts, settings) -> Stored

A matrix's tensors share what stands before those ends, the module's name: `model.layers.0.mlp.up_proj.qweight`. All
of them together stand for the tensor `model.layers.0.mlp.up_proj.weight` (out, in), which is what a family asks for.
What is not quantized (norms, embeddings, an ignored head) lies in the folder as in any other.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy.typing as npt

from lilliput.errors import SourceError, did_you_mean
from lilliput.sources.stored import Stored

Settings = Mapping[str, Any]
Raw = Callable[[str], npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Parts:
    """The tensors of one quantized matrix, each read when asked for: integers as stored, floats as float32."""

    module: str
    names: Mapping[str, str]  # end of the name → the checkpoint's tensor
    shapes: Mapping[str, tuple[int, ...]]  # by the checkpoint's names
    raw: Raw

    def __contains__(self, end: str) -> bool:
        return end in self.names

    def __getitem__(self, end: str) -> npt.NDArray[Any]:
        return self.raw(self._name(end))

    def shape(self, end: str) -> tuple[int, ...]:
        return self.shapes[self._name(end)]

    def matrix(self, end: str) -> tuple[int, int]:
        """The shape of a tensor that must have two dimensions."""
        found = self.shape(end)
        if len(found) != 2:
            raise SourceError(f"{self._name(end)} has shape {found}, wanted two dimensions: the file is damaged")
        return found[0], found[1]

    def want(self, end: str, shape: tuple[int, ...]) -> None:
        """Raise SourceError unless a tensor has that shape."""
        if self.shape(end) != shape:
            raise SourceError(
                f"{self._name(end)} has shape {self.shape(end)}, wanted {shape} by the other tensors of {self.module}: "
                "the file is damaged, get it anew"
            )

    def _name(self, end: str) -> str:
        if end not in self.names:
            raise SourceError(
                f"{self.module}.{end} is missing, which its other tensors need: the download is not complete"
            )
        return self.names[end]


class Format(Protocol):
    """What a format's module offers."""

    METHOD: str
    MARK: str
    OTHERS: tuple[str, ...]

    def check(self, settings: Settings) -> None: ...

    def shape(self, parts: Parts, settings: Settings) -> tuple[int, int]: ...

    def read(self, parts: Parts, settings: Settings) -> Stored: ...


@dataclass(frozen=True, eq=False)
class Matrix:
    """One quantized matrix of a folder."""

    format: Format
    parts: Parts
    settings: Settings

    @cached_property
    def shape(self) -> tuple[int, int]:
        return self.format.shape(self.parts, self.settings)

    def read(self) -> Stored:
        stored = self.format.read(self.parts, self.settings)
        assert stored.shape == self.shape, f"{self.parts.module}: read in another shape"
        return stored


def formats(settings: Settings) -> list[Format]:
    """The formats that read a folder of these settings, checked. Raises SourceError naming the known methods."""
    known: list[Format] = [
        importlib.import_module(f"{__name__}.{module.name}")
        for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name)
        if module.name != "words"
    ]
    method = str(settings.get("quant_method") or "")
    found = [each for each in known if method == each.METHOD]
    if not found:
        raise SourceError(
            f"config.json: quantization_config has quant_method {method!r}, which is not read: "
            f"{did_you_mean(method, {each.METHOD for each in known})}; or use the float checkpoint it was made from"
        )
    for each in found:
        each.check(settings)
    return found


def matrices(settings: Settings, shapes: Mapping[str, tuple[int, ...]], raw: Raw) -> dict[str, Matrix]:
    """The quantized matrices of a folder that holds tensors of these names and shapes: `{module}.weight` → Matrix."""
    found = {}
    for each in formats(settings):
        for name in shapes:
            if not name.endswith(f".{each.MARK}"):
                continue
            module = name.removesuffix(f".{each.MARK}")
            names = {end: f"{module}.{end}" for end in (each.MARK, *each.OTHERS)}
            there = {end: full for end, full in names.items() if full in shapes}
            found[f"{module}.weight"] = Matrix(each, Parts(module, there, shapes, raw), settings)
    if not found:
        raise SourceError(
            "config.json: quantization_config says that the weights are quantized, and no tensor is: "
            "the two do not belong together"
        )
    return found
