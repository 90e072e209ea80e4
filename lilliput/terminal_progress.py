"""Progress on stderr: bars with the remaining time on a terminal, one line a finished stage elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lilliput import figures
from lilliput.progress import Progress as Callback
from lilliput.report import StageTime
from lilliput.run import Plan, PlannedStage


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        transient=True,
    )


class StageDisplay:
    """A pipeline.Watcher: which stage is at work, how far it is, and what is left of the whole."""

    def __init__(self, plan: Plan) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars = _bars(self._console) if sys.stderr.isatty() else None
        self._count, self._done = len(plan.stages), 0
        self._plan, self._started_at = plan, time.monotonic()
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bars:
            self._bars.stop()

    def started(self, stage: PlannedStage) -> Callback:
        """Draw the stage; its estimate serves until it reports its own progress."""
        if self._bars is None:
            return lambda done, total: None
        bars = self._bars
        task = self._task = bars.add_task(f"[{self._done + 1}/{self._count}] {stage.name}", total=None)

        def progress(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        return progress

    def finished(self, stage: StageTime) -> None:
        """One line that stays."""
        if self._bars and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        self._done += 1
        what = "from the store" if stage.cached else figures.seconds(stage.seconds)
        left = self._left()
        tail = f", about {figures.seconds(left)} left" if left >= 1 else ""
        self._console.print(f"[{self._done}/{self._count}] {stage.name}: {what}{tail}", markup=False)

    def _left(self) -> float:
        """Seconds: the plan's estimate of the stages that are left."""
        return sum(stage.seconds for stage in self._plan.stages[self._done :] if not stage.cached)


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
