"""Smoothing of networks: the float network stays, the outliers go, and what else reads a value reads it as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_networks import encoder_network, sentences
from torch import Tensor, nn
from torch.nn import functional as F

from calibration.clipping import RangeOptions
from calibration.network_smoothing import Options, channel_peaks, smoothed
from calibration.network_solve import Options as SolveOptions
from calibration.network_solve import solve
from calibration.network_statistics import gather
from lilliput.errors import CalibrationError
from lilliput.network import Network
from lilliput.network.run import run, run_quantized
from lilliput.network.trace import trace

OUTLIER, LARGER = 5, 60.0


class Uneven(nn.Module):
    """Rows (1, 12, 16) through a norm whose channel OUTLIER is LARGER than the others, and a matrix that expects it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.inner, self.outer = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        with torch.no_grad():
            self.norm.weight[OUTLIER] *= LARGER
            self.inner.weight[:, OUTLIER] /= LARGER
            self.outer.weight[OUTLIER] *= LARGER

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        summed: Tensor = x + self.outer(F.gelu(self.inner(x)))
        return summed


def rows(count: int, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"rows": torch.randn(1, 12, 16, generator=generator)} for _ in range(count)]


def lost(network: Network, reference: Network) -> dict[str, float]:
    """Mean squared error of the outlier, and of the other channels."""
    options = SolveOptions(ranges=RangeOptions(dtype="uint8"), integer="products")
    model = solve(network, gather(network, rows(24)), options)
    (name,) = network.outputs
    errors = [(run(reference, batch)[name] - run_quantized(model, batch)[name]).square() for batch in rows(8, seed=5)]
    by_channel = torch.cat(errors).mean((0, 1))
    others = torch.arange(16) != OUTLIER
    return {"outlier": float(by_channel[OUTLIER]), "others": float(by_channel[others].mean())}


def test_the_float_network_stays_the_same() -> None:
    network = encoder_network()
    other = smoothed(network, sentences(8), Options())
    assert sum(node.name.endswith("/smoothed") for node in other.nodes) == 6  # norm, norm and GELU of each layer
    assert any("scaled by channel" in note for note in other.notes)
    (name,) = network.outputs
    for batch in sentences(4, seed=3):
        torch.testing.assert_close(run(other, batch)[name], run(network, batch)[name], rtol=1e-4, atol=1e-5)


def test_the_residual_stream_reads_what_it_read() -> None:
    network = encoder_network()
    other = smoothed(network, sentences(8), Options())
    norms = {node.name for node in network.nodes if node.op == "layer_norm"}
    before = [name for node in network.nodes if node.op == "add" for name in node.inputs if name in norms]
    after = [name for node in other.nodes if node.op == "add" for name in node.inputs if name in norms]
    assert before == after
    assert before


def test_channels_that_matrices_make_are_alike() -> None:
    network, batches = encoder_network(), sentences(8)
    other = smoothed(network, batches, Options())
    restored = {node.inputs[0] for node in other.nodes if node.name.endswith("/restored")}
    for name, most in channel_peaks(other, batches, restored).items():
        np.testing.assert_allclose(most, 1.0, rtol=1e-4, err_msg=name)


def test_the_other_channels_lose_less() -> None:
    network = trace(Uneven().eval(), rows(1)[0], name="uneven")
    before, after = lost(network, network), lost(smoothed(network, rows(24), Options()), network)
    assert after["others"] < before["others"] / 100
    assert after["outlier"] < before["outlier"]


def test_padding_counts_in_no_peak() -> None:
    network = encoder_network()
    name = next(node.name for node in network.nodes if node.op == "gelu")
    (batch,) = sentences(4)[3:]  # 3 positions of padding
    seen: dict[str, Tensor] = {}
    run(network, batch, lambda key, value: seen.update({key: value}))
    peaks = channel_peaks(network, [batch], {name})[name]
    np.testing.assert_array_equal(peaks, seen[name][0, :-3].abs().amax(0).numpy())
    assert not np.array_equal(peaks, seen[name][0].abs().amax(0).numpy())


def test_no_batches_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no calibration samples"):
        smoothed(encoder_network(), [], Options())
