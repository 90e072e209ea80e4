"""Tokenize the evaluation text and cut it into chunks, before anything costly: too short a text is refused here."""

from __future__ import annotations

from pathlib import Path

from lilliput.progress import Progress


def work(source: Path, text: Path | str, count: int, length: int, folder: Path, progress: Progress) -> None:
    from lilliput.source import open_stage
    from lilliput.tokenizer_folder import load_tokenizer
    from targets.reference import evaluation_set

    tokenizer = load_tokenizer(open_stage(source).tokenizer)

    def encode(words: str) -> list[int]:
        return list(tokenizer.encode(words, add_special_tokens=False, verbose=False))

    evaluation_set(encode, count, length, text).save(folder)
    progress(1, 1)
