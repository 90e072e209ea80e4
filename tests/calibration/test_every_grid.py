"""Every solver on every grid: on the grid, packed and read back by each format, no worse than rounding to nearest.

Solvers and exporters come from their registries, so that one added later is held to the same. What is guaranteed:
without correlation (diagonal H) codes are the optimum for their scales; with it coordinate descent ends where no
single code is better, which need not be the optimum; the search of scales is near to the optimum, by the figures here.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import libgguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solvers import loss, matrix, statistics

from calibration import gptq, rtn
from calibration.base import InputStatistics
from calibration.scale_search import SearchOptions, find_blocks, nearest
from exporters.litert_int8 import operators
from exporters.litert_int8 import weights as litert_weights
from exporters.litert_int8.flatbuffer import Model
from exporters.onnx_int4 import packing as onnx_packing
from lilliput import registry
from lilliput.errors import CalibrationError
from lilliput.ggml import blocks as gguf_blocks
from lilliput.grid import COMMON_GRIDS, GGUF_GRIDS, Float, GridSpec, QuantizedTensor, grid

ROWS, COLS = 8, 512
SOLVERS = tuple(name for name in registry.known("solvers") if name != "passthrough")  # which chooses nothing
ONNX = [f"int{bits}-b{size}{zp}" for bits in (2, 4, 8) for size in (16, 32, 64, 128, 256) for zp in ("", "-zp-f16")]
LITERT = ["int8-channel", "int4-channel", "int4-b32", "int4-b64", "int4-b128", "int4-b256"]
GGUF = ["int4-b32-f16", "int5-b32-f16", "int5-b32-min-f16", "int8-b32-f16", *GGUF_GRIDS]
GRIDS = list(dict.fromkeys([*COMMON_GRIDS, *GGUF, *ONNX, *LITERT]))


@cache
def layer() -> tuple[Float, InputStatistics]:
    return matrix(ROWS, COLS), statistics(COLS, tokens=2000)


@cache
def solved(solver: str, name: str) -> QuantizedTensor:
    weight, found = layer()
    options = registry.options("solvers", solver, {})
    beside = "-o8" if solver == "llm_int8" and grid(name).offset != "minimum" and name not in GGUF_GRIDS else ""
    tensor: QuantizedTensor = registry.load("solvers", solver)().solve(weight, grid(name + beside), found, options)
    tensor.check(f"{solver} on {name}")
    assert tensor.shape == weight.shape
    return tensor


def white(found: InputStatistics) -> InputStatistics:
    return replace(found, second_moments=np.eye(len(found.second_moments), dtype=np.float32))


def solved_or_skipped(solver: str, name: str) -> QuantizedTensor:
    """Only a solver that says it cannot hold to a grid is let off; rtn and gptq never."""
    try:
        return solved(solver, name)
    except CalibrationError as error:
        if solver in ("rtn", "gptq"):
            raise
        pytest.skip(f"{solver} refuses {name}: {error}")


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_solver_is_worse_than_rounding_to_nearest(solver: str, name: str) -> None:
    """The loss is the expected squared error of the output; for a solver without statistics, of white inputs."""
    weight, found = layer()
    plain = rtn.Solver().solve(weight, grid(name), None, rtn.Options(candidates=1, refine=0))
    seen = found if registry.constant("solvers", solver, "needs_statistics") else white(found)
    assert loss(weight, solved_or_skipped(solver, name), seen) <= loss(weight, plain, seen)
    if solver == "gptq":
        weighted = rtn.Solver().solve(weight, grid(name), found, rtn.Options(weighted=True))
        assert loss(weight, solved(solver, name), found) < 0.5 * loss(weight, weighted, found)


def through_gguf(tensor: QuantizedTensor, file: Path) -> QuantizedTensor:
    return gguf_blocks.unpack(gguf_blocks.pack(tensor), tensor.spec, "w")


def through_onnx(tensor: QuantizedTensor, file: Path) -> QuantizedTensor:
    return onnx_packing.unpack(onnx_packing.pack(tensor), tensor.spec, "w")


def through_litert(tensor: QuantizedTensor, file: Path) -> QuantizedTensor:
    """By a file of one linear operator."""
    model, stored = Model(), litert_weights.store(tensor)
    graph = model.graph("linear")
    weight = graph.constant("layers.0.mlp.up", stored.data, stored.dtype, stored.shape)
    assert stored.scales is not None
    graph.quantize(weight, stored.scales)
    x = graph.input("x", [1, 1, tensor.shape[1]])
    graph.output("y", operators.fully_connected(graph, x, weight, -1))
    model.write(file)
    found = litert_weights.read(file)["layers.0.mlp.up"]
    assert isinstance(found, QuantizedTensor)
    return found


FORMATS = {"gguf_llamacpp": through_gguf, "litert_int8": through_litert, "onnx_int4": through_onnx}
HELD = {"gguf_llamacpp": GGUF, "litert_int8": LITERT, "onnx_int4": ONNX}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_solved_is_read_back_from_each_format_that_takes_the_grid(
    solver: str, name: str, tmp_path: Path
) -> None:
    tensor = solved_or_skipped(solver, name)
    for exporter, through in FORMATS.items():
        refused = registry.load("exporters", exporter)().refuses(tensor.spec, "linear", tensor.shape)
        assert refused is None or tensor.spec.outliers or name not in HELD[exporter], refused
        if refused is None:
            assert through(tensor, tmp_path / "file").same_as(tensor), exporter


def every_codes(spec: GridSpec, cols: int) -> Float:
    """(codes ** cols, cols): every row of codes there is."""
    codes = spec.codebook or range(spec.qmin, spec.qmax + 1)
    return np.array(list(itertools.product(codes, repeat=cols)), np.float32)


def values_of(tensor: QuantizedTensor, row: int, codes: Float) -> Float:
    """(n, cols) float64: what rows of codes stand for, under one row's scales and offsets."""
    offset = np.zeros_like(tensor.scales) if tensor.offsets is None else np.asarray(tensor.offsets, np.float32)
    s, o = (tensor.per_weight(part)[row].astype(np.float64) for part in (tensor.scales, offset))
    return (codes - o) * s if tensor.spec.offset == "zero_point" else codes * s + o  # type: ignore[no-any-return]


