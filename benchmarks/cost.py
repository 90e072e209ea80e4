"""What a stage costs: seconds, and the kernel's own high-water mark of resident memory (VmHWM), in a child process."""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lilliput import memory
from lilliput.results import Record

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class StageCost(Record):
    stage: str
    seconds: float
    peak_rss_bytes: int


def in_child(work: Callable[..., None], *arguments: Any) -> float:
    """In a process of its own, so that one's memory is not the other's; its seconds from start to end."""
    start = time.monotonic()
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"{work.__name__.strip('_')} ended with status {process.exitcode}")
    return time.monotonic() - start


@contextmanager
def measured(stage: str, stages: list[StageCost], folder: Path) -> Iterator[Path]:
    """Time a stage that writes into `folder` (made here), and note its peak of resident memory.

    Before it, memory is given back as the pipeline does between stages.
    """
    folder.mkdir()
    memory.give_back()
    CLEAR.write_text("5")  # resets VmHWM: see proc(5)
    start = time.monotonic()
    yield folder
    peak = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert peak is not None, "no VmHWM: this needs Linux"
    stages.append(StageCost(stage=stage, seconds=time.monotonic() - start, peak_rss_bytes=int(peak[1]) * 1024))
    print(f"{stage}: {stages[-1].seconds:.0f} s, peak {stages[-1].peak_rss_bytes / 1e9:.2f} GB", flush=True)
