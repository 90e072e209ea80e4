"""The decoder proof: our decoder's logits against transformers' own model, on fixed token ids, before anything else.

Compared is the largest difference over the standard deviation of the reference's logits, all in float32. Where layers
have windows that the fixed tokens do not fill, they are compared once more with both models' windows shortened. A GGUF
file is read by transformers' own import of its weights (which is right, unlike its import of tokenizers). A folder of
quantized weights is read by transformers only where each format's own kernels run, most of them on a GPU alone: there
its model gets the weights as we dequantized them, so the proof is of the decoder. (That they are what the formats mean
is shown by tests, against the formats' own libraries where they run.)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.errors import SourceError
from lilliput.grid import Float
from lilliput.model import DecoderConfig, SourceModel
from lilliput.rope import RopeScaling

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TOLERANCE = 1e-4  # of the logits' standard deviation
ROWS, STEPS = 2, 48
SHORT_WINDOW = 16
Dequantized = Mapping[str, Float]  # by the checkpoint's names, each made when asked for


def prove(
    source: SourceModel, original: Path, *, allow_remote_code: bool = False, dequantized: Dequantized | None = None
) -> str:
    """Compare and return the sentence for the report. `original` is the folder or GGUF file that `source` came from,
    `dequantized` the tensors of a quantized folder.

    Raises SourceError where they differ by more than TOLERANCE, or where transformers cannot read `original`.
    """
    tokens = fixed_tokens(source.config.vocab_size, min(STEPS, source.config.max_positions))
    theirs = _their_logits(source, original, tokens, allow_remote_code, dequantized)
    error = max(relative_error(*pair) for pair in zip(_our_logits(source, tokens), theirs, strict=True))
    if not error <= TOLERANCE:  # also a NaN
        raise SourceError(
            f"{original}: the decoder's logits differ from transformers' by {error:.2e} of their spread, wanted at "
            f"most {TOLERANCE:.0e}: the model computes something that the generic decoder does not"
        )
    found = f"logits within {error:.1e} of their spread on {ROWS} x {tokens.shape[1]} tokens"
    given = "" if dequantized is None else ", given the weights as Lilliput dequantized them"
    return f"proven against transformers{given}: {found}"


def fixed_tokens(vocab_size: int, steps: int) -> Tensor:
    """(ROWS, steps) int64, the same for the same vocabulary."""
    import torch

    return torch.randint(0, vocab_size, (ROWS, steps), generator=torch.Generator().manual_seed(0))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the reference's standard deviation."""
    return float((ours - theirs).abs().max() / theirs.std())


def _window_settings(config: DecoderConfig) -> tuple[int | None, ...]:
    """What the windows are shortened to, run by run; None: they stay."""
    return (None, SHORT_WINDOW) if max(config.windows, default=0) > SHORT_WINDOW else (None,)


def _our_logits(source: SourceModel, tokens: Tensor) -> list[Tensor]:
    """(ROWS, STEPS, vocab) of each window setting."""
    import torch

    from lilliput import decoder

    results = []
    for window in _window_settings(source.config):
        windows = tuple(min(w, window) if window else w for w in source.config.windows)
        model = decoder.build(replace(source, config=replace(source.config, windows=windows)))
        with torch.no_grad():
            results.append(model(tokens))
    return results


def _their_logits(
    source: SourceModel, original: Path, tokens: Tensor, allow_remote_code: bool, dequantized: Dequantized | None
) -> list[Tensor]:
    import torch

    # only their plain attention has soft caps
    attention = "eager" if source.config.attention_softcap else "sdpa"
    try:
        with _quietly():
            if dequantized is not None:
                model = _their_dequantized_model(original, dequantized, attention, allow_remote_code)
            elif original.is_file():
                model = _their_gguf_model(source.config, original, attention)
            else:
                model = _their_model(original, attention, allow_remote_code)
    except Exception as error:  # transformers raises whatever its readers raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"{original}: transformers cannot read it, so the decoder cannot be proven ({reason})"
        ) from error
    results = []
    for window in _window_settings(source.config):
        if window:
            model.config.sliding_window = window
        with torch.no_grad():
            results.append(model.eval()(tokens, use_cache=False).logits)
    return results


@contextmanager
def _quietly() -> Iterator[None]:
    """Without progress bars of their own, and the warnings of what they import on the way (torchao, where it is)."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)


def _their_model(folder: Path, attention: str, allow_remote_code: bool) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation=attention, trust_remote_code=allow_remote_code
    )
    return model


def _their_dequantized_model(
    folder: Path, weights: Dequantized, attention: str, allow_remote_code: bool
) -> PreTrainedModel:
    """Their model of the configuration, with these weights by the checkpoint's names; all parameters must be there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=allow_remote_code)
    del config.quantization_config
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=allow_remote_code
    )
    parameters = dict(model.named_parameters())
    absent = sorted(set(parameters) - set(weights))
    if absent:
        raise ValueError(f"the folder holds no {absent[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(weights[name]))
    return model


def _their_gguf_model(ours: DecoderConfig, path: Path, attention: str) -> PreTrainedModel:
    """Their import of the file. What it does not read from the metadata is set beforehand, as we read it: wrong sizes
    could not pass, as shapes would not fit; windows, scales, caps and rope scaling are proven as arithmetic alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    config = AutoConfig.from_pretrained(**place)
    for name, value in _unread(ours).items():
        setattr(config, name, value)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        **place, config=config, dtype=torch.float32, attn_implementation=attention
    )
    return model


def _unread(ours: DecoderConfig) -> dict[str, Any]:
    """By transformers' names, what its import of GGUF files leaves at its defaults."""
    if ours.family == "gpt2":
        return {"n_positions": ours.max_positions, "n_inner": ours.intermediate_size}
    return {
        "max_position_embeddings": ours.max_positions,
        "head_dim": ours.head_dim,
        "attention_bias": ours.attention_bias,
        "mlp_bias": ours.mlp_bias,
        "partial_rotary_factor": (ours.rope_dims or ours.head_dim) / ours.head_dim,
        "rope_scaling": None if ours.rope_scaling is None else _their_scaling(ours.rope_scaling),
        "rope_local_base_freq": ours.rope_local_theta,
        "query_pre_attn_scalar": ours.score_scale**-2,
        "sliding_window": max(ours.windows, default=0) or None,
        "layer_types": ["sliding_attention" if ours.window(i) else "full_attention" for i in range(ours.num_layers)],
        "attn_logit_softcapping": ours.attention_softcap or None,
        "final_logit_softcapping": ours.logit_softcap or None,
    }


def _their_scaling(ours: RopeScaling) -> dict[str, Any]:
    fields: dict[str, dict[str, Any]] = {
        "linear": {"factor": ours.factor},
        "llama3": {"low_freq_factor": ours.low_freq_factor, "high_freq_factor": ours.high_freq_factor},
        "yarn": {"beta_fast": ours.beta_fast, "beta_slow": ours.beta_slow, "truncate": ours.truncate},
        "longrope": {"short_factor": list(ours.divisors), "long_factor": list(ours.divisors)},
    }
    original = {"original_max_position_embeddings": ours.original_positions} if ours.original_positions else {}
    shared = {"rope_type": ours.kind, "factor": ours.factor, "attention_factor": ours.attention_factor}
    return {**shared, **original, **fields[ours.kind]}
