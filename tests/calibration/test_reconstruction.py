"""Reconstruction: the least squares that it solves, what it lowers in every kind of decoder, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_qat import samples
from tiny_models import quantize, tiny_source

from calibration import gptq, qat, reconstruction
from calibration.reconstruction import Pair, reconstruct
from lilliput.errors import CalibrationError
from lilliput.model import SourceModel, role_of
from lilliput.recipe_schema import Recover

ONLY = Recover(steps=0, precision="float32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return tiny_source(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("onto_the_stream", [False, True])
def test_the_aim_is_the_least_squares_solution(onto_the_stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's, of the same problem written out token by token."""
    monkeypatch.setattr(reconstruction, "BLEND", 1.0)
    monkeypatch.setattr(reconstruction, "DAMPING", 0.0)
    draw = torch.Generator().manual_seed(1)
    x, noise, h, lost = (torch.randn(4, 50, size, generator=draw) for size in (12, 12, 8, 8))
    h *= torch.linspace(0.5, 20, 50)[:, None]
    inputs, stream = Pair(x, x + 0.2 * noise), Pair(h, h - 0.3 * lost)
    weight = torch.randn(8, 12, generator=draw)
    aim = reconstruction._Moments.of(inputs, stream if onto_the_stream else None, eps=0.0).aim(weight)
    wanted = x @ weight.T + (0.3 * lost if onto_the_stream else 0.0)
    w = h.square().mean(-1, keepdim=True).rsqrt() if onto_the_stream else torch.ones(4, 50, 1)
    best, *_ = np.linalg.lstsq((w * inputs.student).flatten(0, 1).numpy(), (w * wanted).flatten(0, 1).numpy())
    assert np.allclose(aim.numpy(), best.T, atol=2e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_it_lowers_the_divergence_on_text_that_it_did_not_see(kind: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, kind)
    solved = quantize(source, "int3-b32")
    trained, found = qat.recover(source, solved, samples(96), ONLY, tmp_path / "work")
    assert found.kept
    assert found.steps == 0
    assert found.kld_after == found.kld_reconstructed
    assert found.kld_after < 0.9 * found.kld_before
    changed = {name for name in solved.quantized if not trained.quantized[name].same_as(solved.quantized[name])}
    assert changed == {name for name in solved.quantized if role_of(name) == "linear"}
    assert all(np.array_equal(trained.floats[name], solved.floats[name]) for name in solved.floats)


def test_only_what_matches_is_solved_again(source: SourceModel) -> None:
    solved = quantize(source, "int3-b32")
    found = reconstruct(source, solved, samples(), "layers.1.mlp.*")
    changed = {name for name in solved.quantized if not found.quantized[name].same_as(solved.quantized[name])}
    assert changed == {f"layers.1.mlp.{part}" for part in ("gate", "up", "down")}


def test_training_starts_from_it_and_keeps_it_after_a_kill(
    source: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved, options = quantize(source, "int3-b32"), Recover(steps=3, precision="float32")
    first, found = qat.recover(source, solved, samples(48), options, tmp_path)
    assert found.kld_reconstructed is not None
    assert found.kld_after < found.kld_reconstructed < found.kld_before

    def never(*_: object) -> None:
        raise AssertionError("it was made before")

    monkeypatch.setattr(gptq.Solver, "solve", never)
    again, _ = qat.recover(source, solved, samples(48), options, tmp_path)
    assert all(again.quantized[name].same_as(first.quantized[name]) for name in first.quantized)


def test_folded_factors_are_left_alone_or_refused(source: SourceModel, tmp_path: Path) -> None:
    solved = quantize(source, "int3-b32")
    folded = replace(solved, floats={**solved.floats, "layers.0.mlp_norm": 2 * solved.floats["layers.0.mlp_norm"]})
    wanted = ONLY.model_copy(update={"reconstruct": True})
    with pytest.raises(CalibrationError, match=r"layers\.0\.mlp_norm.*set recover\.reconstruct to false"):
        qat.recover(source, folded, samples(), wanted, tmp_path / "a")
    _, found = qat.recover(source, folded, samples(), ONLY, tmp_path / "b")
    assert found.kld_reconstructed is None
