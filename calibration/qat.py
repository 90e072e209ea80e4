"""QAT: train a solved model on its own grids, by distillation from the float model.

Every matrix of the decoder's layers is fake-quantized (calibration.fake_quant): what the forward pass multiplies by
is what ships. Norms and biases ship in float and are trained as they are; tables (embedding, head) and learned
positions stay as they were solved. The loss is the divergence of the float model's next-token distribution
(calibration.distillation) on the samples that calibration used.

One step: values of all matrices → forward and backward on `batch` sequences, `micro_batch` at a time → gradients
by positions, stretches and shifts → Adam (Kingma and Ba 2014, arXiv:1412.6980), its rate warmed up and then a
cosine down to zero, so that positions settle. Progress through that schedule is steps done of `steps`, or time passed
of `minutes` where that is more: with steps alone, training twice gives the same bits.

Before that the layers are reconstructed (calibration.reconstruction) where nothing was folded into them: that buys
most. By default scales, minima and norms are trained, and codes stay (`learning_rate` 0): with codes trained at a rate
of 0.04 as well, 0.8 % of them changed, and at int4-b32 the KLD on other text rose from 0.068 to 0.151 (SmolLM2-135M,
four chunks, 31,000 tokens).

A few sequences are never trained on: the divergence on them before and after is reported, and where it did not fall
the solved model is kept.

Memory, bytes a weight: 4 its value, 4 its position, 4 its gradient, 12 more where codes are trained; activations of
`micro_batch` sequences; the teacher's hidden states, 2 a number. Every CHECKPOINT_S seconds the state is written, so
that a killed training goes on from there, to the same result: training.safetensors in its work folder.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from calibration import reconstruction
from calibration.distillation import divergence
from calibration.fake_quant import FakeQuant
from calibration.low_rank import Adapter
from calibration.samples import Samples
from calibration.student import computing_in, fastest_precision, final_hidden, student_of
from lilliput import checkpoint, decoder
from lilliput.decoder import Decoder, torch_name
from lilliput.errors import CalibrationError
from lilliput.grid import Float, QuantizedTensor
from lilliput.model import QuantizedModel, SourceModel, role_of
from lilliput.progress import Progress, part, silent
from lilliput.provenance import RECOVERED
from lilliput.recipe_schema import Recover

CHECKPOINT_S = 300.0
CHECKPOINT, RECONSTRUCTED, SECONDS = "training.safetensors", "reconstructed", "seconds.txt"
RECONSTRUCTION = 0.3  # of the progress that is shown
HELD_OUT = 16  # one of so many sequences is not trained on
WARM_UP = 0.05  # of the schedule
BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Recovery:
    """What training cost and bought. Divergences are means over the held-out sequences, in nats a token."""

    method: str
    steps: int
    tokens: int  # that were trained on, repetitions counted
    seconds: float
    kld_before: float
    kld_after: float
    held_out_tokens: int
    kept: bool  # whether the trained model is used: the divergence fell
    kld_unmerged: float | None = None  # of adapters beside their base, before they were merged into it
    kld_reconstructed: float | None = None  # of what training began with, where layers were reconstructed


def recover(
    source: SourceModel,
    solved: QuantizedModel,
    samples: Samples,
    options: Recover,
    work: Path,
    progress: Progress = silent,
) -> tuple[QuantizedModel, Recovery]:
    """The trained model on the grids of `solved`. `work` holds checkpoints, and is the same folder after a kill."""
    begun = _reconstructed(source, solved, samples, options, work, part(progress, 0.0, RECONSTRUCTION))
    start, spent_s = begun or (solved, 0.0)
    trainer = Trainer(source, start, samples, options)
    before = trainer.divergence_of(solved) if begun else None  # now: norms are not trained yet
    found = trained(trainer, options, work, part(progress, RECONSTRUCTION, 1.0), spent_s)
    if before is not None:
        better = found.kld_after < before
        found = replace(found, kld_before=before, kld_reconstructed=found.kld_before, kept=better)
    return (trainer.model() if found.kept else solved), found


def _reconstructed(
    source: SourceModel, solved: QuantizedModel, samples: Samples, options: Recover, work: Path, progress: Progress
) -> tuple[QuantizedModel, float] | None:
    """What training starts from, and the seconds that it took; None where a transform folded factors into `solved`, or
    the options want it so. Kept in `work`."""
    if options.reconstruct is False or (options.reconstruct is None and reconstruction.folded(source, solved)):
        return None
    folder, started = work / RECONSTRUCTED, time.monotonic()
    if not folder.exists():
        seen = samples.tokens[~held_out(len(samples.tokens))]
        model = reconstruction.reconstruct(source, solved, replace(samples, tokens=seen), options.match, progress)
        unfinished = folder.with_suffix(".tmp")
        checkpoint.save(model, unfinished)
        (unfinished / SECONDS).write_text(repr(time.monotonic() - started))
        unfinished.replace(folder)
    return reconstructed_in(work)


def reconstructed_in(work: Path) -> tuple[QuantizedModel, float]:
    """What a training in that folder began with, and the seconds that it took."""
    folder = work / RECONSTRUCTED
    return checkpoint.load(folder), float((folder / SECONDS).read_text())


def held_out(count: int) -> npt.NDArray[np.bool_]:
    """(count,): the samples that are never trained on."""
    every = min(HELD_OUT, count)
    left_out: npt.NDArray[np.bool_] = np.arange(count) % every == every - 1
    return left_out


def trained(
    trainer: Trainer, options: Recover, work: Path, progress: Progress = silent, spent_s: float = 0.0
) -> Recovery:  # fmt: skip
    """Train to the end of the schedule, from the checkpoint in `work` where there is one. `spent_s`: of the minutes."""
    before = trainer.held_out_divergence()
    steps, seconds = options.limits
    state = _train(trainer, trainer.restore(work / CHECKPOINT), Limits(steps, seconds - spent_s), work, progress)
    after = trainer.held_out_divergence()
    return Recovery(
        options.method, state.step, state.step * options.batch * trainer.length, spent_s + state.seconds,
        before, after, trainer.held.numel(), after < before,
    )  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """Either of which ends a training; none is left at 0 and below."""

    steps: float
    seconds: float


@dataclass(frozen=True)
class State:
    """How far a training is."""

    step: int = 0
    seconds: float = 0.0

    def progress(self, limits: Limits) -> float:
        """0 to 1: of the steps, or of the time where that is further."""
        if limits.steps <= 0 or limits.seconds <= 0:
            return 1.0
        return max(self.step / limits.steps, self.seconds / limits.seconds)


def rate(progress: float) -> float:
    """The learning rates' common factor: a warm-up, then a cosine to zero."""
    if progress < WARM_UP:
        return (progress + 0.1 * WARM_UP) / (1.1 * WARM_UP)
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP)))


