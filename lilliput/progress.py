"""How long work says how far it is: stages call `progress(done, total)`, the command line draws it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called now and then with counts of whatever the stage works through."""

    def __call__(self, done: int, total: int) -> None: ...


def silent(done: int, total: int) -> None:
    """Draw nothing."""


def part(progress: Progress, start: float, stop: float) -> Progress:
    """Progress of a part of the work, from `start` to `stop` of 0 to 1."""

    def shown(done: int, total: int) -> None:
        progress(round(1000 * (start + (stop - start) * done / total)), 1000)

    return shown
