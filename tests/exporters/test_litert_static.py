"""Full int8 `.tflite` files of networks: every number as solved, and both interpreters compute what the grids say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_networks
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibration.clipping import RangeOptions
from calibration.network_smoothing import Options as SmoothOptions
from calibration.network_smoothing import smoothed
from calibration.network_solve import Options as SolveOptions
from calibration.network_solve import solve
from calibration.network_statistics import gather
from exporters.litert_static import NetworkExporter, Options
from lilliput.artifact import Artifact
from lilliput.delegation import delegation
from lilliput.errors import ArtifactError, ExportError, InputError
from lilliput.network import PRODUCT_OPS, Network, QuantizedNetwork
from lilliput.network.run import run_quantized
from lilliput.network.trace import trace
from targets.runtimes.litert_static_cpu import NetworkRuntime
from targets.runtimes.tensorflow_cpu import NetworkRuntime as TensorflowRuntime

Batch = dict[str, Tensor]
EXPORTER = NetworkExporter()


def solved(network: Network, batches: list[Batch], dtype: str = "int8") -> QuantizedNetwork:
    return solve(network, gather(network, batches), SolveOptions(ranges=RangeOptions.model_validate({"dtype": dtype})))


def written(model: QuantizedNetwork, folder: Path, **options: object) -> Artifact:
    artifact, _ = EXPORTER.export(model, Options.model_validate(options), folder)
    return artifact


def outputs(runtime: NetworkRuntime | TensorflowRuntime, artifact: Artifact, batches: list[Batch]) -> np.ndarray:
    """(n, …) of the only output."""
    session = runtime.open(artifact, 1)
    found = [session.run({name: x.numpy() for name, x in batch.items()}) for batch in batches]
    session.close()
    return np.concatenate([next(iter(one.values())) for one in found])


def steps_apart(a: np.ndarray, b: np.ndarray, model: QuantizedNetwork) -> np.ndarray:
    """How many codes of the output's grid lie between them."""
    scale = model.activations[model.network.outputs[0]].scale[0]
    return np.asarray(np.rint(np.abs(a - b) / scale))


def case(name: str) -> tuple[Network, list[Batch]]:
    if name == "cnn":
        return tiny_networks.cnn_network(), tiny_networks.images(24)
    return tiny_networks.encoder_network(), tiny_networks.sentences(24)


