"""QAT of a CNN as a network: the trained codes and grids land unchanged in ONNX and in LiteRT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from calibration import network_qat, network_solve, static_qat
from calibration.clipping import RangeOptions
from exporters import litert_static, onnx_qdq
from lilliput.network import QuantizedNetwork
from lilliput.network.run import run_quantized
from lilliput.progress import silent
from lilliput.tasks import digits
from lilliput.tasks.base import Trained, accuracy

RANGES = RangeOptions(dtype="int8")


@pytest.fixture(scope="module")
def task() -> Trained:
    return digits.Task().train(digits.Options(epochs=4), 0, silent)


@pytest.fixture(scope="module")
def trained(task: Trained) -> static_qat.StaticModel:
    images = torch.from_numpy(task.training.inputs["image"][:256])
    return static_qat.train(task.module, images.split(64), static_qat.Options(steps=12, ranges=RANGES))


@pytest.fixture(scope="module")
def model(task: Trained, trained: static_qat.StaticModel) -> QuantizedNetwork:
    batches = [{"image": torch.from_numpy(image[None])} for image in task.training.inputs["image"][:64]]
    return network_qat.solved(task.module, trained, batches, network_solve.Options(ranges=RANGES), "digits")


def test_trained_codes_and_grids_are_the_networks(trained: static_qat.StaticModel, model: QuantizedNetwork) -> None:
    assert set(trained.layers) == {"first.convolution", "second.convolution", "third.convolution", "head"}
    for name, layer in trained.layers.items():
        held = model.weights[f"{name}.weight"]
        assert np.array_equal(held.codes, layer.weight.codes)
        assert np.array_equal(held.scales, layer.weight.scales)
        (node,) = (node for node in model.network.nodes if node.inputs[1:2] == (f"{name}.weight",))
        assert model.activations[node.inputs[0]].same_as(layer.input)


def test_both_files_hold_them(model: QuantizedNetwork, tmp_path: Path) -> None:
    for exporter in (litert_static.NetworkExporter(), onnx_qdq.NetworkExporter()):
        folder = tmp_path / type(exporter).__module__
        folder.mkdir()
        artifact, notes = exporter.export(model, exporter.Options(), folder)
        assert exporter.differences(model, artifact) == []
        assert notes == []


def test_the_network_answers_as_the_student_does(
    task: Trained, trained: static_qat.StaticModel, model: QuantizedNetwork
) -> None:
    images = torch.from_numpy(task.evaluation.inputs["image"][:200])
    with torch.inference_mode():
        student = trained.module(images).numpy()
    output = model.network.outputs[0]
    network = np.concatenate([run_quantized(model, {"image": image[None]})[output].numpy() for image in images])
    # the student leaves the mean's input and the logits in float
    assert (student.argmax(1) == network.argmax(1)).mean() > 0.97
    assert accuracy(network, task.evaluation.labels[:200]) > 0.8
