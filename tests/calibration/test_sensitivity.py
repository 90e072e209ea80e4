from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_source

from calibration import rtn, sensitivity
from calibration.divergence import divergence as divergence_of_samples
from calibration.samples import Provenance, Samples
from calibration.sensitivity import Sensitivity
from lilliput import decoder
from lilliput.errors import CalibrationError
from lilliput.grid import Float, QuantizedTensor, grid
from lilliput.model import SourceModel, role_of

MATRICES = ("embedding", "layers.0.attention.q", "layers.0.attention.v", "layers.0.attention.o", "layers.0.mlp.up")


def random_samples(source: SourceModel) -> Samples:
    tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (32, 64)).astype(np.int32)
    return Samples(tokens, Provenance("text", "random tokens", "5" * 64, *tokens.shape))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return tiny_source(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def found(source: SourceModel, tmp_path_factory: pytest.TempPathFactory) -> Sensitivity:
    return sensitivity.gather(source, random_samples(source), tmp_path_factory.mktemp("sensitivity"), count=32)


def divergence(source: SourceModel, changed: dict[str, Float]) -> float:
    """Mean KLD of the model with some weights changed, in float64."""
    tokens = torch.from_numpy(random_samples(source).tokens.astype(np.int64))
    with torch.inference_mode():
        model = decoder.build(source).double()
        reference = model(tokens).log_softmax(-1)
        model.load_state_dict({decoder.torch_name(n): torch.from_numpy(w) for n, w in changed.items()}, strict=False)
        return float((reference.exp() * (reference - model(tokens).log_softmax(-1))).sum(-1).mean())


def rounded(source: SourceModel, name: str, bits: int) -> QuantizedTensor:
    return rtn.Solver().solve(source.weights[name], grid(f"int{bits}-b32"), None, rtn.Options())


@pytest.mark.parametrize("name", MATRICES)
def test_the_predicted_divergence_is_the_measured_one(source: SourceModel, found: Sensitivity, name: str) -> None:
    tensor = rounded(source, name, 6)
    predicted = found[name].loss(source.weights[name], tensor)
    measured = divergence(source, {name: tensor.dequantize()})
    assert predicted == pytest.approx(measured, rel=0.45)  # errors of neighbouring positions are taken as independent


def test_every_matrix_has_a_curvature(source: SourceModel, found: Sensitivity) -> None:
    assert set(found) == {name for name in source.weights if role_of(name) != "vector"}
    for name, curvature in found.items():
        rows, cols = source.weights[name].shape
        assert curvature.moments.shape == (cols, cols)
        assert curvature.shares.shape == (rows,)
        assert curvature.shares.sum() == pytest.approx(1, abs=1e-4)
        assert np.linalg.eigvalsh(curvature.moments.astype(np.float64)).min() > -1e-6 * np.trace(curvature.moments)


def test_an_untied_head_has_its_own(tmp_path: Path) -> None:
    source = tiny_source(tmp_path / "model", tie_word_embeddings=False)
    found = sensitivity.gather(source, random_samples(source), tmp_path / "sensitivity", count=32)
    for name in ("embedding", "head"):
        tensor = rounded(source, name, 6)
        predicted = found[name].loss(source.weights[name], tensor)
        assert predicted == pytest.approx(divergence(source, {name: tensor.dequantize()}), rel=0.35)


def test_caps_and_the_scale_of_the_embedding_are_in_it(tmp_path: Path) -> None:
    """Gemma 2's: the logits' cap of 3 is met, and an error of the untied embedding counts 64 times."""
    source = tiny_source(tmp_path / "model", "gemma2", tie_word_embeddings=False, final_logit_softcapping=1.0)
    found = sensitivity.gather(source, random_samples(source), tmp_path / "sensitivity", count=32)
    for name in ("embedding", "head", "layers.1.mlp.down"):
        tensor = rounded(source, name, 6)
        predicted = found[name].loss(source.weights[name], tensor)
        assert predicted == pytest.approx(divergence(source, {name: tensor.dequantize()}), rel=0.35), name
        whole = divergence_of_samples(source, {name: tensor}, random_samples(source))
        assert whole == pytest.approx(divergence(source, {name: tensor.dequantize()}), rel=1e-2), name


def test_the_same_again(source: SourceModel, found: Sensitivity, tmp_path: Path) -> None:
    sensitivity.gather(source, random_samples(source), tmp_path, count=32)
    for file in sorted(found.folder.iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_a_folder_that_holds_none(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no readable sensitivity"):
        Sensitivity(tmp_path)
