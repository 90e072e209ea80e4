"""Ladders of files that others wrote: three known faults, each on its rung and in its place, and files without any.

    a    litert-torch's repeat_kv with one KV head           graph         the attention of layer 0
    b    MatMulNBits at accuracy_level 4                     arithmetic    the first MatMulNBits
    c    8-bit products on x86 without VNNI                  kernels       a MatMulInteger, and only there

The model has weights of one size and two signs: 4 and 8 bits hold them, and 8-bit sums of two products are large enough
to saturate where a processor's instruction does. Its last norm is large, so that its logits are as wide as a trained
model's.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clean_artifacts
import numpy as np
import onnx
import pytest
import tiny_gguf
import tiny_models
import tools
import torch
from gguf import GGMLQuantizationType as Type

from lilliput import cli
from lilliput.checks import source_of
from lilliput.checks.comparison import Source
from lilliput.errors import InputError, LilliputError
from lilliput.file_ladder.climb import climb
from lilliput.file_ladder.found import FileLadder, FileRung
from lilliput.store import default_root
from targets.devices.arm import root

TOKENS = np.random.default_rng(1).integers(0, tiny_models.VOCAB_SIZE, 24).tolist()
EXACT = 1e-6  # nats a token: float32 sums in another order


@dataclass(frozen=True)
class Foreign:
    """A float model, and its ONNX file by torch's own exporter: nothing of ours."""

    source: Source
    folder: Path
    path: Path


class Plain(torch.nn.Module):
    """transformers' model with a plain causal mask: input_ids (1, T) → logits (1, T, vocab)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        steps = input_ids.shape[1]
        mask = torch.full((1, 1, steps, steps), -1e9).triu(1)
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        return logits


def two_signed(folder: Path, **overrides: Any) -> tuple[Source, Any]:
    """The model's source, and transformers' own."""
    source = tiny_models.tiny_source(folder, "llama", **overrides)
    model = tiny_models.theirs(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.copy_(parameter.sign() * 0.7 / parameter.shape[-1] ** 0.5)
        model.model.norm.weight.mul_(8)
    model.save_pretrained(source.tokenizer)
    return source_of(tiny_models.source_of(source.tokenizer)), model


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    folder = tmp_path_factory.mktemp("foreign")
    source, model = two_signed(folder)
    path = folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Plain(model), (torch.tensor([TOKENS]),), str(path), dynamo=False, input_names=["input_ids"],
            output_names=["logits"], dynamic_axes={"input_ids": {1: "t"}, "logits": {1: "t"}}, opset_version=17,
        )  # fmt: skip
    return Foreign(source, folder, path)


def n_bits(foreign: Foreign, level: int) -> Path:
    """ONNX Runtime's own 4-bit quantizer."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(foreign.path), block_size=32, is_symmetric=True, accuracy_level=level)
    quantizer.process()
    path = foreign.folder / f"level-{level}.onnx"
    quantizer.model.save_model_to_file(str(path))
    return path


@pytest.fixture(scope="module")
def eight_bit(foreign: Foreign) -> Path:
    """ONNX Runtime's own dynamic quantization: DynamicQuantizeLinear and MatMulInteger."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = foreign.folder / "int8.onnx"
    quantize_dynamic(foreign.path, path, weight_type=QuantType.QInt8)
    return path


def rung(found: FileLadder, name: str) -> FileRung:
    return next(rung for rung in found.rungs if rung.rung == name)


def off(found: FileLadder) -> list[str]:
    return [rung.rung for rung in found.off]


def test_no_rung_of_a_float_file_is_off(foreign: Foreign) -> None:
    found = climb(foreign.path, foreign.source, TOKENS)
    assert off(found) == []
    assert found.exit_code == 0
    assert all(rung.mean_kld is not None and rung.mean_kld < EXACT for rung in found.rungs)
    assert found.notes == ()


def test_the_command_says_that_no_rung_is_off(foreign: Foreign, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.answer(["ladder", str(foreign.path), "--source", str(foreign.source.tokenizer), "--tokens", "12"]) == 0
    said = capsys.readouterr().out
    assert "no rung is off" in said
    assert all(name in said for name in ("float", "weights", "graph", "arithmetic", "kernels"))


def test_accuracy_level_4_is_off_in_its_arithmetic_and_level_0_is_not(foreign: Foreign) -> None:
    """The kernels give what the level asks for, and the level alone is what differs."""
    exact, rounded = (climb(n_bits(foreign, level), foreign.source, TOKENS) for level in (0, 4))
    assert off(exact) == []
    assert off(rounded) == ["arithmetic"]
    place = rung(rounded, "arithmetic").place
    assert place is not None
    assert (place.layer, place.operator, place.value) == ("layers.0", "MatMulNBits", "layers.0.attention.q")
    kernels = rung(rounded, "kernels").step_kld
    assert kernels is not None
    assert kernels < EXACT
    assert rounded.exit_code == 1


def test_x86_saturation_is_off_in_the_kernels_of_a_processor_that_saturates(
    foreign: Foreign, eight_bit: Path
) -> None:  # fmt: skip
    """ONNX Runtime's own wheel on a processor without VNNI: qemu emulates it. Exact integer sums are Arm's."""
    tools.needs("qemu-x86_64", "qemu-user")
    found = climb(eight_bit, foreign.source, TOKENS, processor="Haswell")
    assert off(found) == ["arithmetic", "kernels"]
    place = rung(found, "kernels").place
    assert place is not None
    assert (place.layer, place.operator) == ("layers.0", "MatMulInteger")
    assert place.error > 1e-2
    assert "Haswell" in found.processor


def test_what_cannot_be_run_is_refused_by_name(foreign: Foreign, tmp_path: Path) -> None:
    tools.needs("qemu-x86_64", "qemu-user")
    with pytest.raises(InputError, match=r"'Haswel'.*did you mean 'Haswell'"):
        climb(foreign.path, foreign.source, TOKENS, processor="Haswel")
    model = onnx.load(foreign.path)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"
    onnx.save(model, tmp_path / "scores.onnx")
    with pytest.raises(InputError, match="no output is called logits"):
        climb(tmp_path / "scores.onnx", foreign.source, TOKENS)
    with pytest.raises(InputError, match=r"which run"):
        climb(foreign.source.tokenizer / "model.safetensors", foreign.source, TOKENS)


def test_arm_sums_8_bit_products_exactly(foreign: Foreign, eight_bit: Path) -> None:
    """The same file on an emulated Cortex-A76, by ONNX Runtime's aarch64 wheel."""
    tools.needs("qemu-aarch64", "qemu-user")
    try:
        root.ready(default_root() / "arm64")
    except LilliputError as error:
        pytest.skip(str(error))
    found = climb(eight_bit, foreign.source, TOKENS, processor="arm://cortex-a76")
    assert off(found) == ["arithmetic"]
    kernels = rung(found, "kernels").step_kld
    assert kernels is not None
    assert kernels < EXACT


