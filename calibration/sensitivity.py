"""Sensitivity: what an error of each matrix costs in KLD, from one backward pass over a few samples.

Near the float model the divergence is a quadratic form of the weights' error, with the Fisher information as its
matrix. For a linear y = W x whose rows' errors are independent, and with g = ∂ℓ/∂y, ℓ = -log p of a token
drawn from the model's own distribution (so that E[g gᵀ] is the Fisher information, with no labels needed):

    KLD ≈ ½ Σ_r E[g_r² (ΔW_r x)²] ≈ ½ Σ_r share_r · ΔW_r M ΔW_rᵀ

    M       = E[(Σ_r g_r²) x xᵀ]          (cols, cols)   second moments weighted by what a token's error costs
    share_r = E[g_r²] / Σ_r E[g_r²]       (rows,)        sums to 1

(Curvature by squared gradients: LeCun et al. 1990; M is GuidedQuant's Hessian with one group, Kim et al. 2025,
arXiv:2505.07004.) Losses of matrices are added: that their errors may add up or cancel is left out.

The head's logits need no draw: E[g_r²] = p_r (1 - p_r), times the square of the soft cap's slope where there is one.
A lookup of embedding row r errs by ΔE_r, times the embedding's scale, in the residual stream, where the gradient is g:
½ Σ_r f_r ΔE_r E[g gᵀ] ΔE_rᵀ, f the tokens' frequencies, for which the mean of p stands (the samples are too few to
count the rarer ones). A tied embedding costs both: M is the sum.

The pass goes layer by layer, forward and back; between the two the hidden states before each layer lie on disk.
Memory: one layer, the hidden states and their gradients, one layer's moments.

    samples.json                    what the samples were, and the names
    layer_{i:03}.safetensors        {linear}.moments, {linear}.shares     float32
    final.safetensors               the same of embedding and head
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from calibration.base import InputStatistics
from calibration.samples import Provenance, Samples
from calibration.statistics import PANEL, Statistics, batches, embed, load_part
from lilliput.decoder import Layer, Norm, Rope, ropes, soft_capped
from lilliput.errors import CalibrationError
from lilliput.grid import Float, QuantizedTensor
from lilliput.model import SourceModel, role_of
from lilliput.progress import Progress, silent

SAMPLES = 16  # of the calibration's, at most
SLAB = 1 << 22  # logits, or errors, at a time


@dataclass(frozen=True, eq=False)
class Curvature:
    """What an error of one matrix costs."""

    moments: Float  # M (cols, cols) float32
    shares: Float  # (rows,) float32

    def loss(self, weight: Float, tensor: QuantizedTensor) -> float:
        """Predicted KLD, nats a token, of `tensor` in place of `weight` (rows, cols)."""
        moments, total = torch.from_numpy(self.moments), 0.0
        step = max(1, SLAB // weight.shape[1])
        error = torch.from_numpy(tensor.dequantize() - weight)
        shares = torch.from_numpy(self.shares)
        for rows, share in zip(torch.split(error, step), torch.split(shares, step), strict=True):
            total += float(((rows @ moments).mul_(rows).sum(1) * share).sum(dtype=torch.float64))
        return total / 2


class Sensitivity(Mapping[str, Curvature]):
    """A folder written by `gather`, read when asked for: a matrix's parameter name → its curvature."""

    def __init__(self, folder: Path) -> None:
        try:
            text = json.loads((folder / "samples.json").read_text())
            self.samples = Provenance(**text["samples"])
            self._names = tuple(text["names"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f"{folder}: no readable sensitivity ({error}): run with --fresh") from error
        self.folder = folder
        self._load = lru_cache(maxsize=2)(load_file)

    def __getitem__(self, name: str) -> Curvature:
        if name not in self._names:
            raise KeyError(name)
        file = (
            "final.safetensors" if name in ("embedding", "head") else f"layer_{int(name.split('.')[1]):03}.safetensors"
        )
        parts = self._load(self.folder / file)
        return Curvature(parts[f"{name}.moments"], parts[f"{name}.shares"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Guided(Statistics):
    """Statistics whose second moments count what an error costs; those of the tied embedding too.

    M would minimise the predicted KLD row by row, but it comes from few samples. Half of it is the plain second moments
    of all samples, scaled to its trace: of four layers of SmolLM2 on int4-b32 (GPTQ) the KLD was 0.0057, with M
    alone 0.0061, with the plain moments 0.0068.
    """

    def __init__(self, statistics: Statistics, sensitivity: Sensitivity) -> None:
        super().__init__(statistics.folder)
        self._plain = statistics
        self._sensitivity = sensitivity  # `_names` are those of the statistics

    def __getitem__(self, name: str) -> InputStatistics:
        moments = self._sensitivity[name].moments
        if name in self._names:
            found = self._plain[name]
            plain = found.second_moments
            blend = (moments + plain * (np.trace(moments) / (np.trace(plain) or 1.0))) / 2
            return replace(found, second_moments=blend.astype(np.float32))
        unknown = np.full(len(moments), np.nan, np.float32)
        return InputStatistics(moments, unknown, unknown, self.samples.tokens)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sensitivity)

    def __len__(self) -> int:
        return len(self._sensitivity)


def gather(
    source: SourceModel,
    samples: Samples,
    folder: Path,
    count: int = SAMPLES,
    seed: int = 0,
    progress: Progress = silent,
) -> Sensitivity:
    """Go forward and back over `count` of the samples, evenly spaced, and write the curvature into `folder`."""
    config = source.config
    samples = taken(samples, spaced(len(samples.tokens), count))
    folder.mkdir(parents=True, exist_ok=True)
    rope = ropes(config, samples.tokens.shape[1])
    steps = 2 * config.num_layers + 1
    with tempfile.TemporaryDirectory(prefix="lilliput-") as scratch:
        hidden = embed(source, samples)
        for i in range(config.num_layers):
            np.save(Path(scratch) / f"{i}.npy", hidden.numpy())
            _forward(_layer(source, i), hidden, rope[i])
            progress(i + 1, steps)
        gradient, table = _head(source, hidden, seed)
        progress(config.num_layers + 1, steps)
        for i in reversed(range(config.num_layers)):
            hidden = torch.from_numpy(np.load(Path(scratch) / f"{i}.npy"))
            found = _backward(_layer(source, i), hidden, gradient, rope[i])
            save_file(
                {f"layers.{i}.{key}": array for key, array in found.items()}, folder / f"layer_{i:03}.safetensors"
            )
            progress(steps - i, steps)
    looked_up = gradient * config.embedding_scale
    save_file(_tables(table, looked_up, config.tied_embeddings), folder / "final.safetensors")
    names = [name for name in config.parameter_shapes() if role_of(name) != "vector"]
    text = {"samples": asdict(samples.provenance), "names": names}
    (folder / "samples.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
    return Sensitivity(folder)


def spaced(total: int, count: int) -> npt.NDArray[np.intp]:
    """The indices of `count` samples of `total`, evenly spaced."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.intp))


def taken(samples: Samples, indices: npt.NDArray[np.intp]) -> Samples:
    """Only the samples of these indices."""
    return replace(samples, tokens=samples.tokens[indices], provenance=replace(samples.provenance, count=len(indices)))


def held_out(samples: Samples, sensitivity: Sensitivity, count: int) -> Samples:
    """Up to `count` samples that the sensitivity does not come from; where it comes from all, some of them."""
    total = len(samples.tokens)
    others = np.setdiff1d(np.arange(total), spaced(total, sensitivity.samples.count))
    others = others if len(others) else np.arange(total)
    return taken(samples, others[spaced(len(others), count)])


def _layer(source: SourceModel, index: int) -> Layer:
    with torch.device("meta"):
        layer = Layer(source.config, index)
    return load_part(layer, source, f"layers.{index}.")


@torch.inference_mode()
def _forward(layer: Layer, hidden: Tensor, rope: Rope) -> None:
    """Send `hidden` through the layer, in place."""
    for batch in batches(hidden):
        batch.copy_(layer(batch, rope))


class Weighted:
    """Adds up x (tokens, cols) and squared gradients (tokens, rows) of a linear that pass."""

    def __init__(self, rows: int, cols: int) -> None:
        self.total = torch.zeros(cols, cols)  # its upper triangle holds
        self.squares = torch.zeros(rows, dtype=torch.float64)
        self.count = 0

    def add(self, x: Tensor, squares: Tensor) -> None:
        weighted = x * squares.sum(1, keepdim=True)
        for start in range(0, x.shape[1], PANEL):
            self.total[start : start + PANEL, start:] += weighted[:, start : start + PANEL].T @ x[:, start:]
        self.squares += squares.sum(0, dtype=torch.float64)
        self.count += len(x)

    @property
    def moments(self) -> Tensor:
        """M (cols, cols) float32."""
        upper = self.total.triu()
        return (upper + upper.triu(1).T) / self.count

    @property
    def shares(self) -> Tensor:
        """(rows,) float32."""
        return (self.squares / self.squares.sum().clamp(min=torch.finfo(torch.float64).tiny)).float()

    def arrays(self, name: str) -> dict[str, Float]:
        """What is stored of linear `name`. Raises CalibrationError where gradients overflowed."""
        parts = {f"{name}.moments": self.moments, f"{name}.shares": self.shares}
        if not all(part.isfinite().all() for part in parts.values()):
            raise CalibrationError(f"the gradients at {name} are NaN or infinite: no sensitivity can be measured")
        return {key: part.numpy() for key, part in parts.items()}


@torch.no_grad()
def _head(source: SourceModel, hidden: Tensor, seed: int) -> tuple[Tensor, Weighted]:
    """∂ℓ/∂hidden (n, length, hidden), and the head's curvature."""
    config = source.config
    norm = load_part(Norm(config), source, "norm.")
    weight = torch.from_numpy(source.weights["embedding" if config.tied_embeddings else "head"])
    generator = torch.Generator().manual_seed(seed)
    table, gradients = Weighted(*weight.shape), []
    for rows in torch.split(hidden.flatten(0, 1), max(1, SLAB // len(weight))):
        with torch.enable_grad():
            inner = rows.clone().requires_grad_()
            x = norm(inner)
        logits = soft_capped(x.detach() @ weight.T, config.logit_softcap)
        p = logits.softmax(-1)
        slope = 1 - (logits / config.logit_softcap).square() if config.logit_softcap else torch.ones(())
        table.add(x.detach(), p * (1 - p) * slope.square())
        drawn = torch.multinomial(p, 1, generator=generator)
        p.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=p.dtype)).mul_(slope)
        gradients.append(torch.autograd.grad(x, inner, p @ weight)[0])
    return torch.cat(gradients).view_as(hidden), table


def _backward(layer: Layer, hidden: Tensor, gradient: Tensor, rope: Rope) -> dict[str, Float]:
    """Send `gradient` back through the layer, in place; the curvature of its linears."""
    linears = {name: part for name, part in layer.named_modules() if isinstance(part, nn.Linear)}
    seen = {name: Weighted(part.out_features, part.in_features) for name, part in linears.items()}
    for name, part in linears.items():
        part.register_forward_hook(lambda _, inputs, y, to=seen[name]: _observe(y, inputs[0], to))
    for inner, outer in zip(batches(hidden), batches(gradient), strict=True):
        inner.requires_grad_()
        outer.copy_(torch.autograd.grad(layer(inner, rope), inner, outer)[0])
    return {key: array for name, weighted in seen.items() for key, array in weighted.arrays(name).items()}


def _observe(y: Tensor, x: Tensor, to: Weighted) -> None:
    """When the gradient of a linear's output y arrives, add it with the linear's input x."""
    y.register_hook(  # type: ignore[no-untyped-call]
        lambda g: to.add(x.detach().flatten(0, -2), g.detach().flatten(0, -2).square())
    )


def _tables(head: Weighted, gradient: Tensor, tied: bool) -> dict[str, Float]:
    """What is stored of embedding and head; `gradient` is that of the looked up rows."""
    g = gradient.flatten(0, -2)
    lookup = (g.T @ g) / len(g)
    if tied:
        return {"embedding.moments": (head.moments + lookup).numpy(), "embedding.shares": head.shares.numpy()}
    return {"embedding.moments": lookup.numpy(), "embedding.shares": head.shares.numpy(), **head.arrays("head")}
