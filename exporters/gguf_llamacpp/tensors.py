"""Which tensors a GGUF file of each architecture holds, and which decoder parameters each is made of.

Names are gguf's own (constants.py, TENSOR_NAMES). Two architectures are written:

    llama   q and k in rows of ggml's interleaved order: within each head, row 2j is the half-split row j and row
            2j + 1 the half-split row head_dim / 2 + j (llama.cpp rotates neighbours, transformers halves)
    gpt2    q, k and v stacked in one matrix, attn_qkv

Both are exact: a quantized row keeps its codes and scales wherever it goes. A tied head is left out, llama.cpp
then takes token_embd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt

from exporters.base import refuse_features
from lilliput.errors import ExportError, did_you_mean
from lilliput.model import DecoderConfig, Feature

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2}  # by the decoder's family
KINDS = {
    "embedding": gguf.MODEL_TENSOR.TOKEN_EMBD, "position_embedding": gguf.MODEL_TENSOR.POS_EMBD,
    "norm": gguf.MODEL_TENSOR.OUTPUT_NORM, "head": gguf.MODEL_TENSOR.OUTPUT,
    "attention_norm": gguf.MODEL_TENSOR.ATTN_NORM, "attention.q": gguf.MODEL_TENSOR.ATTN_Q,
    "attention.k": gguf.MODEL_TENSOR.ATTN_K, "attention.v": gguf.MODEL_TENSOR.ATTN_V,
    "attention.o": gguf.MODEL_TENSOR.ATTN_OUT, "mlp_norm": gguf.MODEL_TENSOR.FFN_NORM,
    "mlp.gate": gguf.MODEL_TENSOR.FFN_GATE, "mlp.up": gguf.MODEL_TENSOR.FFN_UP,
    "mlp.down": gguf.MODEL_TENSOR.FFN_DOWN,
}  # fmt: skip
FEATURES: frozenset[Feature] = frozenset()  # of the decoder, beyond a plain one
FUSED = ("attention.q", "attention.k", "attention.v")


@dataclass(frozen=True)
class Part:
    """One decoder parameter in a file's tensor: its rows, and of how many heads they interleave (0: of none)."""

    parameter: str
    rows: int
    interleaved_heads: int

    def order(self) -> npt.NDArray[np.intp]:
        """order[i] is the decoder's row that stands at the file's row i."""
        rows = np.arange(self.rows, dtype=np.intp)
        if not self.interleaved_heads:
            return rows
        return rows.reshape(self.interleaved_heads, 2, -1).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file: its parts one below the other."""

    name: str
    parts: tuple[Part, ...]


def architecture(config: DecoderConfig) -> gguf.MODEL_ARCH:
    """llama.cpp's architecture of the decoder. Raises ExportError where there is none for its family."""
    if config.family not in ARCHITECTURES:
        raise ExportError(
            f"GGUF has no architecture here for {config.family!r}: {did_you_mean(config.family, ARCHITECTURES)}"
        )
    refuse_features(config, FEATURES, "llama.cpp")
    return ARCHITECTURES[config.family]


def file_tensors(config: DecoderConfig) -> Iterator[FileTensor]:
    """The tensors in the order of computation."""
    fused = gguf.MODEL_TENSOR.ATTN_QKV in gguf.MODEL_TENSORS[architecture(config)]
    shapes = config.parameter_shapes()
    for parameter in shapes:
        inner = _inner(parameter)
        if fused and inner in FUSED[1:]:
            continue
        together = (
            [parameter.replace("attention.q", other) for other in FUSED] if fused and inner == FUSED[0] else [parameter]
        )
        parts = tuple(Part(name, shapes[name][0], 0 if fused else _heads(config, inner)) for name in together)
        yield FileTensor(_file_name(parameter, fused), parts)


def _inner(parameter: str) -> str:
    """The parameter's name within its layer, without `.bias`."""
    bare = parameter.removesuffix(".bias")
    return bare.split(".", 2)[2] if bare.startswith("layers.") else bare


def _heads(config: DecoderConfig, inner: str) -> int:
    if config.positions != "rope":
        return 0
    return {"attention.q": config.num_heads, "attention.k": config.num_kv_heads}.get(inner, 0)


def _file_name(parameter: str, fused: bool) -> str:
    inner = _inner(parameter)
    kind = gguf.MODEL_TENSOR.ATTN_QKV if fused and inner in FUSED else KINDS[inner]
    layer = parameter.split(".")[1] if parameter.startswith("layers.") else ""
    suffix = "bias" if parameter.endswith(".bias") else "weight"
    return f"{gguf.TENSOR_NAMES[kind].format(bid=layer)}.{suffix}"
