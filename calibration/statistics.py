"""Statistics of every linear layer's input, from one streaming pass over the calibration samples.

The pass goes layer by layer: one layer's weights are loaded, all samples run through it, and what its
linears saw is written before the next layer is loaded. Kept between layers: the hidden states of all
samples, (n, length, hidden) float32.

For an input x (cols,) of a linear, over all tokens:

    second_moments = mean of x xᵀ      GPTQ's Hessian is twice this (arXiv:2210.17323, section 3)
    minimum, maximum                   the range, for static activation grids

A product xᵀx of one batch is computed in float32 above its diagonal only, in panels of PANEL columns, and
added up in float64. q, k and v read one input, so do gate and up: they share one entry.

    samples.json                    what the samples were, and the number of layers
    layer_{i:03}.safetensors        {input}.second_moments, .minimum, .maximum      float32
    final.safetensors               the head's input, after the last norm; that of a tied embedding, too
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from calibration.base import InputStatistics
from calibration.samples import Provenance, Samples
from lilliput.decoder import Layer, Norm, Rope, ropes
from lilliput.errors import CalibrationError
from lilliput.grid import Float
from lilliput.model import SourceModel, role_of
from lilliput.progress import Progress, silent

Module = TypeVar("Module", bound=nn.Module)

PANEL = 384  # columns
BATCH_TOKENS = 2048

# Which input a linear reads, by the linear's name in its layer; the first linear of an input is the one observed.
INPUTS = {
    "attention.q": "attention.input",
    "attention.k": "attention.input",
    "attention.v": "attention.input",
    "attention.o": "attention.inner",
    "mlp.gate": "mlp.input",
    "mlp.up": "mlp.input",
    "mlp.down": "mlp.inner",
}
OBSERVED = {"attention.input": "q", "attention.inner": "o", "mlp.input": "up", "mlp.inner": "down"}


class Statistics(Mapping[str, InputStatistics]):
    """A folder written by `gather`, read when asked for: linear's parameter name → its input's statistics."""

    def __init__(self, folder: Path) -> None:
        try:
            text = json.loads((folder / "samples.json").read_text())
            self.samples = Provenance(**text["samples"])
            self._names = tuple(text["names"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f"{folder}: no readable statistics ({error}): run with --fresh") from error
        self.folder = folder
        self._load = lru_cache(maxsize=2)(load_file)

    def __getitem__(self, name: str) -> InputStatistics:
        if name not in Statistics.__iter__(self):
            raise KeyError(name)
        file, key = _place(name)
        parts = self._load(self.folder / file)
        second_moments, low, high = (parts[f"{key}.{part}"] for part in ("second_moments", "minimum", "maximum"))
        return InputStatistics(second_moments, low, high, self.samples.tokens)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names if "head" in self._names else (*self._names, "embedding"))

    def __len__(self) -> int:
        return len(self._names) + ("head" not in self._names)


class Without(Statistics):
    """Statistics of all samples but some that were among them."""

    def __init__(self, every: Statistics, some: Statistics) -> None:
        super().__init__(every.folder)
        self._some = some

    def __getitem__(self, name: str) -> InputStatistics:
        found, left_out = super().__getitem__(name), self._some[name]
        count = found.count - left_out.count
        if count <= 0:  # nothing else is there
            return found
        moments = (found.count * found.second_moments - left_out.count * left_out.second_moments) / count
        return replace(found, second_moments=moments.astype(np.float32), count=count)


def _place(name: str) -> tuple[str, str]:
    """The file and the input of linear `name`."""
    if name in ("head", "embedding"):
        return "final.safetensors", "head.input"
    _, index, inner = name.split(".", 2)
    return f"layer_{int(index):03}.safetensors", INPUTS[inner]


@torch.inference_mode()
def gather(source: SourceModel, samples: Samples, folder: Path, progress: Progress = silent) -> Statistics:
    """Run the float model over the samples and write its statistics into `folder`.

    Memory: one layer, the hidden states, and one layer's second moments in float64.
    """
    config, layers = source.config, source.config.num_layers
    folder.mkdir(parents=True, exist_ok=True)
    hidden = embed(source, samples)
    for i, rope in enumerate(ropes(config, samples.tokens.shape[1])):
        with torch.device("meta"):
            layer = Layer(config, i)
        load_part(layer, source, f"layers.{i}.")
        save_file(_run(layer, hidden, rope), folder / f"layer_{i:03}.safetensors")
        progress(i + 1, layers)
    norm = load_part(Norm(config), source, "norm.")
    final = Moments(config.hidden_size)
    for batch in batches(hidden):
        final.add(norm(batch))
    save_file(final.arrays("head.input"), folder / "final.safetensors")
    names = [n for n in config.parameter_shapes() if role_of(n) in ("linear", "head")]
    text = {"samples": asdict(samples.provenance), "names": names}
    (folder / "samples.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
    return Statistics(folder)


def load_part(part: Module, source: SourceModel, prefix: str) -> Module:
    """Give a part of the decoder (built on the meta device) the source's weights of that prefix."""
    names = {f"{prefix}{name}": name for name, _ in part.named_parameters()}
    state = {own: torch.from_numpy(source.weights[name.removesuffix(".weight")]) for name, own in names.items()}
    part.load_state_dict(state, assign=True)
    return part.eval().requires_grad_(False)


