"""The gate's table of verdicts, every metric, and the three gates that are always on."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from lilliput.results import (
    Accuracy,
    DepthLatency,
    Gate,
    Generation,
    Instructions,
    Interval,
    Latency,
    Memory,
    Metric,
    SliceFigures,
    SuiteFigures,
    Verdict,
    worst,
)
from targets.gates import (
    Figure,
    Figures,
    dot_product_gate,
    exact_gate,
    generation_gate,
    judge,
    judge_all,
    read_back_gate,
    speaks,
)

DEPTH = DepthLatency(depth_tokens=16, steps=8, decode_tokens_per_s=100, decode_ms_p50=10, decode_ms_p90=12)
LATENCY = Latency(
    load_ms=500, ttft_ms=200, prompt_tokens=128, prefill_tokens_per_s=640, decode_tokens_per_s=100, decode_ms_p50=10,
    decode_ms_p90=12, depths=(DEPTH,), threads=2, probe_ms=(5.0, 5.1),
)  # fmt: skip
ACCURACY = Accuracy(
    mean_kld=0.10, top1_agreement=0.85, perplexity=11, reference_perplexity=10, tokens=2048,
    mean_kld_interval=Interval(low=0.08, high=0.12), top1_agreement_interval=Interval(low=0.83, high=0.87),
    perplexity_ratio_interval=Interval(low=1.05, high=1.15),
)  # fmt: skip
SLICE = SliceFigures(
    name="json", items=20, float_score=0.8, score=0.7, drop=0.1, drop_interval=Interval(low=0.0, high=0.2),
    mean_kld=0.1, answer_tokens=400,
)  # fmt: skip
SUITES = SuiteFigures(
    slices=(SLICE, SLICE.model_copy(update={"name": "tools", "drop_interval": Interval(low=0.08, high=0.12)}))
)
FIGURES = Figures(
    accuracy=ACCURACY, latency=LATENCY, memory=Memory(peak_rss_bytes=300_000_000, baseline_rss_bytes=50_000_000),
    size_bytes=92_000_000, exact_step_kld=1e-6, shipped_step_kld=1e-3, missing={}, suites=SUITES,
    instructions=Instructions(tokens=4, per_token=5e7, dot_per_token=8e6, mmla_per_token=0, fma_per_token=1e5),
)  # fmt: skip
NOTHING = Figures(
    accuracy=None, latency=None, memory=None, size_bytes=1, exact_step_kld=None, shipped_step_kld=None,
    missing={
        "accuracy": "it crashed", "latency": "it hung", "exact": "no twin", "suites": "it crashed",
        "instructions": "not counted",
    },
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "limit", "figure", "verdict"),
    [
        ("max", 0.15, Figure(0.10), "PASS"),
        ("max", 0.10, Figure(0.10), "PASS"),
        ("max", 0.05, Figure(0.10), "FAIL"),
        ("min", 0.05, Figure(0.10), "PASS"),
        ("min", 0.15, Figure(0.10), "FAIL"),
        ("max", 0.15, Figure(0.10, Interval(low=0.08, high=0.12)), "PASS"),
        ("max", 0.11, Figure(0.10, Interval(low=0.08, high=0.12)), "INCONCLUSIVE"),
        ("max", 0.09, Figure(0.10, Interval(low=0.08, high=0.12)), "INCONCLUSIVE"),
        ("max", 0.07, Figure(0.10, Interval(low=0.08, high=0.12)), "FAIL"),
        ("min", 0.11, Figure(0.10, Interval(low=0.08, high=0.12)), "INCONCLUSIVE"),
        ("min", 50, Figure(100, disturbed="noise"), "PASS"),
        ("min", 150, Figure(100, disturbed="noise"), "INCONCLUSIVE"),
        ("max", 0.15, Figure(None), "INCONCLUSIVE"),
    ],
)
def test_the_table(kind: str, limit: float, figure: Figure, verdict: Verdict) -> None:
    result = judge("x", kind, limit, figure)  # type: ignore[arg-type]
    assert result.verdict == verdict
    assert bool(result.note) == (verdict == "INCONCLUSIVE")
    assert (result.limit, result.value) == (limit, figure.value)


@pytest.mark.parametrize("metric", get_args(Metric))
def test_every_metric_has_its_figure_and_its_reason_where_it_has_none(metric: Metric) -> None:
    assert judge_all([Gate(metric=metric, max=1e12)], FIGURES)[0].verdict == "PASS"
    if metric != "size_mb":
        missing = judge_all([Gate(metric=metric, max=1e12)], NOTHING)[0]
        assert missing.verdict == "INCONCLUSIVE"
        assert any(why in missing.note for why in ("crashed", "hung", "no twin", "not counted"))


def test_a_build_without_the_dot_product_fails() -> None:
    assert FIGURES.instructions is not None
    assert dot_product_gate(FIGURES.instructions, "").verdict == "PASS"
    plain = FIGURES.instructions.model_copy(update={"dot_per_token": 0.0})
    assert dot_product_gate(plain, "").verdict == "FAIL"
    assert "lacks the dot product" in dot_product_gate(plain, "").note
    assert dot_product_gate(plain.model_copy(update={"mmla_per_token": 2.0}), "").verdict == "PASS"
    assert dot_product_gate(None, "it hung").verdict == "INCONCLUSIVE"


def test_units() -> None:
    values = {m: FIGURES.of(m).value for m in ("size_mb", "peak_rss_mb", "perplexity_ratio", "top1_agreement")}
    assert values == {"size_mb": 92.0, "peak_rss_mb": 300.0, "perplexity_ratio": 1.1, "top1_agreement": 0.85}


def test_unstable_speed_cannot_fail_but_memory_can() -> None:
    unstable = LATENCY.model_copy(update={"unstable": "the host probe took 5 to 9 ms"})
    figures = Figures(ACCURACY, unstable, FIGURES.memory, 1, None, None, {})
    gates = [Gate(metric="decode_tokens_per_s", min=200), Gate(metric="peak_rss_mb", max=100)]
    assert [g.verdict for g in judge_all(gates, figures)] == ["INCONCLUSIVE", "FAIL"]


@pytest.mark.parametrize("limits", [{}, {"max": 0.0, "min": 0.0}])
def test_a_gate_wants_one_limit(limits: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="wanted one of them"):
        Gate(metric="mean_kld", **limits)


def test_read_back_must_be_identical() -> None:
    assert read_back_gate(0, "").verdict == "PASS"
    assert read_back_gate(1, "layers.0.mlp.up").verdict == "FAIL"


def test_the_exact_step_is_held_to_a_tenth_of_a_millinat() -> None:
    verdicts = []
    for step in (0.9e-4, 1.1e-4, None):
        verdicts.append(exact_gate(Figures(None, None, None, 1, step, None, {"exact": "no twin"})).verdict)
    assert verdicts == ["PASS", "FAIL", "INCONCLUSIVE"]


@pytest.mark.parametrize(
    ("tokens", "verdict"),
    [((1, 2, 1), "PASS"), ((5,), "PASS"), ((), "FAIL"), ((5, 5, 5, 5), "FAIL")],
)
def test_an_artifact_must_speak(tokens: tuple[int, ...], verdict: Verdict) -> None:
    generation = Generation(prompt="Hello", text="…", tokens=tokens)
    assert speaks(tokens) == (verdict == "PASS")
    assert generation_gate(generation, "").verdict == verdict
    assert generation_gate(generation, "", float_tokens=(1, 2, 3)).verdict == verdict


def test_an_artifact_is_not_to_blame_for_a_float_model_that_says_the_same() -> None:
    result = generation_gate(Generation(prompt="a", text="bb", tokens=(5, 5)), "", float_tokens=(5, 5))
    assert (result.verdict, result.note) == ("PASS", "the float model says the same")


def test_no_generation_is_inconclusive() -> None:
    assert generation_gate(None, "it hung").verdict == "INCONCLUSIVE"


def test_the_worst_verdict_counts() -> None:
    assert worst(["PASS", "INCONCLUSIVE", "FAIL"]) == "FAIL"
    assert worst(["PASS", "INCONCLUSIVE"]) == "INCONCLUSIVE"
    assert worst(["PASS", "PASS"]) == "PASS"
    assert worst([]) == "INCONCLUSIVE"


def test_a_gate_on_slices_judges_each_by_its_own_interval() -> None:
    results = judge_all([Gate(metric="slice_drop", max=0.15)], FIGURES)
    assert [(r.name, r.verdict) for r in results] == [("slice_drop json", "INCONCLUSIVE"), ("slice_drop tools", "PASS")]
