"""QAT for static integer targets: a classifier or CNN whose weights and activations are both on integer grids.

Every nn.Linear and nn.Conv2d of a plain torch module is trained in its place:

    weight   (out, in · kernel) per output channel, by calibration.fake_quant on `weight_grid`
    input    x̂ = s · (clamp(round(x / s) + z, qmin, qmax) − z), per tensor

s and z are observed first (calibration.activations). s is then learned in logarithm, as LSQ does (Esser et al. 2019,
arXiv:1902.08153): rounding passes gradients straight through, clamping passes them to s alone. z stays, so that zero
stays a code (padding). The rounding is ONNX's QuantizeLinear: to even, before the zero point is added. Biases stay in
float: a runtime's int32 bias on the scale s · weight scale is finer than anything here.

The loss is the divergence of the float model's class probabilities: no labels are needed. Batch norms must be folded
before (torch.nn.utils.fusion.fuse_conv_bn_eval), as a static file has none.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from calibration import rtn
from calibration.activations import Selection, observe
from calibration.base import SolverOptions
from calibration.clipping import RangeOptions
from calibration.fake_quant import FakeQuant
from calibration.observers import ActivationGrid
from calibration.qat import rate
from lilliput.errors import CalibrationError
from lilliput.grid import QuantizedTensor, grid

TRAINED = (nn.Linear, nn.Conv2d)


class Options(SolverOptions):
    """Rates are of Adam: of positions in steps, of all scales relative to the scale."""

    weight_grid: str = "int8-channel-f32"
    steps: int = Field(default=200, ge=0)
    learning_rate: float = Field(default=0.01, ge=0)
    scale_learning_rate: float = Field(default=0.003, ge=0)
    bias_learning_rate: float = Field(default=0.001, ge=0)
    ranges: RangeOptions = RangeOptions()


@dataclass(frozen=True, eq=False)
class StaticLayer:
    """What ships of one layer."""

    weight: QuantizedTensor  # (out, in · kernel)
    input: ActivationGrid


@dataclass(frozen=True, eq=False)
class StaticModel:
    """The trained layers by module name, and the float module that computes as they do."""

    layers: Mapping[str, StaticLayer]
    module: nn.Module


class _Values(torch.autograd.Function):
    """A fake-quantized weight's values, with its own gradients."""

    @staticmethod
    def forward(ctx: Any, fake: FakeQuant, *parameters: Tensor) -> Tensor:
        ctx.fake = fake
        return fake.values()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.fake.gradients(gradients[0])
        return (None, *(found[kind] for kind in ctx.fake.parameters))


class StaticFakeQuant(nn.Module):
    """A Linear or Conv2d in training: its input and its weight on their grids."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, observed: ActivationGrid, weight_grid: str) -> None:
        super().__init__()
        self.layer, self.observed = layer, observed
        weight = layer.weight.detach().flatten(1).contiguous().numpy()
        self.fake = FakeQuant(rtn.Solver().solve(weight, grid(weight_grid), None, rtn.Options()))
        self.fake.parameters = {kind: nn.Parameter(tensor) for kind, tensor in self.fake.parameters.items()}
        self.stretch = nn.Parameter(torch.zeros(()))  # of the input's scale, logarithmic

    def scale(self) -> Tensor:
        """Of the input, () float32."""
        return torch.tensor(float(self.observed.scale[0])) * self.stretch.exp()

    def quantized_input(self, x: Tensor) -> Tensor:
        """x̂ of the formula above."""
        scale, zero_point = self.scale(), int(self.observed.zero_point[0])
        steps = x / scale
        steps = steps + (steps.round() - steps).detach()
        codes = (steps + zero_point).clamp(self.observed.qmin, self.observed.qmax)
        return (codes - zero_point) * scale

    def forward(self, x: Tensor) -> Tensor:
        values = _Values.apply(self.fake, *self.fake.parameters.values())  # type: ignore[no-untyped-call]
        weight, x = values.view_as(self.layer.weight), self.quantized_input(x)
        if isinstance(self.layer, nn.Conv2d):
            convolved: Tensor = self.layer._conv_forward(x, weight, self.layer.bias)
            return convolved
        return F.linear(x, weight, self.layer.bias)

    @torch.no_grad()
    def shipped(self) -> StaticLayer:
        """The codes and grids of now."""
        tensor = self.fake.tensor()
        scale = self.scale().reshape(1).numpy()
        return StaticLayer(tensor, replace(self.observed, scale=scale))


def train(model: nn.Module, batches: Sequence[Tensor], options: Options) -> StaticModel:
    """Train a copy of `model` (float, in eval mode) on inputs `batches`, round and round for `steps` steps.

    Raises CalibrationError for a model with batch norms, or with nothing to train.
    """
    student = prepare(model, batches, options)
    parts = [part for part in student.modules() if isinstance(part, StaticFakeQuant)]
    optimizer = torch.optim.Adam(_groups(parts, options))
    with torch.no_grad():
        answers = [model(batch).log_softmax(-1) for batch in batches]
    for step in range(options.steps):
        batch, answer = batches[step % len(batches)], answers[step % len(batches)]
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * rate(step / options.steps)
        loss = F.kl_div(student(batch).log_softmax(-1), answer, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for part in parts:
                part.fake.project()
    shipped = {name: part.shipped() for name, part in student.named_modules() if isinstance(part, StaticFakeQuant)}
    for name, layer in shipped.items():
        layer.weight.check(name)
    return StaticModel(shipped, student.eval())


def prepare(model: nn.Module, batches: Sequence[Tensor], options: Options) -> nn.Module:
    """A copy of the model with every layer replaced by its fake-quantized one, on observed ranges."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise CalibrationError("static QAT: the model has batch norms: fold them first (fuse_conv_bn_eval)")
    names = [name for name, module in model.named_modules() if isinstance(module, TRAINED)]
    if not names:
        raise CalibrationError(f"static QAT: {type(model).__name__} has no Linear or Conv2d to train")
    selection = Selection(tuple(f"{name}:input" for name in names))
    found = observe(model, batches, selection, options.ranges).grids
    student = copy.deepcopy(model)
    for name in names:
        parent, _, last = name.rpartition(".")
        layer = student.get_submodule(name)
        assert isinstance(layer, TRAINED)
        setattr(
            student.get_submodule(parent), last, StaticFakeQuant(layer, found[f"{name}:input"], options.weight_grid)
        )
    return student


def _groups(parts: Sequence[StaticFakeQuant], options: Options) -> list[dict[str, Any]]:
    """Parameters by their rate."""
    rates = {"u": options.learning_rate, "v": options.learning_rate, "t": options.scale_learning_rate}
    groups = [
        {"params": [tensor], "rate": rates[kind]} for part in parts for kind, tensor in part.fake.parameters.items()
    ]
    groups += [{"params": [part.stretch], "rate": options.scale_learning_rate} for part in parts]
    biases = [part.layer.bias for part in parts if part.layer.bias is not None]
    return [*groups, {"params": biases, "rate": options.bias_learning_rate}]
