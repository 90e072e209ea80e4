"""An artifact: the folder that one exporter wrote for one runtime."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROVENANCE = "lilliput.provenance"  # the name under which a file says what it was made from (lilliput.embedded)
PART = re.compile(r"-\d{5}-of-\d{5}$")  # ends the stem of one part of a split GGUF file


@dataclass(frozen=True)
class Artifact:
    """`main_file` is the model file's name in `folder`; `exporter` the name of the module that wrote it."""

    folder: Path
    exporter: str
    main_file: str
    context: int  # positions that the KV cache holds
    prefill: int  # tokens that one prefill call takes at most; 0: any number
    notes: tuple[str, ...] = ()  # what its exporter has to say of it, for the report

    @property
    def path(self) -> Path:
        return self.folder / self.main_file

    @property
    def files(self) -> tuple[Path, ...]:
        """What a runtime opens: the main file, its data files, the other parts of a split one."""
        stem = PART.sub("", self.path.stem)
        return tuple(sorted(path for path in self.path.parent.glob(f"{stem}*") if path.is_file()))

    @property
    def size_bytes(self) -> int:
        """Bytes of all model files."""
        return sum(path.stat().st_size for path in self.files)


def canonical(values: Mapping[str, object]) -> str:
    """A JSON object, the same text for the same values: what an exporter embeds under PROVENANCE."""
    return json.dumps(dict(values), sort_keys=True, separators=(",", ":"))


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
