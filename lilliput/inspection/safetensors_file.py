"""safetensors: a JSON header of 8-byte length names every tensor's dtype, shape and place.

Roles come from names: transformers' (embed_tokens, wte, lm_head) and the decoder's own (lilliput.model).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lilliput.errors import ArtifactError
from lilliput.inspection.found import Contents, TensorFound, shortened
from lilliput.model import Role

LENGTH_BYTES = 8
LONGEST_HEADER_BYTES = 100_000_000  # the format's own limit
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embedding")
HEADS = ("lm_head", "head", "output")


def read(file: Path) -> Contents:
    """Raises ArtifactError where the header cannot be read, or the file is shorter than it says."""
    header = _header(file)
    notes = header.pop("__metadata__", {})
    tensors = tuple(_tensor(name, facts) for name, facts in sorted(header.items()))
    return Contents("safetensors", tensors, {key: shortened(value) for key, value in notes.items()})


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        text = stream.read(length) if 0 < length <= LONGEST_HEADER_BYTES else b""
    try:
        header: dict[str, Any] = json.loads(text)
        end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{file}: not a readable safetensors file (its header is damaged): fetch it again"
        ) from error
    wanted, seen = LENGTH_BYTES + length + end, file.stat().st_size
    if seen < wanted:
        raise ArtifactError(f"{file}: is cut off, {seen} bytes of {wanted}: fetch it again")
    return header


def _tensor(name: str, facts: dict[str, Any]) -> TensorFound:
    begin, end = facts["data_offsets"]
    shape = tuple(facts["shape"])
    return TensorFound(name=name, role=_role(name, shape), dtype=facts["dtype"], shape=shape, size_bytes=end - begin)


def _role(name: str, shape: tuple[int, ...]) -> Role:
    parts = name.removesuffix(".weight").split(".")
    if len(shape) < 2 or parts[-1] in ("scales", "offsets"):
        return "vector"
    if any(part in EMBEDDINGS for part in parts):
        return "embedding"
    return "head" if parts[0] in HEADS or parts[-1] == "lm_head" else "linear"
