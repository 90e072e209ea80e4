"""WordPiece, llama.cpp's `bert`: a word is cut from its left into the longest tokens of the vocabulary.

llama.cpp marks the beginning of a word where the vocabulary marks its continuation: `##ing` is written as `ing`, and
`play` as U+2581 `play`. Special tokens stay as they are. It lowercases and strips accents by two flags
(tokenizer.ggml.normalizer.*), and always cuts at Chinese characters and drops control characters. It always adds [CLS]
and [SEP], and a word of any length is cut, where BERT calls one of more than 100 characters unknown.
"""

from __future__ import annotations

import json

import gguf

from exporters.gguf_llamacpp.vocabulary.files import Files, Json, check_distinct, tokens
from lilliput.errors import ExportError

BEGINNING = "\u2581"
LOWERCASE = "tokenizer.ggml.normalizer.lowercase"
STRIP_ACCENTS = "tokenizer.ggml.normalizer.strip_accents"


def add(writer: gguf.GGUFWriter, files: Files, vocab_size: int) -> None:
    """Add a WordPiece of BERT's. Raises ExportError for steps that llama.cpp has not."""
    normalizer = _only(files.steps("normalizer"), "BertNormalizer")
    _only(files.steps("pre_tokenizer"), "BertPreTokenizer")
    for key in ("clean_text", "handle_chinese_chars"):
        if not normalizer.get(key, True):
            raise ExportError(f"tokenizer.json has {key} false, llama.cpp's WordPiece always does it")
    if files.model.get("continuing_subword_prefix", "##") != "##":
        raise ExportError("tokenizer.json marks continuations by another prefix than ##, which llama.cpp has not")
    texts, types = tokens(files, vocab_size)
    texts = [_marked(text) if kind == gguf.TokenType.NORMAL else text for text, kind in zip(texts, types, strict=True)]
    check_distinct(texts)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_bool(LOWERCASE, bool(normalizer.get("lowercase", True)))
    writer.add_bool(STRIP_ACCENTS, strips_accents(files))


def strips_accents(files: Files) -> bool:
    """BERT's rule: where it is not said, accents go with the case."""
    normalizer = files.steps("normalizer")[0]
    accents = normalizer.get("strip_accents")
    return bool(normalizer.get("lowercase", True) if accents is None else accents)


def _only(steps: list[Json], kind: str) -> Json:
    if [step["type"] for step in steps] != [kind]:
        raise ExportError(
            f"tokenizer.json is a WordPiece with {json.dumps(steps)[:200]}, llama.cpp has one with {kind} alone"
        )
    return steps[0]


def _marked(text: str) -> str:
    return text[2:] if text.startswith("##") else BEGINNING + text
