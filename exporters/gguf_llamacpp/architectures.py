"""What llama.cpp computes in each of its architectures, and what of a decoder it does not.

An architecture is compiled into llama.cpp (src/models/*.cpp, and llama_model_rope_type): metadata can change sizes and
some numbers, nothing else. What a decoder has beyond that is refused. Facts of 2026-10's source:

    rotary rows     `llama` and `smollm3` rotate neighbours (NORM), so that q and k stand in interleaved order; the
                    others rotate halves (NEOX), as the decoder does
    windows         in gemma2 (every other layer) and gemma3 (all but each n-th); read and switched off in phi3. Where
                    there are none, a file is exact for as many positions as the window has, which context_length says
    scores' scale   1 / sqrt(head_dim); in Gemma's 27B models, known by their layers, 1 / sqrt(hidden / heads)
    RoPE scaling    linear and yarn (its two betas fixed) by metadata, any other set of frequencies by a tensor of
                    divisors, for which `llama` and `phi3` alone have a place
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import gguf

from lilliput.errors import ExportError, did_you_mean
from lilliput.model import DecoderConfig, Feature
from lilliput.rope import YARN_BETAS, RopeScaling

QKV = ("attention.q", "attention.k", "attention.v")
LINEARS = (*QKV, "attention.o", "mlp.gate", "mlp.up", "mlp.down")
TOLERANCE = 1e-6  # relative, of numbers that llama.cpp computes from sizes


@dataclass(frozen=True)
class Architecture:
    """`stacks` are parameters that one tensor holds, one below the other; `square`: heads fill the hidden size."""

    name: gguf.MODEL_ARCH
    features: frozenset[Feature] = frozenset()
    biases: tuple[str, ...] = ()
    interleaved: bool = False
    stacks: tuple[tuple[str, ...], ...] = ()
    scalings: frozenset[str] = frozenset({"linear", "yarn"})
    square: bool = False
    layers_of_27b: int = 0

    @property
    def text(self) -> str:
        """The name as files have it."""
        return str(gguf.MODEL_ARCH_NAMES[self.name])


_SCALED: frozenset[Feature] = frozenset({"rope_scaling"})
_GEMMA: frozenset[Feature] = frozenset(
    {"post_norms", "embedding_scale", "attention_scale", "sliding_window", "logit_softcap"}
)
_DIVISORS = frozenset({"linear", "yarn", "llama3", "longrope"})
ARCHITECTURES = {
    "gpt2": Architecture(gguf.MODEL_ARCH.GPT2, biases=LINEARS, stacks=(QKV,)),
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, _SCALED, LINEARS, interleaved=True, scalings=_DIVISORS),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, _SCALED, QKV, square=True),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, _SCALED | {"qk_norm"}, QKV),
    "gemma2": Architecture(gguf.MODEL_ARCH.GEMMA2, _GEMMA | {"attention_softcap"}, layers_of_27b=46),
    "gemma3": Architecture(
        gguf.MODEL_ARCH.GEMMA3, _GEMMA | _SCALED | {"qk_norm", "local_rope"}, scalings=frozenset({"linear"}),
        layers_of_27b=62,
    ),
    "phi3": Architecture(
        gguf.MODEL_ARCH.PHI3, _SCALED | {"partial_rope"}, scalings=_DIVISORS - {"llama3"}, square=True,
        stacks=(QKV, ("mlp.gate", "mlp.up")),
    ),
    "smollm3": Architecture(gguf.MODEL_ARCH.SMOLLM3, _SCALED | {"rope_free_layers"}, QKV, interleaved=True),
}  # fmt: skip  # by the decoder's family


def of(config: DecoderConfig) -> Architecture:
    """llama.cpp's architecture of the decoder. Raises ExportError where there is none for its family."""
    if config.family not in ARCHITECTURES:
        raise ExportError(
            f"GGUF has no architecture here for {config.family!r}: {did_you_mean(config.family, ARCHITECTURES)}"
        )
    return ARCHITECTURES[config.family]


