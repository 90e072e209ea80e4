"""Tiny GGUF files for tests, written with gguf-py from the Hugging Face folders of tiny_models.

Rows of Llama's q and k are permuted to ggml's interleaved order, as llama.cpp's convert_hf_to_gguf.py does it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from lilliput.families import gpt2, llama

Writer = gguf.GGUFWriter
Change = Callable[[Writer], None]


def byte_level_vocabulary(writer: Writer, tokenizer_json: Path, pre: str = "gpt-2") -> None:
    """The vocabulary of a byte-level tokenizer.json; its added tokens become CONTROL."""
    text = json.loads(tokenizer_json.read_text())
    ids = text["model"]["vocab"] | {token["content"]: token["id"] for token in text["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    control = {token["content"] for token in text["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in control else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in text["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def write_vocabulary(path: Path, *changes: Change) -> Path:
    """A file that holds a vocabulary only; `changes` add to it."""
    writer = Writer(path, "llama")
    for change in changes:
        change(writer)
    return _close(writer, path)


def write_llama(
    path: Path, folder: Path, kind: Type = Type.F32, changes: Iterable[Change] = (), skip: Iterable[str] = (),
    kinds: Mapping[str, Type] | None = None,
) -> Path:  # fmt: skip
    """The model in `folder` as a GGUF file whose matrices are of type `kind`, but those named in `kinds` of their own;
    tensors named in `skip` are left out."""
    hf, tensors = _read(folder)
    writer = Writer(path, "llama")
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(hf["head_dim"])
    writer.add_value_length(hf["head_dim"])
    writer.add_rope_dimension_count(hf["head_dim"])
    writer.add_rope_freq_base(hf["rope_theta"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_vocab_size(hf["vocab_size"])
    byte_level_vocabulary(writer, folder / "tokenizer.json")
    for change in changes:
        change(writer)
    names = {llama.checkpoint_name(n): llama.gguf_name(n) for n in _decoder_names(folder)}
    for name, array in tensors.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if names[name] not in skip:
            its = (kinds or {}).get(names[name], kind)
            _add(writer, names[name], permute(array, hf[heads]) if heads else array, its)
    return _close(writer, path)


def write_family(path: Path, folder: Path, kind: Type = Type.F32, changes: Iterable[Change] = ()) -> Path:
    """A model of tiny_models.KINDS as a GGUF file: tensors by gguf's own map of Hugging Face's names.

    Gemma's norms are written with their ones, as convert_hf_to_gguf.py does it; rows of SmolLM3's q and k permuted.
    """
    hf, tensors = _read(folder)
    family = hf["model_type"].removesuffix("_text")
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family), hf["num_hidden_layers"]
    )
    writer = Writer(path, family)
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * hf.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(hf["rope_theta"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_vocab_size(hf["vocab_size"])
    if hf.get("sliding_window"):
        writer.add_sliding_window(hf["sliding_window"])
    byte_level_vocabulary(writer, folder / "tokenizer.json")
    for change in changes:
        change(writer)
    for name, array in tensors.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None
        if family.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        _add(writer, theirs, permute(array, hf[heads]) if family == "smollm3" and heads else array, kind)
    return _close(writer, path)


def write_gpt2(path: Path, folder: Path, kind: Type = Type.F32) -> Path:
    """The GPT-2 in `folder` as a GGUF file: Conv1D matrices transposed to (out, in)."""
    hf, tensors = _read(folder)
    writer = Writer(path, "gpt2")
    writer.add_block_count(hf["n_layer"])
    writer.add_context_length(hf["n_positions"])
    writer.add_embedding_length(hf["n_embd"])
    writer.add_feed_forward_length(4 * hf["n_embd"])
    writer.add_head_count(hf["n_head"])
    writer.add_layer_norm_eps(hf["layer_norm_epsilon"])
    byte_level_vocabulary(writer, folder / "tokenizer.json")
    inner = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_1": "attn_norm", "ln_2": "ffn_norm"}
    inner |= {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    top = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    for name, array in tensors.items():
        bare, suffix = name.removeprefix("transformer.").rsplit(".", 1)
        _, _, rest = bare.partition("h.")
        index, _, part = rest.partition(".")
        theirs = f"blk.{index}.{inner[part]}" if part else top[bare]
        matrix = array.T if array.ndim == 2 and part else array
        _add(writer, f"{theirs}.{suffix}", np.ascontiguousarray(matrix), kind)
    assert gpt2.GGUF_ARCHITECTURE == "gpt2"
    return _close(writer, path)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Half-split to interleaved order of the rows of each head."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from safetensors.numpy import load_file

    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def _decoder_names(folder: Path) -> list[str]:
    return list(llama.config(json.loads((folder / "config.json").read_text())).parameter_shapes())


def _add(writer: Writer, name: str, array: np.ndarray, kind: Type) -> None:
    stored = Type.F32 if array.ndim == 1 else kind
    writer.add_tensor(name, _quantized(np.ascontiguousarray(array), stored), raw_dtype=stored)


def _quantized(rows: np.ndarray, kind: Type) -> np.ndarray:
    """By gguf-py, or by ggml's own code (libgguf) for the types that gguf-py cannot quantize to."""
    try:
        return gguf.quants.quantize(rows, kind)
    except NotImplementedError:
        import libgguf

        return np.asarray(libgguf.quantize_rows(rows, int(kind))).view(np.uint8).reshape(len(rows), -1)


def _close(writer: Writer, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
