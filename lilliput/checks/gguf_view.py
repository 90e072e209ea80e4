"""A GGUF file as rules see it: metadata, tensors with their place in the file, and the vocabulary.

Numbers are gguf's own: `gguf.quants.dequantize`. Decoder parameters come from lilliput.sources.gguf_file, which undoes
what llama.cpp's converter does (order of rows in q and k, stacked q, k, v). Two codes that share a byte lie half a
group apart: 16 columns in blocks of 32, 32 in Q4_K's groups of 64 (ggml/src/ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lilliput.checks.base import NotCheckedError
from lilliput.checks.opened import Fact, Parameter, Tensor, Text
from lilliput.errors import ArtifactError, LilliputError
from lilliput.grid import Float
from lilliput.inspection.found import TensorFound

PAIRED = {"Q4_0": 16, "Q4_1": 16, "Q5_0": 16, "Q5_1": 16, "IQ4_NL": 16, "IQ4_XS": 16, "Q4_K": 32, "MXFP4": 16}
# Tokens at which llama.cpp stops by their text alone, whatever the metadata names (src/llama-vocab.cpp).
STOPS = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
        "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<｜end▁of▁sentence｜>", "<end_of_utterance>",
    )
)  # fmt: skip
FLOAT_TYPES = ("F32", "F16", "BF16", "F64")
# key of the architecture → field of DecoderConfig
KEYS = {
    "block_count": "num_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "attention.layer_norm_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_positions",
}


@dataclass(frozen=True, eq=False)
class GgufFile:
    """The readers of its parts (one, but of split models), and the metadata by key."""

    path: Path
    readers: tuple[gguf.GGUFReader, ...]
    fields: Mapping[str, Any]

    @property
    def stored(self) -> list[gguf.ReaderTensor]:
        """The tensors of all parts."""
        return [tensor for reader in self.readers for tensor in reader.tensors]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture", ""))

    def tokens(self) -> list[str]:
        return list(self.fields.get("tokenizer.ggml.tokens") or ())

    def types(self) -> list[int]:
        return list(self.fields.get("tokenizer.ggml.token_type") or ())


def open_file(parts: Sequence[Path]) -> GgufFile:
    """One model, in one file or several. Raises ArtifactError for a file that gguf cannot read."""
    try:
        readers = tuple(gguf.GGUFReader(part) for part in parts)
        fields = {key: field.contents() for key, field in readers[0].fields.items()}
    except Exception as error:  # gguf slices a map of the file: a damaged one raises many kinds
        raise ArtifactError(f"{parts[0]}: not a readable GGUF file ({error}): fetch or write it again") from error
    return GgufFile(parts[0], readers, fields)


def tensors(file: GgufFile, found: tuple[TensorFound, ...]) -> tuple[Tensor, ...]:
    stored = {tensor.name: tensor for tensor in file.stored}
    return tuple(_tensor(stored[t.name], t) for t in found)


def _tensor(stored: Any, found: TensorFound) -> Tensor:
    kind = stored.tensor_type
    block = 0 if kind.name in FLOAT_TYPES else int(gguf.GGML_QUANT_SIZES[kind][0])
    read = partial(_numbers, stored, found.shape)
    return Tensor(found.name, found.role, found.dtype, found.shape, block, read, PAIRED.get(kind.name, 0))


def _numbers(stored: Any, shape: tuple[int, ...]) -> Float:
    try:
        return np.asarray(gguf.quants.dequantize(stored.data, stored.tensor_type), np.float32).reshape(shape)
    except (NotImplementedError, ValueError) as error:
        raise NotCheckedError(
            f"{stored.name} ({stored.tensor_type.name}) cannot be read as numbers: {error}"
        ) from error


def parameters(file: GgufFile, held: tuple[Tensor, ...]) -> Iterator[Parameter]:
    """The decoder's parameters, through the family that reads this architecture.

    Raises NotCheckedError where there is none, or the file is not whole.
    """
    from lilliput.source import open_original

    by_name, last = {tensor.name: tensor for tensor in held}, ""

    try:
        original = open_original(file.path)

        def read(name: str) -> Float:
            nonlocal last
            if name not in by_name:
                raise NotCheckedError(f"tensor {name} is missing")
            last = name
            return by_name[name].read()

        for name, values in original.parameters(read):
            yield Parameter(name, by_name[last], values)
    except LilliputError as error:
        raise NotCheckedError(f"no family reads this file: {error}") from error


def facts(file: GgufFile) -> dict[str, Fact]:
    """What the metadata says of the model, by field of DecoderConfig."""
    prefix = f"{file.architecture}."
    found: dict[str, Fact] = {}
    for key, field in KEYS.items():
        value = file.fields.get(prefix + key)
        if isinstance(value, int | float):
            found[field] = Fact(value, prefix + key)
    table = next((t for t in file.stored if t.name == "token_embd.weight"), None)
    if table is not None:
        found["vocab_size"] = Fact(int(table.shape[1]), "token_embd.weight")
    return found


def claimed(file: GgufFile) -> Fact | None:
    """`general.file_type`, where it names a quantized type."""
    value = file.fields.get("general.file_type")
    try:
        name = gguf.LlamaFileType(value).name if isinstance(value, int) else ""
    except ValueError:
        return None
    return Fact(name, "general.file_type") if "Q" in name else None


def text(file: GgufFile) -> Text:
    """What the metadata says of text. The stated end comes first; where none is stated, there is none."""
    ids = [file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    stated = [int(i) for i in ids if i is not None]
    by_text = [i for i, token in enumerate(file.tokens()) if token in STOPS] if stated else []
    ends = tuple(dict.fromkeys(stated + by_text))
    return Text(
        place="tokenizer.ggml.tokens",
        tokens=len(file.tokens()) or None,
        end_ids=ends,
        end_place="tokenizer.ggml.eos_token_id",
        template=file.fields.get("tokenizer.chat_template"),
        template_place="tokenizer.chat_template",
    )
