"""Solving networks: grids are tied and fixed as the formats ask, biases fit, and the twin stays near float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_networks import cnn_network, encoder_network, images, sentences
from torch import Tensor, nn

from calibration import network_statistics
from calibration.clipping import RangeOptions
from calibration.network_solve import BIAS_MOST, Narrow, Options, needs_moments, solve
from calibration.network_statistics import NetworkStatistics, gather
from lilliput.errors import CalibrationError
from lilliput.network import Network, QuantizedNetwork, file
from lilliput.network.run import run, run_quantized
from lilliput.network.trace import trace


def sqnr_db(model: QuantizedNetwork, batches: list[dict[str, Tensor]]) -> float:
    (name,) = model.network.outputs
    exact = torch.cat([run(model.network, batch)[name] for batch in batches])
    found = torch.cat([run_quantized(model, batch)[name] for batch in batches])
    return float(10 * ((exact**2).sum() / ((exact - found) ** 2).sum()).log10())


@pytest.fixture(scope="module")
def cnn() -> tuple[Network, NetworkStatistics]:
    network = cnn_network()
    return network, gather(network, images(16), moments=True)


@pytest.fixture(scope="module")
def encoder() -> tuple[Network, NetworkStatistics]:
    network = encoder_network()
    return network, gather(network, sentences(16))


@pytest.mark.parametrize(("dtype", "least_db"), [("uint8", 25), ("uint16", 40), ("int8", 25)])
def test_a_cnn_stays_near_its_float_model(cnn: tuple[Network, NetworkStatistics], dtype: str, least_db: float) -> None:
    network, statistics = cnn
    ranges = RangeOptions(dtype=dtype)  # type: ignore[arg-type]
    assert sqnr_db(solve(network, statistics, Options(ranges=ranges)), images(8, seed=2)) > least_db


def test_an_encoder_stays_near_its_float_model(encoder: tuple[Network, NetworkStatistics]) -> None:
    network, statistics = encoder
    model = solve(network, statistics, Options(ranges=RangeOptions(dtype="uint16")))
    assert sqnr_db(model, sentences(8, seed=2)) > 30


def test_one_solve_gives_every_target_the_same_weights(cnn: tuple[Network, NetworkStatistics]) -> None:
    network, statistics = cnn
    first, second = (
        solve(network, statistics, Options(ranges=RangeOptions(dtype=dtype)))  # type: ignore[arg-type]
        for dtype in ("int8", "uint16")
    )
    third = solve(network, statistics, Options(ranges=RangeOptions(dtype="uint16")), weights=first.weights)
    assert all(np.array_equal(codes, third.biases[name]) for name, codes in second.biases.items())
    assert all(tensor.same_as(second.weights[name]) for name, tensor in first.weights.items())
    assert all(int(tensor.codes.min()) >= -127 for tensor in first.weights.values())


def test_int8_and_uint8_are_one_grid_moved_by_128(cnn: tuple[Network, NetworkStatistics]) -> None:
    network, statistics = cnn
    signed, unsigned = (
        solve(network, statistics, Options(ranges=RangeOptions(dtype=dtype))).activations  # type: ignore[arg-type]
        for dtype in ("int8", "uint8")
    )
    for name, grid in signed.items():
        np.testing.assert_array_equal(grid.scale, unsigned[name].scale)
        np.testing.assert_array_equal(grid.zero_point + 128, unsigned[name].zero_point)


def test_values_that_only_move_share_a_grid_and_clipping_is_the_grids(cnn: tuple[Network, NetworkStatistics]) -> None:
    network, statistics = cnn
    grids = solve(network, statistics, Options()).activations
    clip = next(node for node in network.nodes if node.op == "clip")
    assert grids[clip.name] is grids[clip.inputs[0]]
    assert int(grids[clip.name].zero_point[0]) == 0
    assert float(grids[clip.name].scale[0]) * 255 <= 6.0 + 1e-6
    concat = next(node for node in network.nodes if node.op == "concat")
    assert {id(grids[name]) for name in concat.inputs} == {id(grids[concat.name])}


def test_softmax_and_tanh_have_the_grids_that_the_formats_fix(encoder: tuple[Network, NetworkStatistics]) -> None:
    network, statistics = encoder
    softmax = next(node.name for node in network.nodes if node.op == "softmax")
    tanh = next(node.name for node in network.nodes if node.op == "tanh")
    found = solve(network, statistics, Options(ranges=RangeOptions(dtype="int8"))).activations
    assert (float(found[softmax].scale[0]), int(found[softmax].zero_point[0])) == (1 / 256, -128)
    assert (float(found[tanh].scale[0]), int(found[tanh].zero_point[0])) == (1 / 128, 0)
    found = solve(network, statistics, Options(ranges=RangeOptions(dtype="uint16"))).activations
    assert (float(found[softmax].scale[0]), int(found[softmax].zero_point[0])) == (1 / 65536, 0)
    assert (float(found[tanh].scale[0]), int(found[tanh].zero_point[0])) == (1 / 32768, 32768)


def test_padding_sets_no_range_and_scores_are_cut_where_no_row_sees_them() -> None:
    network = encoder_network()
    batches = sentences(8)
    statistics = gather(network, batches)
    lookup = next(node.name for node in network.nodes if node.op == "layer_norm")
    padded = sum(int(batch["attention_mask"].numel()) for batch in batches)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert int(statistics.histograms[lookup].counts.sum()) == real * 16 < padded * 16
    scores = next(node.inputs[0] for node in network.nodes if node.op == "softmax")
    grid = solve(network, statistics, Options()).activations[scores]
    low = float(grid.scale[0]) * (grid.qmin - int(grid.zero_point[0]))
    assert low == pytest.approx(statistics.floors[scores] - 16, abs=0.2)


def test_a_bias_that_would_not_fit_widens_its_channels_scale() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)
            with torch.no_grad():
                self.linear.weight[0] *= 1e-9
                self.linear.bias[0] = 3.0

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    batches = [{"x": torch.randn(1, 4)} for _ in range(4)]
    network = trace(Dead(), batches[0], name="dead")
    model = solve(network, gather(network, batches), Options(ranges=RangeOptions(dtype="uint16")))
    bias = model.biases["linear/linear"]
    assert abs(int(bias[0])) <= BIAS_MOST + 64
    node = network.nodes[0]
    assert float(bias[0] * model.bias_scale(node)[0]) == pytest.approx(3.0, rel=1e-6)


def test_gptq_reads_moments_and_int4_solves(cnn: tuple[Network, NetworkStatistics]) -> None:
    network, statistics = cnn
    options = Options(solver="gptq", weight_grid="int4-channel-f32", ranges=RangeOptions(dtype="uint16"))
    assert needs_moments(options)
    assert not needs_moments(Options())
    batches = images(8, seed=2)
    nearest = sqnr_db(solve(network, statistics, Options(**{**options.model_dump(), "solver": "rtn"})), batches)
    assert sqnr_db(solve(network, statistics, options), batches) > nearest


def test_a_narrower_grid_is_taken_where_it_holds(cnn: tuple[Network, NetworkStatistics]) -> None:
    network, statistics = cnn
    batches = images(8, seed=2)
    found = {}
    for least_db in (0.0, 26.0, 99.0):
        narrow = Narrow(least_db=least_db)
        model = solve(network, statistics, Options(narrow=narrow, ranges=RangeOptions(dtype="uint16")))
        held = [name for name, tensor in model.weights.items() if tensor.spec.bits == 4]
        assert all(name in model.provenance["weights on int4-channel-f32"] for name in held)
        found[least_db] = (len(held), sqnr_db(model, batches))
    measured = len(statistics.moments)  # the depthwise convolution has no moments, and stays on 8 bits
    assert found[0.0][0] == measured == 4 > found[26.0][0] >= found[99.0][0] == 0
    assert found[0.0][1] < found[26.0][1] <= found[99.0][1]


def test_files_give_back_statistics_and_the_solved_network(
    cnn: tuple[Network, NetworkStatistics], tmp_path: Path
) -> None:
    network, statistics = cnn
    network_statistics.save(statistics, tmp_path / "statistics")
    again = network_statistics.load(tmp_path / "statistics")
    model = solve(network, statistics, Options())
    same = solve(network, again, Options())
    file.save_quantized(same, tmp_path / "model")
    read = file.load_quantized(tmp_path / "model")
    assert all(grid.same_as(read.activations[name]) for name, grid in model.activations.items())
    assert all(tensor.same_as(read.weights[name]) for name, tensor in model.weights.items())
    assert all(np.array_equal(codes, read.biases[name]) for name, codes in model.biases.items())


def test_no_samples_and_other_grids_are_refused(cnn: tuple[Network, NetworkStatistics]) -> None:
    network, statistics = cnn
    with pytest.raises(CalibrationError, match="no calibration samples"):
        gather(network, [])
    with pytest.raises(CalibrationError, match=r"int4-b32.*int8-channel"):
        solve(network, statistics, Options(weight_grid="int4-b32"))
