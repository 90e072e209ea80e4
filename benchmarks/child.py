"""One measurement in a process that does nothing else: `python -m benchmarks.child REQUEST.json REPLY.json`.

A subject is measured by the protocol of every validation (targets/measure.py); a bandwidth request reads memory.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.subjects import Subject, open_session
from lilliput.results import Latency, Record

PROBE_BYTES = 1 << 29
PROBE_REPEATS = 8
BLOCKS = 2


class Request(Record):
    """`subject` None asks for the read bandwidth."""

    subject: Subject | None
    threads: int
    tokens: tuple[int, ...]
    prompt_tokens: int


class Reply(Record):
    latency: Latency | None = None
    bandwidth_gb_s: float | None = None


def main() -> int:
    request = Request.model_validate_json(Path(sys.argv[1]).read_bytes())
    reply = (
        Reply(bandwidth_gb_s=read_bandwidth_gb_s(request.threads))
        if request.subject is None
        else Reply(latency=latency(request.subject, request))
    )
    Path(sys.argv[2]).write_text(reply.model_dump_json())
    return 0


def latency(subject: Subject, request: Request) -> Latency:
    from targets.measure import measure
    from targets.request import LatencyTask

    task = LatencyTask(
        tokens=request.tokens, prompt_tokens=request.prompt_tokens, depths=(request.prompt_tokens,),
        blocks=BLOCKS, steps=subject.decode_steps,
    )  # fmt: skip
    reply, session = measure(lambda: open_session(subject, request.threads), request.threads, task)
    session.close()
    return reply.latency


def read_bandwidth_gb_s(threads: int, repeats: int = PROBE_REPEATS) -> float:
    """The fastest of `repeats` sums over half a gigabyte, read by `threads` threads; gigabytes are 10⁹ bytes."""
    import torch

    torch.set_num_threads(threads)
    memory = torch.ones(PROBE_BYTES // 4)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        memory.sum()
        seconds.append(time.perf_counter() - start)
    return PROBE_BYTES / min(seconds) / 1e9


if __name__ == "__main__":
    sys.exit(main())
