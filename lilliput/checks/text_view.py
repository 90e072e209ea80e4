"""What lies beside a model file about text: a tokenizer's folder, genai_config.json, or a .litertlm bundle."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lilliput import lm_bundle
from lilliput.checks.opened import Text
from lilliput.checks.rules.onnx_graph import read_genai_config
from lilliput.checks.rules.source_model import chat_template, end_ids
from lilliput.errors import ArtifactError


def beside(folder: Path) -> Text | None:
    """The tokenizer files of a folder, and where they say that a text ends; None where there are none."""
    if not (folder / "tokenizer.json").is_file():
        return None
    model = read_genai_config(folder).get("model", {})
    ends: Any = model.get("eos_token_id") if model else end_ids(folder)
    listed = (ends,) if isinstance(ends, int) else tuple(ends or ())
    where = "genai_config.json: eos_token_id" if model else "generation_config.json: eos_token_id"
    return _text(folder, "tokenizer.json", listed, where, "chat_template.jinja")


@contextmanager
def in_bundle(path: Path) -> Iterator[Text | None]:
    """The tokenizer and metadata of a bundle, unpacked while the context lasts; None where it has none."""
    if not path.is_file():
        yield None
        return
    with tempfile.TemporaryDirectory() as name:
        try:
            lm_bundle.save_tokenizer(path, Path(name))
        except ArtifactError:  # a tokenizer of another kind: rules on text say that there is none
            yield None
            return
        ends = end_ids(Path(name))
        yield _text(
            Path(name), f"{path.name}: HF_Tokenizer", ends, f"{path.name}: stop_tokens", f"{path.name}: template"
        )


def _text(folder: Path, place: str, ends: tuple[int, ...], end_place: str, template_place: str) -> Text:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer.get("model", {}).get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    last = max([*ids, *(token["id"] for token in tokenizer.get("added_tokens") or [])], default=-1)
    return Text(
        place=place,
        tokens=last + 1 if last >= 0 else None,
        end_ids=ends,
        end_place=end_place,
        template=chat_template(folder),
        template_place=template_place,
        folder=folder,
    )
