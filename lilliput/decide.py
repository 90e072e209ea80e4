"""A run whose gates were open asks for more: twice the text or the questions, as often as the recipe's budget allows.

    gates on accuracy     more chunks of the text, up to `evaluation.most`
    gates on slices       more questions of every slice, up to `evaluation.most_items`

A gate is open where its 95 % interval holds the limit (targets.gates). Only what measures is done again: the weights,
and with them the files, stay as they are. What is still open after the last is INCONCLUSIVE (exit 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from lilliput import pipeline, report
from lilliput.errors import InputError
from lilliput.escalation import ACCURACY
from lilliput.recipe_schema import Evaluation
from lilliput.report_table import SLICE_GATE
from lilliput.run import Plan, Run, Watcher

Watch = Callable[[Plan], AbstractContextManager[Watcher]]


def run(plan: Plan, watch: Watch) -> Run:
    """Run the plan, and while that leaves gates open the same with more. The last run's report is what stays."""
    kept: set[str] = set()
    done = _run(plan, watch, kept)
    while (evaluation := larger(done)) is not None:
        try:
            recipe = done.plan.recipe.model_copy(update={"evaluation": evaluation})
            done = _run(pipeline.plan(recipe, plan.out, fresh=plan.fresh), watch, kept)
        except InputError as error:  # the text ends
            return _noted(done, f"no more text was drawn: {error}")
    if spent := sorted(set(_used_up(done))):
        return _noted(done, f"no more questions were asked: {', '.join(spent)} have no more")
    return done


def _run(plan: Plan, watch: Watch, kept: set[str]) -> Run:
    with watch(plan) as watcher:
        return pipeline.run(plan, watcher, kept)


def larger(done: Run) -> Evaluation | None:
    """What could decide the open gates; None where there are none, another gate fails, or the budget is spent."""
    asked = done.plan.recipe.evaluation
    if done.report.verdict != "INCONCLUSIVE":
        return None
    more: dict[str, int | None] = {}
    if any(name in ACCURACY for name in _open(done)):
        more["count"] = _next(asked.count, asked.most)
    if asked.items is not None and set(_open_slices(done)) - set(_used_up(done)):
        more["items"] = _next(asked.items, asked.most_items)
    found = {key: value for key, value in more.items() if value is not None}
    return asked.model_copy(update=found) if found else None


def _open(done: Run) -> Iterator[str]:
    for target in done.report.targets:
        yield from (g.name for g in target.gates if g.verdict == "INCONCLUSIVE" and g.value is not None)


def _open_slices(done: Run) -> Iterator[str]:
    return (name.removeprefix(SLICE_GATE) for name in _open(done) if name.startswith(SLICE_GATE))


def _used_up(done: Run) -> Iterator[str]:
    """Open slices that have fewer items than were wanted of them, where a budget would have more."""
    wanted = done.plan.recipe.evaluation
    if wanted.items is None or wanted.most_items is None:
        return
    still = set(_open_slices(done))
    for target in done.report.targets:
        slices = target.suites.slices if target.suites else ()
        yield from (found.name for found in slices if found.name in still and found.items < wanted.items)


def _next(count: int, most: int | None) -> int | None:
    """Twice as many; None where the budget is spent."""
    return None if most is None or count >= most else min(2 * count, most)


def _noted(done: Run, note: str) -> Run:
    found = done.report.model_copy(update={"notes": (*done.report.notes, note)})
    report.write(found, done.plan.out)
    return Run(done.plan, found)
