"""Statistics of a network's values, from one pass over the calibration batches: what every target's grids are made of.

histograms   of each value that sets a range (lilliput.network.ties), by name; padding is kept out where the network
             has a mask input (calibration.activations says where padding lies in a tensor)
floors       of each value that a softmax reads: the least of its rows' greatest values, over rows of real tokens
moments      of the input of each linear and ungrouped convolution (im2col), by the weight's name; where asked for

histograms.safetensors   {name}.counts|zeros|exponent|minimum|maximum
moments.safetensors      {weight}.second_moments|minimum|maximum
statistics.json          names, floors, number of samples
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from calibration.activations import fitted
from calibration.base import InputStatistics
from calibration.observers import Histogram
from calibration.statistics import Moments
from lilliput.errors import CalibrationError
from lilliput.network import MATRIX_OPS, Network, Operation
from lilliput.network.run import evaluate
from lilliput.network.ties import groups

MOMENTS = ("second_moments", "minimum", "maximum")
PARTS = ("counts", "zeros", "exponent", "minimum", "maximum")


@dataclass(frozen=True, eq=False)
class NetworkStatistics:
    """What passed."""

    histograms: Mapping[str, Histogram]
    floors: Mapping[str, float]
    moments: Mapping[str, InputStatistics]
    samples: int


class _Observer:
    """Sees the values of one batch after another."""

    def __init__(self, network: Network, moments: bool) -> None:
        self.network = network
        sources = {name for group in groups(network) for name in group.sources if name not in network.parameters}
        self.histograms = {name: Histogram() for name in sorted(sources)}
        self.floors = {node.inputs[0]: float("inf") for node in network.nodes if node.op == "softmax"}
        readers = [node for node in network.nodes if node.op in MATRIX_OPS] if moments else []
        self.readers = [node for node in readers if node.attributes.get("groups", 1) == 1]
        self.moments = {n.inputs[1]: Moments(network.matrix(n.inputs[1]).shape[1]) for n in self.readers}
        self.keep: Tensor | None = None  # (batch, positions)

    def see(self, name: str, value: Tensor) -> None:
        mask = None if self.keep is None else fitted(self.keep, value.shape)
        if name in self.floors:
            self._floor(name, value, mask)
        if name in self.histograms:
            kept = self._rows(value) if name in self.floors else mask
            flat = None if kept is None else kept.expand(value.shape).reshape(1, -1)
            try:
                self.histograms[name].add(value.reshape(1, -1), flat)
            except CalibrationError as error:
                raise CalibrationError(f"value {name!r} of {self.network.name}: {error}") from error
        for node in self.readers:
            if node.inputs[0] == name:
                self.moments[node.inputs[1]].add(_vectors(self.network, node, value, mask))

    def _rows(self, scores: Tensor) -> Tensor | None:
        """Scores of real tokens' rows: their masked columns count, as the grid must hold them."""
        if self.keep is None or scores.dim() != 4 or scores.shape[2] != self.keep.shape[1]:
            return None
        return self.keep[:, None, :, None]

    def _floor(self, name: str, scores: Tensor, mask: Tensor | None) -> None:
        most = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        rows = most.amax(-1)
        real = rows[rows.isfinite()]
        if len(real):
            self.floors[name] = min(self.floors[name], float(real.min()))


def _vectors(network: Network, node: Operation, x: Tensor, mask: Tensor | None) -> Tensor:
    """The vectors that a node's matrix is multiplied with: (n, cols)."""
    if node.op == "conv2d":
        stride, padding, dilation = (node.pair(key) for key in ("stride", "padding", "dilation"))
        _, _, height, width = network.shape(node.inputs[1])
        return F.unfold(x, (height, width), dilation, padding, stride).transpose(1, 2).flatten(0, 1)
    if mask is None or mask.dim() != x.dim():
        return x.flatten(0, -2)
    return x[mask.expand(*x.shape[:-1], 1)[..., 0]]


def gather(network: Network, batches: Iterable[Mapping[str, Tensor]], *, moments: bool = False) -> NetworkStatistics:
    """Run the float network over inputs by name.

    Memory: one batch's values, a histogram a value, and the second moments where asked for. Raises CalibrationError
    where there are no batches, or a value is not finite.
    """
    observer = _Observer(network, moments)
    parameters = {name: torch.from_numpy(array) for name, array in network.parameters.items()}
    count = 0
    for batch in batches:
        observer.keep = batch[network.mask].bool() if network.mask else None
        evaluate(network, parameters, batch, observer.see)
        count += 1
    if not count:
        raise CalibrationError(f"{network.name}: there are no calibration samples, wanted at least one")
    found = {name: _statistics(name, part) for name, part in observer.moments.items()}
    return NetworkStatistics(observer.histograms, observer.floors, found, count)


def _statistics(name: str, moments: Moments) -> InputStatistics:
    arrays = moments.arrays(name)
    second_moments, low, high = (arrays[f"{name}.{part}"] for part in MOMENTS)
    return InputStatistics(second_moments, low, high, moments.count)


def save(statistics: NetworkStatistics, folder: Path) -> None:
    """Write into `folder` (made if absent)."""
    folder.mkdir(parents=True, exist_ok=True)
    histograms = {
        f"{name}.{part}": getattr(seen, part) for name, seen in statistics.histograms.items() for part in PARTS
    }
    save_file(histograms, folder / "histograms.safetensors")
    moments = {}
    for name, found in statistics.moments.items():
        for part in MOMENTS:
            moments[f"{name}.{part}"] = torch.from_numpy(getattr(found, part))
    save_file(moments, folder / "moments.safetensors")
    tree = {
        "histograms": sorted(statistics.histograms),
        "floors": dict(statistics.floors),
        "moments": {name: found.count for name, found in statistics.moments.items()},
        "samples": statistics.samples,
    }
    (folder / "statistics.json").write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n")


def load(folder: Path) -> NetworkStatistics:
    """Read what `save` wrote."""
    try:
        tree = json.loads((folder / "statistics.json").read_text())
        arrays, moments = (load_file(folder / f"{kind}.safetensors") for kind in ("histograms", "moments"))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{folder}: no readable statistics of a network ({error})") from error
    histograms = {}
    for name in tree["histograms"]:
        seen = histograms[name] = Histogram(*arrays[f"{name}.counts"].shape)
        for part in PARTS:
            setattr(seen, part, arrays[f"{name}.{part}"])
    found = {}
    for name, count in tree["moments"].items():
        second_moments, low, high = (moments[f"{name}.{part}"].numpy() for part in MOMENTS)
        found[name] = InputStatistics(second_moments, low, high, count)
    return NetworkStatistics(histograms, tree["floors"], found, tree["samples"])
