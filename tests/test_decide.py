"""Open gates draw more text, up to the budget: what is run again, and when it ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from sample_artifact import recipe
from sample_report import passing, report

from lilliput import decide, pipeline
from lilliput.errors import InputError
from lilliput.recipe_schema import Evaluation
from lilliput.report import Report
from lilliput.results import GateResult, Interval, SliceFigures, SuiteFigures, Verdict, worst
from lilliput.run import Plan, Quiet, Run


def plan_of(most: int | None, out: Path, count: int = 2) -> Plan:
    made = recipe()
    evaluation = made.evaluation.model_copy(update={"count": count, "most": most})
    made = made.model_copy(update={"evaluation": evaluation})
    return Plan(made, "0" * 64, "0" * 64, "host", out, out, False, 1, (), (), 0, 0, 0.0)


def judged(*verdicts: tuple[str, Verdict]) -> Report:
    gates = tuple(
        GateResult(name=name, kind="max", limit=0.1, value=0.1, verdict=verdict) for name, verdict in verdicts
    )
    verdict = worst([verdict for _, verdict in verdicts])
    target = passing().model_copy(update={"gates": gates, "verdict": verdict})
    return report(target).model_copy(update={"verdict": verdict})


def counts_of(
    monkeypatch: pytest.MonkeyPatch, plan: Plan, outcome: Callable[[int], Report]
) -> tuple[list[int], Run]:  # fmt: skip
    """Chunks of each run, and the last; `outcome` gives the report by the number of chunks."""
    seen: list[int] = []

    def run(plan: Plan, watcher: object, kept: object) -> Run:
        seen.append(plan.recipe.evaluation.count)
        return Run(plan, outcome(seen[-1]))

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(pipeline, "plan", lambda recipe, out, fresh: replace(plan, recipe=recipe))
    return seen, decide.run(plan, lambda plan: nullcontext(Quiet()))


def sliced(items: int, verdict: Verdict) -> Report:
    """A report whose gate on the slice "json" is judged so, after that many items."""
    made = judged(("slice_drop json", verdict))
    found = SliceFigures(
        name="json", items=items, float_score=0.5, score=0.4, drop=0.1, drop_interval=Interval(low=-0.1, high=0.3),
        mean_kld=0.1, answer_tokens=9,
    )  # fmt: skip
    (target,) = made.targets
    asked = target.model_copy(update={"suites": SuiteFigures(slices=(found,))})
    return made.model_copy(update={"targets": (asked,)})


def items_of(
    monkeypatch: pytest.MonkeyPatch, out: Path, most: int | None, outcome: Callable[[int], Report]
) -> tuple[list[int], Run]:  # fmt: skip
    """Items of each run, and the last."""
    plan, seen = plan_of(None, out), list[int]()
    evaluation = Evaluation.model_validate({"most_items": most})
    plan = replace(plan, recipe=plan.recipe.model_copy(update={"evaluation": evaluation}))

    def run(plan: Plan, watcher: object, kept: object) -> Run:
        seen.append(plan.recipe.evaluation.items or 0)
        return Run(plan, outcome(seen[-1]))

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(pipeline, "plan", lambda recipe, out, fresh: replace(plan, recipe=recipe))
    return seen, decide.run(plan, lambda plan: nullcontext(Quiet()))


def test_an_open_slice_asks_for_more_questions_until_it_is_decided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def outcome(items: int) -> Report:
        return sliced(items, "INCONCLUSIVE" if items < 40 else "PASS")

    seen, done = items_of(monkeypatch, tmp_path, 60, outcome)
    assert (seen, done.exit_code) == ([12, 24, 48], 0)
    assert items_of(monkeypatch, tmp_path, None, outcome)[0] == [0]


def test_a_slice_that_is_open_at_the_budget_stays_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen, done = items_of(monkeypatch, tmp_path, 30, lambda items: sliced(items, "INCONCLUSIVE"))
    assert (seen, done.exit_code) == ([12, 24, 30], 3)


def test_a_slice_that_has_no_more_questions_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen, done = items_of(monkeypatch, tmp_path, 90, lambda items: sliced(min(items, 20), "INCONCLUSIVE"))
    assert (seen, done.exit_code) == ([12, 24], 3)
    assert "no more questions were asked: json have no more" in done.report.notes[-1]


OPEN, SHUT = judged(("mean_kld", "INCONCLUSIVE")), judged(("mean_kld", "PASS"))


def test_chunks_double_until_the_gate_is_decided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen, done = counts_of(monkeypatch, plan_of(22, tmp_path), lambda count: OPEN if count < 8 else SHUT)
    assert (seen, done.exit_code) == ([2, 4, 8], 0)


def test_what_is_open_at_the_budget_stays_inconclusive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen, done = counts_of(monkeypatch, plan_of(11, tmp_path), lambda count: OPEN)
    assert (seen, done.exit_code) == ([2, 4, 8, 11], 3)


@pytest.mark.parametrize(
    "found",
    [
        SHUT,
        judged(("mean_kld", "INCONCLUSIVE"), ("size_mb", "FAIL")),
        judged(("ttft_ms", "INCONCLUSIVE")),
    ],
)
def test_nothing_is_drawn_where_it_cannot_help(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: Report) -> None:
    assert counts_of(monkeypatch, plan_of(22, tmp_path), lambda count: found)[0] == [2]


def test_no_budget_draws_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert counts_of(monkeypatch, plan_of(None, tmp_path), lambda count: OPEN)[0] == [2]


def test_a_text_that_ends_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def outcome(count: int) -> Report:
        if count > 2:
            raise InputError("evaluation text has 100 tokens, wanted 256")
        return OPEN

    _, done = counts_of(monkeypatch, plan_of(22, tmp_path), outcome)
    assert done.exit_code == 3
    assert "no more text was drawn: evaluation text has 100 tokens" in done.report.notes[-1]
    assert "no more text was drawn" in (tmp_path / "report.md").read_text()
