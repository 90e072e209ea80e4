"""The tokenizer of a GGUF file, from the files of a Hugging Face tokenizer.

llama.cpp does not run tokenizer.json: it has tokenizers of its own (src/llama-vocab.cpp).

    gpt2    byte-level BPE, with names for what cuts the text first                byte_level.py
    llama   SentencePiece's BPE with byte fallback                                 scored.py
    t5      SentencePiece's Unigram                                                scored.py
    bert    WordPiece                                                              wordpiece.py

What none of them does is refused; what they seem to do is proven, text by text (proof.py).
"""

from __future__ import annotations

from pathlib import Path

import gguf

from exporters.gguf_llamacpp.vocabulary import byte_level, proof, scored, special, wordpiece
from exporters.gguf_llamacpp.vocabulary.files import Files, read
from lilliput.errors import ExportError


def add(writer: gguf.GGUFWriter, folder: Path, vocab_size: int, *, prove: bool = True) -> str:
    """Add `tokenizer.*`; a sentence for the report where something had to be proven to be chosen, else "".

    Raises ExportError for a tokenizer that llama.cpp cannot run. Without `prove` only what is known is written.
    """
    files = read(folder)
    highest = max([*files.vocabulary.values(), *files.added])
    if highest >= vocab_size:
        raise ExportError(
            f"{folder}: token id {highest} is beyond the model's vocabulary of {vocab_size}: another tokenizer?"
        )
    said = _add_model(writer, files, folder, vocab_size, prove)
    special.add(writer, files)
    return said


def _add_model(writer: gguf.GGUFWriter, files: Files, folder: Path, vocab_size: int, prove: bool) -> str:
    if files.kind == "BPE" and any(step["type"] == "ByteLevel" for step in files.steps("pre_tokenizer")):
        proof.normal_form(files)
        pre, said = proof.pre_name(folder, vocab_size, prove=prove)
        byte_level.add(writer, files, vocab_size, pre)
        return said
    adders = {"BPE": scored.add_bpe, "Unigram": scored.add_unigram, "WordPiece": wordpiece.add}
    if files.kind not in adders:
        raise ExportError(f"{folder}: a {files.kind} tokenizer, llama.cpp has BPE, Unigram and WordPiece")
    adders[files.kind](writer, files, vocab_size)
    return ""
