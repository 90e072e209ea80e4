"""Low-rank recovery: the base keeps its codes, adapters learn, and what they merge into is measured again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_qat import samples
from tiny_models import quantize, tiny_source

from calibration import adapters, qat
from calibration.low_rank import Adapter
from lilliput.model import SourceModel
from lilliput.recipe_schema import Recover

QUICK = Recover(method="adapters", steps=30, batch=8, rank=4, alpha=8, adapter_learning_rate=0.01, precision="float32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return tiny_source(tmp_path_factory.mktemp("model"))


def test_gradients_are_those_of_the_product(source: SourceModel) -> None:
    part = Adapter("w", quantize(source).quantized["layers.0.mlp.up"], QUICK)
    part.parameters["b"] += torch.randn(part.parameters["b"].shape, generator=torch.Generator().manual_seed(0))
    a, b = (part.parameters[name].clone().requires_grad_(True) for name in "ab")
    gradient = torch.randn(part.base.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((gradient * (part.base + part.factor * b @ a)).sum(), (a, b))
    found = part.gradients(gradient)
    assert torch.allclose(found["a"], wanted[0], rtol=1e-4, atol=1e-4)
    assert torch.allclose(found["b"], wanted[1], rtol=1e-4, atol=1e-4)


def test_training_starts_at_the_base_and_keeps_its_codes(source: SourceModel, tmp_path: Path) -> None:
    solved = quantize(source, "int2-b32")
    trainer = qat.Trainer(source, solved, samples(48), QUICK)
    found = qat.trained(trainer, QUICK, tmp_path)
    assert found.kld_before == pytest.approx(
        qat.Trainer(source, solved, samples(48), QUICK.model_copy(update={"method": "qat"})).held_out_divergence()
    )
    assert found.kld_after < 0.95 * found.kld_before
    assert all(trainer.model().quantized[name].same_as(solved.quantized[name]) for name in solved.quantized)
    trained = adapters.adapters_of(trainer)
    assert all(np.abs(adapter.b).max() > 0 for adapter in trained.values())
    full = adapters.merged(source, solved, trained)
    name = "layers.1.attention.q"
    assert np.allclose(full.weights[name], trainer.fakes[name].values().numpy(), atol=1e-6)
    assert np.array_equal(full.weights["norm"], source.weights["norm"])


def test_merged_and_solved_again_on_the_same_grids(source: SourceModel, tmp_path: Path) -> None:
    solved = quantize(source, "int2-b32")
    model, found = adapters.recover(source, solved, samples(48), QUICK, tmp_path)
    assert found.kld_unmerged is not None
    assert found.kept == (found.kld_after < found.kld_before)
    assert found.kept
    assert {n: t.spec for n, t in model.quantized.items()} == {n: t.spec for n, t in solved.quantized.items()}
    assert not model.quantized["layers.0.mlp.up"].same_as(solved.quantized["layers.0.mlp.up"])
    assert model.quantized["embedding"].same_as(solved.quantized["embedding"])
