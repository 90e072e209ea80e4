"""The latency protocol on sessions of a known pace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lilliput.grid import Float
from targets import measure
from targets.request import LatencyTask

DECODE_S, PREFILL_S, OPEN_S = 0.010, 0.002, 0.05
TASK = LatencyTask(tokens=tuple(range(40)), prompt_tokens=20, depths=(4, 32), blocks=3, steps=10)


class Clock:
    """Time that passes only when a session works: a loaded machine cannot disturb these tests."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(measure, "probe_ms", lambda pool, threads: 5.0)
    return clock


class Paced:
    """Takes PREFILL_S a prompt token and DECODE_S a decoded one; every 5th decode three times as long."""

    def __init__(self, clock: Clock) -> None:
        self.calls: list[tuple[str, int]] = []
        self.decodes, self.clock = 0, clock
        clock.now_s += OPEN_S

    def reset(self) -> None:
        self.calls.append(("reset", 0))

    def prefill(self, tokens: Sequence[int]) -> Float:
        self.calls.append(("prefill", len(tokens)))
        self.clock.now_s += PREFILL_S * len(tokens)
        return np.zeros(4, np.float32)

    def decode(self, token: int) -> Float:
        self.decodes += 1
        self.clock.now_s += DECODE_S * (3 if self.decodes % 5 == 0 else 1)
        return np.zeros(4, np.float32)

    def close(self) -> None: ...


def test_figures_are_the_sessions_pace(clock: Clock) -> None:
    reply, _ = measure.measure(lambda: Paced(clock), 2, TASK)
    found = reply.latency
    assert found.load_ms == pytest.approx(52)  # opening, and one token of prompt
    assert found.ttft_ms == pytest.approx(40)
    assert found.prefill_tokens_per_s == pytest.approx(500)
    assert found.decode_ms_p50 == pytest.approx(10)
    assert found.decode_ms_p90 == pytest.approx(30)  # a fifth of the steps take three times as long
    assert found.decode_tokens_per_s == pytest.approx(100)
    assert [(d.depth_tokens, d.steps) for d in found.depths] == [(4, 30), (32, 30)]
    assert found.decode_ms_p50 == found.depths[0].decode_ms_p50
    assert (found.probe_ms, found.unstable, found.threads) == ((5.0,) * 4, None, 2)


def test_every_block_has_the_prompt_and_each_depth_from_an_empty_cache(clock: Clock) -> None:
    _, session = measure.measure(lambda: Paced(clock), 1, TASK)
    assert isinstance(session, Paced)
    block = [("reset", 0), ("prefill", 20), ("reset", 0), ("prefill", 4), ("reset", 0), ("prefill", 32)]
    assert session.calls == [("prefill", 1), *block * 4]  # the load, the warm-up and three blocks


@pytest.mark.parametrize(("budget_s", "steps"), [(100.0, 3 * 10), (1.05, 3 * 8), (0.1, 2 * 8)])
def test_a_slow_session_gets_fewer_steps_and_then_fewer_blocks(clock: Clock, budget_s: float, steps: int) -> None:
    """A block of 8 steps takes 0.33 s: three of them fit into 1.05 s, three of 10 into 100 s; two are always done."""
    reply, _ = measure.measure(lambda: Paced(clock), 1, TASK.model_copy(update={"budget_s": budget_s}))
    assert [depth.steps for depth in reply.latency.depths] == [steps, steps]


@pytest.mark.parametrize(
    ("probes", "disturbed"),
    [([5.0, 5.2, 5.1], False), ([5.0, 6.7], False), ([5.0, 6.8, 5.0], True), ([9.0, 5.0], True)],
)
def test_a_probe_that_wanders_marks_the_run(probes: list[float], disturbed: bool) -> None:
    assert (measure.disturbance(probes) is not None) == disturbed


def test_the_probe_is_a_time_on_all_threads() -> None:
    with ThreadPoolExecutor(2) as pool:
        assert 0.1 < measure.probe_ms(pool, 2) < 5000


def test_peak_memory_is_what_this_process_touched_and_not_its_parents() -> None:
    """A parent of 400 MB more starts a process that touches 100 MB: ru_maxrss can tell the parent's peak, VmHWM not."""
    held = np.ones(400_000_000, np.uint8)
    program = (
        "import numpy as np; from targets.measure import peak_rss_bytes; a = peak_rss_bytes();"
        "x = np.ones(100_000_000, np.uint8); print(a, peak_rss_bytes())"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(int, ended.stdout.split())
    assert held[0] == 1
    assert before < 300_000_000
    assert 95_000_000 < after - before < 130_000_000
