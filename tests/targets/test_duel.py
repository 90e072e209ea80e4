"""Duels on a clock of the test's own: what is called, when more is drawn, and what makes a run unstable."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from targets import duel as duels
from targets.duel import Rules, duel


class Clock:
    """Time passes where a step or the probe says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, probe_s: Callable[[], float] = lambda: 1e-4) -> None:
        self.now, self.rng, self.opened, self.closed = 0.0, np.random.default_rng(0), list[str](), 0
        monkeypatch.setattr(duels, "perf_counter", lambda: self.now)
        monkeypatch.setattr(duels, "probe", lambda: self.spend(probe_s()))

    def spend(self, seconds: float) -> float:
        self.now += seconds
        return seconds


class Contender:
    """Steps of a mean time; one in five waits a hundred times as long."""

    def __init__(self, clock: Clock, name: str, mean_s: float, noise: float = 0.01) -> None:
        self.clock, self.mean_s, self.noise = clock, mean_s, noise
        clock.opened.append(name)

    def step(self) -> object:
        waits = 100 if self.clock.rng.random() < 0.2 else 1
        return self.clock.spend(self.mean_s * waits * (1 + abs(self.clock.rng.normal(0, self.noise))))

    def close(self) -> None:
        self.clock.closed += 1


def run(clock: Clock, slower: float, noise: float = 0.01) -> duels.Duel:
    a, b = partial(Contender, clock, "a", 1e-3, noise), partial(Contender, clock, "b", 1e-3 * slower, noise)
    return duel(a, b)


@pytest.mark.parametrize(
    ("slower", "verdict", "finding"),
    [(1.0, "PASS", "not told apart"), (1.05, "FAIL", "worse"), (0.9, "PASS", "better")],
)
def test_a_duel_ends_at_the_first_look_where_it_is_clear(
    monkeypatch: pytest.MonkeyPatch, slower: float, verdict: str, finding: str
) -> None:
    clock = Clock(monkeypatch)
    found = run(clock, slower)
    assert found.judgement is not None
    assert (found.verdict, found.judgement.finding, found.rounds, found.disturbed) == (verdict, finding, 10, 0)
    assert found.b_ms / found.a_ms == pytest.approx(slower, rel=0.01)
    assert found.a_ms == pytest.approx(1.0, rel=0.02), "the steps that waited are not in it"
    assert clock.closed == len(clock.opened) == 20
    assert {clock.opened[i] for i in range(0, 20, 2)} == {"a", "b"}, "who opens first is drawn"


def test_what_noise_hides_stays_inconclusive_after_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(Clock(monkeypatch), 1.02, noise=0.5)
    assert found.rounds == Rules().sequence.looks[-1]
    assert found.verdict == "INCONCLUSIVE"
    assert "budget of rounds is spent" in found.note
    assert found.unstable is None


def test_disturbed_rounds_are_drawn_again_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every fifth round the machine is slower by half, for everyone."""
    calls = iter(range(10**9))

    def probe_s() -> float:
        return 1.5e-4 if next(calls) // 33 % 5 == 2 else 1e-4

    found = run(Clock(monkeypatch, probe_s), 1.05)
    assert (found.disturbed, found.verdict) == (found.rounds - 10, "FAIL")
    assert found.disturbed > 0


def test_a_machine_that_is_mostly_disturbed_makes_a_duel_unstable(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10**9))

    def probe_s() -> float:
        return 1e-4 if next(calls) // 33 % 5 == 2 else 1.5e-4

    found = run(Clock(monkeypatch, probe_s), 1.05)
    assert found.verdict == "INCONCLUSIVE"
    assert found.unstable is not None
    assert "something else used this machine" in found.unstable


def test_contenders_are_closed_where_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    class Broken(Contender):
        def step(self) -> object:
            raise RuntimeError("the delegate is gone")

    with pytest.raises(RuntimeError, match="delegate"):
        duel(partial(Contender, clock, "a", 1e-3), partial(Broken, clock, "b", 1e-3))
    assert clock.closed == 2