def _train(trainer: Trainer, state: State, limits: Limits, work: Path, progress: Progress) -> State:
    """Step until the schedule ends."""
    before, saved, started = state.seconds, state.seconds, time.monotonic()
    while (done := state.progress(limits)) < 1:
        trainer.step(state.step, rate(done))
        state = State(state.step + 1, before + time.monotonic() - started)
        progress(min(1000, round(1000 * state.progress(limits))), 1000)
        if state.seconds - saved >= CHECKPOINT_S:
            trainer.save(work / CHECKPOINT, state)
            saved = state.seconds
    return state


class Trainer:
    """The student, what of it is trained, and the teacher's answers."""

    def __init__(self, source: SourceModel, solved: QuantizedModel, samples: Samples, options: Recover) -> None:
        self.solved, self.options, self.device = solved, options, options.device
        self.precision = fastest_precision(self.device) if options.precision == "auto" else options.precision
        tokens = torch.from_numpy(samples.tokens.astype(np.int64)).to(self.device)
        if len(tokens) < 2:
            raise CalibrationError(
                f"recover: training wants at least 2 samples, there is {len(tokens)}: raise calibration.count"
            )
        self.length = tokens.shape[1]
        held = torch.from_numpy(held_out(len(tokens)))
        self.tokens, self.held = tokens[~held], tokens[held]
        teacher = decoder.build(source).to(self.device)
        self.teacher_head = self._head(teacher)
        self.answers, self.held_answers = self._hidden(teacher, self.tokens), self._hidden(teacher, self.held)
        del teacher
        self.student = student_of(solved).to(self.device)
        self.head = self._head(self.student)
        self.fakes = {
            name: _part(name, tensor, options)
            for name, tensor in solved.quantized.items()
            if role_of(name) == "linear" and fnmatchcase(name, options.match)
        }
        if not self.fakes:
            raise CalibrationError(
                f"recover: match {options.match!r} fits no quantized matrix of {solved.name}: mend it"
            )
        self.floats = {
            n: self._parameter(n)
            for n in solved.floats
            if n != "position_embedding" and role_of(n) == "vector" and options.method == "qat"
        }
        for parameter in [*self.floats.values(), *map(self._parameter, self.fakes)]:
            parameter.requires_grad_(True)
        self.rates = _rates(options)
        self.optimizer = self._optimizer()

    def _parameter(self, name: str) -> torch.nn.Parameter:
        return self.student.get_parameter(torch_name(name))

    def _head(self, model: Decoder) -> Tensor:
        """(vocab, hidden), in the dtype that products are computed in."""
        weight = model.embedding.weight if model.config.tied_embeddings else model.head.weight
        return weight.detach().to(torch.bfloat16 if self.precision == "bfloat16" else torch.float32)

    @torch.no_grad()
    def _hidden(self, model: Decoder, tokens: Tensor) -> Tensor:
        """Final hidden states (n, length, hidden), in the heads' dtype."""
        with computing_in(self.precision, self.device):
            parts = [final_hidden(model, part) for part in torch.split(tokens, self.options.micro_batch)]
        return torch.cat(parts).to(torch.bfloat16 if self.precision == "bfloat16" else torch.float32)

    def _optimizer(self) -> torch.optim.Adam:
        groups = [
            {
                "params": [fake.parameters[kind] for fake in self.fakes.values() if kind in fake.parameters],
                "rate": rate,
            }
            for kind, rate in self.rates.items()
        ]
        for parameter in self.floats.values():  # their sizes differ by tens: a rate is relative to the mean size
            size = float(parameter.detach().abs().mean()) or 1.0
            groups.append({"params": [parameter], "rate": self.options.float_learning_rate * size})
        return torch.optim.Adam([g for g in groups if g["params"]], betas=BETAS, eps=1e-12, fused=True)

    def step(self, index: int, factor: float) -> float:
        """One optimizer step; the mean divergence of its batch before it."""
        self.write_values()
        chosen = _batch(index, len(self.tokens), self.options)
        total = 0.0
        for ids in torch.split(chosen, self.options.micro_batch):
            loss = self._divergence(self.tokens[ids], self.answers[ids], self.options.checkpointing)
            (loss / (len(chosen) * self.length)).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        kinds = frozenset(self.rates)
        with torch.no_grad():
            for name, fake in self.fakes.items():
                parameter = self._parameter(name)
                assert parameter.grad is not None
                for kind, gradient in fake.gradients(parameter.grad, kinds).items():
                    fake.parameters[kind].grad = gradient
                parameter.grad = None
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        for fake in self.fakes.values():
            fake.project()
        return total / (len(chosen) * self.length)

    @torch.no_grad()
    def write_values(self) -> None:
        """Give the student the values that its codes and scales stand for now."""
        for name, fake in self.fakes.items():
            self._parameter(name).copy_(fake.values())

    def _divergence(self, tokens: Tensor, answers: Tensor, checkpointing: bool) -> Tensor:
        """Summed over all positions."""
        with computing_in(self.precision, self.device):
            hidden = final_hidden(self.student, tokens, checkpointing=checkpointing)
        softcap = self.student.config.logit_softcap
        return divergence(hidden.float().flatten(0, 1), answers.flatten(0, 1), self.head, self.teacher_head, softcap)

    @torch.no_grad()
    def held_out_divergence(self) -> float:
        """Mean over the sequences that are not trained on, in nats a token."""
        self.write_values()
        return self._held_out()

    @torch.no_grad()
    def _held_out(self) -> float:
        size = self.options.micro_batch
        parts = zip(torch.split(self.held, size), torch.split(self.held_answers, size), strict=True)
        return sum(float(self._divergence(*part, checkpointing=False)) for part in parts) / self.held.numel()

    @torch.no_grad()
    def divergence_of(self, model: QuantizedModel) -> float:
        """The held-out divergence of another model on the same grids; the student is that model from now on."""
        for name in self.fakes:
            self._parameter(name).copy_(torch.from_numpy(model.dequantized(name)))
        return self._held_out()

    def model(self) -> QuantizedModel:
        """The codes, scales and floats of now; every matrix is checked against its grid."""
        trained = {name: fake.tensor() for name, fake in self.fakes.items()}
        for name, tensor in trained.items():
            tensor.check(name)
        floats: dict[str, Float] = {name: p.detach().cpu().numpy().copy() for name, p in self.floats.items()}
        note = {"recovered": RECOVERED["qat"]}
        return replace(
            self.solved,
            quantized={**self.solved.quantized, **trained},
            floats={**self.solved.floats, **floats},
            provenance={**self.solved.provenance, **note},
        )

    def _trained(self) -> dict[str, Tensor]:
        """Every tensor that the optimizer moves, by name."""
        found: dict[str, Tensor] = dict(self.floats)
        for name, fake in self.fakes.items():
            found |= {f"{name}.{kind}": tensor for kind, tensor in fake.parameters.items() if kind in self.rates}
        return found

    def save(self, path: Path, state: State) -> None:
        """Write the training's state, all or nothing."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self._trained().items():
            moments = self.optimizer.state[tensor]
            tensors |= {name: tensor.detach(), f"{name}:m": moments["exp_avg"], f"{name}:v": moments["exp_avg_sq"]}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, {"step": str(state.step), "seconds": repr(state.seconds)})
        temporary.replace(path)

    @torch.no_grad()
    def restore(self, path: Path) -> State:
        """Go on from where `save` was; from the start where there is no file."""
        if not path.is_file():
            return State()
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            state = State(int(metadata["step"]), float(metadata["seconds"]))
            for name, tensor in self._trained().items():
                tensor.copy_(file.get_tensor(name))
                self.optimizer.state[tensor] = {
                    "step": torch.tensor(float(state.step), device=self.device),
                    "exp_avg": file.get_tensor(f"{name}:m").to(self.device),
                    "exp_avg_sq": file.get_tensor(f"{name}:v").to(self.device),
                }
        return state


def _rates(options: Recover) -> dict[str, float]:
    """Adam's rate of each kind of parameter that is trained: those above zero."""
    found = {
        "u": options.learning_rate,
        "v": options.scale_learning_rate,
        "t": options.scale_learning_rate,
        "a": options.adapter_learning_rate,
        "b": options.adapter_learning_rate,
    }
    return {kind: rate for kind, rate in found.items() if rate}


def _part(name: str, tensor: QuantizedTensor, options: Recover) -> FakeQuant | Adapter:
    """One matrix in training."""
    return FakeQuant(tensor, options.device) if options.method == "qat" else Adapter(name, tensor, options)


def _batch(step: int, count: int, options: Recover) -> Tensor:
    """The sequences of a step: each epoch has its own order, drawn from the seed, and a last batch may be short."""
    per_epoch = -(-count // options.batch)
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)[place * options.batch :][: options.batch]
