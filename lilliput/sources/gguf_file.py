"""A GGUF file: weights with their codes, configuration and tokenizer rebuilt from its metadata.

Dimensions stand in ggml's order, innermost first: a matrix (out, in) has shape [in, out] there. Metadata
keys of the architecture carry its name as prefix (`llama.block_count`). Which key and tensor means what is the
family's to say. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lilliput import parity, rope, tokenizer
from lilliput.errors import SourceError
from lilliput.families import Family, Read, gguf_family_of
from lilliput.ggml import blocks
from lilliput.grid import GGUF_GRIDS, Float, grid, narrowest
from lilliput.model import DecoderConfig
from lilliput.sources.stored import OffGrid, Stored

MAGIC = b"GGUF"
FLOAT_TYPES = ("F32", "F16", "BF16", "F64")
# Of the quantized block types; where scales have no name of their own, they are float16.
GRIDS = ("int4-b32-f16", "int4-b32-min-f16", "int5-b32-f16", "int5-b32-min-f16", "int8-b32-f16", *GGUF_GRIDS)


@dataclass(frozen=True, eq=False)
class GgufFile:
    """An opened file (an `Original`)."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]  # gguf.ReaderTensor by name; data is mapped, not read
    family: Family
    config: DecoderConfig
    vocabulary: tokenizer.Vocabulary
    settings: str = "its metadata"

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def license(self) -> str | None:
        return self.fields.get("general.license")

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return _shapes(self.tensors)

    def unused(self, name: str) -> bool:
        return name in rope.GGUF_FACTORS  # a part of the configuration

    def file_of(self, name: str) -> str:
        return self.path.name

    def stored(self, name: str) -> Stored | None:
        tensor = self.tensors[name]
        kind = tensor.tensor_type.name
        if kind in FLOAT_TYPES:
            return None
        spec = next((s for s in map(grid, GRIDS) if blocks.block_type(s).name == kind), None)
        if spec is None or len(self.shapes[name]) != 2:
            return OffGrid(self._values(name), f"no grid holds GGUF's {kind}")
        found = blocks.unpack(tensor.data, spec, name)
        plain = spec.symmetric and not spec.super_blocks and not spec.codebook
        return replace(found, spec=replace(spec, scale_dtype=narrowest(found.scales))) if plain else found

    def read(self, name: str) -> Float:
        stored = self.stored(name)
        return self._values(name) if stored is None else stored.dequantize()

    def _values(self, name: str) -> Float:
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        try:
            array = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise SourceError(
                f"{self.path}: tensor {name} is {tensor.tensor_type.name}, which cannot be read as float: "
                "use a file of F32, F16, BF16, Q8_0, Q4_*, Q5_* or K-quants"
            ) from error
        return np.asarray(array, dtype=np.float32).reshape(self.shapes[name])

    def dequantized(self) -> None:
        return None  # transformers reads GGUF

    def parameters(self, read: Read) -> Iterator[tuple[str, Float]]:
        return self.family.gguf_weights(self.config, read)

    def save_tokenizer(self, folder: Path) -> str:
        tokenizer.save(self.vocabulary, folder)
        return parity.against_llama_cpp(self.path, folder)


def save_tokenizer(path: Path, folder: Path) -> str:
    """The tokenizer of a file alone, which may be the first part of a split one; what was proven of it."""
    tokenizer.save(tokenizer.read(_read(path)[0]), folder)
    return parity.against_llama_cpp(path, folder)


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}


def open_gguf(path: Path) -> GgufFile:
    """Open a file. Raises SourceError for a foreign, truncated or split one, and for what is not supported, by name."""
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise SourceError(f"{path}: not a GGUF file (begins with {magic!r}, wanted {MAGIC!r}): check the download")
    fields, tensors = _read(path)
    parts = fields.get("split.count") or 1
    if parts > 1:
        raise SourceError(f"{path}: one of {parts} parts of a split model: merge them (llama-gguf-split --merge)")
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str):
        raise SourceError(f"{path}: no 'general.architecture' in its metadata, wanted a language model: check the file")
    family = gguf_family_of(architecture)
    own = {key.removeprefix(f"{architecture}."): value for key, value in fields.items()}
    config = family.gguf_config(own | rope.gguf_factors(tensors), _shapes(tensors))
    return GgufFile(path, fields, tensors, family, config, tokenizer.read(fields))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the reader slices a map of the file: a short one raises many kinds of errors
        raise SourceError(
            f"{path}: truncated or damaged GGUF file of {path.stat().st_size} bytes ({error}): get the file anew"
        ) from error
    return fields, {tensor.name: tensor for tensor in reader.tensors}
