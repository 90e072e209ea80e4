"""The exception tree: every error that a user can cause or mend derives from LilliputError.

An error carries one message of one line (the object, what was seen, what was wanted, what to do)
and the exit code that the command line answers with:

    1  a gate fails            (a verdict, never an exception)
    2  bad input or usage      InputError and below
    3  inconclusive            (a verdict, never an exception)
    4  something is missing on this machine: a package, a device, disk, memory    MissingError and below
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LilliputError(Exception):
    """Base of every user error. `exit_code` is the process's exit status."""

    exit_code = 2


class InputError(LilliputError):
    """Bad input or usage (exit 2)."""


class RecipeError(InputError):
    """A recipe that cannot be read or does not fit the schema."""


class SourceError(InputError):
    """A model source that cannot be read, is damaged, or is not supported."""


class CalibrationError(InputError):
    """Calibration samples that cannot be had, or do not suffice."""


class GridError(InputError):
    """A grid that does not exist, or that a tensor or a format cannot hold."""


class ExportError(InputError):
    """A model that a format cannot hold, or a written file that does not read back."""


class ArtifactError(InputError):
    """An artifact folder or file that is foreign, damaged or changed."""


class OutputError(InputError):
    """An output folder that holds something else."""


class MissingError(LilliputError):
    """Something on this machine is missing (exit 4)."""

    exit_code = 4


class MissingPackageError(MissingError):
    """A package that is not installed; names the extra to install."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f'package {package!r} is not installed, {purpose} needs it: pip install "lilliput[{extra}]"')


class MeasurementError(MissingError):
    """A runtime that failed, hung or was killed while it was measured."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of a message about an unknown name: a guess where one is close, and all known names."""
    choices = sorted(known)
    close = get_close_matches(name, choices, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}known: {', '.join(choices)}"
