"""Histograms that merge exactly, static grids, and the ranges that they hold: against ONNX Runtime and brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnxruntime.quantization import calibrate
from onnxruntime.quantization.quant_utils import compute_scale_zp

from calibration.clipping import RangeOptions, activation_grid, entropy, squared_errors
from calibration.observers import BINS, Histogram, grid_of
from lilliput.errors import CalibrationError

VALUES = st.floats(-1e6, 1e6, width=32)
ROWS = hnp.arrays(np.float32, st.tuples(st.just(2), st.integers(1, 12)), elements=VALUES)


def seen(*batches: np.ndarray, bins: int = BINS) -> Histogram:
    histogram = Histogram(len(batches[0]), bins)
    for batch in batches:
        histogram.add(torch.from_numpy(batch))
    return histogram


def same(a: Histogram, b: Histogram) -> bool:
    names = ("counts", "zeros", "exponent", "minimum", "maximum")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def bell(seed: int, size: int = 20_000, heavy: bool = True) -> np.ndarray:
    """(size,) float32 with tails, as activations have."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(4, size) if heavy else rng.normal(size=size)
    return x.astype(np.float32)


@settings(deadline=None, max_examples=100)
@given(st.lists(ROWS, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_batches_and_merging_change_nothing(batches: list[np.ndarray], random: Any) -> None:
    whole = seen(np.concatenate(batches, axis=1), bins=16)
    shuffled = random.sample(batches, len(batches))
    assert same(whole, seen(*shuffled, bins=16))
    cut = random.randint(0, len(batches) - 1)
    merged = seen(*batches[: cut + 1], bins=16)
    merged.merge(seen(batches[0][:, :0], *batches[cut + 1 :], bins=16))
    assert same(whole, merged)


@settings(deadline=None, max_examples=60)
@given(ROWS)
def test_counts_are_numpys_on_the_least_power_of_two_that_holds_all(x: np.ndarray) -> None:
    histogram = seen(x, bins=64)
    for channel, row in enumerate(x):
        edges, most = histogram.edges(channel), np.abs(row).max()
        if most:
            assert most < edges[-1] <= 2 * np.nextafter(most, np.inf), "no wider than it must be"
        counted, _ = np.histogram(row.astype(np.float64), edges)
        assert np.array_equal(histogram.counts[channel].numpy(), counted)
    assert np.array_equal(histogram.zeros.numpy(), (x == 0).sum(1))
    assert np.array_equal(histogram.minimum.numpy(), x.min(1))


def test_memory_does_not_grow() -> None:
    histogram = Histogram(3, 64)
    before = histogram.counts.nbytes
    for seed in range(50):
        histogram.add(torch.from_numpy(bell(seed, 300).reshape(3, 100) * 2.0**seed))
    assert histogram.counts.nbytes == before
    assert int(histogram.counts.sum()) == 50 * 300


def test_masked_values_do_not_count_whatever_they_are() -> None:
    x = torch.tensor([[1.0, -torch.inf, torch.nan, -3.0, 1e30]])
    histogram = Histogram()
    histogram.add(x, torch.tensor([[True, False, False, True, False]]))
    assert (float(histogram.minimum), float(histogram.maximum), int(histogram.counts.sum())) == (-3.0, 1.0, 2)
    histogram.add(x, torch.zeros(1, 5, dtype=torch.bool))
    assert int(histogram.counts.sum()) == 2
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        histogram.add(x)


@settings(deadline=None)
@given(VALUES, VALUES, st.sampled_from(["int8", "uint8", "int16", "uint16"]), st.booleans())
def test_zero_is_a_code_and_the_ends_are_held(a: float, b: float, dtype: Any, symmetric: bool) -> None:
    low, high = min(a, b), max(a, b)
    if symmetric and dtype.startswith("u"):
        with pytest.raises(CalibrationError, match="wanted int8 or int16"):
            grid_of(np.array([low]), np.array([high]), dtype, symmetric, None)
        return
    made = grid_of(np.array([low]), np.array([high]), dtype, symmetric, None)
    assert made.scale.dtype == np.float32
    assert made.scale[0] > 0
    assert made.qmin <= made.zero_point[0] <= made.qmax
    x = np.array([[0.0, low, high]])
    on_grid = made.dequantized(x)
    assert on_grid[0, 0] == 0.0
    assert np.abs(on_grid - x).max() <= made.scale[0] * 1.001
    theirs = compute_scale_zp(
        np.float32(low), np.float32(high), np.array(made.qmin, dtype), np.array(made.qmax, dtype), symmetric
    )
    assert made.scale[0] == pytest.approx(float(theirs[1]), rel=1e-6)
    assert abs(int(made.zero_point[0]) - int(theirs[0])) <= 1, "theirs divides by a scale of more digits"


class Reader(calibrate.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: list[np.ndarray]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"x": batch}


def theirs(folder: Path, calibrater: type, batches: list[np.ndarray], **options: Any) -> tuple[float, float]:
    """ONNX Runtime's range of the input of a one-node model that these batches pass."""
    kind = onnx.TensorProto.FLOAT
    x, y = (onnx.helper.make_tensor_value_info(name, kind, ["n"]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "one", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "one.onnx")
    made = calibrater(str(folder / "one.onnx"), augmented_model_path=str(folder / "augmented.onnx"), **options)
    made.augment_graph()
    made.create_inference_session()
    made.collect_data(Reader(batches))
    low, high = (np.asarray(end).item() for end in made.compute_data()["x"].range_value)
    return low, high


def ours(batches: list[np.ndarray], method: str, bins: int = BINS, **options: Any) -> tuple[float, float, float]:
    """The ends that our grid was made of, by the scale, and the width of a bin."""
    histogram = seen(*[batch[None] for batch in batches], bins=bins)
    made = activation_grid(histogram, RangeOptions(method=method, dtype="uint16", **options))  # type: ignore[arg-type]
    low = float(made.scale[0] * (made.qmin - made.zero_point[0]))
    return low, float(made.scale[0]) * made.qmax + low, float(np.ldexp(1.0, int(histogram.exponent)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_min_max_is_onnx_runtimes(seed: int, tmp_path: Path) -> None:
    batches = [bell(seed + n) * (n + 1) for n in range(3)]
    low, high, _ = ours(batches, "min_max")
    # 16 bits: half a step of the zero point's rounding
    step = (high - low) / 65535
    assert (low, high) == pytest.approx(theirs(tmp_path, calibrate.MinMaxCalibrater, batches), abs=step)


@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99])
@pytest.mark.parametrize("seed", [0, 1])
def test_percentile_is_onnx_runtimes_within_a_bin(percent: float, seed: int, tmp_path: Path) -> None:
    # no share of this many values is a whole number: there both ends of a gap between two bins would do
    batches = [bell(seed, 19_997), bell(seed + 10, 19_997) + np.float32(0.5)]
    low, high, width = ours(batches, "percentile", percentile=percent)
    found = theirs(tmp_path, calibrate.PercentileCalibrater, batches, percentile=percent, num_bins=2048)
    their_width = 2 * float(np.abs(np.concatenate(batches)).max()) / 2048
    assert (low, high) == pytest.approx(found, abs=width + 2 * their_width)


@pytest.mark.parametrize("seed", range(6))
def test_entropy_is_onnx_runtimes_on_the_same_histogram(seed: int) -> None:
    x = bell(seed, 200_000, heavy=seed % 2 == 0)
    histogram = seen(x[None], bins=1024)
    counts, edges = histogram.counts[0].numpy(), histogram.edges(0)
    collector = calibrate.HistogramCollector("entropy", False, 1024, 128, None, None)
    entry = (counts, edges.astype(np.float32), x.min(), x.max(), np.float32(edges[-1]))
    found = tuple(map(float, collector.get_entropy_threshold(entry, 128)))
    low, high = entropy(counts, edges)
    # beyond the data all ranges are alike up to float32's rounding; both are cut to what was seen
    assert (max(low, float(x.min())), min(high, float(x.max()))) == pytest.approx(found, rel=1e-6)


def test_entropy_end_to_end_is_onnx_runtimes_within_a_bin(tmp_path: Path) -> None:
    """The largest magnitude is just below a power of two, so that both histograms have the same bins."""
    x = bell(3, 100_000)
    x *= np.nextafter(np.float32(16), np.float32(0)) / np.abs(x).max()
    x[[0, np.abs(x).argmax()]] = x[[np.abs(x).argmax(), 0]]  # their first batch sets the bins
    batches = list(np.split(x, 4))
    low, high, width = ours(batches, "entropy", bins=1024)
    found = theirs(tmp_path, calibrate.EntropyCalibrater, batches, num_bins=1024)
    assert (low, high) == pytest.approx(found, abs=width)


def true_error(x: np.ndarray, low: float, high: float, dtype: Any, symmetric: bool) -> float:
    made = grid_of(np.array([low]), np.array([high]), dtype, symmetric, None)
    wide = x[None].astype(np.float64)
    return float(((made.dequantized(wide) - wide) ** 2).mean())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["heavy", "normal", "relu", "shifted"])
def test_mse_is_near_the_best_of_brute_force(kind: str, symmetric: bool) -> None:
    x = bell(0, 20_000, heavy=kind != "normal")
    x = {"relu": np.maximum(x, 0), "shifted": x + 2}.get(kind, x)
    made = activation_grid(seen(x[None]), RangeOptions(method="mse", symmetric=symmetric))
    wide = x[None].astype(np.float64)
    chosen = float(((made.dequantized(wide) - wide) ** 2).mean())
    low, high = min(x.min(), 0), x.max()
    if symmetric:
        ends = [(-end, end) for end in np.linspace(0.02, 1, 400) * np.abs(x).max()]
    else:
        ends = [(a * low, b * high) for a in np.linspace(0, 1, 48) for b in np.linspace(0.02, 1, 48)]
    best = min(true_error(x, *end, "int8", symmetric) for end in ends)
    assert chosen <= 1.01 * best
    assert chosen <= true_error(x, float(x.min()), float(x.max()), "int8", symmetric), "no worse than min-max"


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_the_error_of_a_histogram_is_that_of_its_values(dtype: Any) -> None:
    """Steps finer than a bin, and coarser; clipped on both sides."""
    x = bell(5, 400_000)
    histogram = seen(x[None])
    counts, edges = histogram.counts[0].numpy().astype(np.float64), histogram.edges(0)
    for low, high in [(-3.0, 3.0), (-1.0, 8.0), (float(x.min()), float(x.max()))]:
        made = grid_of(np.array([low]), np.array([high]), dtype, False, None)
        found = squared_errors(counts, edges[:-1], edges[1:], made)[0] / len(x)
        assert found == pytest.approx(true_error(x, low, high, dtype, False), rel=0.02)


def test_each_channel_has_its_own_range() -> None:
    x = np.stack([bell(0, 4000), 100 * bell(1, 4000), np.zeros(4000, np.float32)])
    for method in ("min_max", "percentile", "mse"):
        made = activation_grid(seen(x, bins=512), RangeOptions(method=method, axis=1))  # type: ignore[arg-type]
        alone = [activation_grid(seen(row[None], bins=512), RangeOptions(method=method)) for row in x]  # type: ignore[arg-type]
        assert made.scale.tolist() == [float(one.scale[0]) for one in alone]
        assert made.scale[2] == 1.0
        assert made.axis == 1


def test_entropy_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="defined per tensor"):
        RangeOptions(method="entropy", axis=1)


def test_clipping_methods_do_clip_an_outlier() -> None:
    x = bell(0, 50_000, heavy=False)
    x[0] = 300.0
    histogram = seen(x[None])
    scales = {
        method: float(activation_grid(histogram, RangeOptions(method=method)).scale[0])  # type: ignore[arg-type]
        for method in ("min_max", "percentile", "entropy", "mse")
    }
    assert scales["min_max"] > 1
    assert scales["percentile"] < 0.1
    assert scales["entropy"] < 0.2, "its least range has 128 bins"
    assert scales["mse"] < scales["min_max"]
