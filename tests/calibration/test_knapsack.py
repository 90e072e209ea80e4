from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from calibration.knapsack import TOLERANCE, Option, choose, hull, least_bytes

OPTIONS = st.lists(st.builds(Option, st.integers(1, 60), st.floats(0, 100, allow_nan=False)), min_size=1, max_size=4)
UNITS = st.lists(OPTIONS, min_size=1, max_size=5)


@given(UNITS, st.floats(0, 1))
def test_the_choice_is_as_good_as_the_best_of_all(units: list[list[Option]], share: float) -> None:
    low, high = least_bytes(units), sum(max(o.size_bytes for o in options) for options in units)
    budget = low + int(share * (high - low))
    chosen = [options[i] for options, i in zip(units, choose(units, budget), strict=True)]
    every = (o for o in product(*units) if sum(option.size_bytes for option in o) <= budget)
    best = min(sum(option.loss for option in o) for o in every)
    assert sum(option.size_bytes for option in chosen) <= budget
    assert sum(option.loss for option in chosen) * (1 - TOLERANCE) <= best + 1e-9


@given(OPTIONS)
def test_the_hull_is_convex_and_ends_at_the_least_loss(options: list[Option]) -> None:
    steps = hull(0, options)
    slopes = [step.gain / step.size_bytes for step in steps]
    assert slopes == sorted(slopes, reverse=True)
    assert all(step.gain > 0 and step.size_bytes > 0 for step in steps)
    if steps:
        assert options[steps[-1].to].loss == min(option.loss for option in options)


def test_many_units_keep_the_budget_and_use_it() -> None:
    """As many as a model has: the sizes of seven grids, losses fourfold a bit."""
    rng = np.random.default_rng(0)
    scales = rng.lognormal(0, 2, 150)
    units = [[Option(int(1000 * bits), float(s * 4.0**-bits)) for bits in (2, 3, 4, 4.5, 5, 6, 8.5)] for s in scales]
    budget = 150 * 4500
    chosen = choose(units, budget)
    used = sum(units[i][j].size_bytes for i, j in enumerate(chosen))
    uniform = sum(unit[3].loss for unit in units)
    assert budget - 1000 < used <= budget
    assert sum(units[i][j].loss for i, j in enumerate(chosen)) < 0.5 * uniform
