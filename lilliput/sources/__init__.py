"""Where a model comes from: each module reads one kind of place and gives an `Original`, which stage.py writes out.

hf_folder      a Hugging Face folder: config.json, safetensors (one file or shards), tokenizer files
quantized      the formats in which such a folder may hold quantized matrices
gguf_file      a GGUF file: metadata, quantized or float tensors, vocabulary
package_file   finds either inside an installed package, without importing it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from lilliput.families import Read
from lilliput.grid import Float
from lilliput.model import DecoderConfig
from lilliput.sources.stored import Stored


class Original(Protocol):
    """An opened source whose weights are still where they are. Everything is read when asked for."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> Path:
        """The folder or file."""
        ...

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def settings(self) -> str:
        """What the configuration was read from, for messages: `config.json`."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read, for hashing."""
        ...

    @property
    def license(self) -> str | None: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The checkpoint's tensors, by its own names."""
        ...

    def unused(self, name: str) -> bool:
        """Whether a tensor is known to be no parameter."""
        ...

    def file_of(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        ...

    def read(self, name: str) -> Float:
        """A tensor as float32, in the checkpoint's shape."""
        ...

    def stored(self, name: str) -> Stored | None:
        """A tensor as it is quantized in the checkpoint; None where it is float."""
        ...

    def dequantized(self) -> Mapping[str, Float] | None:
        """All tensors as float32, where transformers cannot be asked to dequantize them itself; else None."""
        ...

    def parameters(self, read: Read) -> Iterator[tuple[str, Float]]:
        """The decoder's parameters, made of what `read` gives."""
        ...

    def save_tokenizer(self, folder: Path) -> str:
        """Write the tokenizer's files; the sentence on its parity."""
        ...
