"""Reconstruction: solve a model again, layer by layer, on the inputs that it has, towards the float model's outputs.

A solve from the float model's statistics takes every matrix as if all before it were exact. Here the layers are done in
their order, each on x', the student's own input: what the layers before it, already on their codes, make of the
samples. The float model runs beside it, with x at the same place and h, h' the residual streams. Wanted is

    inputs of attention and MLP     minimise  E |W x - V x'|²                        over V on the grid
    o and down, onto the residual   minimise  E w |(h + W x) - (h' + V x')|²         w = 1 / (mean h² + ε)

of the token, ε the norms'; so that o and down also mend what earlier layers did to the residual stream, as far as
x' tells it. With H = E[w x' x'ᵀ], C = E[w x x'ᵀ] and R = E[w (h - h') x'ᵀ], the best V off the grid is W + D,

    D = (W (C - H) + R) (H + λ diag H)⁻¹

and GPTQ (calibration.gptq) rounds W + BLEND · D under H. It is the asymmetric correction of GPTAQ (Li et al. 2025,
arXiv:2504.02692), with the residual stream in it (as block reconstruction has it: BRECQ, Li et al. 2021,
arXiv:2102.05426). The weights w keep the few tokens with huge hidden states (Sun et al. 2024, arXiv:2402.17762) from
being all that counts: without them, and with BLEND 1 and λ 0.01, the KLD of SmolLM2-135M on other text rose to 0.21,
where plain GPTQ has 0.061 (int4-b32).

Where a norm stands between o or down and the residual (Gemma), R is left out. Tables, norms, biases, and matrices in
float stay as they are; so do those that `match` leaves out, but what they read is the student's. A model whose solve
folded factors into its matrices (AWQ, SmoothQuant) is refused: its inputs are not the float model's.

On SmolLM2-135M at int4-b32 with 188 samples of 512 tokens, the KLD on other text of two kinds fell from 0.068 and 0.069
(GPTQ) to 0.035 and 0.043 (python -m benchmarks.qat).

Memory: both models, and four hidden states and one inner activation of attention for all samples, (n, length, hidden)
float32. Cost: five passes' products over the samples, and one GPTQ solve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn

from calibration import gptq
from calibration.base import InputStatistics
from calibration.parallel import in_parallel
from calibration.samples import Samples
from calibration.student import student_of
from lilliput import decoder
from lilliput.decoder import Layer, Norm, Rope, ropes
from lilliput.errors import CalibrationError
from lilliput.grid import QuantizedTensor
from lilliput.model import QuantizedModel, SourceModel
from lilliput.progress import Progress, silent

BLEND = 0.5  # of the way to the best weights off the grid
DAMPING = 0.1  # λ
BATCH_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Pair:
    """The same thing in the float model and in the student: (n, length, size) float32."""

    teacher: Tensor
    student: Tensor

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = max(1, BATCH_TOKENS // self.teacher.shape[1])
        yield from zip(torch.split(self.teacher, size), torch.split(self.student, size), strict=True)

    def through(self, teacher: Callable[[Tensor], Tensor], student: Callable[[Tensor], Tensor]) -> Pair:
        parts = [(teacher(t), student(s)) for t, s in self.batches()]
        return Pair(torch.cat([t for t, _ in parts]), torch.cat([s for _, s in parts]))


@torch.no_grad()
def reconstruct(
    source: SourceModel, solved: QuantizedModel, samples: Samples, match: str, progress: Progress = silent
) -> QuantizedModel:
    """The model on the grids of `solved`, its matrices that `match` fits solved again.

    Raises CalibrationError where factors were folded into `solved`.
    """
    if name := folded(source, solved):
        raise CalibrationError(
            f"recover: {name} of {solved.name} is not the source's, a transform changed it: reconstruction wants a "
            "solve without transforms; take them out of quantize, or set recover.reconstruct to false"
        )
    teacher, student = decoder.build(source), student_of(solved)
    tokens = torch.from_numpy(samples.tokens.astype(np.int64))
    positions = torch.arange(tokens.shape[1])
    hidden = Pair(tokens, tokens).through(lambda t: teacher.embed(t, positions), lambda t: student.embed(t, positions))
    found: dict[str, QuantizedTensor] = {}
    for index, rope in enumerate(ropes(source.config, tokens.shape[1])):
        prefix = f"layers.{index}."
        old = {
            name.removeprefix(prefix): tensor
            for name, tensor in solved.quantized.items()
            if name.startswith(prefix) and fnmatchcase(name, match)
        }
        both = _Layers(teacher.layers[index], student.layers[index], rope, old)  # type: ignore[arg-type]
        hidden = both.advance(hidden)
        found |= {f"{prefix}{name}": tensor for name, tensor in both.solved.items()}
        progress(index + 1, source.config.num_layers)
    return replace(solved, quantized={**solved.quantized, **found})


def folded(source: SourceModel, solved: QuantizedModel) -> str | None:
    """The first norm of `solved` that is not the source's: a transform folded factors into it."""
    changed = (name for name, values in solved.floats.items() if not np.array_equal(values, source.weights[name]))
    return next(changed, None)


