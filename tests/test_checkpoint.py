"""The checkpoint holds a tensor of every grid bit for bit, and the same model is the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from grid_cases import random_tensor
from tiny_models import tiny_quantized_model

from lilliput import checkpoint
from lilliput.grid import COMMON_GRIDS, GGUF_GRIDS, grid


@pytest.mark.parametrize("name", [*COMMON_GRIDS, *GGUF_GRIDS])
def test_a_tensor_of_every_grid_is_given_back(tmp_path: Path, name: str) -> None:
    model = tiny_quantized_model(tmp_path)
    tensor = random_tensor(grid(name), 3, 512, seed=0)
    model = replace(model, quantized=dict(model.quantized) | {"head": tensor})
    for folder in ("first", "second"):
        checkpoint.save(model, tmp_path / folder)
    loaded = checkpoint.load(tmp_path / "first").quantized["head"]
    assert loaded.spec == tensor.spec
    assert loaded.same_as(tensor)
    assert np.array_equal(loaded.dequantize(), tensor.dequantize())
    first, second = (tmp_path / folder / "codes.safetensors" for folder in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
