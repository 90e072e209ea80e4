"""An artifact: the folder that one exporter wrote for one runtime."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Artifact:
    """`main_file` is the model file's name in `folder`; `exporter` the name of the module that wrote it."""

    folder: Path
    exporter: str
    main_file: str
    context: int  # positions that the KV cache holds
    prefill: int  # tokens that one prefill call takes at most; 0: any number

    @property
    def path(self) -> Path:
        return self.folder / self.main_file

    @property
    def size_bytes(self) -> int:
        """Bytes of all model files of the folder (the main file and its data files)."""
        return sum(f.stat().st_size for f in self.folder.glob(f"{self.path.stem}*") if f.is_file())


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
