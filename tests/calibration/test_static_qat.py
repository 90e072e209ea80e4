"""QAT of a small CNN and a classifier for static integer grids, on drawn digits of a few templates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibration.static_qat import Options, StaticFakeQuant, StaticModel, prepare, train
from lilliput.errors import CalibrationError

QUICK = Options(weight_grid="int3-channel-f32", steps=150, learning_rate=0.02, scale_learning_rate=0.005)


def digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten fixed 8 x 8 templates, shifted by a pixel and with noise; (count, 1, 8, 8) and their classes."""
    templates = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(99)).round()
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(10, (count,), generator=generator)
    shifted = torch.where(
        torch.rand(count, 1, 1, 1, generator=generator) < 0.5, templates[classes], templates[classes].roll(1, 3)
    )
    return shifted + 0.6 * torch.randn(count, 1, 8, 8, generator=generator), classes


def fitted(model: nn.Module) -> nn.Module:
    """The float model, trained on drawn digits."""
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(120):
        x, classes = digits(64, step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), classes).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def cnn() -> nn.Module:
    conv = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, groups=2), nn.ReLU()]
    return fitted(nn.Sequential(*conv, nn.Flatten(), nn.Linear(144, 10)))


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    return fitted(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10)))


def batches(count: int = 6) -> list[Tensor]:
    return [digits(64, 1000 + i)[0] for i in range(count)]


def lost(model: nn.Module, candidate: nn.Module) -> float:
    """Divergence of the classes' probabilities on digits that nothing was trained on."""
    x, _ = digits(500, 5000)
    with torch.no_grad():
        return float(
            F.kl_div(candidate(x).log_softmax(-1), model(x).log_softmax(-1), reduction="batchmean", log_target=True)
        )


@pytest.mark.parametrize("kind", ["cnn", "classifier"])
def test_training_cuts_what_rounding_costs(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    rounded = prepare(model, batches(), QUICK)
    trained = train(model, batches(), QUICK)
    assert lost(model, trained.module) < 0.5 * lost(model, rounded)


def integer_forward(model: nn.Sequential, trained: StaticModel, x: Tensor) -> Tensor:
    """The runtime's own arithmetic: integer products, one rescale, the float bias."""
    for name, module in trained.module.named_children():
        if not isinstance(module, StaticFakeQuant):
            x = module(x)
            continue
        layer = trained.layers[name]
        grid, shape = layer.input, module.layer.weight.shape
        codes = np.clip(np.rint(x.numpy() / grid.scale[0]) + grid.zero_point[0], grid.qmin, grid.qmax)
        left = torch.from_numpy((codes - grid.zero_point[0]).astype(np.float64))
        right = torch.from_numpy(layer.weight.codes.astype(np.float64)).view(shape)
        if isinstance(module.layer, nn.Conv2d):
            total = F.conv2d(left, right, None, module.layer.stride, module.layer.padding, 1, module.layer.groups)
        else:
            total = F.linear(left, right)
        channels = (-1, 1, 1) if isinstance(module.layer, nn.Conv2d) else (-1,)
        scale = torch.from_numpy(layer.weight.scales[:, 0].astype(np.float64) * grid.scale[0])
        assert module.layer.bias is not None
        x = (total * scale.view(channels) + module.layer.bias.detach().view(channels)).float()
    return x


def test_the_module_computes_what_integers_do(cnn: nn.Sequential) -> None:
    trained = train(cnn, batches(), QUICK.model_copy(update={"steps": 20}))
    x, _ = digits(100, 7)
    with torch.no_grad():
        found = trained.module(x)
    difference = (found - integer_forward(cnn, trained, x)).abs()
    assert float(difference.median()) < 1e-5
    assert float((difference > 1e-3).float().mean()) < 0.02  # an input on a tie may fall to the other code


def test_at_eight_bits_little_is_lost(cnn: nn.Module) -> None:
    trained = train(cnn, batches(), QUICK.model_copy(update={"weight_grid": "int8-channel-f32", "steps": 30}))
    assert lost(cnn, trained.module) < 2e-3
    assert set(trained.layers) == {"0", "2", "5"}
    assert trained.layers["2"].weight.shape == (16, 36)
    assert all(layer.input.dtype == "int8" for layer in trained.layers.values())


def test_scales_of_inputs_learn_by_lsq(classifier: nn.Module) -> None:
    """By the logarithm of s, against LSQ's formula: outside by the edge's code, inside by what was rounded."""
    part = next(m for m in prepare(classifier, batches(), QUICK).modules() if isinstance(m, StaticFakeQuant))
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)) * 3
    part.quantized_input(x).sum().backward()
    scale, zero_point = float(part.scale().detach()), int(part.observed.zero_point[0])
    steps = x / scale
    low, high = part.observed.qmin - zero_point, part.observed.qmax - zero_point
    by_scale = torch.where(steps.round() < low, low, torch.where(steps.round() > high, high, steps.round() - steps))
    assert part.stretch.grad is not None
    assert float(part.stretch.grad) == pytest.approx(float(by_scale.sum()) * scale, rel=1e-3)


def test_batch_norms_and_nothing_to_train_are_refused() -> None:
    x = [torch.zeros(2, 1, 8, 8)]
    with pytest.raises(CalibrationError, match="batch norms"):
        prepare(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), x, QUICK)
    with pytest.raises(CalibrationError, match="no Linear or Conv2d"):
        prepare(nn.Sequential(nn.Flatten()), x, QUICK)
