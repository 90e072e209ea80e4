"""Two settings side by side: which loses less, whether that is sure, and what does not compare."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_recipe
from tiny_models import TEXT, tiny_llama

from lilliput import ab, cli
from lilliput.ab import AB, finding
from lilliput.errors import CalibrationError, RecipeError
from lilliput.report import StageTime
from lilliput.results import Interval
from lilliput.run import PlannedStage, Quiet
from targets.metrics import bootstrap_interval

BITS = ("quantize=[{match: '*', grid: int8-channel}]", "quantize=[{match: '*', grid: int4-b32}]")
BOTH = ("calibration.samples=self", "calibration.samples=[{samples: builtin, count: 2}, {samples: self, count: 2}]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))


def sides(folder: Path, model: Path, a: str, b: str, *both: str) -> tuple[ab.Side, ab.Side]:
    read = [tiny_recipe.recipe(folder, model, *both, setting, targets=("onnx", "gguf")) for setting in (a, b)]
    return ab.sides(read[0], read[1], [a], [b])


class Seen(Quiet):
    def __init__(self) -> None:
        self.names: list[str] = []

    def finished(self, stage: StageTime) -> None:
        self.names.append(stage.name)


def test_fewer_bits_lose_more_and_that_is_sure(tmp_path: Path, model: Path) -> None:
    both = sides(tmp_path, model, *BITS, "evaluation.count=4")
    seen = Seen()
    (pair,) = ab.ab(both, seen).pairs
    assert pair.targets == ("onnx", "gguf"), "two targets, one solution"
    assert pair.finding == "A is better"
    assert pair.interval is not None
    assert 0 < pair.interval.low <= pair.difference <= pair.interval.high
    assert pair.difference == pytest.approx(pair.mean_kld_b - pair.mean_kld_a)
    assert seen.names == [stage.name for stage in ab.planned(both)], "each planned stage is told once, in order"
    assert [name for name in seen.names if name.startswith("quantize")] == [
        "quantize:int8-channel of A",
        "quantize:int4-b32 of B",
    ]


def test_two_mixes_are_compared_in_one_command(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(tiny_recipe.write(tmp_path, model, ("gguf",)))
    command = ["ab", recipe, "--set-a", BOTH[0], "--set-b", BOTH[1]]
    assert cli.answer([*command, "--json"]) == 0
    found = AB.model_validate_json(capsys.readouterr().out)
    assert found.calibration_a is not None
    assert found.calibration_b is not None
    assert found.calibration_b.origin.startswith("2 x builtin + 2 x sampled from")
    assert found.pairs[0].mean_kld_a != found.pairs[0].mean_kld_b
    assert cli.answer(command) == 0
    out, err = capsys.readouterr()
    assert "from the store" in err, "the second time nothing is solved"
    assert BOTH[1] in out
    assert "gguf" in out
    assert json.loads(found.model_dump_json())["tokens"] == 32


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("seed=3", "seed=3", "A and B are solved alike"),
        ("evaluation.count=1", "evaluation.count=2", "not the same evaluation"),
        ("targets.gguf.name=one", "targets.gguf.name=two", "not the same targets"),
    ],
)
def test_what_does_not_compare_is_refused(tmp_path: Path, model: Path, a: str, b: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        sides(tmp_path, model, a, b)


def test_leakage_in_b_is_refused_before_a_is_solved(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 4)
    sizes = [f"{part}.{size}" for part in ("calibration", "evaluation") for size in ("count=8", "length=32")]
    both = sides(tmp_path, model, BOTH[0], f"calibration.samples={path}", f"evaluation.text={path}", *sizes)
    seen = Seen()
    with pytest.raises(CalibrationError, match="share text"):
        ab.ab(both, seen)
    assert {name.partition(":")[0] for name in seen.names} == {"source", "evaluation", "samples", "coverage"}


def test_the_interval_is_paired() -> None:
    """Chunks differ by far more than the two sides do; the difference is seen all the same."""
    chunks = np.random.default_rng(0).gamma(2.0, size=(12, 1)) + np.random.default_rng(1).normal(0, 0.01, (12, 64))
    interval = bootstrap_interval((chunks + 0.05) - chunks)
    assert finding(interval, same=False) == "A is better"
    assert finding(bootstrap_interval(chunks - (chunks + 0.05)), same=False) == "B is better"


def test_an_interval_that_holds_zero_or_none_tells_nothing() -> None:
    assert finding(Interval(low=-0.1, high=0.2), same=False) == "the noise is too large"
    assert finding(None, same=False) == "the noise is too large"
    assert finding(Interval(low=0.0, high=0.0), same=True) == "the same"


def test_planned_stages_carry_their_side(tmp_path: Path, model: Path) -> None:
    planned = ab.planned(sides(tmp_path, model, *BITS))
    assert all(
        isinstance(stage, PlannedStage) and stage.name.endswith((" A", " B", ":of A", ":of B")) for stage in planned
    )
    assert not any(stage.cached for stage in planned)
