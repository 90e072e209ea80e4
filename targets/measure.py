"""Speed and memory of an artifact, in a process of its own that does nothing else.

    load_ms        open() and the first one-token prompt, so that mapped weights are paid for here; the
                   runtime's Python packages were imported before
    ttft_ms        a prompt in an empty cache, to its logits in this process's memory
    decode         single tokens after a cache was filled to each depth; p50 and p90 over all steps

A short block is done unmeasured (warm-up), then `blocks` that count, each with the prompt and every depth, so
that a drift of the machine meets all figures alike. Where the warm-up shows that they will take longer than
the budget, they decode fewer steps, but no fewer than WARM_UP_STEPS.

A fixed host probe runs before, between and after the blocks. It multiplies a matrix and reads 8 MB on as many
threads as the runtime uses: if its slowest run takes PROBE_SPREAD of its fastest or longer, something else
held the machine, and the figures are marked unstable.

The board's sensors are read before, during and after the blocks (targets.sensors), energy over the decoding alone.
Where the board says that it throttled, the figures are marked unstable too.

Peak memory is VmHWM of /proc/self/status: unlike ru_maxrss it does not start at the parent's peak.
It counts the mapped pages of the model file, which are in memory while the model runs.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lilliput.progress import Progress, silent
from lilliput.results import DepthLatency, Latency, Memory
from targets import sensors
from targets.base import Session
from targets.request import LatencyReply, LatencyTask
from targets.sensors import Recorder

PROBE_SPREAD = 1.35
PROBE_RUNS = 3  # the fastest of so many counts: a single hiccup is not a disturbed machine
MIN_BLOCKS = 2
WARM_UP_STEPS = 8


def measure(
    open_session: Callable[[], Session], threads: int, task: LatencyTask, progress: Progress = silent
) -> tuple[LatencyReply, Session]:
    """Open, measure, and give the session back for what else is to be done with it."""
    baseline = peak_rss_bytes()
    start = time.perf_counter()
    session = open_session()
    session.prefill(task.tokens[:1])
    load_ms = _since(start)
    found = sensors.find()
    recorder = sensors.Recorder(found, sensors.absent(found))
    with ThreadPoolExecutor(threads) as pool:
        samples = _blocks(session, task, lambda: probe_ms(pool, threads), recorder, progress)
    conditions = recorder.stop()
    latency = _latency(load_ms, samples, threads, task, conditions.throttled)
    memory = Memory(peak_rss_bytes=peak_rss_bytes(), baseline_rss_bytes=baseline)
    return LatencyReply(latency=latency, memory=memory, conditions=conditions), session


class _Samples:
    """Milliseconds, as they come in."""

    def __init__(self, depths: int) -> None:
        self.ttft: list[float] = []
        self.decode: list[list[float]] = [[] for _ in range(depths)]
        self.probe: list[float] = []


def _blocks(
    session: Session, task: LatencyTask, probe: Callable[[], float], recorder: Recorder, progress: Progress
) -> _Samples:
    """One unmeasured block, then the measured ones until the time budget is spent."""
    start = time.perf_counter()
    warm_up_steps = min(WARM_UP_STEPS, task.steps)
    _block(session, task, warm_up_steps, _Samples(len(task.depths)))
    warm_up_s = time.perf_counter() - start
    affordable = int(warm_up_steps * task.budget_s / (task.blocks * max(warm_up_s, 1e-3)))
    steps = max(warm_up_steps, min(task.steps, affordable))
    samples, start = _Samples(len(task.depths)), time.perf_counter()
    samples.probe.append(probe())
    recorder.start()
    for done in range(task.blocks):
        if done >= MIN_BLOCKS and time.perf_counter() - start > task.budget_s:
            break
        _block(session, task, steps, samples, recorder)
        samples.probe.append(probe())
        progress(done + 1, task.blocks)
    return samples


def _block(
    session: Session, task: LatencyTask, steps: int, samples: _Samples, recorder: Recorder | None = None
) -> None:
    session.reset()
    start = time.perf_counter()
    session.prefill(task.tokens[: task.prompt_tokens])
    samples.ttft.append(_since(start))
    for depth, times in zip(task.depths, samples.decode, strict=True):
        session.reset()
        token = int(session.prefill(task.tokens[:depth]).argmax())
        began = time.perf_counter()
        for _ in range(steps):
            start = time.perf_counter()
            logits = session.decode(token)
            times.append(_since(start))
            token = int(logits.argmax())
        if recorder is not None:
            recorder.decoded(began, time.perf_counter(), steps)


def _latency(load_ms: float, samples: _Samples, threads: int, task: LatencyTask, throttled: str | None) -> Latency:
    depths = tuple(_depth(depth, times) for depth, times in zip(task.depths, samples.decode, strict=True))
    ttft_ms = statistics.median(samples.ttft)
    return Latency(
        load_ms=load_ms,
        ttft_ms=ttft_ms,
        prompt_tokens=task.prompt_tokens,
        prefill_tokens_per_s=1000 * task.prompt_tokens / ttft_ms,
        decode_tokens_per_s=depths[0].decode_tokens_per_s,
        decode_ms_p50=depths[0].decode_ms_p50,
        decode_ms_p90=depths[0].decode_ms_p90,
        depths=depths,
        threads=threads,
        probe_ms=tuple(samples.probe),
        unstable=f"the device throttled: {throttled}" if throttled else disturbance(samples.probe),
    )


def _depth(depth: int, times_ms: list[float]) -> DepthLatency:
    p50, p90 = np.percentile(times_ms, (50, 90))
    return DepthLatency(
        depth_tokens=depth,
        steps=len(times_ms),
        decode_tokens_per_s=float(1000 / p50),
        decode_ms_p50=float(p50),
        decode_ms_p90=float(p90),
    )


def disturbance(probes_ms: list[float]) -> str | None:
    """Why a run with these probes was disturbed; None where it was not."""
    fastest, slowest = min(probes_ms), max(probes_ms)
    if slowest < PROBE_SPREAD * fastest:
        return None
    return (
        f"the host probe took {fastest:.1f} to {slowest:.1f} ms, wanted within a factor of {PROBE_SPREAD}: "
        "something else used this machine, measure again when it is idle"
    )


def probe_ms(pool: ThreadPoolExecutor, threads: int) -> float:
    """Time of a fixed work on all threads at once: the fastest of PROBE_RUNS."""
    return min(_probe_once(pool, threads) for _ in range(PROBE_RUNS))


def _probe_once(pool: ThreadPoolExecutor, threads: int) -> float:
    start = time.perf_counter()
    list(pool.map(_probe_work, range(threads)))
    return _since(start)


def _probe_work(seed: int) -> float:
    """About 10 ms: 16 products of 128 × 128 float64 (compute) and four reads of 8 MB (memory)."""
    x = np.full((128, 128), 1 / 128)
    for _ in range(16):
        x = x @ x
    memory = np.full(1 << 20, float(seed))
    return float(x[0, 0] + sum(memory.sum() for _ in range(4)))


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _since(start: float) -> float:
    """Milliseconds."""
    return 1000 * (time.perf_counter() - start)
