"""The decoder proof: our decoder's logits against transformers' own model, on fixed token ids, before anything else.

Compared is the largest difference over the standard deviation of the reference's logits, all in float32. Where layers
have windows that the fixed tokens do not fill, they are compared once more with both models' windows shortened. A GGUF
file is read by transformers' own import of its weights (which is right, unlike its import of tokenizers).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from lilliput.errors import SourceError
from lilliput.model import DecoderConfig, SourceModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TOLERANCE = 1e-4  # of the logits' standard deviation
ROWS, STEPS = 2, 48
SHORT_WINDOW = 16


def prove(source: SourceModel, original: Path, *, allow_remote_code: bool = False) -> str:
    """Compare and return the sentence for the report. `original` is the folder or GGUF file that `source` came from.

    Raises SourceError where they differ by more than TOLERANCE, or where transformers cannot read `original`.
    """
    tokens = fixed_tokens(source.config.vocab_size, min(STEPS, source.config.max_positions))
    pairs = zip(_our_logits(source, tokens), _their_logits(source, original, tokens, allow_remote_code), strict=True)
    error = max(relative_error(ours, theirs) for ours, theirs in pairs)
    if not error <= TOLERANCE:  # also a NaN
        raise SourceError(
            f"{original}: the decoder's logits differ from transformers' by {error:.2e} of their spread, wanted at "
            f"most {TOLERANCE:.0e}: the model computes something that the generic decoder does not"
        )
    return (
        f"proven against transformers: logits within {error:.1e} of their spread on {ROWS} x {tokens.shape[1]} tokens"
    )


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


def _their_logits(source: SourceModel, original: Path, tokens: Tensor, allow_remote_code: bool) -> list[Tensor]:
    import torch

    # only their plain attention has soft caps
    attention = "eager" if source.config.attention_softcap else "sdpa"
    try:
        with _quietly():
            model = (
                _their_gguf_model(source.config, original, attention)
                if original.is_file()
                else _their_model(original, attention, allow_remote_code)
            )
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


def _their_gguf_model(ours: DecoderConfig, path: Path, attention: str) -> PreTrainedModel:
    """Their import of the file. Sizes that it does not read from the metadata are set beforehand: GPT-2's positions
    and inner width, Llama's biases. Wrong ones could not pass: shapes would not fit, or logits differ."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    config = AutoConfig.from_pretrained(**place)
    if ours.family == "gpt2":
        config.n_positions, config.n_inner = ours.max_positions, ours.intermediate_size
    else:
        config.attention_bias, config.mlp_bias = ours.attention_bias, ours.mlp_bias
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        **place, config=config, dtype=torch.float32, attn_implementation=attention
    )
    return model