def fitted(config: DecoderConfig, context: int | None) -> tuple[DecoderConfig, str]:
    """The decoder as its architecture computes it for `context` positions (None: all), and a sentence for the report.

    Raises ExportError for what the architecture does not compute.
    """
    architecture, said = of(config), ""
    if "sliding_window" in config.features and "sliding_window" not in architecture.features:
        config, said = _within_window(config, architecture, context or config.max_positions)
    _refuse_features(config, architecture)
    _refuse_biases(config, architecture)
    if config.rope_scaling is not None:
        _refuse_scaling(config.rope_scaling, architecture)
    if architecture.layers_of_27b:
        _refuse_gemma(config, architecture)
    if architecture.square and config.num_heads * config.head_dim != config.hidden_size:
        raise ExportError(
            f"llama.cpp's {architecture.text} has heads that fill the hidden size, not {config.num_heads} of "
            f"{config.head_dim} in {config.hidden_size}"
        )
    return config, said


def _within_window(config: DecoderConfig, architecture: Architecture, context: int) -> tuple[DecoderConfig, str]:
    window = min(window for window in config.windows if window)
    if context > window:
        raise ExportError(
            f"llama.cpp has no sliding window in architecture {architecture.text}, and a query reaches past "
            f"{window} positions within a context of {context}: choose context ≤ {window}"
        )
    said = f"sliding window: llama.cpp has none in {architecture.text}, the file is exact up to its {window} positions"
    return replace(config, windows=(), max_positions=min(config.max_positions, window)), said


def _refuse_features(config: DecoderConfig, architecture: Architecture) -> None:
    missing = sorted(config.features - architecture.features)
    if missing:
        raise ExportError(f"llama.cpp's architecture {architecture.text} has no {', '.join(missing)}")
    free = tuple(i for i in range(config.num_layers) if (i + 1) % 4 == 0)
    if "rope_free_layers" in architecture.features and config.rope_free_layers != free:
        raise ExportError(
            f"llama.cpp's {architecture.text} rotates in all but each fourth layer, the model in all but "
            f"{list(config.rope_free_layers)}"
        )


def _refuse_biases(config: DecoderConfig, architecture: Architecture) -> None:
    names = {name.removesuffix(".bias").split(".", 2)[2] for name in config.parameter_shapes() if _is_bias(name)}
    beyond: Collection[str] = sorted(names - set(architecture.biases))
    if beyond:
        raise ExportError(f"llama.cpp's architecture {architecture.text} has no bias of {', '.join(beyond)}")


def _is_bias(name: str) -> bool:
    return name.startswith("layers.") and name.endswith(".bias") and not name.endswith("norm.bias")


def _refuse_scaling(scaling: RopeScaling, architecture: Architecture) -> None:
    if scaling.kind not in architecture.scalings:
        raise ExportError(
            f"llama.cpp's architecture {architecture.text} has no RoPE scaling {scaling.kind!r}, only "
            f"{', '.join(sorted(architecture.scalings))}"
        )
    if scaling.kind == "yarn" and ((scaling.beta_fast, scaling.beta_slow) != YARN_BETAS or not scaling.truncate):
        raise ExportError(
            f"llama.cpp's {architecture.text} has yarn's betas {YARN_BETAS} alone, truncated, not "
            f"({scaling.beta_fast}, {scaling.beta_slow})"
        )


def _refuse_gemma(config: DecoderConfig, architecture: Architecture) -> None:
    """Numbers that are not in the metadata: llama.cpp computes them."""
    is_27b = config.num_layers == architecture.layers_of_27b
    per_head = config.hidden_size // config.num_heads if is_27b else config.head_dim
    for what, seen, fixed in (
        ("a scale of scores", config.score_scale, per_head**-0.5),
        ("a scale of the embedding", config.embedding_scale, config.hidden_size**0.5),
    ):
        if abs(seen / fixed - 1) > TOLERANCE:
            raise ExportError(f"llama.cpp's {architecture.text} has {what} of {fixed:.6g}, the model {seen:.6g}")
    if "attention_softcap" in architecture.features and not (config.attention_softcap and config.logit_softcap):
        raise ExportError(f"llama.cpp's {architecture.text} always has soft caps, the model lacks one")


def window_pattern(config: DecoderConfig) -> int:
    """n where all but each n-th layer have the one window. Raises ExportError for other arrangements.

    llama.cpp's rule: layer i has it where i mod n < n - 1 (llama_hparams::set_swa_pattern).
    """
    has = [window > 0 for window in config.windows]
    sizes = set(config.windows) - {0}
    found = (n for n in range(1, len(has) + 2) if has == [i % n < n - 1 for i in range(len(has))])
    pattern = next(found, None)
    if pattern is None or len(sizes) > 1 or (config.family == "gemma2" and pattern != 2):
        raise ExportError(f"windows of {list(config.windows)} positions, layer by layer, are no pattern of llama.cpp's")
    return pattern
