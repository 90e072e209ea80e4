"""The worker's tasks in this process; how it ends is shown by test_host."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny_setting import Setting

from targets import reference, worker
from targets.request import ArtifactReference, GenerateTask, LatencyTask, Reply, Request
from targets.runtimes.torch_cpu import Runtime


def test_generation_is_greedy_and_stops(setting: Setting) -> None:
    model, prompt = setting.model, (5, 9, 200)
    weights = {name: model.dequantized(name) for name in model.config.parameter_shapes()}
    wanted = reference.greedy(model.config, weights, prompt, 6)
    session = Runtime().open(setting.artifact, threads=1)
    assert worker.generate(session, GenerateTask(prompt=prompt, max_tokens=6)) == wanted
    assert worker.generate(session, GenerateTask(prompt=prompt, max_tokens=6, stop_tokens=(wanted[0],))) == ()
    assert worker.generate(session, GenerateTask(prompt=prompt, max_tokens=0)) == ()


def test_all_tasks_share_one_session(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = Runtime.open
    monkeypatch.setattr(Runtime, "open", lambda *a, **k: opened.append(1) or real(*a, **k))
    latency = LatencyTask(tokens=(1, 2, 3, 4), prompt_tokens=4, depths=(1, 2), blocks=2, steps=2)
    request = Request(
        artifact=ArtifactReference.of(setting.artifact),
        runtime="torch_cpu",
        threads=1,
        tasks=(latency, GenerateTask(prompt=(5, 9), max_tokens=3)),
    )
    reply = worker.answer(request, lambda done, total: None)
    assert opened == [1]
    assert reply.latency is not None
    assert reply.generated is not None
    assert len(reply.generated) == 3


def test_an_error_of_ours_is_in_the_reply(setting: Setting) -> None:
    task = GenerateTask(prompt=tuple(range(65)))  # the artifact's context is 64
    artifact = ArtifactReference.of(setting.artifact)
    reply = worker.answer(
        Request(artifact=artifact, runtime="torch_cpu", threads=1, tasks=(task,)), lambda done, total: None
    )
    assert reply.error == "65 tokens do not fit the context of 64"
    assert Reply.model_validate_json(reply.model_dump_json()) == reply


def test_the_worker_starts_without_torch() -> None:
    """Its memory is the runtime's: what it does not need is not loaded."""
    program = "import sys, targets.worker, targets.accuracy, targets.measure; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"