def embed(source: SourceModel, samples: Samples) -> Tensor:
    """(n, length, hidden) float32."""
    tokens = torch.from_numpy(samples.tokens.astype(np.int64))
    hidden = torch.from_numpy(source.weights["embedding"])[tokens]
    hidden *= source.config.embedding_scale
    if source.config.positions == "learned":
        hidden += torch.from_numpy(source.weights["position_embedding"])[: tokens.shape[1]]
    return hidden


def batches(hidden: Tensor) -> tuple[Tensor, ...]:
    """Views of (n, length, hidden) of about BATCH_TOKENS tokens each."""
    return torch.split(hidden, max(1, BATCH_TOKENS // hidden.shape[1]))


def _run(layer: Layer, hidden: Tensor, rope: Rope) -> dict[str, Float]:
    """Send `hidden` through the layer, in place; the statistics of its inputs."""
    observed = {name: Moments(_linear(layer, name).in_features) for name in OBSERVED}
    for name, moments in observed.items():
        _linear(layer, name).register_forward_pre_hook(lambda _, inputs, moments=moments: moments.add(inputs[0]))
    for batch in batches(hidden):
        batch.copy_(layer(batch, rope))
    return {key: array for name, moments in observed.items() for key, array in moments.arrays(name).items()}


def _linear(layer: Layer, name: str) -> nn.Linear:
    block = layer.attention if name.startswith("attention.") else layer.mlp
    linear = getattr(block, OBSERVED[name])
    assert isinstance(linear, nn.Linear)
    return linear


class Moments:
    """Adds up second moments and ranges of the vectors (cols,) that pass."""

    def __init__(self, cols: int) -> None:
        self.total = torch.zeros(cols, cols, dtype=torch.float64)  # its upper triangle holds
        self.minimum, self.maximum = torch.full((cols,), torch.inf), torch.full((cols,), -torch.inf)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """x (…, cols) float32."""
        x = x.flatten(0, -2)
        for start in range(0, x.shape[1], PANEL):
            self.total[start : start + PANEL, start:] += x[:, start : start + PANEL].T @ x[:, start:]
        self.minimum = torch.minimum(self.minimum, x.amin(0))
        self.maximum = torch.maximum(self.maximum, x.amax(0))
        self.count += len(x)

    def arrays(self, name: str) -> dict[str, Float]:
        """What is stored of input `name`. Raises CalibrationError where the model's own numbers overflowed."""
        if not (self.minimum.isfinite().all() and self.maximum.isfinite().all()):
            raise CalibrationError(f"the float model gives NaN or infinite values at {name}: nothing can be calibrated")
        upper = self.total.triu()
        mean = (upper + upper.triu(1).T) / self.count
        parts = {"second_moments": mean.float(), "minimum": self.minimum, "maximum": self.maximum}
        return {f"{name}.{part}": tensor.numpy() for part, tensor in parts.items()}
