"""The NPU: every operator that the exporter writes is given to QNN's compiler; the others are refused by name.

Without the extra `qnn` these tests are skipped, but for the static check's own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_networks import cnn_network, encoder_network, images, sentences
from torch import Tensor, nn

from benchmarks.npu import plant
from calibration.clipping import RangeOptions
from calibration.network_solve import Options, solve
from calibration.network_statistics import gather
from exporters.onnx_qdq import NetworkExporter
from exporters.onnx_qdq import Options as ExporterOptions
from lilliput import cli
from lilliput.artifact import Artifact
from lilliput.errors import ArtifactError, RecipeError
from lilliput.network import QuantizedNetwork
from lilliput.network.run import run_quantized
from lilliput.network.trace import trace
from targets.npu import Coverage, cover, qnn, soc, static_check
from targets.runtimes.qnn_npu import NetworkRuntime

MODELS = {"cnn": (cnn_network, images), "encoder": (encoder_network, sentences)}
with_qnn = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None, reason="the extra qnn is not installed"
)


class AllElse(nn.Module):
    """The operators that the other two models lack."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.gelu(x, approximate="tanh").tanh() - x
        y = torch.nn.functional.avg_pool2d(torch.nn.functional.hardsigmoid(y), 2) / 3.0
        return (y / (y.relu() + 2.0)).flatten(1)[:, 1:].softmax(-1)


def solved(kind: str, dtype: Any) -> QuantizedNetwork:
    make, samples = MODELS[kind]
    network = make()
    return solve(network, gather(network, samples(8)), Options(ranges=RangeOptions(dtype=dtype)))


def export(model: QuantizedNetwork, folder: Path) -> Artifact:
    folder.mkdir(exist_ok=True)
    return NetworkExporter().export(model, ExporterOptions(), folder)[0]


@with_qnn
@pytest.mark.parametrize(("kind", "dtype"), [("cnn", "uint8"), ("cnn", "uint16"), ("encoder", "uint16")])
def test_every_node_is_the_npus_and_its_arithmetic_is_near(kind: str, dtype: str, tmp_path: Path) -> None:
    model = solved(kind, dtype)
    artifact = export(model, tmp_path)
    coverage = qnn.place(artifact.path, soc("sm8650"))
    assert coverage.elsewhere == ()
    assert coverage.share == 1.0
    assert coverage.method == "compiled"
    static = static_check.check(artifact.path, soc("sm8650"))
    assert static.elsewhere == ()
    session = NetworkRuntime().open(artifact, 1)
    (name,) = model.network.outputs
    batches = MODELS[kind][1](4, seed=2)
    found = [session.run({key: tensor.numpy() for key, tensor in batch.items()})[name] for batch in batches]
    wanted = [run_quantized(model, batch)[name].numpy() for batch in batches]
    exact, error = np.concatenate(wanted), np.concatenate(wanted) - np.concatenate(found)
    assert (error**2).sum() <= 10**-2.5 * (exact**2).sum()


@with_qnn
def test_the_rest_of_the_operators_are_the_npus_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [{"x": torch.randn(1, 2, 4, 4)} for _ in range(4)]
    network = trace(AllElse().eval(), batches[0], name="all-else")
    for dtype in ("uint8", "uint16"):
        model = solve(network, gather(network, batches), Options(ranges=RangeOptions(dtype=dtype)))  # type: ignore[arg-type]
        artifact = export(model, tmp_path / dtype)
        assert qnn.place(artifact.path, soc("sm8650")).elsewhere == ()


@with_qnn
def test_a_planted_operator_is_refused_by_its_name(tmp_path: Path) -> None:
    artifact = export(solved("cnn", "uint8"), tmp_path)
    plant(artifact.path)
    with pytest.raises(ArtifactError, match=r"NPU of sm8650 does not take .*planted \(Sinh\)"):
        NetworkRuntime().open(artifact, 1)
    with pytest.raises(ArtifactError, match=r"planted \(Sinh\)"):
        qnn.compile_context(artifact.path, soc("sm8650"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@with_qnn
def test_a_context_binary_is_made_for_the_named_chip(tmp_path: Path) -> None:
    artifact = export(solved("cnn", "uint8"), tmp_path)
    written = qnn.compile_context(artifact.path, soc("sm8550"), tmp_path)
    proto = onnx.load(str(tmp_path / qnn.CONTEXT_FILE), load_external_data=False)
    assert [node.op_type for node in proto.graph.node] == ["EPContext"]
    assert sum(path.stat().st_size for path in written) > 4096
    assert [value.name for value in proto.graph.input] == ["image"]


def test_the_static_check_names_what_is_in_float_and_what_is_foreign(tmp_path: Path) -> None:
    artifact = export(solved("cnn", "uint8"), tmp_path)
    clean = static_check.check(artifact.path, soc("sm8650"))
    assert (clean.method, clean.elsewhere) == ("static", ())
    assert "static operator check only" in clean.sentence()
    plant(artifact.path)
    found = static_check.check(artifact.path, soc("sm8650"))
    assert found.on_npu == found.nodes - len(found.elsewhere) < found.nodes
    assert any("planted (Sinh: operator not known to run there)" in name for name in found.elsewhere)
    assert "planted" in found.sentence()


def test_the_static_check_sees_open_shapes_and_other_files(tmp_path: Path) -> None:
    artifact = export(solved("cnn", "uint8"), tmp_path)
    proto = onnx.load(str(artifact.path))
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save_model(proto, str(artifact.path))
    assert any("shape not fixed" in name for name in static_check.check(artifact.path, soc("sm8650")).elsewhere)
    artifact.path.write_bytes(b"no model")
    with pytest.raises(ArtifactError, match="not a readable ONNX model"):
        static_check.check(artifact.path, soc("sm8650"))


@pytest.mark.parametrize("installed", [pytest.param(True, marks=with_qnn), False])
def test_the_command_says_where_nodes_go_and_its_floor_is_a_gate(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    artifact = export(solved("cnn", "uint8"), tmp_path / "cnn")
    if not installed:
        monkeypatch.setattr(cover.importlib.util, "find_spec", lambda _: None)
    assert cli.answer(["npu", str(tmp_path / "cnn"), "--json"]) == 0
    found = Coverage.model_validate_json(capfd.readouterr().out)
    assert (found.method, found.share) == ("compiled" if installed else "static", 1.0)
    plant(artifact.path)
    assert cli.answer(["npu", str(artifact.path)]) == 1
    out, _ = capfd.readouterr()
    assert "planted (Sinh" in out
    assert "FAIL: 9" in out
    assert ("static operator check only" in out) is not installed
    assert cli.answer(["npu", str(artifact.path), "--floor", "0.9"]) == 0


@with_qnn
def test_the_command_writes_the_context_binary(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = export(solved("cnn", "uint8"), tmp_path)
    assert cli.answer(["npu", str(artifact.path), "--chip", "sm8550", "--binary", str(tmp_path / "ctx")]) == 0
    assert "model_ctx.onnx" in capfd.readouterr().out
    assert len(list((tmp_path / "ctx").iterdir())) == 2
    assert cli.answer(["npu", str(tmp_path / "nothing.onnx")]) == 2
    assert "does not exist, wanted an ONNX file in QDQ form" in capfd.readouterr().err


def test_an_unknown_chip_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"unknown SoC 'sm8560': did you mean 'sm8\d50'\?"):
        soc("sm8560")
