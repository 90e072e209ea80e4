"""What a device says of itself: the machine, and what it has free.

`python -m targets.probe NAME FOLDER` prints it as JSON.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from lilliput.errors import MissingError
from lilliput.results import Host, Record


class Probe(Record):
    """The machine now. `free_disk_bytes` is of the folder that artifacts are put into."""

    host: Host
    free_memory_bytes: int
    free_disk_bytes: int

    def check_memory(self, needed_bytes: int, what: str) -> None:
        """Raise MissingError (exit 4) where `what` needs more memory than the device has available."""
        if needed_bytes > self.free_memory_bytes:
            raise MissingError(
                f"{what} needs {needed_bytes / 1e9:.1f} GB of memory, {self.free_memory_bytes / 1e9:.1f} GB are "
                f"available on {self.host.device}: end other programs there, or choose a smaller model"
            )


def here(device: str, folder: Path) -> Probe:
    """This machine."""
    from targets import machine

    return Probe(
        host=machine.describe(device),
        free_memory_bytes=machine.available_memory_bytes(),
        free_disk_bytes=shutil.disk_usage(folder).free,
    )


if __name__ == "__main__":
    print(here(sys.argv[1], Path(sys.argv[2])).model_dump_json())
