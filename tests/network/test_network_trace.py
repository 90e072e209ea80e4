"""Tracing: the network computes what the module does, batch norms are folded, foreign operators are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_networks import cnn, cnn_network, encoder, encoder_network, images, sentences
from torch import Tensor, nn

from lilliput.errors import SourceError
from lilliput.network import OPS, Network, file
from lilliput.network.run import run
from lilliput.network.trace import trace


def output(network: Network, inputs: dict[str, Tensor]) -> Tensor:
    return run(network, inputs)[network.outputs[0]]


def test_a_cnn_computes_what_its_module_does_and_has_no_batch_norm() -> None:
    network, module = cnn_network(), cnn()
    for batch in images(3):
        torch.testing.assert_close(output(network, batch), module(batch["image"]), rtol=1e-4, atol=1e-5)
    assert [node.op for node in network.nodes].count("conv2d") == 4
    assert not any("norm" in node.name for node in network.nodes)
    assert all(node.op in OPS for node in network.nodes)


def test_an_encoder_computes_what_transformers_does_on_padded_sentences() -> None:
    network, module = encoder_network(), encoder()
    for batch in sentences(7):
        torch.testing.assert_close(output(network, batch), module(**batch), rtol=1e-4, atol=1e-5)


def test_what_depends_on_no_input_is_a_parameter_and_masks_are_sane() -> None:
    network = encoder_network()
    assert [node.op for node in network.nodes].count("embedding") == 1
    assert min(float(array.min()) for array in network.parameters.values()) == -30.0
    assert any("masks" in note for note in network.notes)
    assert {info.dtype for info in network.inputs} == {"int32"}


def test_names_are_unique_and_in_order() -> None:
    network = encoder_network()
    known = {info.name for info in network.inputs} | set(network.parameters)
    for node in network.nodes:
        assert node.name not in known
        assert known.issuperset(node.inputs)
        known.add(node.name)
    assert set(network.outputs) <= known


def test_attention_of_torch_and_a_lone_batch_norm() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.BatchNorm2d(2), nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x).flatten(2)
            return self.attention(x, x, x, need_weights=False)[0].sum(-1)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    module = Odd()
    module(torch.randn(8, 2, 2, 2))
    x = torch.randn(1, 2, 2, 2)
    network = trace(module.eval(), {"x": x}, name="odd")
    torch.testing.assert_close(output(network, {"x": x}), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: torch.cumsum(x, -1), r"'cumsum'.*aten\.cumsum\.default is not supported; known: .*conv2d"),
        (lambda x: x.expand(3, 4), r"'expand'.*copies values along an axis"),
        (lambda x: x.clamp(min=1), r"'clamp'.*one bound only"),
        (lambda x: torch.nn.functional.dropout(x, 0.5), r"'native_dropout'.*drops values"),
        (lambda x: torch.ones(2), r"depends on no input"),
    ],
)
def test_what_is_not_in_the_table_is_refused_by_the_nodes_name(
    function: Callable[[Tensor], Tensor], named: str
) -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    with pytest.raises(SourceError, match=named):
        trace(Module(), {"x": torch.ones(1, 4)}, name="refused")


def test_a_file_gives_the_same_network_and_the_same_bytes(tmp_path: Path) -> None:
    network = encoder_network()
    file.save(network, tmp_path / "a")
    read = file.load(tmp_path / "a")
    assert (read.nodes, read.values, read.inputs, read.outputs) == (
        network.nodes, network.values, network.inputs, network.outputs,
    )  # fmt: skip
    assert (read.mask, read.notes) == (network.mask, network.notes)
    file.save(read, tmp_path / "b")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
