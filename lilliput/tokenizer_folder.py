"""A folder with a tokenizer in it, as transformers writes it: opening it, and which tokens end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer from a folder; never from the hub, never with remote code.

    The class that the folder names is opened as AutoTokenizer opens it, the fast one first; but AutoTokenizer itself
    imports scipy, pandas and scikit-learn: 170 MB and some seconds, in every process that reads a text.
    """
    return _class_of(folder).from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _class_of(folder: Path) -> Any:
    """What tokenizer_config.json names; AutoTokenizer where that is nothing that transformers has."""
    import transformers

    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    name = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    found = getattr(transformers, f"{name}Fast", None) or getattr(transformers, name, None) if name else None
    return transformers.AutoTokenizer if found is None or "auto_map" in settings else found


def stop_tokens(folder: Path, eos: int | None) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's end of sequence and those of generation_config.json."""
    path = folder / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    listed = named if isinstance(named, list) else [named]
    return frozenset(int(token) for token in (*listed, eos) if token is not None)
