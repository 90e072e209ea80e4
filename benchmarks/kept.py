"""Folders that are made once: published under their name when they are whole, made anew where their record differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

RECORD = "kept.json"


def keep(folder: Path, record: Mapping[str, str], make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` (which is given an empty one) unless it is there with the same record.

    A maker that raises leaves what it wrote in `folder`.partial.
    """
    if is_kept(folder, record):
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    make(partial)
    (partial / RECORD).write_text(json.dumps(dict(record), indent=2) + "\n")
    partial.rename(folder)
    return folder


def is_kept(folder: Path, record: Mapping[str, str]) -> bool:
    return (folder / RECORD).is_file() and json.loads((folder / RECORD).read_text()) == dict(record)
