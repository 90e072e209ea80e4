"""What LiteRT's GPU delegate does not take: a note of files for CPUs, an error where a GPU is asked for.

No oracle: the GPU check of tensorflow's analyzer is not compiled into its wheel (2.21 calls every file compatible).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_networks
import torch
from ai_edge_litert import schema_py_generated as schema
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.defects.tflite_files import FILE, repacked
from calibration.clipping import RangeOptions
from calibration.network_solve import Options as SolveOptions
from calibration.network_solve import solve
from calibration.network_statistics import gather
from exporters.litert_static import NetworkExporter, Options
from lilliput import checks, cli
from lilliput.network import Network
from lilliput.network.trace import trace

BUILTIN = schema.BuiltinOperator
KERNEL = torch.linspace(-1, 1, 576).sin().reshape(8, 8, 3, 3)


class Operators(nn.Module):
    """A function of an image (1, 8, 12, 18)."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def rows(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


SOUND: Mapping[str, Callable[[Tensor], Tensor]] = {
    "max_pool": lambda x: F.max_pool2d(x.relu(), 2),
    "mean_pool": lambda x: F.avg_pool2d(x, 2),
    "relu6": lambda x: F.relu6(x * 8.0),
    "silu": F.silu,
    "hard_swish": F.hardswish,
    "tanh": lambda x: rows(x).tanh(),
    "gelu": lambda x: F.gelu(rows(x)),
    "softmax": lambda x: rows(x).softmax(-1),
    "product": lambda x: rows(x)[:, :16] @ rows(x)[:, 16:32].transpose(1, 2),
    "dilated": lambda x: F.conv2d(x, KERNEL, None, 1, 2, 2),
    "depthwise": lambda x: F.conv2d(x, KERNEL[:, :1], None, (1, 2), (0, 1), 1, 8),
    "sum": lambda x: x.relu().add(x.tanh()).mean((2, 3)),
    "concat": lambda x: torch.cat([x.relu(), x.sigmoid()], 1),
}


