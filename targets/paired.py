"""Is B worse than A? Both on the same items, a few at a time, until it is known or a budget is spent.

An item is a round of an interleaved measurement (targets.duel), or a chunk of text. Of each there is one figure of A
and one of B, so that what the item does to both (a busy machine, a hard text) cancels:

    speed    log(b / a) of each round; their median, as a round may be hit on one side only
    loss     the chunks' mean divergences a and b; the ratio of their means

Two statements are made at each look, both at the level alpha / looks, so that all looks together are wrong in at most
alpha of all comparisons, wherever one stops (Bonferroni):

    finding    "worse" or "better": the bootstrap interval (over items; Efron 1979) of the ratio leaves out 1, and so
               does the sign-flip test (Fisher 1935): were A and B alike, each item's difference would as well have the
               other sign; p is the share of all sign patterns that give as large a mean. With labels that are drawn at
               random it is exact for any noise, which the bootstrap of ten items is not
    verdict    of the limit 1 + max_rise: PASS where the interval lies below, FAIL where it lies above and the test
               agrees, else INCONCLUSIVE: more items are drawn

Speeds are flipped by signed rank (Wilcoxon 1945): one disturbed round then counts as one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lilliput.results import Record, Verdict

Double = npt.NDArray[np.float64]
Finding = Literal["better", "worse", "not told apart"]

RESAMPLES = 10_000
FLIPS = 20_000
EXACT_ITEMS = 12  # up to so many items all sign patterns are counted


@dataclass(frozen=True)
class Sequence:
    """When to look, in items, and how often all looks together may see a difference that is not there."""

    looks: tuple[int, ...] = (10, 16, 24, 36)
    alpha: float = 0.02

    @property
    def level(self) -> float:
        return self.alpha / len(self.looks)


class Judgement(Record):
    """What the items so far say. `ratio` is B's figure over A's; low to high its interval at 1 - `level`."""

    items: int
    ratio: float
    low: float
    high: float
    level: float
    p: float  # of the sign-flip test against a ratio of 1
    max_rise: float
    finding: Finding
    verdict: Verdict


def judge_speed(log_ratios: Double, max_rise: float, level: float) -> Judgement:
    """`log_ratios`: log of B's time over A's, a round each (items,)."""
    drawn = _resampled(log_ratios)
    medians = np.exp(np.median(drawn, axis=1))
    ratio = float(np.exp(np.median(log_ratios)))
    return _judge(ratio, medians, lambda limit: _signed_ranks(log_ratios - np.log(limit)), max_rise, level)


def judge_loss(a: Double, b: Double, max_rise: float, level: float) -> Judgement:
    """Mean divergences of the same chunks, (items,) each. Two files that lose nothing are alike."""
    if not a.any():
        ratio, ratios = (1.0, np.ones(1)) if not b.any() else (np.inf, np.full(1, np.inf))
        raise_to = float(np.finfo(np.float64).max)
        return _judge(min(ratio, raise_to), np.minimum(ratios, raise_to), lambda limit: b - limit * a, max_rise, level)
    index = _indices(len(a))
    ratios = b[index].mean(axis=1) / np.maximum(a[index].mean(axis=1), np.finfo(np.float64).tiny)
    return _judge(float(b.mean() / a.mean()), ratios, lambda limit: b - limit * a, max_rise, level)


def _judge(ratio: float, drawn: Double, against: Callable[[float], Double], max_rise: float, level: float) -> Judgement:
    """`against(limit)` are the items' differences from that ratio, positive where B is above it."""
    low, high = (float(q) for q in np.quantile(drawn, (level / 2, 1 - level / 2)))
    p, limit = sign_flip_p(against(1.0)), 1 + max_rise
    finding: Finding = "not told apart"
    if p <= level and (low > 1 or high < 1):
        finding = "worse" if low > 1 else "better"
    verdict: Verdict = "INCONCLUSIVE"
    if high <= limit:
        verdict = "PASS"
    elif low > limit and sign_flip_p(against(limit)) <= level:
        verdict = "FAIL"
    return Judgement(
        items=len(against(1.0)), ratio=ratio, low=low, high=high, level=level, p=p, max_rise=max_rise,
        finding=finding, verdict=verdict,
    )  # fmt: skip


def sign_flip_p(values: Double) -> float:
    """The share of sign patterns whose mean is as far from 0 as that of `values` (items,); two-sided."""
    count, seen = len(values), abs(values.sum())
    if count <= EXACT_ITEMS:
        bits = np.arange(1 << count)[:, None] >> np.arange(count) & 1
        sums = np.abs((2 * bits - 1) @ values)
        return float((sums >= seen * (1 - 1e-12)).mean())
    signs = np.random.default_rng(0).integers(0, 2, (FLIPS, count)) * 2 - 1
    return float((1 + (np.abs(signs @ values) >= seen * (1 - 1e-12)).sum()) / (1 + FLIPS))


def _signed_ranks(values: Double) -> Double:
    """Each value's rank by size, from 1, with its sign; equal sizes share their mean rank."""
    sizes = np.abs(values)
    _, group, count = np.unique(sizes, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray(np.sign(values) * (last - (count - 1) / 2)[group], np.float64)


def _indices(count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))


def _resampled(values: Double) -> Double:
    """(RESAMPLES, items): items drawn with replacement."""
    return np.asarray(values[_indices(len(values))], np.float64)
