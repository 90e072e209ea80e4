"""The multiple-choice knapsack: one option for each unit, the least loss together, no more bytes than a budget.

The convex hull of a unit's options (bytes, loss), its steps taken in the order of loss saved a byte, gives the
optimum of the relaxed problem, in which a step may be taken in part (Sinha and Zoltners 1979). Taking whole steps
only, as long as they fit, is off by less than one step: `_greedy`. From there `choose` goes on to a dynamic
programme over the units: states (bytes, loss) of the units so far, of which those are dropped that another one
beats in both, or whose bound (their loss and the relaxed optimum of the units to come) saves less than TOLERANCE of
the best found so far. So the result is within TOLERANCE of the optimum, unless more than STATES are left
over at one unit: then the greedy choice stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

TOLERANCE = 1e-3
STATES = 200_000

Array = npt.NDArray[np.float64]


class Option(NamedTuple):
    size_bytes: int
    loss: float


class Step(NamedTuple):
    """From one option on a unit's hull to the next larger one."""

    unit: int
    to: int  # the option's index
    size_bytes: int
    gain: float


@dataclass(frozen=True, eq=False)
class States:
    """Non-dominated choices for the first units: totals, and where each comes from."""

    size_bytes: Array
    loss: Array
    parent: npt.NDArray[np.intp]  # state of the units before
    option: npt.NDArray[np.intp]  # of the last unit


def least_bytes(units: Sequence[Sequence[Option]]) -> int:
    """The smallest budget that can be kept."""
    return sum(min(option.size_bytes for option in options) for options in units)


def choose(units: Sequence[Sequence[Option]], budget: int) -> tuple[int, ...]:
    """The index of each unit's option. The budget is at least `least_bytes`."""
    assert budget >= least_bytes(units)
    steps = sorted(
        (s for i, options in enumerate(units) for s in hull(i, options)), key=lambda s: -s.gain / s.size_bytes
    )
    start = [_smallest(options) for options in units]
    found = _greedy(units, start, steps, budget)
    levels, best = [States(np.zeros(1), np.zeros(1), np.zeros(1, np.intp), np.zeros(1, np.intp))], _loss(units, found)
    for i, options in enumerate(units):
        states = _extend(levels[-1], options)
        bound = states.loss + _relaxed(units, start, steps, i + 1, budget - states.size_bytes)
        kept = _undominated(states, bound < best * (1 - TOLERANCE))
        if not len(kept.loss) or len(kept.loss) > STATES:
            return found
        levels.append(kept)
    return _trace(levels)


def hull(unit: int, options: Sequence[Option]) -> list[Step]:
    """The steps along the lower convex hull, of falling gain a byte; from the smallest option on."""
    order = sorted(range(len(options)), key=lambda i: options[i])
    corners = [order[0]]
    for i in order[1:]:
        if options[i].loss >= options[corners[-1]].loss:
            continue
        while len(corners) > 1 and _slope(options, corners[-2], corners[-1]) >= _slope(options, corners[-2], i):
            corners.pop()
        if options[corners[-1]].size_bytes == options[i].size_bytes:
            corners[-1] = i
        else:
            corners.append(i)
    pairs = pairwise(corners)
    return [
        Step(unit, b, options[b].size_bytes - options[a].size_bytes, options[a].loss - options[b].loss)
        for a, b in pairs
    ]


def _slope(options: Sequence[Option], a: int, b: int) -> float:
    return (options[b].loss - options[a].loss) / (options[b].size_bytes - options[a].size_bytes)


def _smallest(options: Sequence[Option]) -> int:
    return min(range(len(options)), key=lambda i: options[i])


def _loss(units: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return sum(options[i].loss for options, i in zip(units, chosen, strict=True))


def _greedy(
    units: Sequence[Sequence[Option]], start: Sequence[int], steps: Sequence[Step], budget: int
) -> tuple[int, ...]:
    """Whole steps by falling gain a byte; a unit whose step does not fit stays where it is."""
    chosen, stuck = list(start), set[int]()
    left = budget - sum(options[i].size_bytes for options, i in zip(units, start, strict=True))
    for step in steps:
        if step.unit in stuck:
            continue
        if step.size_bytes > left:
            stuck.add(step.unit)
            continue
        chosen[step.unit], left = step.to, left - step.size_bytes
    return tuple(chosen)


def _relaxed(
    units: Sequence[Sequence[Option]], start: Sequence[int], steps: Sequence[Step], first: int, budgets: Array
) -> Array:
    """The relaxed optimum of the units from `first` on, for each budget; infinite where it cannot be kept."""
    rest = range(first, len(units))
    least = sum(units[i][start[i]].size_bytes for i in rest)
    worst = sum(units[i][start[i]].loss for i in rest)
    later = [step for step in steps if step.unit >= first]
    sizes = np.cumsum([0.0, *(step.size_bytes for step in later)])
    gains = np.cumsum([0.0, *(step.gain for step in later)])
    return np.where(budgets >= least, worst - np.interp(budgets - least, sizes, gains), np.inf)


def _extend(states: States, options: Sequence[Option]) -> States:
    """Every state with every option of the next unit."""
    n = len(states.loss)
    return States(
        np.concatenate([states.size_bytes + option.size_bytes for option in options]),
        np.concatenate([states.loss + option.loss for option in options]),
        np.tile(np.arange(n), len(options)),
        np.repeat(np.arange(len(options)), n),
    )


def _undominated(states: States, allowed: npt.NDArray[np.bool_]) -> States:
    """Of the allowed states, those of least loss for their bytes."""
    order = np.flatnonzero(allowed)
    order = order[np.lexsort((states.loss[order], states.size_bytes[order]))]
    loss = states.loss[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
    kept = order[loss < before]
    return States(states.size_bytes[kept], states.loss[kept], states.parent[kept], states.option[kept])


def _trace(levels: Sequence[States]) -> tuple[int, ...]:
    """The options of the last level's best state."""
    chosen, state = [], int(np.argmin(levels[-1].loss))
    for level in reversed(levels[1:]):
        chosen.append(int(level.option[state]))
        state = int(level.parent[state])
    return tuple(reversed(chosen))
