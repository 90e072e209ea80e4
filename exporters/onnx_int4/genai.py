"""The files that make the folder an onnxruntime-genai model: genai_config.json and the tokenizer.

Field meanings: onnxruntime-genai's src/config.h and its own builder's make_genai_config (0.18).

`past_present_share_buffer` lets the client bind one buffer of `max_length` positions as past and present.
The type "decoder" is its name for a plain decoder-only model, whatever the family. The logits' middle dimension is
1 in the graph, which the client takes for a head that computes the last position only.

The client reads tokenizer.json with code of its own (onnxruntime-extensions 0.18), whose `Digits` step leaves
numerals other than decimal digits (½, ², Ⅷ) joined to a space before them, while tokenizers takes them apart. The copy
in the folder says the same in plain patterns, which both read alike: \\p{N} is Rust's `char::is_numeric`, and
BYTE_LEVEL is the pattern that tokenizers' `ByteLevel` itself applies (its pre_tokenizers/byte_level.rs). It passes over
a normalizer NFC (Qwen's): `write` gives a note that says so.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lilliput.errors import ExportError
from lilliput.model import DecoderConfig, QuantizedModel

CONFIG_FILE = "genai_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
NOT_COMPOSED = (
    "onnxruntime-genai's tokenizer does not compose characters (NFC) as the model's own does: text that writes é as e "
    "and a combining accent becomes other tokens there, give it composed text"
)
# No memory pattern: ONNX Runtime makes one for every new input shape, and the mask widens at each step.
SESSION_OPTIONS = {"log_id": "onnxruntime-genai", "provider_options": [], "enable_mem_pattern": False}
NAMES = {
    "inputs": {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    },
    "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
}


def write(model: QuantizedModel, context: int, main_file: str, folder: Path) -> tuple[str, ...]:
    """Write genai_config.json and copy the tokenizer's files into `folder`; what is to say of them."""
    for name in TOKENIZER_FILES:
        if (model.tokenizer / name).is_file():
            shutil.copyfile(model.tokenizer / name, folder / name)
    if not (folder / "tokenizer.json").is_file():
        raise ExportError(f"{model.tokenizer}: no tokenizer.json, which onnxruntime-genai reads: save a fast tokenizer")
    _spell_out_digits(folder / "tokenizer.json")
    text = {"model": _model(model, context, main_file), "search": _search(context)}
    (folder / CONFIG_FILE).write_text(json.dumps(text, indent=2) + "\n")
    return (NOT_COMPOSED,) if _composes(_json(folder / "tokenizer.json").get("normalizer")) else ()


def _composes(normalizer: dict[str, Any] | None) -> bool:
    steps = (normalizer or {}).get("normalizers", [normalizer or {}])
    return any(step.get("type") == "NFC" for step in steps)


def _spell_out_digits(path: Path) -> None:
    """Rewrite a tokenizer.json that splits digits and bytes by named steps; others stay as they are."""
    tokenizer = _json(path)
    steps = (tokenizer.get("pre_tokenizer") or {}).get("pretokenizers", [])
    if any(step["type"] == "Digits" for step in steps):
        tokenizer["pre_tokenizer"]["pretokenizers"] = [new for step in steps for new in spelled_out(step)]
        path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False), encoding="utf-8")


def spelled_out(step: dict[str, Any]) -> list[dict[str, Any]]:
    """A pre-tokenizer's step as steps that split by a pattern, where there are such."""
    if step["type"] == "Digits":
        return [_split(r"\p{N}" if step["individual_digits"] else r"\p{N}+")]
    if step["type"] == "ByteLevel" and step.get("use_regex", True) and not step.get("add_prefix_space"):
        return [_split(BYTE_LEVEL), {**step, "use_regex": False}]
    return [step]


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _model(model: QuantizedModel, context: int, main_file: str) -> dict[str, Any]:
    bos, eos = special_tokens(model.tokenizer)
    return {
        "type": "decoder",
        "vocab_size": model.config.vocab_size,
        "context_length": context,
        "bos_token_id": bos if bos is not None else eos[0],
        "eos_token_id": eos,
        "pad_token_id": eos[0],
        "decoder": _decoder(model.config, main_file),
    }


def _decoder(config: DecoderConfig, main_file: str) -> dict[str, Any]:
    positions = {"position_ids": "position_ids"} if config.positions == "learned" else {}
    return {
        "filename": main_file,
        "session_options": SESSION_OPTIONS,
        "hidden_size": config.hidden_size,
        "head_size": config.head_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_hidden_layers": config.num_layers,
        "inputs": NAMES["inputs"] | positions,
        "outputs": NAMES["outputs"],
    }


def _search(context: int) -> dict[str, Any]:
    """Greedy search: what a user gets who sets nothing is reproducible."""
    return {
        "do_sample": False,
        "early_stopping": True,
        "max_length": context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }


def special_tokens(tokenizer: Path) -> tuple[int | None, list[int]]:
    """The ids of the token that begins a text, if any, and of those that end one: in generation_config.json, or else
    as tokenizer_config.json names them. Raises ExportError where nothing ends a text."""
    stated = _json(tokenizer / "generation_config.json")
    named = _json(tokenizer / "tokenizer_config.json")
    ids = _token_ids(_json(tokenizer / "tokenizer.json"))
    bos, eos = (stated.get(f"{k}_token_id", ids.get(_text(named.get(f"{k}_token")))) for k in ("bos", "eos"))
    if eos is None:
        raise ExportError(f"{tokenizer}: neither generation_config.json nor tokenizer_config.json names an eos token")
    return bos, [eos] if isinstance(eos, int) else list(eos)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _text(token: str | dict[str, Any] | None) -> str:
    return token["content"] if isinstance(token, dict) else token or ""


def _token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    listed = vocabulary if isinstance(vocabulary, dict) else {token: i for i, (token, _) in enumerate(vocabulary)}
    return listed | {t["content"]: t["id"] for t in tokenizer.get("added_tokens", [])}
