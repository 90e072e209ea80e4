"""Lilliput: quantize a small model once, emit what each runtime wants, prove each artifact."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lilliput.errors import MissingError

__version__ = "0.1.0"

_SIBLINGS = ("calibration", "exporters", "targets")


def _refuse_foreign_siblings() -> None:
    """The sibling packages have common names: a foreign package first on sys.path would be imported instead."""
    home = Path(__file__).resolve().parent.parent
    for name in _SIBLINGS:
        spec = importlib.util.find_spec(name)
        seen = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if seen != home / name:
            where = f"is {seen}" if seen else "is not found"
            raise MissingError(
                f"package {name!r} {where}, wanted {home / name}: reinstall lilliput, or remove the other "
                f"{name!r} from sys.path"
            )


_refuse_foreign_siblings()
