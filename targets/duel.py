"""Two contenders timed against each other, interleaved, until one is told from the other or the budget is spent.

A round opens both anew (which is first is drawn: where a model lies in memory makes a per cent of speed), warms them
up, and times single steps in turn, a b p, b a p, a b p, …, where p is a fixed probe. Of each the round keeps the lower
quartile: on a busy machine most steps are undisturbed and take the same time, some wait for a processor; the mean is
that of the waiting. What a change does to the rare slow steps alone is therefore not seen here.

The probe is work that no contender can change. A round whose probe took PROBE_SPREAD of the run's fastest or longer was
not on the machine that the others were on (throttled, or its caches were shared): it is disturbed, counted, and its
figures are left out. Who is timed plays no part in that, so it favours neither. Where more rounds are disturbed
than not, the whole comparison is unstable, and INCONCLUSIVE whatever its figures are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import numpy as np

from lilliput.progress import Progress, silent
from lilliput.results import Record, Verdict
from targets.paired import Judgement, Sequence, judge_speed

PROBE_SPREAD = 1.15
PROBE_SIZE = 48  # columns of the probe's matrix: a fraction of a millisecond, in the innermost cache
PROBE_PRODUCTS = 16
QUARTILE = 25


class Contender(Protocol):
    """What is timed: one step at a time."""

    def step(self) -> object: ...

    def close(self) -> None: ...


Open = Callable[[], Contender]


@dataclass(frozen=True)
class Rules:
    """How much is measured, and what B may cost: `max_rise` of A's time."""

    max_rise: float = 0.02
    pairs: int = 30
    warm_up: int = 3
    sequence: Sequence = field(default_factory=Sequence)
    seed: int = 0

    @property
    def most_rounds(self) -> int:
        """Drawn at most: twice the last look, as up to half may be disturbed."""
        return 2 * self.sequence.looks[-1]


class Round(Record):
    """Lower quartiles of the steps' times."""

    a_ms: float
    b_ms: float
    probe_ms: float


class Duel(Record):
    """`judgement` is over the rounds that were not disturbed; None: too few of them. `note` says why it is not PASS."""

    rounds: int
    disturbed: int
    a_ms: float
    b_ms: float
    probe_ms: tuple[float, ...]  # a round each
    judgement: Judgement | None
    verdict: Verdict
    unstable: str | None
    note: str = ""


def duel(a: Open, b: Open, rules: Rules = Rules(), progress: Progress = silent) -> Duel:
    """Rounds until the verdict is PASS or FAIL, or the budget is spent."""
    rng, rounds, looks = np.random.default_rng(rules.seed), list[Round](), rules.sequence.looks
    found: Judgement | None = None
    while len(rounds) < rules.most_rounds:
        rounds.append(_round(a, b, rules, a_first=bool(rng.integers(2))))
        progress(len(rounds), rules.most_rounds)
        calm = undisturbed(rounds)
        if len(calm) in looks and (found is None or found.items < len(calm)):
            found = judge_speed(_log_ratios(calm), rules.max_rise, rules.sequence.level)
            if found.verdict != "INCONCLUSIVE" or len(calm) == looks[-1]:
                break
    return _duel(rounds, found)


def undisturbed(rounds: list[Round]) -> list[Round]:
    """Those whose probe was about as fast as the fastest."""
    fastest = min(r.probe_ms for r in rounds)
    return [r for r in rounds if r.probe_ms < PROBE_SPREAD * fastest]


def _log_ratios(rounds: list[Round]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.array([np.log(r.b_ms / r.a_ms) for r in rounds])


def _duel(rounds: list[Round], found: Judgement | None) -> Duel:
    calm = undisturbed(rounds)
    disturbed = len(rounds) - len(calm)
    unstable = None
    if disturbed > len(calm):
        unstable = (
            f"in {disturbed} of {len(rounds)} rounds the probe took {PROBE_SPREAD} of its fastest time or longer: "
            "something else used this machine, compare again when it is idle"
        )
    verdict: Verdict = "INCONCLUSIVE" if unstable or found is None else found.verdict
    note = unstable or ("" if verdict != "INCONCLUSIVE" else "the budget of rounds is spent, the noise is too large")
    return Duel(
        rounds=len(rounds), disturbed=disturbed,
        a_ms=float(np.median([r.a_ms for r in calm])), b_ms=float(np.median([r.b_ms for r in calm])),
        probe_ms=tuple(r.probe_ms for r in rounds), judgement=found, verdict=verdict, unstable=unstable, note=note,
    )  # fmt: skip


def _round(a: Open, b: Open, rules: Rules, *, a_first: bool) -> Round:
    if a_first:
        left, right = a(), b()
    else:
        right, left = b(), a()
    try:
        for _ in range(rules.warm_up):
            _pair(left, right, swapped=not a_first)
        times = np.array([_pair(left, right, swapped=bool(i % 2) == a_first) for i in range(rules.pairs)])
    finally:
        left.close()
        right.close()
    a_ms, b_ms, probe_ms = (1000 * float(q) for q in np.percentile(times, QUARTILE, axis=0))
    return Round(a_ms=a_ms, b_ms=b_ms, probe_ms=probe_ms)


def _pair(a: Contender, b: Contender, *, swapped: bool) -> tuple[float, float, float]:
    """Seconds of a step of A, of B, and of the probe."""
    first, second = (b, a) if swapped else (a, b)
    start = perf_counter()
    first.step()
    middle = perf_counter()
    second.step()
    end = perf_counter()
    probe()
    probed = perf_counter() - end
    one, other = middle - start, end - middle
    return (other, one, probed) if swapped else (one, other, probed)


_MATRIX = np.full((PROBE_SIZE, PROBE_SIZE), 1 / PROBE_SIZE)


def probe() -> float:
    """A fixed work on one thread that touches nothing beyond its own small matrix."""
    x = _MATRIX
    for _ in range(PROBE_PRODUCTS):
        x = x @ _MATRIX
    return float(x[0, 0])
