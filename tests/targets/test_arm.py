"""An emulated Cortex-A76 and A72: the files' accuracy on the runtimes' aarch64 wheels, and counts of instructions.

Built for them once, in the cache: a Debian arm64 root. Nothing here is timed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tools
from tiny_setting import CHUNKS, LENGTH, Setting

from lilliput import decoder, registry
from lilliput.artifact import Artifact
from lilliput.errors import InputError, LilliputError, MeasurementError
from lilliput.results import Instructions
from lilliput.store import default_root
from lilliput.trace import trace
from targets import boards, gates
from targets.devices import arm
from targets.devices.arm import counting, root
from targets.far import run_for
from targets.metrics import TokenMetrics
from targets.request import AccuracyTask, ArtifactReference, CountTask, GenerateTask, LatencyTask, Request

RUNTIMES = {"onnx_int4": "ort_cpu", "litert_int8": "litert_cpu", "gguf_llamacpp": "llamacpp_cpu"}
COUNT = CountTask(tokens=tuple(range(2, 14)), steps=4)


@pytest.fixture(scope="module")
def a76() -> Iterator[arm.ArmConnection]:
    yield from opened("cortex-a76")


@pytest.fixture(scope="module")
def a72() -> Iterator[arm.ArmConnection]:
    yield from opened("raspberry-pi-4")


def opened(address: str) -> Iterator[arm.ArmConnection]:
    tools.needs("qemu-aarch64", "qemu-user")
    try:
        root.ready(default_root() / "arm64")
    except LilliputError as error:
        pytest.skip(str(error))
    with closing(arm.Device().open(arm.Options(address=address))) as connection:
        yield connection


@pytest.fixture(scope="module")
def files(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Artifact, Artifact]]:
    """Each format's shipped file and its exact twin."""
    traced = trace(decoder.Decoder(setting.model.config), context=64, prefill=16)
    made = {}
    for name in RUNTIMES:
        exporter = registry.load("exporters", name)()
        shipped, exact = (tmp_path_factory.mktemp(f"{name}-{kind}") for kind in ("shipped", "exact"))
        options = exporter.Options()
        made[name] = (
            exporter.export(setting.model, traced, options, shipped),
            exporter.export(setting.model, traced, options, exact, exact=True),
        )
    return made


def accuracy(setting: Setting, folder: Path) -> AccuracyTask:
    return AccuracyTask(
        tokens=setting.float_model.folder.parent / "evaluation" / "tokens.npy",
        scored_from=LENGTH // 2,
        chunks=CHUNKS,
        reference=setting.float_model.path,
        dequantized=setting.dequantized.path,
        metrics_out=folder / "metrics.npz",
    )


def asked(artifact: Artifact, runtime: str, *tasks: object, exact: bool = False) -> Request:
    reference = ArtifactReference.of(artifact)
    return Request.model_validate(
        {"artifact": reference, "runtime": runtime, "threads": 1, "exact": exact, "tasks": tasks}
    )


def counted(connection: arm.ArmConnection, artifact: Artifact, exact: bool = False) -> Instructions:
    found = connection.run(asked(artifact, "ort_cpu", COUNT, exact=exact)).instructions
    assert found is not None
    return found


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_files_compute_there_what_torch_does(
    setting: Setting, files: Mapping[str, tuple[Artifact, Artifact]], a76: arm.ArmConnection, tmp_path: Path, name: str
) -> None:
    """The exact twin to float32's rounding; the shipped file speaks the same first words."""
    shipped, exact = files[name]
    reply = a76.run(asked(exact, RUNTIMES[name], accuracy(setting, tmp_path), exact=True))
    assert reply.metrics is not None
    found, wanted = TokenMetrics.load(reply.metrics), setting.dequantized.metrics()
    assert found.mean_step_kld < gates.EXACT_STEP_KLD_MAX / 100
    np.testing.assert_allclose(found.kld, wanted.kld, atol=1e-5)
    spoken = a76.run(asked(shipped, RUNTIMES[name], GenerateTask(prompt=(5, 9, 200), max_tokens=4))).generated
    assert spoken is not None
    assert len(spoken) == 4


def test_counts_repeat_and_the_dot_product_is_proven(
    files: Mapping[str, tuple[Artifact, Artifact]], a76: arm.ArmConnection
) -> None:
    shipped, exact = files["onnx_int4"]
    first, second = (counted(a76, shipped) for _ in range(2))
    assert abs(first.per_token - second.per_token) < 0.01 * first.per_token
    assert first.dot_per_token == second.dot_per_token > 0
    assert gates.dot_product_gate(first, "").verdict == "PASS"
    plain = counted(a76, exact, exact=True)  # a build of the graph without 8-bit activations
    assert plain.dot_per_token == plain.mmla_per_token == 0
    assert plain.fma_per_token > first.fma_per_token
    gate = gates.dot_product_gate(plain, "")
    assert gate.verdict == "FAIL"
    assert "no SDOT, UDOT or MMLA in 4 decoded tokens" in gate.note


