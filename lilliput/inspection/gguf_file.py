"""GGUF: every tensor has a name and a ggml type, whose block gives bits; a file without `output.weight` is tied.

Names are llama.cpp's: token_embd, output, output_norm, blk.{i}.*. Block sizes are gguf.constants.GGML_QUANT_SIZES.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf

from lilliput.errors import ArtifactError
from lilliput.inspection.found import Contents, TensorFound, shortened
from lilliput.model import Role


def read(parts: Sequence[Path]) -> Contents:
    """One model, in one file or several. Raises ArtifactError where one is no GGUF, ends too early, or is missing."""
    readers = [_open(file) for file in parts]
    count = readers[0].get_field(gguf.Keys.Split.LLM_KV_SPLIT_COUNT)
    if count is not None and int(count.contents()) != len(parts):
        raise ArtifactError(f"{parts[0]}: {len(parts)} of {count.contents()} parts of a split model are here: get all")
    names = {tensor.name for reader in readers for tensor in reader.tensors}
    tied = "token_embd.weight" in names and "output.weight" not in names
    tensors = tuple(_tensor(tensor, tied) for reader in readers for tensor in reader.tensors)
    metadata = {name: _value(field) for name, field in readers[0].fields.items() if not name.startswith("GGUF.")}
    return Contents("GGUF", tensors, metadata)


def _open(file: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(file)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ArtifactError(f"{file}: not a readable GGUF file ({error}): fetch or write it again") from error


def _tensor(tensor: Any, tied: bool) -> TensorFound:
    role = _role(tensor.name)
    return TensorFound(
        name=tensor.name,
        role=role,
        dtype=tensor.tensor_type.name,
        shape=tuple(int(n) for n in reversed(tensor.shape)),
        size_bytes=int(tensor.n_bytes),
        shared=tied and role == "embedding",
    )


def _role(name: str) -> Role:
    if name == "token_embd.weight":
        return "embedding"
    if name == "output.weight":
        return "head"
    return "vector" if "norm" in name or name.endswith(".bias") or not name.startswith("blk.") else "linear"


def _value(field: Any) -> str:
    if field.types and field.types[0] == gguf.GGUFValueType.ARRAY:
        return f"{len(field.data)} values"
    return shortened(field.contents())
