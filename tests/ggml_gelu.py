"""ggml's GELU in torch: what llama.cpp computes where a model has one."""

from __future__ import annotations

import torch


def ggml_gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """ggml looks GELU up in a table from float16 to float16 between -10 and 10 (ggml-cpu/vec.h, GGML_GELU_FP16)."""
    assert approximate == "tanh"
    half = x.half().float()
    inner = 0.79788456080286535587989211986876 * half * (1.0 + 0.044715 * half * half)
    looked_up = (0.5 * half * (1.0 + torch.tanh(inner))).half().float()
    return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, looked_up))
