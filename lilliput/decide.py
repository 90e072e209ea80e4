"""A run whose gates on accuracy were open draws more text: twice the chunks, as often as `evaluation.most` allows.

A gate is open where its 95 % interval holds the limit (targets.gates). Only what measures is done again: the weights,
and with them the files, stay as they are. What is still open after the last is INCONCLUSIVE (exit 3).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from lilliput import pipeline, report
from lilliput.errors import InputError
from lilliput.escalation import ACCURACY
from lilliput.run import Plan, Run, Watcher

Watch = Callable[[Plan], AbstractContextManager[Watcher]]


def run(plan: Plan, watch: Watch) -> Run:
    """Run the plan, and while that leaves gates open the same with more text. The last run's report is what stays."""
    kept: set[str] = set()
    done = _run(plan, watch, kept)
    while is_open(done) and (count := _next(done.plan)):
        recipe = done.plan.recipe
        evaluation = recipe.evaluation.model_copy(update={"count": count})
        try:
            larger = recipe.model_copy(update={"evaluation": evaluation})
            done = _run(pipeline.plan(larger, plan.out, fresh=plan.fresh), watch, kept)
        except InputError as error:  # the text ends
            return _noted(done, f"no more text was drawn: {error}")
    return done


def _run(plan: Plan, watch: Watch, kept: set[str]) -> Run:
    with watch(plan) as watcher:
        return pipeline.run(plan, watcher, kept)


def is_open(done: Run) -> bool:
    """Whether more text could decide a gate, and no other gate fails already."""
    gates = [gate for target in done.report.targets for gate in target.gates]
    return done.report.verdict == "INCONCLUSIVE" and any(
        gate.name in ACCURACY and gate.verdict == "INCONCLUSIVE" and gate.value is not None for gate in gates
    )


def _next(plan: Plan) -> int | None:
    """The next number of chunks; None where the budget is spent."""
    wanted = plan.recipe.evaluation
    if wanted.most is None or wanted.count >= wanted.most:
        return None
    return min(2 * wanted.count, wanted.most)


def _noted(done: Run, note: str) -> Run:
    found = done.report.model_copy(update={"notes": (*done.report.notes, note)})
    report.write(found, done.plan.out)
    return Run(done.plan, found)