def written(network: Network, batches: list[dict[str, Tensor]], folder: Path) -> Path:
    options = SolveOptions(ranges=RangeOptions.model_validate({"dtype": "int8"}))
    model = solve(network, gather(network, batches), options)
    folder.mkdir()
    return NetworkExporter().export(model, Options(), folder)[0].path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Full-int8 files by name."""
    folder, made = tmp_path_factory.mktemp("gpu"), dict[str, Path]()
    torch.manual_seed(0)
    batches = [{"image": torch.randn(1, 8, 12, 18)} for _ in range(4)]
    for name, function in SOUND.items():
        network = trace(Operators(function).eval(), batches[0], name=name)
        made[name] = written(network, batches, folder / name)
    made["cnn"] = written(tiny_networks.cnn_network(), tiny_networks.images(8), folder / "cnn")
    made["encoder"] = written(tiny_networks.encoder_network(), tiny_networks.sentences(8), folder / "encoder")
    return made


@dataclass(frozen=True)
class Planted:
    """`change` spoils the unpacked file of that name and answers with the place that is to be named."""

    file: str
    rule: str
    said: str
    change: Callable[[Any], str]


def operator(model: Any, name: str) -> Any:
    """The first operator of that name."""
    codes = {i for i, code in enumerate(model.operatorCodes) if code.builtinCode == getattr(BUILTIN, name)}
    return next(o for o in model.subgraphs[0].operators if o.opcodeIndex in codes)


def tensor(model: Any, index: int) -> Any:
    return model.subgraphs[0].tensors[index]


def output_name(model: Any, of: Any) -> str:
    return str(tensor(model, of.outputs[0]).name.decode())


def _foreign(model: Any) -> str:
    found = operator(model, "HARD_SWISH")
    code = model.operatorCodes[found.opcodeIndex]
    code.builtinCode = code.deprecatedBuiltinCode = BUILTIN.LOG_SOFTMAX
    return output_name(model, found)


def _int16(model: Any) -> str:
    found = operator(model, "HARD_SWISH")
    tensor(model, found.outputs[0]).type = schema.TensorType.INT16
    return output_name(model, found)


def _five_dimensions(model: Any) -> str:
    found = operator(model, "HARD_SWISH")
    values = tensor(model, found.outputs[0])
    values.shape = [1, *values.shape]
    return output_name(model, found)


def _beta(model: Any) -> str:
    found = operator(model, "SOFTMAX")
    found.builtinOptions.beta = 2.0
    return output_name(model, found)


def _shuffled(model: Any) -> str:
    found = operator(model, "FULLY_CONNECTED")
    found.builtinOptions.weightsFormat = schema.FullyConnectedOptionsWeightsFormat.SHUFFLED4x16INT8
    return output_name(model, found)


def _axes(model: Any) -> str:
    found = operator(model, "MEAN")
    tensor(model, found.inputs[1]).buffer = 0
    return output_name(model, found)


def _multiplier(model: Any) -> str:
    found = operator(model, "DEPTHWISE_CONV_2D")
    found.builtinOptions.depthMultiplier = 3
    return output_name(model, found)


PLANTED = {
    "an operator without a parser": Planted("cnn", "GPU-OPERATOR", "LOG_SOFTMAX has no parser", _foreign),
    "16-bit values": Planted("cnn", "GPU-TYPE", "reads or writes INT16", _int16),
    "five dimensions": Planted("cnn", "GPU-FORM", "tensor of 5 dimensions", _five_dimensions),
    "a softmax with beta": Planted("softmax", "GPU-FORM", "SOFTMAX has beta 2", _beta),
    "shuffled weights": Planted("cnn", "GPU-FORM", "FULLY_CONNECTED has shuffled weights", _shuffled),
    "axes that are computed": Planted("sum", "GPU-FORM", "no int32 constant", _axes),
    "another depth multiplier": Planted("depthwise", "GPU-FORM", "depth multiplier 3", _multiplier),
}


@pytest.fixture(scope="module")
def planted(files: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, str]]:
    """The spoiled file of each defect, and its place."""
    folder, made = tmp_path_factory.mktemp("planted"), dict[str, tuple[Path, str]]()
    for i, (name, defect) in enumerate(PLANTED.items()):
        (folder / str(i)).mkdir()
        path, places = folder / str(i) / FILE, list[str]()
        path.write_bytes(files[defect.file].read_bytes())
        repacked(lambda model, change=defect.change, said=places: said.append(change(model)))(path.parent)
        made[name] = path, places[0]
    return made


@pytest.mark.parametrize("name", [*SOUND, "cnn"])
def test_a_file_that_fits_a_gpu_raises_no_alarm(name: str, files: Mapping[str, Path]) -> None:
    found = checks.check(files[name], gpu=True)
    assert [(f.rule, f.place, f.seen) for f in (*found.findings, *found.notes)] == []
    assert {"GPU-OPERATOR", "GPU-TYPE", "GPU-FORM"} <= set(found.rules)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_defect_is_noted_and_is_an_error_for_a_gpu(
    name: str, planted: Mapping[str, tuple[Path, str]]
) -> None:
    defect, (path, place) = PLANTED[name], planted[name]
    noted = checks.check(path)
    assert noted.findings == ()
    assert {f.severity for f in noted.notes} == {"note"}
    assert any(f.rule == defect.rule and place in f.place and defect.said in f.seen for f in noted.notes), noted.notes
    asked = checks.check(path, gpu=True)
    assert asked.notes == ()
    assert {f.rule for f in asked.errors} == {f.rule for f in noted.notes}


def test_token_ids_are_noted(files: Mapping[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """An encoder is sound on a CPU; a GPU does not look tokens up."""
    assert cli.answer(["inspect", str(files["encoder"]), "--check"]) == 0
    assert "0 errors, 0 warnings, " in " ".join(capsys.readouterr().out.split())
    assert cli.answer(["inspect", str(files["encoder"]), "--check", "--gpu"]) == 1
    out = capsys.readouterr().out
    assert "error GPU-FORM  serving_default: model.bert.embeddings.word_embeddings/embedding: GATHER takes" in out