def test_with_exact_8_bit_products_only_the_arithmetic_is_off(foreign: Foreign, eight_bit: Path) -> None:
    """On this machine, where its processor sums as the operator is defined."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "vnni" not in flags and "asimd" not in flags:
        pytest.skip("this processor has no VNNI, and is no Arm: its 8-bit products saturate")
    found = climb(eight_bit, foreign.source, TOKENS)
    assert off(found) == ["arithmetic"]
    assert rung(found, "kernels").step_kld == 0
    place = rung(found, "arithmetic").place
    assert place is not None
    assert (place.layer, place.operator, place.value) == ("layers.0", "MatMulInteger", "layers.0.attention.q")
    graph = rung(found, "graph").step_kld
    assert graph is not None
    assert graph < EXACT


@pytest.fixture(scope="module")
def one_kv_head(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Source]:
    """litert-torch's conversion of transformers' repeat_kv with one KV head."""
    import litert_torch

    folder = tmp_path_factory.mktemp("converted")
    source, model = two_signed(folder, num_key_value_heads=1, num_hidden_layers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        litert_torch.convert(Plain(model).eval(), (torch.tensor([TOKENS]),)).export(str(folder / "model.tflite"))
    return folder / "model.tflite", source


def test_the_converter_error_of_one_kv_head_is_off_in_the_graph(one_kv_head: tuple[Path, Source]) -> None:
    path, source = one_kv_head
    found = climb(path, source, TOKENS)
    assert off(found) == ["graph"]
    place = rung(found, "graph").place
    assert place is not None
    assert place.layer == "layers.0"
    assert place.agrees == "layers.0.attention.k_rotated"
    assert (place.value, place.operator) == ("layers.0.attention.scores", "BATCH_MATMUL")


def test_a_wrong_rotary_base_in_a_gguf_file_is_off_in_its_graph(tmp_path: Path) -> None:
    """What llama.cpp computes from the metadata is shown by its own callback."""
    folder = tiny_models.tiny_llama(tmp_path / "tiny-llama")
    other = tiny_models.tiny_llama(tmp_path / "other", rope_theta=300.0)  # of the same weights
    path = tiny_gguf.write_llama(tmp_path / "base.gguf", other, Type.F16)
    found = climb(path, source_of(tiny_models.source_of(folder)), TOKENS, limit=EXACT)
    assert [rung.rung for rung in found.rungs] == ["float", "weights", "graph", "kernels"]
    place = rung(found, "graph").place
    assert place is not None
    assert (place.layer, place.operator, place.value) == ("layers.0", "ROPE", "layers.0.attention.q_rotated")


def test_a_sound_gguf_file_has_no_rung_off(tmp_path: Path) -> None:
    path, source = clean_artifacts.foreign(Type.Q4_0, tmp_path)
    found = climb(path, source_of(source), TOKENS)
    assert off(found) == []
    graph, kernels = rung(found, "graph").step_kld, rung(found, "kernels").step_kld
    assert graph is not None
    assert graph < EXACT
    assert kernels is not None
    assert kernels > graph


@pytest.mark.parametrize("exporter", ["onnx_int4", "litert_int8"])
def test_our_own_files_have_no_rung_off(exporter: str, tmp_path: Path) -> None:
    """Their logits are narrow: what 8-bit activations lose is below the limit."""
    clean = next(c for c in clean_artifacts.CLEAN if c.exporter == exporter)
    path, source = clean_artifacts.make(clean, tmp_path)
    found = climb(path, source_of(source), TOKENS)
    assert off(found) == []
    assert found.exit_code == 0
    assert found.notes == ()
    rounding = "kernels" if exporter == "litert_int8" else "arithmetic"  # weights in blocks, see tflite_graph
    graph, rounded = rung(found, "graph").step_kld, rung(found, rounding).step_kld
    assert graph is not None
    assert graph < EXACT
    assert rounded is not None
    assert rounded > graph
