"""Byte-level BPE, llama.cpp's `gpt2`: tokens, merges, and `pre`, the name of a list of regular expressions.

The lists are compiled into llama.cpp (src/llama-vocab.cpp, llm_tokenizer_bpe). A name is found by comparing
tokenizer.json's own steps with lists that are known here; spellings that mean the same are made one: ByteLevel with its
regex is that regex, Digits is `\\p{N}`, an isolated split is an inverted removed one, and contractions in any case are
written out (llama.cpp's regex knows no `(?i:`).

Steps that equal none of them leave `CANDIDATES`: one name for each list that llama.cpp has, of which the proof
(proof.py) takes the first that gives the tokenizer's own ids on every text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import gguf

from exporters.gguf_llamacpp.vocabulary.files import Files, Json, check_distinct, tokens
from lilliput.errors import ExportError
from lilliput.tokenizer import PRE_TOKENIZERS

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ANY_CASE_WRITTEN_OUT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
# `tokenizer.ggml.pre` by the regular expressions and `ignore_merges`: those that sources can have (lilliput.tokenizer,
# the first of names that mean the same).
KNOWN: dict[tuple[tuple[str, ...], bool], str] = {
    (rule.patterns, rule.ignore_merges): name for name, rule in reversed(PRE_TOKENIZERS.items())
}
# One name for each list of llama.cpp. Some let a word that is a token stay (`ignore_merges`): the same where merges
# lead to that token. Lists that llama.cpp approximates (letters with marks, in gpt-4o) stand beside others.
CANDIDATES = (
    "gpt-4o", "granite-embed-multi-97m", "tekken", "gpt-2", "smollm", "qwen2", "dbrx", "llama-bpe", "qwen35",
    "seed-coder", "ufakzeka", "bailingmoe", "deepseek-coder", "deepseek-llm", "deepseek-v3", "tiny_aya", "exaone-moe",
    "falcon", "jais-2", "laguna", "superbpe", "viking", "poro-chat", "chameleon", "default", "glm4", "youtu",
    "minicpm5",
)  # fmt: skip


def add(writer: gguf.GGUFWriter, files: Files, vocab_size: int, pre: str) -> None:
    """Add tokens, merges and `pre`."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    texts, types = tokens(files, vocab_size)
    check_distinct(texts)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges(files)])
    writer.add_add_space_prefix(False)


def known_pre(files: Files) -> str | None:
    """`tokenizer.ggml.pre` of steps that equal a list known here, or None.

    Raises ExportError for a step that no list of llama.cpp can do.
    """
    patterns = tuple(pattern for step in files.steps("pre_tokenizer") for pattern in _patterns(step))
    return KNOWN.get((patterns, bool(files.model.get("ignore_merges"))))


def merges(files: Files) -> list[tuple[str, str]]:
    """Pairs in order of rank; tokenizer.json has them as pairs, older ones as "left right"."""
    pairs: Sequence[str | Sequence[str]] = files.model["merges"]
    split = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in pairs)
    return [(pair[0], pair[1]) for pair in split]


def _patterns(step: Json) -> Iterator[str]:
    """The regular expressions that one step splits by, in one spelling."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        yield from (GPT2,) if step.get("use_regex", True) else ()
    elif kind == "Digits" and step.get("individual_digits"):
        yield r"\p{N}"
    elif kind == "Split" and "Regex" in step["pattern"] and _isolates(step):
        yield step["pattern"]["Regex"].replace(ANY_CASE, ANY_CASE_WRITTEN_OUT)
    else:
        raise ExportError(f"tokenizer.json has the pre-tokenizer {json.dumps(step)}, which llama.cpp has not")


def _isolates(step: Json) -> bool:
    return (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))
