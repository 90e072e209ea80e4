"""What a folder with a Hugging Face tokenizer says: tokenizer.json and the files beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from lilliput.errors import ExportError

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Files:
    """What a tokenizer folder says."""

    tokenizer: Json  # tokenizer.json
    config: Json  # tokenizer_config.json
    generation: Json  # generation_config.json, empty where there is none
    chat_template: str | None

    @property
    def model(self) -> Json:
        model: Json = self.tokenizer["model"]
        return model

    @property
    def kind(self) -> str:
        """BPE, Unigram or WordPiece."""
        return str(self.model.get("type"))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids by token; a Unigram has its pieces in a list, with their scores."""
        vocab = self.model["vocab"]
        return {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)

    @property
    def added(self) -> dict[int, Json]:
        """Added tokens by id."""
        return {token["id"]: token for token in self.tokenizer.get("added_tokens") or ()}

    def steps(self, name: str) -> list[Json]:
        """The steps of `normalizer`, `pre_tokenizer` or `post_processor` in order, sequences opened."""
        keys = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
        return list(flatten(self.tokenizer.get(name), keys[name]))

    def token_id(self, name: str) -> int | None:
        """The id of the token that tokenizer_config.json calls `name`, e.g. "bos_token"."""
        entry = self.config.get(name)
        text = entry.get("content") if isinstance(entry, Mapping) else entry
        ids = {token["content"]: i for i, token in self.added.items()}
        found: int | None = ids.get(text, self.vocabulary.get(text)) if text else None
        return found


def read(folder: Path) -> Files:
    """The files of a tokenizer folder. Raises ExportError where there is no tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ExportError(
            f"{folder} has no tokenizer.json, GGUF needs one: convert the tokenizer to transformers' fast form"
        )
    return Files(
        _load(path),
        _load(folder / "tokenizer_config.json"),
        _load(folder / "generation_config.json"),
        _template(folder),
    )


def _load(path: Path) -> Json:
    loaded: Json = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return loaded


def _template(folder: Path) -> str | None:
    """chat_template.jinja, or the one (of several: the default one) in tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    stored = _load(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(stored, list):
        stored = {entry["name"]: entry["template"] for entry in stored}.get("default")
    return stored


def flatten(step: Json | None, key: str) -> Iterator[Json]:
    """The steps of a pre-tokenizer, normalizer or post-processor in order, sequences opened."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step[key]:
            yield from flatten(inner, key)
    else:
        yield step


def tokens(files: Files, vocab_size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Text and type of every id; ids that the tokenizer does not use are padding, as in llama.cpp's converter."""
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for text, i in files.vocabulary.items():
        texts[i], types[i] = text, gguf.TokenType.NORMAL
    for i, added in files.added.items():
        texts[i] = added["content"]
        types[i] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    return texts, types


def check_distinct(texts: list[str]) -> None:
    """llama.cpp ends the process over two tokens of one text."""
    if len(set(texts)) < len(texts):
        seen: set[str] = set()
        twice = next(text for text in texts if text in seen or seen.add(text))  # type: ignore[func-returns-value]
        raise ExportError(f"token {twice!r} has two ids as GGUF writes it, llama.cpp takes each text once only")
