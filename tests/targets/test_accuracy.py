"""Teacher forcing through a session, against one pass over the whole chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from tiny_setting import CHUNKS, LENGTH, Setting

from lilliput.grid import Float
from targets import accuracy
from targets.request import AccuracyTask
from targets.runtimes.torch_cpu import Runtime, TorchSession


@pytest.fixture(scope="module")
def session(setting: Setting) -> Iterator[TorchSession]:
    session = Runtime().open(setting.artifact, threads=1)
    yield session
    session.close()


def task(setting: Setting, first: int = 0, chunks: int = CHUNKS) -> AccuracyTask:
    return AccuracyTask(
        tokens=setting.float_model.folder.parent / "evaluation" / "tokens.npy",
        scored_from=LENGTH // 2,
        first=first,
        chunks=chunks,
        reference=setting.float_model.path,
        dequantized=setting.dequantized.path,
        metrics_out=setting.float_model.folder / "unused.npz",
    )


def test_a_session_over_the_checkpoint_is_the_dequantized_rung(setting: Setting, session: TorchSession) -> None:
    """Prefill and single decodes with a cache give what one pass over the chunk gave."""
    found, wanted = accuracy.measure(session, task(setting)), setting.dequantized.metrics()
    assert found.mean_step_kld < 1e-9
    assert found.mean_kld == pytest.approx(wanted.mean_kld, rel=1e-4)
    np.testing.assert_allclose(found.kld, wanted.kld, atol=1e-6)
    np.testing.assert_allclose(found.reference_nll, wanted.reference_nll, atol=1e-12)
    np.testing.assert_allclose(found.nll, wanted.nll, atol=1e-5)


def test_a_range_of_chunks_is_held_against_its_own_references(setting: Setting, session: TorchSession) -> None:
    found = accuracy.measure(session, task(setting, first=1, chunks=1))
    np.testing.assert_allclose(found.kld, setting.dequantized.metrics().kld[1:2], atol=1e-6)


def test_progress_ends_at_its_total(setting: Setting, session: TorchSession) -> None:
    seen: list[tuple[int, int]] = []
    accuracy.measure(session, task(setting), lambda done, total: seen.append((done, total)))
    assert seen[0] == (1, CHUNKS * LENGTH // 2)
    assert seen[-1] == (CHUNKS * LENGTH // 2, CHUNKS * LENGTH // 2)


class Recorder:
    """Notes the calls that it gets."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []

    def reset(self) -> None:
        self.calls.append(("reset", []))

    def prefill(self, tokens: Sequence[int]) -> Float:
        self.calls.append(("prefill", list(tokens)))
        return np.zeros(4, np.float32)

    def decode(self, token: int) -> Float:
        self.calls.append(("decode", [token]))
        return np.zeros(4, np.float32)

    def close(self) -> None: ...


def test_the_protocol_prefills_the_first_half_and_never_feeds_the_last_token() -> None:
    recorder = Recorder()
    rows = list(accuracy.teacher_forced(recorder, [10, 11, 12, 13, 14, 15], 3))
    assert len(rows) == 3
    assert recorder.calls == [("reset", []), ("prefill", [10, 11, 12]), ("decode", [13]), ("decode", [14])]
