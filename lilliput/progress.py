"""How long work says how far it is: stages call `progress(done, total)`, the command line draws it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called now and then with counts of whatever the stage works through."""

    def __call__(self, done: int, total: int) -> None: ...


def silent(done: int, total: int) -> None:
    """Draw nothing."""
