"""QAT on tiny random models: what is trained is what ships, it helps, and a kill changes nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import quantize, tiny_source

from calibration import qat
from calibration.distillation import divergence
from calibration.qat import Trainer, recover
from calibration.samples import Provenance, Samples
from calibration.student import fastest_precision, final_hidden, student_of
from exporters import gguf_llamacpp, litert_int8, onnx_int4
from lilliput import decoder
from lilliput.decoder import torch_name
from lilliput.errors import CalibrationError
from lilliput.grid import QuantizedTensor
from lilliput.model import QuantizedModel, SourceModel, role_of
from lilliput.recipe_schema import Recover
from lilliput.trace import trace

QUICK = Recover(steps=12, learning_rate=0.03, scale_learning_rate=0.005, precision="float32")


def samples(count: int = 12, length: int = 24) -> Samples:
    tokens = np.random.default_rng(0).integers(0, 320, (count, length)).astype(np.int32)
    return Samples(tokens, Provenance("text", "random tokens", "5" * 64, *tokens.shape))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return tiny_source(tmp_path_factory.mktemp("model"))


def same(a: QuantizedModel, b: QuantizedModel) -> bool:
    """Every code, scale and float, bit for bit."""
    return all(a.quantized[name].same_as(b.quantized[name]) for name in a.quantized) and all(
        np.array_equal(a.floats[name], b.floats[name]) for name in a.floats
    )


def test_training_lowers_the_divergence_on_text_that_it_did_not_see(source: SourceModel, tmp_path: Path) -> None:
    solved = quantize(source, "int3-b32")
    options = Recover(steps=40, batch=8, learning_rate=0.005, scale_learning_rate=0.005, precision="float32")
    trained, found = recover(source, solved, samples(48), options, tmp_path)
    assert found.kept
    assert found.steps == 40
    assert found.tokens == 40 * 8 * 24
    assert found.kld_after < 0.9 * found.kld_before
    changed = {name for name in solved.quantized if not trained.quantized[name].same_as(solved.quantized[name])}
    assert changed == {name for name in solved.quantized if role_of(name) == "linear"}
    assert not np.array_equal(trained.floats["norm"], solved.floats["norm"])


def test_a_training_that_helps_nothing_is_dropped(source: SourceModel, tmp_path: Path) -> None:
    solved = quantize(source)
    wild = QUICK.model_copy(update={"learning_rate": 3.0, "float_learning_rate": 1.0})
    kept, found = recover(source, solved, samples(), wild, tmp_path)
    assert not found.kept
    assert found.kld_after > found.kld_before
    assert kept is solved


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gemma3"])
def test_the_student_is_the_dequantized_model(kind: str, tmp_path: Path) -> None:
    """The same float32 weights in torch's memory, and the decoder's own hidden states."""
    source = tiny_source(tmp_path, kind)
    trainer = Trainer(source, quantize(source), samples(), QUICK)
    for step in range(2):
        trainer.step(step, 1.0)
    trainer.write_values()
    model = trainer.model()
    for name in source.config.parameter_shapes():
        assert np.array_equal(trainer.student.get_parameter(torch_name(name)).detach().numpy(), model.dequantized(name))
    with torch.no_grad():
        expected = trainer.student.norm(trainer.student.hidden(trainer.held))
        assert torch.allclose(final_hidden(trainer.student, trainer.held), expected, atol=1e-5)
        rebuilt = student_of(model)
        assert torch.equal(rebuilt(trainer.held), trainer.student(trainer.held))


def test_the_files_hold_the_trained_codes(source: SourceModel, tmp_path: Path) -> None:
    trainer = Trainer(source, quantize(source), samples(), QUICK)
    for step in range(3):
        trainer.step(step, 1.0)
    trained = trainer.model()
    assert not trained.quantized["layers.0.mlp.up"].same_as(trainer.solved.quantized["layers.0.mlp.up"])
    traced = trace(decoder.Decoder(trained.config), context=64, prefill=16)
    for module in (onnx_int4, litert_int8, gguf_llamacpp):
        folder = tmp_path / module.__name__
        folder.mkdir()
        exporter = module.Exporter()
        options = exporter.Options()
        read = exporter.read(exporter.export(trained, traced, options, folder))
        for name, tensor in trained.quantized.items():
            found_tensor = read[name]
            assert isinstance(found_tensor, QuantizedTensor)
            assert found_tensor.same_as(tensor), (module.__name__, name)
        assert np.array_equal(np.asarray(read["norm"]), trained.floats["norm"])


def test_a_killed_training_resumes_to_the_same_bits(
    source: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = quantize(source, "int2-b32")
    undisturbed, _ = recover(source, solved, samples(), QUICK, tmp_path / "a")
    monkeypatch.setattr(qat, "CHECKPOINT_S", 0.0)  # after every step
    whole, steps = Trainer.step, []

    def killed(trainer: Trainer, index: int, factor: float) -> float:
        if index == 7 and 7 not in steps:
            steps.append(index)
            raise KeyboardInterrupt
        steps.append(index)
        return whole(trainer, index, factor)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        recover(source, solved, samples(), QUICK, tmp_path / "b")
    resumed, found = recover(source, solved, samples(), QUICK, tmp_path / "b")
    assert steps == [*range(8), *range(7, 12)]
    assert found.steps == 12
    assert same(resumed, undisturbed)


def test_minutes_end_a_training(source: SourceModel, tmp_path: Path) -> None:
    brief = QUICK.model_copy(update={"steps": 10**6, "minutes": 0.01, "reconstruct": False})
    _, found = recover(source, quantize(source), samples(), brief, tmp_path)
    assert 1 <= found.steps < 10**5
    assert found.seconds >= 0.6


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    rates = [qat.rate(p / 100) for p in range(101)]
    assert 0 < rates[0] < rates[3] < 1
    assert rates[5] == 1
    assert all(a > b for a, b in itertools.pairwise(rates[5:]))
    assert rates[100] == pytest.approx(0, abs=1e-12)


def test_an_epoch_shows_every_sample_once() -> None:
    options = Recover(batch=4, seed=3)
    epochs = [torch.cat([qat._batch(3 * e + step, 11, options) for step in range(3)]).tolist() for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(11))
    assert epochs[0] != epochs[1]


def test_micro_batches_and_checkpointing_change_no_gradient(source: SourceModel) -> None:
    gradients = []
    for changes in ({}, {"micro_batch": 4}, {"checkpointing": True}):
        trainer = Trainer(source, quantize(source), samples(), QUICK.model_copy(update=changes))
        taken: list[torch.Tensor] = []
        fake = trainer.fakes["layers.0.mlp.down"]
        whole = fake.gradients
        fake.gradients = lambda g, kinds, whole=whole, taken=taken: taken.append(g.clone()) or whole(g, kinds)  # type: ignore[method-assign]
        trainer.step(0, 1.0)
        gradients.append(taken[0])
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-9)
    assert torch.allclose(gradients[0], gradients[2], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_divergence_and_its_gradient_are_torchs_own(softcap: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(300, 16, generator=generator) for _ in range(2))
    head, teacher_head = (torch.randn(50, 16, generator=generator) for _ in range(2))
    student.requires_grad_(True)
    logits = teacher @ teacher_head.T, student @ head.T
    log_p, log_q = ((softcap * (x / softcap).tanh() if softcap else x).log_softmax(-1) for x in logits)
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    (wanted,) = torch.autograd.grad(expected, student)
    loss = divergence(student, teacher, head, teacher_head, softcap)
    (found,) = torch.autograd.grad(2 * loss, student)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(found, 2 * wanted, atol=1e-5)


def test_what_cannot_be_trained_is_refused(source: SourceModel) -> None:
    with pytest.raises(CalibrationError, match="fits no quantized matrix"):
        Trainer(source, quantize(source), samples(), QUICK.model_copy(update={"match": "layer.*"}))
    with pytest.raises(CalibrationError, match="at least 2 samples"):
        Trainer(source, quantize(source), samples(1), QUICK)


def test_precision_is_one_of_two() -> None:
    assert fastest_precision("cuda") == "bfloat16"
    assert fastest_precision("cpu") in ("float32", "bfloat16")
