"""QDQ files: they read back bit for bit, ONNX Runtime computes what the integers mean, and clipping costs no node."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_networks import cnn_network, encoder_network, images, sentences
from torch import Tensor

from calibration.clipping import RangeOptions
from calibration.network_solve import Options, solve
from calibration.network_statistics import gather
from exporters.onnx_qdq import NetworkExporter
from exporters.onnx_qdq import Options as ExporterOptions
from lilliput.artifact import Artifact
from lilliput.errors import ArtifactError, InputError
from lilliput.network import QuantizedNetwork
from lilliput.network.run import run_quantized
from targets.runtimes.ort_static_cpu import NetworkRuntime

MODELS = {"cnn": (cnn_network, images), "encoder": (encoder_network, sentences)}


def solved(kind: str, dtype: Any, **options: Any) -> QuantizedNetwork:
    make, samples = MODELS[kind]
    network = make()
    return solve(network, gather(network, samples(8)), Options(ranges=RangeOptions(dtype=dtype), **options))


def export(model: QuantizedNetwork, folder: Path) -> Artifact:
    folder.mkdir(exist_ok=True)
    return NetworkExporter().export(model, ExporterOptions(), folder)[0]


def numpy(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in batch.items()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int8", "int16"])
def test_the_file_holds_the_model_and_computes_it(kind: str, dtype: str, tmp_path: Path) -> None:
    model = solved(kind, dtype)
    artifact = export(model, tmp_path)
    assert NetworkExporter().differences(model, artifact) == []
    session = NetworkRuntime().open(artifact, 1, exact=True)
    (name,) = model.network.outputs
    step = float(model.activations[name].scale[0])
    for batch in MODELS[kind][1](4, seed=2):
        found, wanted = session.run(numpy(batch))[name], run_quantized(model, batch)[name].numpy()
        # float32 sums in another order move a value that lies between two codes to the other one
        assert np.abs(found - wanted).max() <= (4 if dtype.endswith("8") else 64) * step + 1e-6


@pytest.mark.parametrize("kind", MODELS)
def test_the_shipped_kernels_agree_with_the_exact_ones(kind: str, tmp_path: Path) -> None:
    model = solved(kind, "uint8")
    artifact = export(model, tmp_path)
    exact, shipped = NetworkRuntime().open(artifact, 1, exact=True), NetworkRuntime().open(artifact, 1)
    (name,) = model.network.outputs
    step = float(model.activations[name].scale[0])
    differences = [
        np.abs(exact.run(numpy(batch))[name] - shipped.run(numpy(batch))[name]).max()
        for batch in MODELS[kind][1](8, seed=3)
    ]
    assert max(differences) <= 4 * step
    assert np.mean(differences) <= step


def test_matrices_alone_leave_the_rest_in_float_by_name(tmp_path: Path) -> None:
    model = solved("encoder", "uint8", integer="matrices")
    artifact, notes = NetworkExporter().export(model, ExporterOptions(), tmp_path)
    assert NetworkExporter().differences(model, artifact) == []
    assert any("stay in float32" in note and "attention.output/add" in note for note in notes)
    assert not any("linear" in name and name.endswith("query/linear") for name in model.in_float)
    session = NetworkRuntime().open(artifact, 1)
    (name,) = model.network.outputs
    for batch in sentences(4, seed=2):
        torch.testing.assert_close(
            torch.from_numpy(session.run(numpy(batch))[name]), run_quantized(model, batch)[name], atol=0.02, rtol=0
        )


def test_a_changed_number_in_float_is_seen(tmp_path: Path) -> None:
    model = solved("encoder", "uint8", integer="products")
    artifact = export(model, tmp_path)
    assert NetworkExporter().differences(model, artifact) == []
    name = next(n.inputs[1] for n in model.network.nodes if n.op == "layer_norm")
    other = {**model.network.parameters, name: model.network.parameters[name] * np.float32(1.5)}
    changed = replace(model, network=replace(model.network, parameters=other))
    assert NetworkExporter().differences(changed, artifact) == [f"{name}: other numbers"]


def test_a_relu_on_its_grid_is_no_node(tmp_path: Path) -> None:
    model = solved("cnn", "uint8")
    proto = onnx.load(str(export(model, tmp_path).path))
    counted = Counter(node.op_type for node in proto.graph.node)
    assert counted["Relu"] == counted["Clip"] == 0
    assert counted["Conv"] == 4
    assert any(node.op in ("relu", "clip") for node in model.network.nodes)


def test_a_grid_that_goes_below_zero_keeps_its_relu(tmp_path: Path) -> None:
    model = solve(
        network := cnn_network(),
        gather(network, images(4)),
        Options(ranges=RangeOptions(dtype="int16", symmetric=True)),
    )
    proto = onnx.load(str(export(model, tmp_path).path))
    counted = Counter(node.op_type for node in proto.graph.node)
    assert counted["Relu"] + counted["Clip"] == 2


def test_four_bit_weights_are_stored_in_four_bits(tmp_path: Path) -> None:
    model = solved("cnn", "uint16", weight_grid="int4-channel-f32")
    artifact = export(model, tmp_path)
    assert NetworkExporter().differences(model, artifact) == []
    proto = onnx.load(str(artifact.path))
    codes = next(tensor for tensor in proto.graph.initializer if tensor.name == "head.weight.codes")
    assert codes.data_type == onnx.TensorProto.INT4
    assert len(codes.raw_data or codes.int32_data) <= 64


def test_a_changed_code_scale_or_zero_point_is_seen(tmp_path: Path) -> None:
    model = solved("cnn", "uint8")
    artifact = export(model, tmp_path)
    clean = artifact.path.read_bytes()
    for name in ("head.weight.codes", "head.weight.scales", "head/linear.bias", "image.scale", "image.zero_point"):
        proto = onnx.load_from_string(clean)
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array.flat[0] += 1
        tensor.CopyFrom(numpy_helper.from_array(array, name))
        onnx.save_model(proto, str(artifact.path))
        assert len(NetworkExporter().differences(model, artifact)) == 1, name


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = solved("cnn", "uint8")
    assert export(model, tmp_path / "a").path.read_bytes() == export(model, tmp_path / "b").path.read_bytes()


def test_foreign_inputs_and_files_are_refused(tmp_path: Path) -> None:
    artifact = export(solved("cnn", "uint8"), tmp_path)
    session = NetworkRuntime().open(artifact, 1)
    with pytest.raises(InputError, match=r"inputs are \['x'\], the file wants \['image'\]"):
        session.run({"x": np.zeros(1, np.float32)})
    with pytest.raises(InputError, match=r"'image' is \[1, 3\], the file wants \[1, 1, 12, 12\]"):
        session.run({"image": np.zeros((1, 3), np.float32)})
    artifact.path.write_bytes(b"no model")
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot load it"):
        NetworkRuntime().open(artifact, 1)
    with pytest.raises(ArtifactError, match="not a readable ONNX model"):
        NetworkExporter().differences(solved("cnn", "uint8"), artifact)
