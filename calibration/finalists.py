"""Finalists: allocations that predictions cannot tell apart are solved and measured, and the best one ships.

The sum of predicted losses is off by a tenth or so, and not alike for a table that lost bits and for linear layers that
did. (SmolLM2-135M in LiteRT, 90 MB: with the embedding at 8 bits 0.0421 predicted and 0.0448 measured here, at 4 bits
0.0428 and 0.0427; on the runtime and other text 0.0699 against 0.0627.) No choice moves as many bytes as a table's. So
beside the best allocation stand the best with each other grid of each table (embedding, head), where their prediction
is within NEAR of it, MOST in all.

Each is solved without the judged samples, and its KLD on them decides. Cost: a solve and a pass over HELD samples each.
"""

from __future__ import annotations

from collections.abc import Sequence

from calibration.allocation import Prices, unseen
from calibration.divergence import divergence
from calibration.samples import Samples
from calibration.sensitivity import Sensitivity
from calibration.solve import solve
from calibration.statistics import Statistics
from lilliput.allocated import Choice
from lilliput.model import SourceModel, role_of
from lilliput.recipe_schema import Rule

NEAR = 1.3  # times the least predicted loss
MOST = 3


def rivals(prices: Prices, best: Sequence[Choice]) -> list[Prices]:
    """The prices with one table held to another grid than in `best`, those of the least predicted loss first."""
    budget, loss = sum(choice.size_bytes for choice in best), sum(choice.loss for choice in best)
    found = []
    for table in (choice for choice in best if role_of(choice.name) != "linear"):
        for price in prices.of[table.name]:
            held = prices.model_copy(update={"of": {**prices.of, table.name: (price,)}})
            if price.grid == table.grid or held.least_bytes > budget:
                continue
            predicted = sum(choice.loss for choice in held.within(budget))
            if predicted <= NEAR * loss:
                found.append((predicted, held))
    return [held for _, held in sorted(found, key=lambda pair: pair[0])][: MOST - 1]


def measured(
    source: SourceModel,
    statistics: Statistics,
    sensitivity: Sensitivity,
    samples: Samples,
    rules: Sequence[Sequence[Rule]],
) -> list[float]:
    """KLD, nats a token, of the model by each set of rules. `statistics`, `samples`: all of the calibration."""
    with unseen(source, statistics, sensitivity, samples) as (judged, others):
        return [divergence(source, solve(source, one, others).quantized, judged) for one in rules]
