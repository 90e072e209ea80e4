"""Static grids of real modules' activations: decoder, encoder with padding, CNN."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_source
from torch import Tensor, nn

from calibration import statistics
from calibration.activations import Selection, fitted, observe
from calibration.clipping import RangeOptions
from calibration.samples import Provenance, Samples
from lilliput.decoder import build
from lilliput.errors import CalibrationError

MIN_MAX = RangeOptions(dtype="int16")


class Encoder(nn.Module):
    """One attention with an additive mask, its scores a module's output; then a pooled head."""

    def __init__(self, masked: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.scores, self.masked = nn.Identity(), masked

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        scores = self.scores(scores.masked_fill(~keep[:, None, None], self.masked))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head((mixed * keep[..., None]).sum(1))


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Padded positions hold huge numbers."""
    rng = torch.Generator().manual_seed(1)
    made = []
    for n in range(count):
        keep = torch.arange(6)[None] < torch.tensor([[6], [4 - n]])
        x = torch.randn(2, 6, 8, generator=rng)
        made.append({"x": torch.where(keep[..., None], x, 1000.0), "keep": keep})
    return made


def keep_of(batch: object) -> Tensor:
    assert isinstance(batch, dict)
    kept = batch["keep"]
    assert isinstance(kept, Tensor)
    return kept


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min, -1e4])
def test_padding_and_masked_scores_stay_out_of_the_ranges(masked: float) -> None:
    model = Encoder(masked)
    selection = Selection(("q:input", "scores:output", "head:input"), scores=("scores:*",))
    found = observe(model, batches(), selection, MIN_MAX, keep_of)
    real = torch.cat([batch["x"][batch["keep"]] for batch in batches()])
    held = found.grids["q:input"]
    assert float(held.scale[0]) * 65535 == pytest.approx(float(real.max() - real.min()), rel=1e-3)
    assert float(found.grids["scores:output"].scale[0]) * 65535 < 100
    assert found.unmasked == ("head:input",), "pooled: no position is left"


def test_masked_scores_that_are_not_named_are_refused() -> None:
    with pytest.raises(CalibrationError, match="activation scores:output: a tensor has NaN or infinite"):
        observe(Encoder(-torch.inf), batches(), Selection(("scores:output",)), MIN_MAX)


def test_where_a_mask_fits() -> None:
    keep = torch.tensor([[True, False, True]])
    assert fitted(keep, torch.Size([1, 3, 8])) is not None
    heads, scores = fitted(keep, torch.Size([1, 2, 3, 8])), fitted(keep, torch.Size([1, 2, 3, 3]))
    assert heads is not None
    assert scores is not None
    assert heads.expand(1, 2, 3, 8)[0, 0, :, 0].tolist() == [True, False, True]
    assert scores.expand(1, 2, 3, 3)[0, 0].tolist() == [[True, False, True], [False] * 3, [True, False, True]]
    assert fitted(keep, torch.Size([1, 8])) is None
    assert fitted(keep, torch.Size([1, 3])) is None


def test_a_decoders_ranges_are_those_of_its_statistics(tmp_path: Path) -> None:
    source = tiny_source(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 320, (4, 16)).astype(np.int32)
    gathered = statistics.gather(source, Samples(tokens, Provenance("text", "", "", 4, 16)), tmp_path / "statistics")
    options = RangeOptions(dtype="int16", axis=-1)
    rows = (torch.from_numpy(row[None].astype(np.int64)) for row in tokens)
    found = observe(build(source), rows, Selection(("layers.*.mlp.down:input",)), options)
    assert sorted(found.grids) == ["layers.0.mlp.down:input", "layers.1.mlp.down:input"]
    for name, grid in found.grids.items():
        known = gathered[name.removesuffix(":input")]
        span = np.maximum(known.maximum, 0) - np.minimum(known.minimum, 0)
        np.testing.assert_allclose(grid.scale * 65535, span, rtol=1e-4)
        assert grid.axis == -1


def test_a_cnns_channels_are_its_second_axis() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3))
    images = [torch.randn(2, 3, 12, 12) for _ in range(3)]
    found = observe(model, images, Selection(("*:output",)), RangeOptions(method="mse", axis=1))
    assert {name: len(grid.scale) for name, grid in found.grids.items()} == {
        "0:output": 5,
        "1:output": 5,
        "2:output": 7,
        ":output": 7,
    }
    assert (found.grids["1:output"].zero_point == -128).all(), "after ReLU nothing is below zero"


@pytest.mark.parametrize("method", ["min_max", "percentile", "mse", "entropy"])
def test_the_order_of_batches_does_not_matter(method: str) -> None:
    options = RangeOptions(method=method)  # type: ignore[arg-type]
    selection = Selection(("q:input", "v:output"))
    forth, back = (observe(Encoder(-1e4), order, selection, options, keep_of) for order in (batches(), batches()[::-1]))
    for name in forth.grids:
        assert forth.grids[name].scale == back.grids[name].scale
        assert forth.grids[name].zero_point == back.grids[name].zero_point


def test_no_activation_is_kept() -> None:
    model, alive = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), []
    model[0].register_forward_hook(lambda _, __, output: alive.append(weakref.ref(output)))

    def stream() -> Iterator[Tensor]:
        for _ in range(20):
            assert sum(ref() is not None for ref in alive) <= 1, "at most the last batch's"
            yield torch.randn(4, 8)

    found = observe(model, stream(), Selection(("0:output",)), MIN_MAX)
    assert len(alive) == 20
    assert list(found.grids) == ["0:output"]
    assert not model[1]._forward_hooks
    assert len(model[0]._forward_hooks) == 1, "the test's own"


@pytest.mark.parametrize(
    ("selection", "axis", "message"),
    [
        (Selection(("layer:input",)), None, "'layer:input' fits no tensor"),
        (Selection(("0:input",), scores=("nothing",)), None, "'nothing' fits no tensor"),
        (Selection(("0:input",)), 2, r"activation 0:input is \(4, 8\): it has no axis 2"),
    ],
)
def test_what_does_not_fit_is_named(selection: Selection, axis: int | None, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        observe(nn.Sequential(nn.Linear(8, 8)), [torch.randn(4, 8)], selection, RangeOptions(axis=axis))