@pytest.mark.parametrize("name", ["cnn", "encoder"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_a_file_holds_every_number_and_both_interpreters_compute_with_them(
    name: str, dtype: str, tmp_path: Path
) -> None:
    network, batches = case(name)
    model = solved(network, batches, dtype)
    artifact = written(model, tmp_path)
    assert EXPORTER.differences(model, artifact) == []
    twin = np.concatenate([run_quantized(model, batch)[network.outputs[0]].numpy() for batch in batches])
    ours, theirs = (outputs(r, artifact, batches) for r in (NetworkRuntime(), TensorflowRuntime()))
    assert ours.std() > 0
    # integer kernels round once where the twin rounds a float32 sum: a code at most, as the kernels' own tests allow
    assert steps_apart(ours, twin, model).max() <= 1
    assert steps_apart(theirs, twin, model).max() <= 1
    assert steps_apart(ours, theirs, model).max() <= 1


class Operator(nn.Module):
    """One function of an image (1, 8, 12, 18)."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def rows(x: Tensor) -> Tensor:
    """Images (1, 8, 12, 18) as sequences (1, 216, 8)."""
    return x.flatten(2).transpose(1, 2)


OFFSET = torch.linspace(-1, 1, 8).reshape(8, 1, 1)
KERNEL = torch.linspace(-1, 1, 576).sin().reshape(8, 8, 3, 3)
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "padded_max_pool": lambda x: F.max_pool2d(x.relu(), 3, 2, 1),
    "padded_mean_pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "constant_of_channels": lambda x: (x + OFFSET) * OFFSET,
    "clip": lambda x: x.clamp(-0.5, 0.75),
    "relu6": lambda x: F.relu6(x * 8.0),
    "silu": F.silu,
    "tanh_of_rows": lambda x: rows(x).tanh(),
    "gelu": lambda x: F.gelu(rows(x)),
    "gelu_tanh": lambda x: F.gelu(rows(x), approximate="tanh"),
    "parts": lambda x: torch.cat([rows(x)[:, ::2, :4] - rows(x)[:, 1::2, 4:], rows(x)[:, :108, :4]], -1),
    "softmax": lambda x: rows(x).softmax(-1),
    "product": lambda x: rows(x)[:, :16] @ rows(x)[:, 16:32].transpose(1, 2),
    "mean_of_rows": lambda x: rows(x).mean(1, keepdim=True),
    "dilated": lambda x: F.conv2d(x, KERNEL, None, 1, 2, 2),
    "depthwise": lambda x: F.conv2d(x, KERNEL[:, :1], None, (1, 2), (0, 1), 1, 8),
    "sum": lambda x: x.relu().add(x.tanh()).mean((2, 3)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_each_operator_on_its_grids(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Operator(OPERATORS[name]).eval()
    batches = [{"image": torch.randn(1, 8, 12, 18)} for _ in range(4)]
    network = trace(module, batches[0], name=name)
    model = solved(network, batches)
    artifact = written(model, tmp_path)
    assert EXPORTER.differences(model, artifact) == []
    twin = np.concatenate([run_quantized(model, batch)[network.outputs[0]].numpy() for batch in batches])
    for runtime in (NetworkRuntime(), TensorflowRuntime()):
        found = outputs(runtime, artifact, batches)
        assert found.std() > 0
        assert steps_apart(found, twin, model).max() <= 1


def test_float_ends_are_quantized_in_the_file(tmp_path: Path) -> None:
    network, batches = case("cnn")
    model = solved(network, batches)
    found = []
    for io in ("int8", "float32"):
        (tmp_path / io).mkdir()
        found.append(outputs(NetworkRuntime(), written(model, tmp_path / io, io=io), batches))
    assert np.array_equal(*found)


def test_a_cnn_is_one_part_of_xnnpack_but_for_hard_swish(tmp_path: Path) -> None:
    network, batches = case("cnn")
    found = delegation(written(solved(network, batches), tmp_path).path)
    assert found.left == {"HARD_SWISH": 1}
    assert found.delegated > 10


def test_the_file_is_the_same_each_time_and_damage_is_seen(tmp_path: Path) -> None:
    network, batches = case("cnn")
    model = solved(network, batches)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (written(model, tmp_path / name) for name in ("a", "b"))
    assert first.path.read_bytes() == second.path.read_bytes()
    other = solved(tiny_networks.cnn_network(seed=3), batches)
    assert any("other codes" in line for line in EXPORTER.differences(other, first))
    first.path.write_bytes(first.path.read_bytes()[: first.size_bytes // 2])
    with pytest.raises(ArtifactError):
        EXPORTER.differences(model, first)


@pytest.mark.parametrize(("dtype", "seen"), [("int16", "int16"), ("uint16", "uint16")])
def test_grids_of_16_bit_are_refused_by_name(dtype: str, seen: str, tmp_path: Path) -> None:
    network, batches = case("cnn")
    with pytest.raises(ExportError, match=f"image: LiteRT's static grids are of 8 bits.*{seen}"):
        written(solved(network, batches[:2], dtype), tmp_path)


def test_what_has_no_lowering_is_refused_by_name(tmp_path: Path) -> None:
    class Divides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (x * x + 1.0)

    batches = [{"x": torch.randn(1, 8)} for _ in range(4)]
    model = solved(trace(Divides(), batches[0], name="divides"), batches)
    with pytest.raises(ExportError, match="node 'div': LiteRT has no int8 operator for 'div'"):
        written(model, tmp_path)


def test_inputs_that_are_not_the_files_are_refused(tmp_path: Path) -> None:
    network, batches = case("cnn")
    session = NetworkRuntime().open(written(solved(network, batches), tmp_path), 1)
    with pytest.raises(InputError, match=r"inputs are \['picture'\], the file wants \['image'\]"):
        session.run({"picture": batches[0]["image"].numpy()})
    session.close()


@pytest.mark.parametrize("smooth", [False, True])
def test_products_alone_are_int8_and_the_rest_is_float_by_name(smooth: bool, tmp_path: Path) -> None:
    network, batches = case("encoder")
    if smooth:
        network = smoothed(network, batches, SmoothOptions())
    options = SolveOptions(ranges=RangeOptions(dtype="uint8"), integer="products")
    model = solve(network, gather(network, batches), options)
    artifact, notes = EXPORTER.export(model, Options(), tmp_path)
    assert EXPORTER.differences(model, artifact) == []
    assert any("attention.output/add" in note and "softmax" in note for note in notes)
    made = {node.name for node in network.nodes if node.op in PRODUCT_OPS}
    assert made
    assert made.isdisjoint(model.in_float)
    twin = np.concatenate([run_quantized(model, batch)[network.outputs[0]].numpy() for batch in batches])
    ours, theirs = (outputs(r, artifact, batches) for r in (NetworkRuntime(), TensorflowRuntime()))
    # the only sums that round otherwise are the products'; what follows in float32 carries a code's difference on
    for found in (ours, theirs):
        apart = steps_apart(found, twin, model)
        assert apart.max() <= 3
        assert apart.mean() <= 0.5
    assert steps_apart(ours, theirs, model).max() <= 3


def test_products_without_a_grid_are_refused_by_name(tmp_path: Path) -> None:
    network, batches = case("encoder")
    model = solve(network, gather(network, batches), SolveOptions(ranges=RangeOptions(), integer="matrices"))
    with pytest.raises(ExportError, match=r"self/matmul: it stays in float32.*integer products, or all"):
        EXPORTER.export(model, Options(), tmp_path)


def test_a_changed_factor_is_seen(tmp_path: Path) -> None:
    network, batches = case("encoder")
    network = smoothed(network, batches, SmoothOptions())
    options = SolveOptions(ranges=RangeOptions(dtype="uint8"), integer="products")
    model = solve(network, gather(network, batches), options)
    artifact = written(model, tmp_path)
    name = next(name for name in network.parameters if name.endswith("/restored.factors"))
    other = {**network.parameters, name: network.parameters[name] * np.float32(1.5)}
    changed = replace(model, network=replace(network, parameters=other))
    assert EXPORTER.differences(changed, artifact) == [f"{name}: other codes"]