def test_a_processor_without_the_dot_product_gets_other_kernels(
    setting: Setting, files: Mapping[str, tuple[Artifact, Artifact]], a72: arm.ArmConnection, tmp_path: Path
) -> None:
    shipped, _ = files["onnx_int4"]
    reply = a72.run(asked(shipped, "ort_cpu", accuracy(setting, tmp_path), COUNT))
    assert reply.instructions is not None
    assert reply.instructions.dot_per_token == 0
    assert reply.metrics is not None
    assert TokenMetrics.load(reply.metrics).mean_step_kld < 1e-2
    assert "asimddp" not in a72.probe().host.isa


def test_the_machine_is_described_as_emulated_and_is_never_timed(
    files: Mapping[str, tuple[Artifact, Artifact]], a76: arm.ArmConnection
) -> None:
    host, planned = a76.probe().host, arm.Device().describe(arm.Options(address="cortex-a76"))
    assert (host.architecture, host.cpu, host.isa) == ("aarch64", "cortex-a76", ("asimd", "asimdhp", "asimddp"))
    assert (planned.device, planned.isa, planned.emulated) == (host.device, host.isa, host.emulated)
    assert host.emulated is not None
    assert boards.differences(boards.load("raspberry-pi-5"), host.model_copy(update={"cores": 4})) is None
    task = LatencyTask(tokens=(1, 2, 3), prompt_tokens=3, depths=(1,), blocks=2, steps=2)
    with pytest.raises(MeasurementError, match="is emulated: its speed is no evidence of any board's"):
        a76.run(asked(files["onnx_int4"][0], "ort_cpu", task))


def test_llama_cpps_parameters_are_laid_out_as_the_bindings_say(a76: arm.ArmConnection, tmp_path: Path) -> None:
    """The wheel's llama.cpp is of another version than ours: the defaults that it fills in are ours, field by field."""
    import llama_cpp

    assert llama_cpp.llama_version()
    (tmp_path / "defaults.py").write_text(
        "import json, llama_cpp as l\n"
        "found = [l.llama_context_default_params(), l.llama_model_default_params()]\n"
        "plain = [{f: v for f, *_ in p._fields_ if isinstance(v := getattr(p, f), (int, float))} for p in found]\n"
        "print(json.dumps(plain))\n"
    )
    *command, _, _, _ = a76.command("unused")
    ended = run_for([*command, str(tmp_path / "defaults.py")], 120, stdout=tmp_path / "there.json")
    assert ended.status == 0, ended.stderr
    there = json.loads((tmp_path / "there.json").read_text())
    found = [llama_cpp.llama_context_default_params(), llama_cpp.llama_model_default_params()]
    here = [{f: v for f, *_ in p._fields_ if isinstance(v := getattr(p, f), int | float)} for p in found]
    assert there == here
    assert len(here[0]) > 20


def test_what_cannot_be_emulated_names_what_can() -> None:
    with pytest.raises(InputError, match=r"arm://max cannot be emulated: .*cortex-a72, cortex-a76, raspberry-pi-4"):
        arm.Device().open(arm.Options(address="max"))


def test_cpuinfo_offers_what_the_processor_has() -> None:
    """A feature too many would end a worker with SIGILL; the text is the kernel's."""
    emulation = boards.load("raspberry-pi-4").emulation
    assert emulation is not None
    text = root.cpuinfo(emulation, 4)
    assert text.count("processor\t:") == 4
    assert "CPU part\t: 0xd08\n" in text
    assert "asimddp" not in text
    for name in boards.names():
        board = boards.load(name)
        if board.emulation:
            assert set(board.isa.features) <= set(board.emulation.features)


def test_counts_are_read_between_the_marks(tmp_path: Path) -> None:
    (tmp_path / "counts").write_text("1 900 9 9 9\n2 400 20 4 8\n")
    wanted = Instructions(tokens=4, per_token=100, dot_per_token=5, mmla_per_token=1, fma_per_token=2)
    assert counting.read(tmp_path / "counts", 4) == wanted
    (tmp_path / "counts").write_text("1 900 9 9 9\n")
    assert counting.read(tmp_path / "counts", 4) is None
    assert counting.read(tmp_path / "none", 4) is None
    assert counting.why_not((7, 2)) is None
    assert "counting needs 7.2 to 8.2" in (counting.why_not((9, 1)) or "")