TINY = ("int2-b32", "int2-b32-zp-f16", "int2-b32-min-f16", "q2_k", "q3_k", "iq4_nl", "iq4_xs")


@pytest.mark.parametrize("name", TINY)
def test_codes_are_the_optimum_of_all_codes_without_correlation(name: str) -> None:
    cols = 3
    weight, found = matrix(6, cols), statistics(cols)
    diagonal = np.diag(np.diag(found.second_moments))
    independent = InputStatistics(diagonal, found.minimum, found.maximum, found.count)
    for options in ({"rounds": 0}, {"rounds": 3}):
        tensor = gptq.Solver().solve(weight, grid(name), independent, gptq.Options.model_validate(options))
        for row in range(len(weight)):
            errors = values_of(tensor, row, every_codes(grid(name), cols)) - weight[row]
            least = (errors**2 @ np.diag(diagonal)).min()
            own = (tensor.dequantize()[row].astype(np.float64) - weight[row]) ** 2 @ np.diag(diagonal)
            assert own <= least * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize("name", TINY)
def test_descent_ends_between_the_optimum_of_all_codes_and_every_change_of_one(name: str) -> None:
    cols = 4 if grid(name).bits < 4 else 3
    weight, found = matrix(12, cols), statistics(cols)
    h = gptq.damped(torch.from_numpy(found.second_moments), 0.01).numpy()
    tensor = gptq.Solver().solve(weight, grid(name), found, gptq.Options(rounds=60))
    every = every_codes(grid(name), cols)
    for row in range(len(weight)):
        errors = values_of(tensor, row, every) - weight[row]
        losses = np.einsum("ni,ij,nj->n", errors, h, errors)
        one_apart = (every != tensor.codes[row]).sum(1) <= 1
        own = losses[(every == tensor.codes[row]).all(1)]
        assert losses.min() * 0.9999 <= own <= losses[one_apart].min() * 1.0001 + 1e-12


def least_of_all_scales_and_minima(weights: Float, spec: GridSpec, importance: Float) -> float:
    """The least weighted error of one block over all real scales and minima: by least squares for all codes."""
    q = every_codes(spec, len(weights)).astype(np.float64)
    h, w = importance.astype(np.float64), weights.astype(np.float64)
    w = w - h @ w / h.sum()
    q = q - (q @ h / h.sum())[:, None]
    curve = q**2 @ h
    gain = np.divide((q @ (h * w)) ** 2, curve, out=np.zeros_like(curve), where=curve > 1e-12)
    return float(h @ w**2 - gain.max())


