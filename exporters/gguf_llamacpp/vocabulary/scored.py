"""SentencePiece tokenizers: llama.cpp's `llama` (its BPE with byte fallback) and `t5` (its Unigram).

    llama   tokens and scores. The neighbours whose union has the highest score are merged first, so minus the rank of
            the first merge that makes a token is its score
    t5      tokens and scores (log probabilities): the segmentation of the highest sum is taken. Text is rewritten
            first by SentencePiece's compiled map of characters, and runs of spaces become one where the model says so

An added token of a `llama` that spells spaces as U+2581 (Gemma's runs of spaces) is a merge like any other: as
USER_DEFINED its text would be printed as it stands. llama.cpp's Unigram knows no byte fallback.
"""

from __future__ import annotations

import base64
import json
import re

import gguf

from exporters.gguf_llamacpp.vocabulary.byte_level import merges
from exporters.gguf_llamacpp.vocabulary.files import Files, Json, check_distinct, tokens
from lilliput.errors import ExportError

SPACE = "\u2581"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
UNMERGED_SCORE = -1e6  # a token that no merge makes
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
RUNS_OF_SPACES = (" {2,}", "\\s{2,}")


def add_bpe(writer: gguf.GGUFWriter, files: Files, vocab_size: int) -> None:
    """Add a BPE with byte fallback. Raises ExportError for steps that llama.cpp has not."""
    if not files.model.get("byte_fallback"):
        raise ExportError(
            "tokenizer.json is a BPE neither byte-level nor with byte fallback: llama.cpp has no tokenizer for it"
        )
    prefix = _space_prefix([*files.steps("normalizer"), *files.steps("pre_tokenizer")])
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges(files)):
        ranks.setdefault(left + right, rank)
    texts, types = tokens(files, vocab_size)
    for i, text in enumerate(texts):
        if BYTE_TOKEN.fullmatch(text):
            types[i] = gguf.TokenType.BYTE
        elif types[i] == gguf.TokenType.USER_DEFINED and SPACE in text:
            types[i] = gguf.TokenType.NORMAL
    unknown = files.vocabulary.get(files.model.get("unk_token") or "")
    if unknown is not None:
        types[unknown] = gguf.TokenType.UNKNOWN
    scores = [-float(ranks[text]) if text in ranks else UNMERGED_SCORE for text in texts]
    _add(writer, "llama", texts, types, scores)
    writer.add_add_space_prefix(prefix)


def spaces_as_added(files: Files) -> bool:
    """Whether runs of U+2581 are added tokens that are not special."""
    return any(SPACE in added["content"] and not added["special"] for added in files.added.values())


def _add(
    writer: gguf.GGUFWriter, model: str, texts: list[str], types: list[gguf.TokenType], scores: list[float]
) -> None:
    check_distinct(texts)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)


def _space_prefix(steps: list[Json]) -> bool:
    """Whether a space is put in front. Raises ExportError for steps that do more than make spaces U+2581."""
    prefix = replaced = False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif kind == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            prefix = step["prepend_scheme"] != "never"
        elif step == REPLACE:
            replaced = True
        elif not (replaced and kind == "Split" and step["pattern"] == {"String": " "}):  # no space is left to split at
            raise ExportError(
                f"tokenizer.json has the step {json.dumps(step)}, which llama.cpp's SentencePiece BPE has not"
            )
    return prefix


def add_unigram(writer: gguf.GGUFWriter, files: Files, vocab_size: int) -> None:
    """Add a Unigram. Raises ExportError for steps that llama.cpp has not."""
    if files.model.get("byte_fallback"):
        raise ExportError("tokenizer.json is a Unigram with byte fallback, llama.cpp's (t5) has none")
    texts, types = tokens(files, vocab_size)
    scores = [0.0] * vocab_size
    for i, (_, score) in enumerate(files.model["vocab"]):
        scores[i] = float(score)
    if files.model.get("unk_id") is not None:
        types[files.model["unk_id"]] = gguf.TokenType.UNKNOWN
    _add(writer, "t5", texts, types, scores)
    prefix, merged = _unigram_spaces(writer, files)
    writer.add_add_space_prefix(prefix)
    writer.add_remove_extra_whitespaces(merged)


def _unigram_spaces(writer: gguf.GGUFWriter, files: Files) -> tuple[bool, bool]:
    """Whether a space is put in front, and whether runs of spaces become one; adds the map of characters."""
    prefix = merged = False
    for step in (*files.steps("normalizer"), *files.steps("pre_tokenizer")):
        kind = step["type"]
        if kind == "Precompiled":
            writer.add_precompiled_charsmap(base64.b64decode(step["precompiled_charsmap"]))
        elif kind == "Metaspace" and step["replacement"] == SPACE:
            prefix = step["prepend_scheme"] != "never"
        elif kind == "WhitespaceSplit" or (kind == "Replace" and step["pattern"].get("Regex") in RUNS_OF_SPACES):
            merged = True
        elif not (kind == "Strip" and step["strip_right"]):
            raise ExportError(f"tokenizer.json has the step {json.dumps(step)}, which llama.cpp's Unigram has not")
    if merged and not prefix:
        raise ExportError(
            "tokenizer.json puts no space in front of a text, llama.cpp's Unigram that merges spaces does"
        )
    return prefix, merged
