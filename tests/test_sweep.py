from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import tiny_recipe

from lilliput import sweep
from lilliput.cli import answer
from lilliput.errors import RecipeError
from lilliput.run import Quiet
from lilliput.sweep import Options, Sweep


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.MonkeyPatch().setenv("LILLIPUT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    options = Options(bits=(8, 4, 2), chunks=2, suspects=3, limit=0.9)
    recipe = tiny_recipe.recipe(tmp_path_factory.mktemp("recipe"), model, targets=("gguf",))
    graph, _ = sweep.planned(sweep.recipe_of(recipe, options))
    return sweep.sweep(sweep.prepare(graph, options, Quiet()))


def test_the_loss_grows_as_bits_fall(found: Sweep) -> None:
    klds = [width.mean_kld for width in found.widths]
    assert [width.bits for width in found.widths] == [8, 4, 2]
    assert klds == sorted(klds)
    assert found.widths[0].step is None
    assert all(width.step is not None and width.step > 0 for width in found.widths[1:])


def test_the_cliff_is_the_first_width_below_the_limit(found: Sweep) -> None:
    below = [width.bits for width in found.widths if width.top1_agreement < found.limit]
    assert found.cliff == (below[0] if below else None)
    assert found.suspects_at == (below[0] if below else 2)


def test_suspects_are_named_by_prediction_and_confirmed_by_measurement(found: Sweep) -> None:
    predicted = [suspect.predicted for suspect in found.suspects]
    assert predicted == sorted(predicted, reverse=True)
    assert [suspect.costs is not None for suspect in found.suspects[:4]] == [True, True, True, False]
    whole = next(width.mean_kld for width in found.widths if width.bits == found.suspects_at)
    worst = found.suspects[0].costs
    assert worst is not None
    assert worst > 0
    assert found.kept_kld < whole - worst / 2
    assert sum(found.kinds.values()) == pytest.approx(1)


def test_the_command_prints_json_and_a_table(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(tiny_recipe.write(tmp_path, model, ("gguf",)))
    given = ["sweep", recipe, "--bits", "8,4", "--chunks", "2", "--suspects", "1", "--solver", "rtn"]
    assert answer([*given, "--json"]) == 0
    assert [width["bits"] for width in json.loads(capsys.readouterr().out)["widths"]] == [8, 4]
    assert answer(given) == 0
    shown = capsys.readouterr().out
    assert "predicted KLD" in shown
    assert "kept at 8 bits" in shown


@pytest.mark.parametrize("bits", ["4,8", "9", "8,x", ""])
def test_widths_that_are_none(bits: str) -> None:
    with pytest.raises(RecipeError, match="wanted falling widths from 8 to 2"):
        Options(bits=sweep.widths(bits))
