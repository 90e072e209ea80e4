"""A tokenizer rebuilt from the metadata of a GGUF file, as the files that transformers' AutoTokenizer opens.

GGUF holds tokens, types, scores and merges (gguf's docs: "ggml.tokenizer.*"), not the rules of the tokenizer;
those are llama.cpp's (src/llama-vocab.cpp), and are facts that stand here as data:

- model `gpt2`: byte-level BPE. Text is cut by the regular expressions that `tokenizer.ggml.pre` names, one
  after the other, each cutting the pieces that the last one left; then bytes are merged by rank.
- model `llama`: SentencePiece's BPE with byte fallback. Spaces become U+2581 (one more in front, also after each
  special token, where add_space_prefix is set); of the neighbours whose union is a token, the one of the
  highest score is merged first. That is BPE whose merges are all splits of all tokens, ordered by score.
- Tokens of type CONTROL, UNKNOWN and USER_DEFINED are found in the raw text before anything else, so
  that a run of spaces of type USER_DEFINED stays what it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lilliput.errors import SourceError, did_you_mean

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

# Token types of the format (gguf.TokenType).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL


@dataclass(frozen=True)
class PreTokenizerRule:
    """What a `tokenizer.ggml.pre` means: regular expressions in order; whole pieces that are tokens stay unmerged
    (`ignore_merges`); whether a beginning-of-sequence token is added where the file does not say."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_DIGITS_GPT2 = PreTokenizerRule((r"\p{N}", _GPT2))
_PLAIN_GPT2 = PreTokenizerRule((_GPT2,))
_LLAMA3_MERGED = PreTokenizerRule((_LLAMA3,))
_LLAMA3_WHOLE = PreTokenizerRule((_LLAMA3,), ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {
    "default": PreTokenizerRule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "smollm": _DIGITS_GPT2, "starcoder": _DIGITS_GPT2, "refact": _DIGITS_GPT2, "command-r": _DIGITS_GPT2,
    "codeshell": _DIGITS_GPT2, "exaone": _DIGITS_GPT2, "minerva-7b": _DIGITS_GPT2,
    "gpt-2": _PLAIN_GPT2, "phi-2": _PLAIN_GPT2, "mpt": _PLAIN_GPT2, "olmo": _PLAIN_GPT2, "jais": _PLAIN_GPT2,
    "llama-bpe": _LLAMA3_WHOLE, "llama3": _LLAMA3_WHOLE, "llama-v3": _LLAMA3_WHOLE, "falcon3": _LLAMA3_WHOLE,
    "pixtral": _LLAMA3_WHOLE, "dbrx": _LLAMA3_MERGED, "smaug-bpe": _LLAMA3_MERGED,
    "qwen2": PreTokenizerRule((_QWEN2,)), "stablelm2": PreTokenizerRule((_QWEN2,)),
    "deepseek-r1-qwen": PreTokenizerRule((_QWEN2,)),
}  # fmt: skip
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # llama.cpp's, where a file of model `llama` names none
END_OF_GENERATION = ("eos", "eot", "eom")  # the tokens after which llama.cpp stops


@dataclass(frozen=True)
class Vocabulary:
    """`tokenizer.*` of a GGUF file. `ids` holds bos, eos, unknown, padding, eot, eom where they are named."""

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]  # empty unless model is llama
    merges: tuple[str, ...]  # "left right"; empty unless model is gpt2
    ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None

    def token(self, name: str) -> str | None:
        """The text of the special token that `ids` names, or None."""
        return self.tokens[self.ids[name]] if name in self.ids else None

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end a generation."""
        return sorted({self.ids[name] for name in END_OF_GENERATION if name in self.ids})


def read(fields: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary in GGUF metadata. Raises SourceError for what is missing or not supported, by its key."""
    model = _field(fields, "model")
    if model not in ("gpt2", "llama"):
        raise SourceError(f"tokenizer.ggml.model {model!r} is not supported: {did_you_mean(model, ('gpt2', 'llama'))}")
    pre = fields.get("tokenizer.ggml.pre", "default")
    if model == "gpt2" and pre not in PRE_TOKENIZERS:
        raise SourceError(f"tokenizer.ggml.pre {pre!r} is not supported: {did_you_mean(pre, PRE_TOKENIZERS)}")
    tokens = tuple(_field(fields, "tokens"))
    types = tuple(fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens))
    scores = tuple(_field(fields, "scores")) if model == "llama" else ()
    if len(types) != len(tokens) or (scores and len(scores) != len(tokens)):
        raise SourceError(f"tokenizer.ggml: {len(tokens)} tokens, {len(types)} types, {len(scores)} scores do not fit")
    by_default = model == "llama" or PRE_TOKENIZERS[pre].add_bos
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=tuple(_field(fields, "merges")) if model == "gpt2" else (),
        ids=_special_ids(fields, model, len(tokens)),
        add_bos=bool(fields.get("tokenizer.ggml.add_bos_token", by_default)),
        add_eos=bool(fields.get("tokenizer.ggml.add_eos_token", False)),
        add_space_prefix=model == "llama" and bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _field(fields: Mapping[str, Any], key: str) -> Any:
    value = fields.get(f"tokenizer.ggml.{key}")
    if value is None:
        raise SourceError(
            f"GGUF metadata has no 'tokenizer.ggml.{key}', so its tokenizer cannot be rebuilt: convert the model anew"
        )
    return value


