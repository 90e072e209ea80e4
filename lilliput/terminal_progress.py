"""Progress on stderr: bars with the remaining time on a terminal, one line a finished stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lilliput import figures
from lilliput.progress import Progress as Callback
from lilliput.progress import silent
from lilliput.report import StageTime
from lilliput.run import PlannedStage


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        transient=True,
    )


class StageDisplay:
    """A pipeline.Watcher: which stage is at work, how far it is, and what is left of the whole.

    A stage may start within another: a damaged result that is needed is made anew.
    """

    def __init__(self, stages: Sequence[PlannedStage]) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars = _bars(self._console) if sys.stderr.isatty() else None
        self._left = {stage.name: 0.0 if stage.cached else stage.seconds for stage in stages}
        self._count = len(stages)
        self._tasks: dict[str, TaskID] = {}
        self._expected = self._taken = 0.0  # seconds of the stages that are done, by the plan and by the clock

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bars:
            self._bars.stop()

    def started(self, stage: PlannedStage) -> Callback:
        """Draw the stage; the bar moves without aim until the stage reports how far it is."""
        if self._bars is None:
            return silent
        bars = self._bars
        task = self._tasks[stage.name] = bars.add_task(f"{self._place(stage.name)} {stage.name}", total=None)

        def progress(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        return progress

    def finished(self, stage: StageTime) -> None:
        """One line that stays."""
        if self._bars and stage.name in self._tasks:
            self._bars.remove_task(self._tasks.pop(stage.name))
        place = self._place(stage.name)
        expected = self._left.pop(stage.name, 0.0)
        if expected and not stage.cached:
            self._expected, self._taken = self._expected + expected, self._taken + stage.seconds
        what = "from the store" if stage.cached else figures.seconds(stage.seconds)
        left = sum(self._left.values()) * self._pace
        tail = f", about {figures.seconds(left)} left" if left >= 1 and not stage.cached else ""
        self._console.print(f"{place} {stage.name}: {what}{tail}", markup=False, soft_wrap=True)

    @property
    def _pace(self) -> float:
        """How much longer (or shorter) than planned the stages take on this machine."""
        return self._taken / self._expected if self._expected else 1.0

    def _place(self, name: str) -> str:
        """[3/14]; a stage that is done once more has no place of its own."""
        done = self._count - len(self._left)
        return f"[{done + 1}/{self._count}]" if name in self._left else "[again]"


class Countdown:
    """One piece of long work: a bar on a terminal, nothing elsewhere. Called as lilliput.progress.Progress."""

    def __init__(self, title: str) -> None:
        self._bars = _bars(Console(stderr=True)) if sys.stderr.isatty() else None
        self._task = self._bars.add_task(title, total=None) if self._bars else None

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._bars and self._task is not None:
            self._bars.update(self._task, completed=done, total=total)
