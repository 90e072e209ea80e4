"""The cost benchmark: its ratios, and its stages on a tiny random model."""

from __future__ import annotations

import argparse
from pathlib import Path

from tiny_models import tiny_llama

from benchmarks import calibration_cost
from benchmarks.calibration_cost import Cost
from benchmarks.cost import StageCost
from lilliput import source


def test_a_further_target_is_held_against_all_that_the_first_needs() -> None:
    stages = [("samples", 10, 100), ("statistics", 60, 300), ("quantize a", 30, 400), ("quantize b", 25, 200)]
    cost = Cost(
        model="m", parameters=50, weights_bytes=200, samples="builtin", tokens=1,
        stages=tuple(StageCost(stage=s, seconds=t, peak_rss_bytes=b) for s, t, b in stages),
    )  # fmt: skip
    assert cost.memory_ratio == 2.0
    assert cost.time_ratios == (0.25,)
    assert "PASS" in calibration_cost.markdown(cost)
    slow = cost.model_copy(update={"weights_bytes": 199})
    assert "2.01, wanted at most 2.0 MISS" in calibration_cost.markdown(slow)


def test_stages_run_once_each_and_their_peak_is_the_kernels(tmp_path: Path) -> None:
    source.load(str(tiny_llama(tmp_path / "hf")), tmp_path / "source", proof=False)
    arguments = argparse.Namespace(
        out=tmp_path, samples="self", count=2, length=8, grids="int4-b32,int8-channel", model="tiny", random_1b=False
    )
    calibration_cost._calibrate(arguments)
    cost = Cost.model_validate_json((tmp_path / "calibration_cost.json").read_bytes())
    assert [s.stage for s in cost.stages] == ["samples", "statistics", "quantize int4-b32", "quantize int8-channel"]
    assert all(stage.peak_rss_bytes > 50e6 for stage in cost.stages)  # an interpreter with torch
    assert cost.weights_bytes == 4 * cost.parameters
