"""The pipeline: plan(recipe) → Plan, run(plan) → Run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lilliput.recipe import Recipe
from lilliput.run import Plan, PlannedStage, PlannedTarget, Quiet, Run, Watcher

__all__ = ["Plan", "PlannedStage", "PlannedTarget", "Quiet", "Run", "Watcher", "plan", "run"]


def plan(recipe: Recipe, out: Path, targets: Sequence[str] = (), model: str | None = None, fresh: bool = False) -> Plan:
    """All stages in order, what is cached and what the rest will take; every check that needs no work.

    `targets` keeps the targets of these names, `model` replaces the recipe's source, `fresh` ignores what is cached.
    Raises LilliputError: a format that cannot hold a tensor, a missing package, too little disk or memory,
    an output folder that holds something else.
    """
    raise NotImplementedError


def run(plan: Plan, watcher: Watcher | None = None) -> Run:
    """Do what is planned; write `out/<target>/…` with manifest.json and `out/report.json|md|html`."""
    raise NotImplementedError
