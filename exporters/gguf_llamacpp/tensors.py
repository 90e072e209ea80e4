"""Which tensors a GGUF file of each architecture holds, and which decoder parameters each is made of.

Names are gguf's own (constants.py, TENSOR_NAMES). What differs between architectures:

    order of rows   where llama.cpp rotates neighbours, q and k are in ggml's interleaved order: within each head, row
                    2j is the half-split row j and row 2j + 1 the half-split row head_dim / 2 + j. Where a part of the
                    head rotates, that part is first, as in checkpoints
    stacks          q, k and v in one matrix (gpt2, phi3), gate and up in one (phi3)

Both are exact: a quantized row keeps its codes and scales wherever it goes. A tied head is left out, llama.cpp
then takes token_embd. Frequencies that metadata cannot say are tensors of divisors, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt

from exporters.gguf_llamacpp import architectures
from exporters.gguf_llamacpp.architectures import Architecture
from lilliput.grid import Float
from lilliput.model import DecoderConfig
from lilliput.rope import full_order, inverse_frequencies

KINDS = {
    "embedding": gguf.MODEL_TENSOR.TOKEN_EMBD, "position_embedding": gguf.MODEL_TENSOR.POS_EMBD,
    "norm": gguf.MODEL_TENSOR.OUTPUT_NORM, "head": gguf.MODEL_TENSOR.OUTPUT,
    "attention_norm": gguf.MODEL_TENSOR.ATTN_NORM, "attention.q": gguf.MODEL_TENSOR.ATTN_Q,
    "attention.k": gguf.MODEL_TENSOR.ATTN_K, "attention.v": gguf.MODEL_TENSOR.ATTN_V,
    "attention.o": gguf.MODEL_TENSOR.ATTN_OUT, "mlp_norm": gguf.MODEL_TENSOR.FFN_NORM,
    "mlp.gate": gguf.MODEL_TENSOR.FFN_GATE, "mlp.up": gguf.MODEL_TENSOR.FFN_UP,
    "mlp.down": gguf.MODEL_TENSOR.FFN_DOWN, "attention.q_norm": gguf.MODEL_TENSOR.ATTN_Q_NORM,
    "attention.k_norm": gguf.MODEL_TENSOR.ATTN_K_NORM, "attention_post_norm": gguf.MODEL_TENSOR.ATTN_POST_NORM,
    "mlp_post_norm": gguf.MODEL_TENSOR.FFN_POST_NORM,
}  # fmt: skip
LONG = (gguf.MODEL_TENSOR.ROPE_FACTORS_SHORT, gguf.MODEL_TENSOR.ROPE_FACTORS_LONG)
STACKED = {"attention.q": gguf.MODEL_TENSOR.ATTN_QKV, "mlp.gate": gguf.MODEL_TENSOR.FFN_UP}  # by their first part


@dataclass(frozen=True)
class Part:
    """One decoder parameter in a file's tensor: its rows, and how those of each head are ordered (None: as they are).

    head_order[i] is the row of the decoder's head that stands at row i of the file's.
    """

    parameter: str
    rows: int
    head_order: tuple[int, ...] | None = None

    def order(self) -> npt.NDArray[np.intp]:
        """order[i] is the decoder's row that stands at the file's row i."""
        rows = np.arange(self.rows, dtype=np.intp)
        if self.head_order is None:
            return rows
        return rows.reshape(-1, len(self.head_order))[:, list(self.head_order)].reshape(-1)


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file: its parts one below the other."""

    name: str
    parts: tuple[Part, ...]


def file_tensors(config: DecoderConfig) -> Iterator[FileTensor]:
    """The tensors in the order of computation."""
    architecture, shapes = architectures.of(config), config.parameter_shapes()
    stacks = {stack[0]: stack for stack in architecture.stacks}
    inside = {part for stack in architecture.stacks for part in stack[1:]}
    for parameter in shapes:
        inner = _inner(parameter)
        if inner in inside:
            continue
        together = [parameter.replace(inner, other) for other in stacks.get(inner, (inner,))]
        parts = tuple(Part(name, shapes[name][0], _head_order(config, architecture, name)) for name in together)
        yield FileTensor(_file_name(parameter, STACKED[inner] if inner in stacks else KINDS[inner]), parts)


def _inner(parameter: str) -> str:
    """The parameter's name within its layer, without `.bias`."""
    bare = parameter.removesuffix(".bias")
    return bare.split(".", 2)[2] if bare.startswith("layers.") else bare


def _head_order(config: DecoderConfig, architecture: Architecture, parameter: str) -> tuple[int, ...] | None:
    if _inner(parameter) not in ("attention.q", "attention.k") or config.positions != "rope":
        return None
    own = np.arange(config.head_dim)
    if architecture.interleaved:
        return tuple(own.reshape(2, -1).T.reshape(-1).tolist())
    return tuple(np.argsort(full_order(config.head_dim, config.rope_dims)).tolist()) if config.rope_dims else None


def _file_name(parameter: str, kind: gguf.MODEL_TENSOR) -> str:
    layer = parameter.split(".")[1] if parameter.startswith("layers.") else ""
    suffix = "bias" if parameter.endswith(".bias") else "weight"
    return f"{gguf.TENSOR_NAMES[kind].format(bid=layer)}.{suffix}"


def rope_tensors(config: DecoderConfig) -> dict[str, Float]:
    """(rotating dims / 2,) float32 divisors of the plain frequencies, where metadata cannot say them.

    A long RoPE is known for its original positions alone, so that both of its tables are the one for them.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in ("llama3", "longrope"):
        return {}
    dims = config.rope_dims or config.head_dim
    plain, scaled = (inverse_frequencies(config.rope_theta, dims, 0, s) for s in (None, scaling))
    divisors = np.asarray((plain / scaled).numpy(), np.float32)
    if long_rope(config):
        return dict.fromkeys((f"{gguf.TENSOR_NAMES[kind]}.weight" for kind in LONG), divisors)
    return {f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight": divisors}


def long_rope(config: DecoderConfig) -> bool:
    """Whether divisors are written as a long RoPE's: `phi3` knows no other, and only there is an attention factor."""
    scaling = config.rope_scaling
    return (
        scaling is not None
        and scaling.kind == "longrope"
        and (config.family == "phi3" or scaling.attention_factor != 1)
    )
