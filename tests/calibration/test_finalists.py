"""Which allocations are measured, and that the measure is of a solve that has not seen the judged samples."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_sensitivity import random_samples
from tiny_models import tiny_source

from calibration import allocation, finalists, sensitivity, statistics
from calibration.allocation import Price, Prices
from calibration.divergence import divergence
from calibration.solve import solve
from lilliput.recipe_schema import Rule


def priced(table_losses: dict[str, float]) -> Prices:
    """A table of which each grid costs as given, and one linear that may have 4 or 8 bits."""
    sizes = {"int2-channel": 25, "int4-channel": 50, "int8-channel": 100}
    table = tuple(Price(grid=grid, size_bytes=sizes[grid], loss=loss) for grid, loss in table_losses.items())
    linear = (Price(grid="int4-b32", size_bytes=50, loss=0.1), Price(grid="int8-channel", size_bytes=100, loss=0.01))
    name = "layers.0.mlp.down"
    return Prices(
        units=(("embedding",), (name,)), of={"embedding": table, name: linear}, weights={"embedding": 100, name: 100}
    )


@pytest.mark.parametrize(
    ("losses", "rivals"),
    [
        ({"int4-channel": 0.09, "int8-channel": 0.01}, ["int8-channel"]),  # 0.10 against 0.11
        ({"int4-channel": 0.09, "int8-channel": 0.08}, []),  # 0.10 against 0.18
        ({"int2-channel": 0.11, "int4-channel": 0.10, "int8-channel": 0.02}, ["int8-channel", "int2-channel"]),
        ({"int4-channel": 0.09}, []),
    ],
)
def test_a_table_on_another_grid_is_a_rival_where_it_is_predicted_near(
    losses: dict[str, float], rivals: list[str]
) -> None:
    prices = priced(losses)
    best = prices.within(150)
    assert best[0].grid == "int4-channel"
    found = finalists.rivals(prices, best)
    assert sorted(held.of["embedding"][0].grid for held in found) == sorted(rivals)
    for held in found:
        assert sum(choice.size_bytes for choice in held.within(150)) <= 150


def test_what_is_measured_is_solved_without_the_judged_samples(tmp_path: Path) -> None:
    source = tiny_source(tmp_path / "model")
    samples = random_samples(source)
    sensed = sensitivity.gather(source, samples, tmp_path / "sensitivity")
    gathered = statistics.gather(source, samples, tmp_path / "statistics")
    rules = [[Rule(match="*", grid=grid, solver={"name": "gptq"})] for grid in ("int3-b32", "int8-b32")]  # type: ignore[arg-type]
    worse, better = finalists.measured(source, gathered, sensed, samples, rules)
    with allocation.unseen(source, gathered, sensed, samples) as (judged, others):
        assert worse == divergence(source, solve(source, rules[0], others).quantized, judged)
    assert better < worse