def test_search_of_scales_and_minima_is_near_to_the_optimum_of_all() -> None:
    rng, spec, cols = np.random.default_rng(0), grid("int2-b8-min-f32"), 8
    weight, importance = matrix(60, cols), rng.uniform(0.1, 3, cols).astype(np.float32)
    tensor = nearest(weight, find_blocks(weight, spec, importance, SearchOptions()))
    errors = (importance * (weight - tensor.dequantize()) ** 2).sum(1)
    optima = np.array([least_of_all_scales_and_minima(row, spec, importance) for row in weight])
    assert (errors >= optima * 0.999).all()
    assert errors.sum() <= 1.1 * optima.sum()


def least_of_all_factors(weights: Float, importance: Float) -> float:
    """The least weighted error of one super-block of q2_k over dense d and dmin, and all integers and codes."""
    w, h = weights.reshape(16, 16), importance.reshape(16, 16)
    span = np.linspace(0.4, 1.2, 24, dtype=np.float32) / 15
    d, dmin = span * (w.max(1) - w.min(1)).max() / 3, span * -w.min()
    s = d[:, None, None, None, None] * np.arange(1, 16, dtype=np.float32)[:, None, None]
    m = dmin[:, None, None, None] * np.arange(16, dtype=np.float32)[:, None]
    least = np.zeros((len(d), len(dmin)))
    for block, own in zip(w, h, strict=True):  # (d, dmin, sc, m, weights)
        codes = np.clip(np.rint((block + m) / s), 0, 3)
        least += (own * (codes * s - m - block) ** 2).sum(-1).min(axis=(2, 3))
    return float(least.min())


def test_search_of_factors_and_integers_is_near_to_the_optimum_of_all() -> None:
    rng, weight, spec = np.random.default_rng(1), matrix(3, 256), grid("q2_k")
    importance = rng.uniform(0.1, 3, 256).astype(np.float32)
    found = nearest(weight, find_blocks(weight, spec, importance, SearchOptions()))
    errors = (importance * (weight - found.dequantize()) ** 2).sum(1)
    optima = np.array([least_of_all_factors(row, importance) for row in weight])
    assert (errors <= 1.1 * optima).all()


@given(st.sampled_from(GRIDS), st.integers(1, 3), st.integers(1, 300), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_any_matrix_is_put_on_the_grid(name: str, rows: int, cols: int, seed: int) -> None:
    """Also of widths that no block divides; blocks of zeros, of the smallest and of large numbers among them."""
    rng = np.random.default_rng(seed)
    weight = matrix(rows, cols, seed) * 10.0 ** rng.integers(-12, 4, (rows, 1), np.int64)
    weight[rng.random((rows, cols)) < rng.choice([0, 0.9])] = 0
    weight = weight.astype(np.float32)
    importance = np.where(rng.random(cols) < 0.2, 0, rng.uniform(0.1, 3, cols)).astype(np.float32)
    tensor = nearest(weight, find_blocks(weight, grid(name), importance, SearchOptions(candidates=4)))
    tensor.check(name)
    assert not tensor.dequantize()[(weight == 0).all(1)].any()
    error, size = np.abs(tensor.dequantize() - weight).max(1), np.abs(weight).max(1)
    assert (error <= size * 1.01 + 2.0**-23 * 2 ** grid(name).bits).all()


@pytest.mark.parametrize("name", GGUF)
def test_search_is_no_worse_than_llama_cpps_own(name: str) -> None:
    """Round to nearest weighted by H's diagonal, beside ggml's quantizer with the same as importance matrix."""
    weight, found = matrix(32, 768), statistics(768, tokens=2000)
    spec, importance = grid(name), found.second_moments.diagonal().copy()
    packed = libgguf.quantize_rows(weight, gguf_blocks.block_type(spec), imatrix=importance)
    theirs = gguf_blocks.unpack(np.frombuffer(bytes(packed), np.uint8).reshape(len(weight), -1), spec, "w")
    diagonal = InputStatistics(np.diag(importance), found.minimum, found.maximum, found.count)
    ours = rtn.Solver().solve(weight, spec, found, rtn.Options(weighted=True))
    assert loss(weight, ours, diagonal) <= loss(weight, theirs, diagonal)
    refined = gptq.Solver().solve(weight, spec, found, gptq.Options())
    assert loss(weight, refined, found) <= 0.5 * loss(weight, theirs, found)