@dataclass(frozen=True, eq=False)
class _Moments:
    """Of the inputs x and x' (cols,) of a linear, float64: H and C (cols, cols), R (hidden, cols) or None."""

    own: Tensor
    cross: Tensor
    residual: Tensor | None
    tokens: int

    @classmethod
    def of(cls, inputs: Pair, stream: Pair | None, eps: float) -> _Moments:
        """`stream`: h and h', where the linear's output is added to them; `eps` is the norms'."""
        cols, tokens = inputs.student.shape[-1], inputs.student[..., 0].numel()
        own, cross = torch.zeros(cols, cols, dtype=torch.float64), torch.zeros(cols, cols, dtype=torch.float64)
        residual = None if stream is None else torch.zeros(stream.teacher.shape[-1], cols, dtype=torch.float64)
        streams = ((None, None) for _ in inputs.batches()) if stream is None else stream.batches()
        for (t, s), (h, g) in zip(inputs.batches(), streams, strict=True):
            x, y = t.flatten(0, 1), s.flatten(0, 1)
            if residual is not None and h is not None and g is not None:
                h, lost = h.flatten(0, 1), (h - g).flatten(0, 1)
                root = (h.square().mean(-1, keepdim=True) + eps).rsqrt()
                x, y = root * x, root * y
                residual += (root * lost).T @ y
            own += y.T @ y
            cross += x.T @ y
        return cls(own / tokens, cross / tokens, None if residual is None else residual / tokens, tokens)

    def aim(self, weight: Tensor) -> Tensor:
        """W + BLEND · D (rows, cols), the weights to round, of W (rows, cols) float32."""
        lost = weight.double() @ (self.cross - self.own)
        if self.residual is not None:
            lost += self.residual
        best: Tensor = weight + BLEND * torch.linalg.solve(gptq.damped(self.own, DAMPING), lost.T).T
        return best.float()


class _Layers:
    """A layer of the float model and of the student; `solved` fills up in the order of computation."""

    def __init__(self, teacher: Layer, student: Layer, rope: Rope, old: Mapping[str, QuantizedTensor]) -> None:
        self.teacher, self.student, self.rope, self.old = teacher, student, rope, old
        self.solved: dict[str, QuantizedTensor] = {}

    def advance(self, stream: Pair) -> Pair:
        """Solve this layer's matrices; the residual stream after it."""
        teacher, student, rope = self.teacher, self.student, self.rope
        normed = stream.through(teacher.attention_norm, student.attention_norm)
        self._solve(("attention.q", "attention.k", "attention.v"), normed, None)
        inner = normed.through(
            _input_of(teacher.attention.o, lambda x: teacher.attention(x, rope)),
            _input_of(student.attention.o, lambda x: student.attention(x, rope)),
        )
        stream = self._onto("attention.o", inner, stream, (teacher.attention_post_norm, student.attention_post_norm))
        normed = stream.through(teacher.mlp_norm, student.mlp_norm)
        self._solve(("mlp.gate", "mlp.up"), normed, None)
        inner = normed.through(_input_of(teacher.mlp.down, teacher.mlp), _input_of(student.mlp.down, student.mlp))
        return self._onto("mlp.down", inner, stream, (teacher.mlp_post_norm, student.mlp_post_norm))

    def _onto(self, name: str, inner: Pair, stream: Pair, norms: tuple[Norm | None, Norm | None]) -> Pair:
        """Solve o or down, and add its output to the stream."""
        self._solve((name,), inner, stream if norms[0] is None else None)
        added = inner.through(self.teacher.get_submodule(name), self.student.get_submodule(name))
        if norms[0] is not None and norms[1] is not None:
            added = added.through(norms[0], norms[1])
        return Pair(stream.teacher + added.teacher, stream.student + added.student)

    def _solve(self, names: Sequence[str], inputs: Pair, stream: Pair | None) -> None:
        """Solve the matrices that read one input, and write their values into the student."""
        names = [name for name in names if name in self.old]
        if not names:
            return
        moments = _Moments.of(inputs, stream, self.teacher.mlp_norm.eps)
        unknown = np.full(len(moments.own), np.nan, np.float32)
        seen = InputStatistics(moments.own.float().numpy(), unknown, unknown, moments.tokens)

        def one(name: str) -> QuantizedTensor:
            aim = moments.aim(self.teacher.get_parameter(f"{name}.weight"))
            return gptq.Solver().solve(aim.numpy(), self.old[name].spec, seen, gptq.Options())

        for name, tensor in zip(names, in_parallel(one, names), strict=True):
            self.solved[name] = tensor
            self.student.get_parameter(f"{name}.weight").copy_(torch.from_numpy(tensor.dequantize()))


def _input_of(module: nn.Module, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `module` is given while `run` runs."""

    def seen(x: Tensor) -> Tensor:
        found: list[Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, given: found.append(given[0]))
        try:
            run(x)
        finally:
            hook.remove()
        return found[0]

    return seen
