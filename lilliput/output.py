"""The folder of a run's results: DIR/<target>/… with manifest.json, and DIR/report.json|md|html.

A marker file says that the folder is ours; a folder that holds something else is never written into. While a run
writes, the marker is locked (flock), so that a second run on the same folder is refused at once.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lilliput.errors import OutputError
from lilliput.store import disk_errors

MARKER = ".lilliput"
TEXT = "Written by `lilliput run`, which may replace what is here.\n"


def check(out: Path) -> None:
    """Raise OutputError unless `out` is absent, empty, or a former run's, and can be written."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise OutputError(f"--out {out}: {existing} is a file, wanted a folder: choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"--out {out}: {existing} cannot be written: choose another --out")
    if existing == out.absolute() and not (out / MARKER).is_file():
        held = sorted(path.name for path in out.iterdir())
        if held:
            shown = ", ".join(held[:3]) + (", …" if len(held) > 3 else "")
            raise OutputError(
                f"--out {out}: the folder holds something else ({shown}), wanted an empty folder or that of a former "
                "lilliput run: choose another --out"
            )


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Make the folder ours, and hold it while the run writes. Raises OutputError where another run does.

    A run that fails before it wrote anything leaves the folder as it found it.
    """
    check(out)
    made = not out.exists()
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        marker = (out / MARKER).open("a+")
    with marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"--out {out}: another lilliput run is writing here: wait, or choose another") from error
        new = marker.seek(0, os.SEEK_END) == 0
        try:
            with disk_errors(out):
                marker.write(TEXT if new else "")
                marker.flush()
            yield
        except BaseException:
            if new and [path.name for path in out.iterdir()] == [MARKER]:
                (out / MARKER).unlink()
                if made:
                    out.rmdir()
            raise
