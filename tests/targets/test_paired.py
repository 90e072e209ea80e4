"""Paired comparisons: the test against counts by hand, the calls, and how often they are wrong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from targets import paired
from targets.paired import Sequence, judge_loss, judge_speed, sign_flip_p

LEVEL = Sequence().level


def test_the_share_of_sign_patterns_is_counted() -> None:
    values = np.array([3.0, -1.0, 2.0, 5.0])
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((-1, 1), repeat=4)
    ]
    assert sign_flip_p(values) == np.mean([s >= 9.0 for s in sums]) == 4 / 16
    assert sign_flip_p(np.zeros(5)) == 1
    assert sign_flip_p(np.ones(10)) == 2 / 1024


def test_many_items_are_drawn_and_agree_with_the_count() -> None:
    values = np.random.default_rng(0).normal(0.4, 1, 12)
    exact = sign_flip_p(values)
    drawn = sign_flip_p(np.append(values, 0.0))  # an item without a difference changes no sum
    assert drawn == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(
    ("rise", "finding", "verdict"),
    [(0.0, "not told apart", "PASS"), (0.05, "worse", "FAIL"), (-0.05, "better", "PASS")],
)
def test_ten_rounds_of_one_percent_noise_suffice(rise: float, finding: str, verdict: str) -> None:
    noise = np.random.default_rng(1).normal(0, 0.01, 10)
    found = judge_speed(np.log1p(rise) + noise, 0.02, LEVEL)
    assert (found.finding, found.verdict) == (finding, verdict)
    assert found.low <= found.ratio <= found.high
    assert found.ratio == pytest.approx(1 + rise, abs=0.01)


def test_one_disturbed_round_changes_no_call() -> None:
    log_ratios = np.random.default_rng(2).normal(np.log(1.05), 0.005, 16)
    log_ratios[3] = -2.0  # A waited for a processor
    found = judge_speed(log_ratios, 0.02, LEVEL)
    assert (found.finding, found.verdict) == ("worse", "FAIL")


def test_at_the_limit_it_stays_open() -> None:
    log_ratios = np.log(1.02) + np.random.default_rng(3).normal(0, 0.01, 36)
    assert judge_speed(log_ratios, 0.02, LEVEL).verdict == "INCONCLUSIVE"


def test_losses_are_compared_chunk_by_chunk() -> None:
    """Texts differ by a factor of ten, the files by a tenth: only the pairing shows it."""
    rng = np.random.default_rng(4)
    a = rng.uniform(0.02, 0.2, 10)
    b = 1.1 * a * rng.normal(1, 0.02, 10)
    found = judge_loss(a, b, 0.02, LEVEL)
    assert (found.finding, found.verdict) == ("worse", "FAIL")
    assert found.ratio == pytest.approx(b.mean() / a.mean())
    shuffled = judge_loss(a, rng.permutation(b), 0.02, LEVEL)
    assert shuffled.verdict == "INCONCLUSIVE"


def test_files_that_lose_nothing_are_alike_and_any_loss_is_worse() -> None:
    nothing, something = np.zeros(10), np.full(10, 1e-6)
    assert judge_loss(nothing, nothing, 0.0, LEVEL).verdict == "PASS"
    assert judge_loss(something, something, 0.0, LEVEL).finding == "not told apart"
    found = judge_loss(nothing, something, 0.02, LEVEL)
    assert (found.finding, found.verdict) == ("worse", "FAIL")


@pytest.mark.parametrize("noise", ["normal", "heavy", "drifting"])
def test_looking_again_and_again_raises_few_false_alarms(noise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A/A, with noise that no assumption of a bootstrap covers; each look until something is called."""
    monkeypatch.setattr(paired, "RESAMPLES", 400)
    monkeypatch.setattr(paired, "FLIPS", 2000)
    rng, sequence, called, runs = np.random.default_rng(5), Sequence(), 0, 200
    for _ in range(runs):
        values = rng.standard_cauchy(36) * 0.01 if noise == "heavy" else rng.normal(0, 0.01, 36)
        if noise == "drifting":
            values = np.abs(values) * np.linspace(0.1, 5, 36) * rng.choice((-1, 1), 36)
        called += any(
            judge_speed(values[:look], 0.02, sequence.level).finding != "not told apart" for look in sequence.looks
        )
    assert called <= 0.02 * runs + 2 * (0.02 * 0.98 * runs) ** 0.5
