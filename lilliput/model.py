"""What a model is between the stages: SourceModel → TracedModel, and (solved on grids) QuantizedModel.

All three speak of one decoder (lilliput/decoder.py) by the same parameter names. A matrix is
(out, in); `layers.{i}.` stands before a layer's own names:

    embedding                     (vocab, hidden); also the head where config.tied_embeddings
    position_embedding            (max_positions, hidden)      only learned positions (GPT-2)
    attention_norm[.bias]         (hidden,)
    attention.q|k|v[.bias]        (heads * head_dim, hidden)   RoPE in half-split order (as transformers)
    attention.q_norm|k_norm       (head_dim,)                  only with config.qk_norm
    attention.o[.bias]            (hidden, heads * head_dim)
    attention_post_norm           (hidden,)                    only with config.post_norms
    mlp_norm[.bias]               (hidden,)
    mlp.gate                      (intermediate, hidden)       only gated MLPs
    mlp.up[.bias]                 (intermediate, hidden)
    mlp.down[.bias]               (hidden, intermediate)
    mlp_post_norm                 (hidden,)                    only with config.post_norms
    norm[.bias]                   (hidden,)
    head                          (vocab, hidden)              only where not tied

A norm's weight is what is multiplied: families that store it less one (Gemma) add the one as they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from safetensors import safe_open

from lilliput.errors import SourceError
from lilliput.grid import Float, QuantizedTensor
from lilliput.rope import RopeScaling

Role = Literal["linear", "embedding", "head", "vector"]
Feature = Literal[
    "qk_norm", "post_norms", "embedding_scale", "attention_scale", "sliding_window", "attention_softcap",
    "logit_softcap", "rope_scaling", "local_rope", "partial_rope", "rope_free_layers",
]  # fmt: skip
FEATURES: tuple[Feature, ...] = get_args(Feature)


@dataclass(frozen=True)
class DecoderConfig:
    """What the generic decoder needs to know of a causal LM. Sizes are counts of elements.

    A layer computes h += post(o(attention(norm(h)))), then h += post(mlp(norm(h))); post is a norm with `post_norms`,
    else nothing.

    attention_bias         of q, k and v; output_bias that of o
    embedding_scale        multiplies what is looked up (Gemma: sqrt(hidden)), never the head, tied or not
    attention_scale        of the scores; None: 1 / sqrt(head_dim)
    windows                a layer each: positions that a query sees, its own among them; 0: all. (): no layer has one
    attention_softcap      scores become cap * tanh(scores / cap) before the mask; 0: they stay
    logit_softcap          the same of the logits
    rope_theta             base of the rotary embedding; rope_scaling changes its frequencies
    rope_local_theta       base in the layers that have a window, never scaled (Gemma 3); None: they are like the others
    rope_dims              dimensions of each head that rotate, 0: all. The rest comes out of the rotation as it went
                           in: its frequency is 0. Rows of q and k are in an order in which the first rope_dims / 2 of
                           either half rotate (`rope.full_order`), so that tables are as wide as ever.
    rope_free_layers       layers that do not rotate at all (SmolLM3)
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    positions: Literal["rope", "learned"]
    activation: Literal["silu", "gelu_tanh"]
    gated_mlp: bool
    attention_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    rope_theta: float = 10000.0
    output_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    windows: tuple[int, ...] = ()
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None
    rope_dims: int = 0
    rope_free_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """What JSON made lists and objects of is as it was."""
        for name in ("windows", "rope_free_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        scaling: Any = self.rope_scaling
        if isinstance(scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling(**scaling))

    @property
    def norm_bias(self) -> bool:
        return self.norm == "layer"

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def window(self, layer: int) -> int:
        """Positions that a query of the layer sees, its own among them; 0: all."""
        return self.windows[layer] if self.windows else 0

    def rotation(self, layer: int) -> Literal["global", "local"] | None:
        """Which rotary table the layer rotates by, if any."""
        if self.positions != "rope" or layer in self.rope_free_layers:
            return None
        return "local" if self.rope_local_theta is not None and self.window(layer) else "global"

    @property
    def features(self) -> frozenset[Feature]:
        """What this decoder has beyond a plain one. An exporter refuses those that it does not lower."""
        has: dict[Feature, bool] = {
            "qk_norm": self.qk_norm,
            "post_norms": self.post_norms,
            "embedding_scale": self.embedding_scale != 1,
            "attention_scale": self.score_scale != self.head_dim**-0.5,
            "sliding_window": any(self.windows),
            "attention_softcap": bool(self.attention_softcap),
            "logit_softcap": bool(self.logit_softcap),
            "rope_scaling": self.rope_scaling is not None,
            "local_rope": any(self.rotation(i) == "local" for i in range(self.num_layers)),
            "partial_rope": bool(self.rope_dims),
            "rope_free_layers": bool(self.rope_free_layers),
        }
        return frozenset(feature for feature, there in has.items() if there)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape, in the order of computation."""
        shapes: dict[str, tuple[int, ...]] = {"embedding": (self.vocab_size, self.hidden_size)}
        if self.positions == "learned":
            shapes["position_embedding"] = (self.max_positions, self.hidden_size)
        for i in range(self.num_layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in self._layer_shapes().items()}
        shapes |= self._norm_shapes("norm")
        if not self.tied_embeddings:
            shapes["head"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _norm_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        names = (name, f"{name}.bias") if self.norm_bias else (name,)
        return dict.fromkeys(names, (self.hidden_size,))

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = self._norm_shapes("attention_norm")
        shapes |= self._linear("attention.q", heads, self.hidden_size, self.attention_bias)
        shapes |= self._linear("attention.k", kv_heads, self.hidden_size, self.attention_bias)
        shapes |= self._linear("attention.v", kv_heads, self.hidden_size, self.attention_bias)
        if self.qk_norm:
            shapes |= {"attention.q_norm": (self.head_dim,), "attention.k_norm": (self.head_dim,)}
        shapes |= self._linear("attention.o", self.hidden_size, heads, self.output_bias)
        if self.post_norms:
            shapes |= self._norm_shapes("attention_post_norm")
        shapes |= self._norm_shapes("mlp_norm")
        if self.gated_mlp:
            shapes |= self._linear("mlp.gate", self.intermediate_size, self.hidden_size, self.mlp_bias)
        shapes |= self._linear("mlp.up", self.intermediate_size, self.hidden_size, self.mlp_bias)
        shapes |= self._linear("mlp.down", self.hidden_size, self.intermediate_size, self.mlp_bias)
        if self.post_norms:
            shapes |= self._norm_shapes("mlp_post_norm")
        return shapes

    @staticmethod
    def _linear(name: str, rows: int, cols: int, bias: bool) -> dict[str, tuple[int, ...]]:
        return {name: (rows, cols)} | ({f"{name}.bias": (rows,)} if bias else {})


def role_of(name: str) -> Role:
    """What a parameter is to quantization. `vector` covers norms, biases and learned positions: never quantized."""
    if name in ("embedding", "head"):
        return name  # type: ignore[return-value]
    last = name.rsplit(".", 1)[-1]
    return "linear" if last in ("q", "k", "v", "o", "gate", "up", "down") else "vector"


class Weights(Mapping[str, Float]):
    """Read-only parameters of one safetensors file, each read when asked for: (shape as stored) float32.

    The file is opened anew for each: an open one stays mapped, and every page that was read counts as this
    process's memory until it is closed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            self._names = frozenset(file.keys())

    def __getitem__(self, name: str) -> Float:
        if name not in self._names:
            raise KeyError(name)
        with self._open() as file:
            return np.asarray(file.get_tensor(name), dtype=np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            file = safe_open(self.path, framework="numpy")
        except Exception as error:  # safetensors raises its own untyped errors
            raise SourceError(f"{self.path}: not a readable safetensors file ({error})") from error
        with file:
            yield file


@dataclass(frozen=True, eq=False)
class SourceModel:
    """A float model in the decoder's own terms. `tokenizer` is a folder that transformers' AutoTokenizer opens.

    The two proofs are sentences for the report; one that begins with "not proven" says why it was not made.
    """

    name: str
    config: DecoderConfig
    weights: Mapping[str, Float]
    tokenizer: Path
    sha256: str  # of the files that it was read from
    origin: str  # what the user called it
    license: str | None = None
    tokenizer_parity: str = "not proven: not tried"
    decoder_proof: str = "not proven: not tried"
    codes: Mapping[str, QuantizedTensor] = field(default_factory=dict)  # of matrices that the source holds on a grid
    not_passed: Mapping[str, str] = field(default_factory=dict)  # why others that it quantizes have no codes here


@dataclass(frozen=True)
class TensorInfo:
    """A graph input or output. dtype is numpy's name."""

    name: str
    dtype: Literal["float32", "int32"]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One operator. `inputs` name graph inputs, other nodes' outputs, or parameters (by parameter name).

    op            inputs                                         attributes            outputs
    embedding     table, indices (T,)                                                  x (1, T, hidden)
    linear        x, weight[, bias]                                                    y (1, T, out)
    rms_norm      x, weight                                      eps                   y
    layer_norm    x, weight, bias                                eps                   y
    head_norm     x (1, T, heads * head_dim), weight (head_dim,) eps, heads            y
    add, mul      a, b (same shape)                                                    y
    scale         x                                              factor                y = factor * x
    silu, gelu_tanh, tanh   x                                                          y
    attention     q, k, v, k_cache, v_cache, positions[, cos, sin]   num_heads, num_kv_heads, head_dim, scale,
                                                                 window, softcap       y, k_cache', v_cache'
    last          x (1, T, hidden)                                                     y (1, 1, hidden)

    head_norm is the RMS norm of each head's head_dim columns alone, with one weight for all heads; between the
    linears of q and k and their attention.

    attention rotates q and k where cos and sin (C, head_dim / 2) are given (half-split), writes k and v
    (1, T, kv_heads * head_dim) into the caches (1, kv_heads, C, head_dim) at `positions`, and attends causally: the
    query at position p sees cache slots max(0, p - window + 1)..p, all of 0..p where window is 0. Scores are
    scale * q·k, then softcap * tanh(scores / softcap) where softcap is not 0.

    The tables are named rope.cos and rope.sin, or rope.local_cos and rope.local_sin, layer by layer
    (DecoderConfig.rotation); lilliput.decoder.rope_tables gives them by name. They hold scaled frequencies and,
    multiplied in, the attention factor of a RopeScaling: an exporter that reads them has no more to do about either.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, int | float]


@dataclass(frozen=True)
class Signature:
    """One way to call the model: inputs tokens (T,), positions (T,), then k_cache_{i}, v_cache_{i} per layer;
    outputs logits (1, 1, vocab) of the last position, then the updated caches under the same names with `.out`."""

    name: Literal["prefill", "decode"]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class TracedModel:
    """The decoder's graph as torch.export traced it, in operators that every exporter lowers."""

    config: DecoderConfig
    signatures: tuple[Signature, ...]

    def signature(self, name: str) -> Signature:
        return next(s for s in self.signatures if s.name == name)


@dataclass(frozen=True)
class SolveStep:
    """What one step of a rule's solvers left: E|D x|² / E|W x|² over its matrices, D what rounding changed.

    Steps go in order: plain rounding to nearest (`rtn`), each transform with plain rounding after it, the solver.
    A matrix that the source held quantized and that was quantized anew has a step of its own, `re-quantized`, by its
    name: |W - W'|² / |W|², W the source's values.
    """

    match: str  # the rule's pattern
    grid: str
    step: str
    relative_error: float
    source_grid: str | None = None  # of a re-quantized matrix: the source's


@dataclass(frozen=True, eq=False)
class LowRank:
    """The adapter of one matrix: `alpha / rank · b @ a` is added to it."""

    a: Float  # (rank, cols) float32
    b: Float  # (rows, rank) float32
    alpha: float

    def delta(self) -> Float:
        """(rows, cols) float32."""
        found: Float = np.float32(self.alpha / len(self.a)) * (self.b @ self.a)
        return found


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A solved model: matrices on their grids, the rest as float32. Nothing downstream chooses numbers again."""

    name: str
    config: DecoderConfig
    quantized: Mapping[str, QuantizedTensor]
    floats: Mapping[str, Float]  # norms, biases, learned positions, and whatever a rule keeps in float
    tokenizer: Path
    provenance: Mapping[str, str]  # source sha256, solver per tensor group, calibration text's sha256, license
    steps: tuple[SolveStep, ...] = ()  # where there were statistics

    def dequantized(self, name: str) -> Float:
        """Parameter `name` as the artifacts hold it, float32."""
        return self.quantized[name].dequantize() if name in self.quantized else self.floats[name]