def _special_ids(fields: Mapping[str, Any], model: str, count: int) -> dict[str, int]:
    ids = dict(SENTENCEPIECE_IDS) if model == "llama" else {}
    for name in ("bos", "eos", "unknown", "padding", "eot", "eom"):
        value = fields.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and 0 <= int(value) < count:
            ids[name] = int(value)
    if "eos" not in ids:
        raise SourceError(
            "GGUF metadata has no 'tokenizer.ggml.eos_token_id' within its tokens: a generation would not end"
        )
    return ids


def build(vocabulary: Vocabulary) -> Tokenizer:
    """The vocabulary as a tokenizer of the `tokenizers` package."""
    from tokenizers import AddedToken, processors

    tokenizer = _byte_level(vocabulary) if vocabulary.model == "gpt2" else _sentencepiece(vocabulary)
    for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (CONTROL, UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])
    bos, eos = vocabulary.token("bos"), vocabulary.token("eos")
    before = [bos] if vocabulary.add_bos and bos else []
    after = [eos] if vocabulary.add_eos and eos else []
    if before or after:
        single = [*before, "$A", *after]
        pair = [*single, *(f"{part}:1" for part in (*before, "$B", *after))]
        ids = [(text, vocabulary.tokens.index(text)) for text in dict.fromkeys([*before, *after])]
        template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
        base = [processors.ByteLevel(trim_offsets=False)] if vocabulary.model == "gpt2" else []
        tokenizer.post_processor = processors.Sequence([*base, template]) if base else template
    return tokenizer


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    rule = PRE_TOKENIZERS[vocabulary.pre]
    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    merges = [_pair(line) for line in vocabulary.merges]
    unknown = [line for (left, right), line in zip(merges, vocabulary.merges, strict=True) if left + right not in ids]
    if unknown:
        raise SourceError(
            f"tokenizer.ggml.merges: {unknown[0]!r} makes no token of the vocabulary ({len(unknown)} such)"
        )
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=rule.ignore_merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(line: str) -> tuple[str, str]:
    left, _, right = line.partition(" ")
    return left, right


def _pre_tokenizer(rule: PreTokenizerRule) -> PreTokenizer:
    """One Split for each expression, then bytes. GPT-2's could stand as ByteLevel's own, and single digits as Digits,
    but onnxruntime-genai reads those shapes differently (digits of other scripts, runs of spaces); this one it
    reads as `tokenizers` does."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    bpe = models.BPE(
        vocab=ids, merges=merges_by_score(vocabulary), unk_token=vocabulary.token("unknown"), fuse_unk=True,
        byte_fallback=True,
    )  # fmt: skip
    tokenizer = Tokenizer(bpe)
    prefix = [normalizers.Prepend(SPACE)] if vocabulary.add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.add_space_prefix else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """All pairs of tokens whose union is a token, the union of the highest score first."""
    known = {text: i for i, text in enumerate(vocabulary.tokens)}
    order = sorted(known.values(), key=lambda i: (-vocabulary.scores[i], i))
    texts = [vocabulary.tokens[i] for i in order if vocabulary.types[i] in (NORMAL, USER_DEFINED, UNUSED)]
    splits = ((text[:at], text[at:]) for text in texts for at in range(1, len(text)))
    return [(left, right) for left, right in splits if left in known and right in known]


def save(vocabulary: Vocabulary, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat template, generation_config.json."""
    from transformers import PreTrainedTokenizerFast

    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {key: vocabulary.token(name) for name, key in names.items() if vocabulary.token(name)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build(vocabulary), clean_up_tokenization_spaces=False, **special
    )
    if vocabulary.chat_template:
        tokenizer.chat_template = vocabulary.chat_template
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    save_generation_config(folder, vocabulary.ids.get("bos"), vocabulary.end_ids, vocabulary.ids.get("padding"))


def save_generation_config(folder: Path, bos_id: int | None, end_ids: list[int], pad_id: int | None) -> None:
    """Write generation_config.json: which token begins, which end a generation."""
    end: int | list[int] = end_ids[0] if len(end_ids) == 1 else end_ids
    ids = {"bos_token_id": bos_id, "eos_token_id": end, "pad_token_id": pad_id}
    text = json.dumps({k: v for k, v in ids.items() if v is not None}, indent=2, sort_keys=True)
    (folder / "generation_config.json").write_text(text + "\n", encoding="utf-8")
