"""The tokenizer of a GGUF file, from the files of a Hugging Face tokenizer.

llama.cpp does not run tokenizer.json: it has two BPE tokenizers of its own, and names for what cuts the text first.

    gpt2    byte-level BPE: tokens, merges, and `pre`, the name of a list of regular expressions compiled into
            llama.cpp (src/llama-vocab.cpp). It is found by comparing tokenizer.json's own steps with those lists;
            steps that llama.cpp does not know are refused, as a wrong name tokenizes differently without a word
    llama   SentencePiece's BPE with byte fallback: tokens and scores. The neighbours whose union has the highest score
            are merged first, so minus the rank of the first merge that makes a token is its score

Spellings that mean the same are made one: ByteLevel with its regex is that regex, Digits is `\\p{N}`, an isolated
split is an inverted removed one, and contractions in any case are written out (llama.cpp's regex knows no `(?i:`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from lilliput.errors import ExportError
from lilliput.tokenizer import PRE_TOKENIZERS

Json = Mapping[str, Any]

SPACE = "\u2581"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
UNMERGED_SCORE = -1e6  # a token that no merge makes
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ANY_CASE_WRITTEN_OUT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = ANY_CASE_WRITTEN_OUT + "?"

# `tokenizer.ggml.pre` by the regular expressions and `ignore_merges`: those that sources can have (lilliput.tokenizer,
# the first of names that mean the same), and two that llama.cpp quotes from tokenizer.json files.
KNOWN: dict[tuple[tuple[str, ...], bool], str] = {
    (rule.patterns, rule.ignore_merges): name for name, rule in reversed(PRE_TOKENIZERS.items())
} | {
    ((_WORDS % ("", "") + r"\p{N}" + _TAIL,), True): "tekken",
    ((_WORDS % (_CONTRACTION, _CONTRACTION) + r"\p{N}{1,3}" + _TAIL,), False): "gpt-4o",
}


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
    def added(self) -> dict[int, Json]:
        """Added tokens by id."""
        return {token["id"]: token for token in self.tokenizer.get("added_tokens") or ()}

    def token_id(self, name: str) -> int | None:
        """The id of the token that tokenizer_config.json calls `name`, e.g. "bos_token"."""
        entry = self.config.get(name)
        text = entry.get("content") if isinstance(entry, Mapping) else entry
        ids = {token["content"]: i for i, token in self.added.items()}
        found: int | None = ids.get(text, self.model["vocab"].get(text)) if text else None
        return found


def read(folder: Path) -> Files:
    """The files of a tokenizer folder. Raises ExportError where tokenizer.json is no BPE."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ExportError(
            f"{folder} has no tokenizer.json, GGUF needs one: convert the tokenizer to transformers' fast form"
        )
    files = Files(
        _load(path),
        _load(folder / "tokenizer_config.json"),
        _load(folder / "generation_config.json"),
        _template(folder),
    )
    if files.model.get("type") != "BPE":
        raise ExportError(f"{path}: a {files.model.get('type')} tokenizer, GGUF is written for BPE only")
    return files


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


def add(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Add `tokenizer.*`. Raises ExportError for a tokenizer that llama.cpp cannot run."""
    files = read(folder)
    highest = max([*files.model["vocab"].values(), *files.added])
    if highest >= vocab_size:
        raise ExportError(
            f"{folder}: token id {highest} is beyond the model's vocabulary of {vocab_size}: another tokenizer?"
        )
    steps = list(_flatten(files.tokenizer.get("pre_tokenizer"), "pretokenizers"))
    if any(step["type"] == "ByteLevel" for step in steps):
        _add_byte_level(writer, files, steps, vocab_size)
    else:
        _add_sentencepiece(writer, files, steps, vocab_size)
    _add_special(writer, files)


def _flatten(step: Json | None, key: str) -> Iterator[Json]:
    """The steps of a pre-tokenizer, normalizer or post-processor in order, sequences opened."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step[key]:
            yield from _flatten(inner, key)
    else:
        yield step


def _add_byte_level(writer: gguf.GGUFWriter, files: Files, steps: list[Json], vocab_size: int) -> None:
    normalizers = [step["type"] for step in _flatten(files.tokenizer.get("normalizer"), "normalizers")]
    if normalizers:
        raise ExportError(
            f"tokenizer.json normalizes text ({', '.join(normalizers)}), llama.cpp's byte-level BPE does not"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_name(steps, bool(files.model.get("ignore_merges"))))
    tokens, types = _tokens(files, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in _merges(files)])
    writer.add_add_space_prefix(False)


def pre_name(steps: list[Json], ignore_merges: bool) -> str:
    """`tokenizer.ggml.pre` of a byte-level BPE with these pre-tokenizer steps.

    Raises ExportError for steps that no list in llama.cpp equals.
    """
    patterns = tuple(pattern for step in steps for pattern in _patterns(step))
    name = KNOWN.get((patterns, ignore_merges))
    if name is None:
        raise ExportError(
            f"tokenizer.json cuts text by {list(patterns)} (ignore_merges {ignore_merges}), which none known here "
            f"does ({', '.join(sorted(KNOWN.values()))}): llama.cpp would tokenize differently"
        )
    return name


