"""Static grids of a model's activations, from hooks on any torch module: decoder, encoder or CNN.

A tensor is named after the module that reads or makes it: `layers.0.mlp.down:input`, `conv1:output`. All batches pass
once, nothing of them is kept but histograms (calibration.observers), so memory does not depend on how many there are.

Values that the model itself will not look at widen a range for nothing and are kept out of it:

    padding      `keep` (batch, positions), true at real tokens, is applied to tensors (batch, positions, …),
                 (batch, heads, positions, …), and on both axes to scores (batch, heads, positions, positions)
    masks        scores at or below `masked_below` (additive masks give −inf, finfo.min, −10⁴) in tensors whose name
                 matches `scores`; anywhere else −inf is an error, as NaN is

A tensor that `keep` does not fit (one that is pooled over positions) counts as a whole, and is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from calibration.clipping import RangeOptions, activation_grid
from calibration.observers import BINS, ActivationGrid, Histogram
from lilliput.errors import CalibrationError

Batch = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Mask = Callable[[Batch], Tensor | None]

CHANNEL_BINS = 512  # of each channel's histogram
MASKED_BELOW = -5e3


@dataclass(frozen=True)
class Selection:
    """Which tensors are observed, and which of them are attention scores. Shell patterns over tensors' names."""

    tensors: tuple[str, ...]
    scores: tuple[str, ...] = ()
    masked_below: float = MASKED_BELOW

    def takes(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.tensors)

    def is_score(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.scores)


@dataclass(frozen=True, eq=False)
class Observed:
    """A grid for each tensor that was seen, and the names of those that `keep` did not fit."""

    grids: Mapping[str, ActivationGrid]
    unmasked: tuple[str, ...]


class Observer:
    """The histograms of the selected tensors, one each, made when a tensor is first seen."""

    def __init__(self, selection: Selection, axis: int | None) -> None:
        self.selection, self.axis = selection, axis
        self.keep: Tensor | None = None  # of the batch that is passing
        self.histograms: dict[str, Histogram] = {}
        self.unmasked: dict[str, None] = {}

    def see(self, name: str, value: object) -> None:
        """Count a tensor. Raises CalibrationError naming it where it has no range or no such axis."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        kept = torch.ones(value.shape, dtype=torch.bool, device=value.device)
        if self.keep is not None:
            mask = fitted(self.keep.to(value.device), value.shape)
            if mask is None:
                self.unmasked[name] = None
            else:
                kept &= mask
        if self.selection.is_score(name):
            kept &= value > self.selection.masked_below
        rows, mask_rows = (self._channels(name, x) for x in (value, kept))
        histogram = self.histograms.get(name)
        if histogram is None:
            bins = BINS if self.axis is None else CHANNEL_BINS
            histogram = self.histograms[name] = Histogram(len(rows), bins)
        if len(rows) != len(histogram.counts):
            raise CalibrationError(f"activation {name}: {len(rows)} channels, before {len(histogram.counts)}")
        try:
            histogram.add(rows, mask_rows)
        except CalibrationError as error:
            raise CalibrationError(f"activation {name}: {error}") from error

    def _channels(self, name: str, x: Tensor) -> Tensor:
        """(…) → (channels, n)."""
        if self.axis is None:
            return x.reshape(1, -1)
        if not -x.dim() <= self.axis < x.dim():
            raise CalibrationError(f"activation {name} is {tuple(x.shape)}: it has no axis {self.axis}, choose another")
        return x.movedim(self.axis, 0).flatten(1)


def fitted(keep: Tensor, shape: torch.Size) -> Tensor | None:
    """The mask (batch, positions) as one that broadcasts to `shape`; None where it has no place there."""
    batch, positions = keep.shape
    if len(shape) == 4 and shape[0] == batch and shape[2] == positions:
        rows = keep[:, None, :, None]
        return rows & keep[:, None, None, :] if shape[3] == positions else rows
    if len(shape) >= 3 and tuple(shape[:2]) == (batch, positions):
        return keep.reshape(batch, positions, *[1] * (len(shape) - 2))
    return None


@torch.inference_mode()
def observe(
    model: nn.Module, batches: Iterable[Batch], selection: Selection, options: RangeOptions, keep: Mask | None = None
) -> Observed:
    """Run the batches and make the grid of every selected tensor.

    Raises CalibrationError where a pattern fits no tensor that was seen, or a tensor is not finite.
    """
    observer = Observer(selection, options.axis)
    handles = [handle for name, module in model.named_modules() for handle in _hooked(observer, name, module)]
    try:
        for batch in batches:
            observer.keep = keep(batch) if keep else None
            _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for pattern in (*selection.tensors, *selection.scores):
        if not any(fnmatchcase(name, pattern) for name in observer.histograms):
            raise CalibrationError(
                f"activations: {pattern!r} fits no tensor that was seen: names are like 'layers.0.mlp.down:input'"
            )
    grids = {name: activation_grid(seen, options) for name, seen in sorted(observer.histograms.items())}
    return Observed(grids, tuple(observer.unmasked))


def _call(model: nn.Module, batch: Batch) -> None:
    if isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*batch)


def _hooked(observer: Observer, name: str, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks on what a module reads first and makes first, where they are selected."""
    found = []
    if observer.selection.takes(f"{name}:input"):

        def before(_: nn.Module, inputs: tuple[object, ...]) -> None:
            observer.see(f"{name}:input", inputs[0] if inputs else None)

        found.append(module.register_forward_pre_hook(before))
    if observer.selection.takes(f"{name}:output"):

        def after(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            observer.see(f"{name}:output", output[0] if isinstance(output, tuple) else output)

        found.append(module.register_forward_hook(after))
    return found
