"""A folder with a tokenizer in it, as transformers writes it: opening it, and which tokens end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer from a folder; never from the hub, never with remote code."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def stop_tokens(folder: Path, eos: int | None) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's end of sequence and those of generation_config.json."""
    path = folder / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    listed = named if isinstance(named, list) else [named]
    return frozenset(int(token) for token in (*listed, eos) if token is not None)