def _patterns(step: Json) -> Iterator[str]:
    """The regular expressions that one step splits by, in one spelling."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        yield from (GPT2,) if step.get("use_regex", True) else ()
    elif kind == "Digits" and step.get("individual_digits"):
        yield r"\p{N}"
    elif (
        kind == "Split"
        and "Regex" in step["pattern"]
        and (step["behavior"], step["invert"])
        in (
            ("Isolated", False),
            ("Removed", True),
        )
    ):
        yield step["pattern"]["Regex"].replace(ANY_CASE, ANY_CASE_WRITTEN_OUT)
    else:
        raise ExportError(f"tokenizer.json has the pre-tokenizer {json.dumps(step)}, which llama.cpp has not")


def _add_sentencepiece(writer: gguf.GGUFWriter, files: Files, steps: list[Json], vocab_size: int) -> None:
    if not files.model.get("byte_fallback"):
        raise ExportError(
            "tokenizer.json is a BPE neither byte-level nor with byte fallback: llama.cpp has no tokenizer for it"
        )
    prefix = _space_prefix([*_flatten(files.tokenizer.get("normalizer"), "normalizers"), *steps])
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(files)):
        ranks.setdefault(left + right, rank)
    tokens, types = _tokens(files, vocab_size)
    for i, token in enumerate(tokens):
        if BYTE_TOKEN.fullmatch(token):
            types[i] = gguf.TokenType.BYTE
    unknown = files.model["vocab"].get(files.model.get("unk_token"))
    if unknown is not None:
        types[unknown] = gguf.TokenType.UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(ranks[token]) if token in ranks else UNMERGED_SCORE for token in tokens])
    writer.add_token_types(types)
    writer.add_add_space_prefix(prefix)


def _space_prefix(steps: list[Json]) -> bool:
    """Whether a space is put in front. Raises ExportError for steps that do more than make spaces U+2581."""
    prefix = False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif kind == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            prefix = step["prepend_scheme"] != "never"
        elif not (kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE):
            raise ExportError(
                f"tokenizer.json has the step {json.dumps(step)}, which llama.cpp's SentencePiece BPE has not"
            )
    return prefix


def _merges(files: Files) -> list[tuple[str, str]]:
    """Pairs in order of rank; tokenizer.json has them as pairs, older ones as "left right"."""
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in files.model["merges"]]
    return [(left, right) for left, right in pairs]


def _tokens(files: Files, vocab_size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Text and type of every id; ids that the tokenizer does not use are padding, as in llama.cpp's converter."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for text, i in files.model["vocab"].items():
        tokens[i], types[i] = text, gguf.TokenType.NORMAL
    for i, added in files.added.items():
        tokens[i] = added["content"]
        types[i] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    return tokens, types


def _add_special(writer: gguf.GGUFWriter, files: Files) -> None:
    """Ids of special tokens, what is added by itself, and the chat template."""
    bos, eos = files.token_id("bos_token"), files.token_id("eos_token")
    ids = {"bos": bos, "eos": eos, "unk": files.token_id("unk_token"), "pad": files.token_id("pad_token")}
    for name, value in ids.items():
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(value)
    ends = files.generation.get("eos_token_id")
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, eos)]
    if others:
        writer.add_eot_token_id(others[0])
    before, after = _template_tokens(files)
    writer.add_add_bos_token(_adds(before, bos, files, "beginning"))
    writer.add_add_eos_token(_adds(after, eos, files, "end"))
    if files.chat_template:
        writer.add_chat_template(files.chat_template)


def _template_tokens(files: Files) -> tuple[list[str], list[str]]:
    """The special tokens that the post-processor puts before and after a text."""
    before: list[str] = []
    after: list[str] = []
    for step in _flatten(files.tokenizer.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            single = step["single"]
            at = next(i for i, part in enumerate(single) if "Sequence" in part)
            before += [part["SpecialToken"]["id"] for part in single[:at]]
            after += [part["SpecialToken"]["id"] for part in single[at + 1 :]]
        elif step["type"] != "ByteLevel":
            raise ExportError(f"tokenizer.json has the post-processor {step['type']}, which llama.cpp has not")
    return before, after


def _adds(tokens: list[str], special: int | None, files: Files, where: str) -> bool:
    """Whether the tokens added at one side are exactly that side's own special token."""
    ids = {added["content"]: i for i, added in files.added.items()}
    if tokens and [ids.get(token) for token in tokens] != [special]:
        raise ExportError(
            f"tokenizer.json adds {tokens} at the {where} of a text, llama.cpp can add one token only: id {special}"
        )
    return bool(tokens)
