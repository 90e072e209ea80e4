"""`quantize: auto`: which targets climb how far, what they keep, and what the report says of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_recipe
from sample_report import gate, passing, report
from test_cli import a_plan
from tiny_models import tiny_llama

from lilliput import cli, escalation, pipeline, terminal
from lilliput.assignment import assign
from lilliput.errors import RecipeError
from lilliput.estimate import artifact_bytes
from lilliput.model import DecoderConfig
from lilliput.recipe import Recipe, load
from lilliput.recipe_schema import Auto, Budget, Recover
from lilliput.report import Report, TriedRung
from lilliput.report import load as load_report
from lilliput.report_page import html
from lilliput.report_table import markdown
from lilliput.results import TargetResult, worst
from lilliput.run import Plan, Quiet, Run, Watcher

RUNGS = ("rtn", "gptq", "awq", "mixed", "qat")
AUTO = f"quantize={{auto: [{', '.join(RUNGS)}]}}"
CONFIG = DecoderConfig("llama", 320, 64, 128, 2, 4, 2, 16, 256, "rms", 1e-5, "rope", "silu", True, False, False, True)
RECIPE = """
name: tiny
model: {source: nowhere}
quantize: auto
targets:
  - {name: onnx, exporter: onnx_int4, runtime: ort_cpu}
  - {name: gguf, exporter: gguf_llamacpp, runtime: llamacpp_cpu}
"""


def read(tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return load(path, overrides)


def way_of(recipe: Recipe, name: str) -> str:
    """The rung that a target of a concrete recipe is on."""
    (target,) = (t for t in recipe.targets if t.name == name)
    if target.recover:
        return "qat"
    if isinstance(target.quantize, Budget):
        return "mixed"
    assert target.quantize is not None
    return {"rtn": "rtn", "gptq": "gptq", "awq, then gptq": "awq"}[target.quantize[0].chain]


def result(name: str, kld: float, verdict: str, metric: str = "mean_kld", value: float | None = 0.5) -> TargetResult:
    """One target with one gate beside those that pass."""
    base = passing()
    accuracy = base.accuracy
    assert accuracy is not None
    judged = gate(metric, "max", 0.1, value).model_copy(update={"verdict": verdict})
    gates = (gate("read_back", "max", 0, 0), judged)
    updates = {"name": name, "gates": gates, "verdict": worst([g.verdict for g in gates])}
    return base.model_copy(update={**updates, "accuracy": accuracy.model_copy(update={"mean_kld": kld})})


class Staged:
    """Stands in for the pipeline: each target's result by its rung; remembers what was run."""

    def __init__(self, results: Mapping[str, Mapping[str, TargetResult]]) -> None:
        self.results, self.ran = results, list[dict[str, str]]()

    def plan(self, recipe: Recipe, out: Path, targets: Sequence[str] = (), fresh: bool = False) -> Plan:
        return replace(a_plan(str(out.parent / "tiny.yaml"), out), recipe=recipe, fresh=fresh)

    def run(self, plan: Plan, watcher: Watcher, kept: set[str]) -> Run:
        ways = {target.name: way_of(plan.recipe, target.name) for target in plan.recipe.targets}
        self.ran.append(ways)
        found = [self.results[name][way] for name, way in ways.items()]
        made = report(*found).model_copy(update={"escalation": ()})
        return Run(plan, made)


@contextmanager
def quiet(plan: Plan) -> Iterator[Watcher]:
    yield Quiet()


Climb = Callable[..., tuple[Staged, Run, list[TriedRung]]]


@pytest.fixture
def climb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Climb:
    def done(results: Mapping[str, Mapping[str, TargetResult]], *overrides: str) -> tuple[Staged, Run, list[TriedRung]]:
        staged, told = Staged(results), list[TriedRung]()
        monkeypatch.setattr(pipeline, "plan", staged.plan)
        monkeypatch.setattr(pipeline, "run", staged.run)
        monkeypatch.setattr(escalation.planning, "config_of", lambda recipe: CONFIG)
        recipe = read(tmp_path, *overrides)
        return staged, escalation.climb(recipe, tmp_path / "out", (), None, False, quiet, told.append), told

    return done


def always(verdict: str, **more: object) -> dict[str, TargetResult]:
    return {way: result("x", 0.2, verdict, **more) for way in RUNGS}  # type: ignore[arg-type]


def named(results: Mapping[str, TargetResult], name: str) -> dict[str, TargetResult]:
    return {way: found.model_copy(update={"name": name}) for way, found in results.items()}


def both(onnx: Mapping[str, TargetResult], gguf: Mapping[str, TargetResult]) -> dict[str, dict[str, TargetResult]]:
    return {"onnx": named(onnx, "onnx"), "gguf": named(gguf, "gguf")}


def test_what_passes_at_once_climbs_nothing(climb: Climb) -> None:
    staged, run, told = climb(both(always("PASS"), always("PASS")))
    assert staged.ran == [{"onnx": "rtn", "gguf": "rtn"}]
    assert [step.rung for step in told] == ["rtn"]
    assert run.exit_code == 0


def test_only_the_target_that_fails_climbs(climb: Climb) -> None:
    gguf = always("FAIL") | {"gptq": result("x", 0.05, "PASS")}
    staged, run, told = climb(both(always("PASS"), gguf))
    assert staged.ran == [{"onnx": "rtn", "gguf": "rtn"}, {"onnx": "rtn", "gguf": "gptq"}]
    assert [[target.name for target in step.targets] for step in told] == [["onnx", "gguf"], ["gguf"]]
    assert run.exit_code == 0
    assert run.report.escalation == tuple(told)


def test_what_never_passes_keeps_the_rung_that_lost_least(climb: Climb) -> None:
    onnx = {way: result("x", kld, "FAIL") for way, kld in zip(RUNGS, (0.4, 0.2, 0.3, 0.25, 0.22), strict=True)}
    staged, run, told = climb(both(onnx, always("PASS")), AUTO)
    assert [step["onnx"] for step in staged.ran] == [*RUNGS, "gptq"]
    assert {step["gguf"] for step in staged.ran} == {"rtn"}
    assert len(told) == 5
    assert run.exit_code == 1
    assert way_of(run.plan.recipe, "onnx") == "gptq"


def test_inconclusive_accuracy_climbs_too(climb: Climb) -> None:
    staged, run, _ = climb(both(always("INCONCLUSIVE"), always("PASS")), "quantize={auto: [rtn, gptq]}")
    assert [step["onnx"] for step in staged.ran] == ["rtn", "gptq", "rtn"], "alike: the cheaper is kept"
    assert run.exit_code == 3


@pytest.mark.parametrize(("metric", "value"), [("decode_tokens_per_s", 3.0), ("size_mb", 200.0), ("mean_kld", None)])
def test_what_more_bits_of_work_cannot_mend_does_not_climb(climb: Climb, metric: str, value: float | None) -> None:
    staged, run, _ = climb(both(always("FAIL", metric=metric, value=value), always("PASS")))
    assert len(staged.ran) == 1
    assert run.exit_code == 1


def test_a_target_with_rules_of_its_own_stays(climb: Climb) -> None:
    staged, _, told = climb(both(always("FAIL"), always("PASS")), "targets.onnx.quantize=int4-b32")
    assert [step["onnx"] for step in staged.ran] == ["gptq"]
    assert [target.name for target in told[0].targets] == ["gguf"]


def test_all_rungs_have_the_same_bytes() -> None:
    ladder = escalation.rungs(Auto(auto=RUNGS), CONFIG)
    assert [rung.name for rung in ladder] == list(RUNGS)
    budget = ladder[3].quantize
    assert isinstance(budget, Budget)
    assert budget.bits_per_weight is not None
    uniform = ladder[0].quantize
    assert not isinstance(uniform, Budget)
    shapes = CONFIG.parameter_shapes()
    matrices = assign(uniform, CONFIG)
    floats = sum(4 * shape[0] for name, shape in shapes.items() if name not in matrices)
    weights = sum(shapes[name][0] * shapes[name][1] for name in matrices)
    assert weights * budget.bits_per_weight / 8 == pytest.approx(artifact_bytes(matrices, CONFIG) - floats)


def test_training_starts_from_the_rung_below_and_is_the_recipes_own(tmp_path: Path) -> None:
    short = rungs_of(tmp_path, "quantize={auto: [gptq, qat]}")[1]
    assert not isinstance(short.quantize, Budget)
    assert short.quantize[0].chain == "gptq"
    assert short.recover == Recover(minutes=10)
    own = rungs_of(tmp_path, "recover={steps: 7}")
    assert [rung.name for rung in own] == ["rtn", "gptq", "mixed", "qat"]
    assert own[3].recover == Recover(steps=7)
    assert isinstance(own[3].quantize, Budget)
    assert [rung.recover for rung in own[:3]] == [None] * 3
    assert rungs_of(tmp_path, "quantize={auto: [qat]}")[0].what.startswith("int4-b32, GPTQ, then 10 min")
    recipe = read(tmp_path, "recover={steps: 7}", "targets.onnx.quantize=int4-b32")
    made = escalation.concrete(recipe, {"gguf": own[0]})
    assert [made.recover_of(target) for target in made.targets] == [Recover(steps=7), None]


def rungs_of(tmp_path: Path, *overrides: str) -> tuple[escalation.Rung, ...]:
    recipe = read(tmp_path, *overrides)
    assert isinstance(recipe.quantize, Auto)
    return escalation.rungs(recipe.quantize, CONFIG, recipe.recover)


def test_the_report_has_the_table_of_rungs(climb: Climb, tmp_path: Path) -> None:
    gguf = always("FAIL") | {"gptq": result("x", 0.05, "PASS")}
    _, run, _ = climb(both(always("PASS"), gguf))
    written = load_report(tmp_path / "out")
    assert written == run.report
    assert "| gptq | gguf |" in markdown(written)
    assert "How far each target climbed" in html(written)
    assert "How far each target climbed" not in html(report())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("quantize={auto: [rtn, rtn]}", "auto: each rung once"),
        ("quantize={auto: [hqq]}", "quantize"),
        ("quantize={auot: [rtn]}", "did you mean 'auto'"),
        ("targets.onnx.quantize=auto", "auto"),
    ],
)
def test_a_ladder_that_does_not_fit_is_refused(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, setting)


def test_a_ladder_is_no_single_recipe(tmp_path: Path) -> None:
    recipe = read(tmp_path)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    with pytest.raises(RecipeError, match="only `lilliput run` climbs"):
        recipe.quantize_of(recipe.targets[0])


def test_the_ladder_is_shown_with_what_each_rung_adds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plain.yaml").write_text(RECIPE.replace("quantize: auto", "quantize: int4-b32"))
    plan = a_plan(str(tmp_path / "plain.yaml"), tmp_path / "out")
    terminal.show_ladder([(rung, plan) for rung in escalation.rungs(Auto(), CONFIG)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "rtn: int4-b32, round to nearest"
    assert lines[3].endswith("then 10 min of training")
    assert ["1 min 15 s" in line for line in lines[6:10]] == [True, False, False, False], "what two share is done once"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "llama")


def climbed(out: Path, recipe: Path, *settings: str) -> tuple[int, Report]:
    arguments = [part for setting in settings for part in ("--set", setting)]
    code = cli.answer(["run", str(recipe), "--out", str(out), *arguments])
    return code, load_report(out)


def test_real_runs_climb_none_one_and_all(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One chunk has no interval, so a limit between two rungs' losses decides."""
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    recipe = tiny_recipe.write(tmp_path, model, ("onnx",))
    ladder = ("quantize=auto", "recover={steps: 2, batch: 2}", "evaluation.count=1")
    dry = ["run", str(recipe), "--dry-run", "--json", "--set", ladder[0]]
    assert cli.answer(dry) == 0
    shown = json.loads(capsys.readouterr().out)["ladder"]
    assert [rung["rung"] for rung in shown] == ["rtn", "gptq", "mixed", "qat"]
    assert not (tmp_path / "cache").exists(), "a dry run does nothing"

    def limit(value: float) -> str:
        return f"gates=[{{metric: mean_kld, max: {value:.12f}}}]"

    code, every = climbed(tmp_path / "all", recipe, *ladder, limit(1e-9))
    assert code == 1
    assert [step.rung for step in every.escalation] == ["rtn", "gptq", "mixed", "qat"]
    assert "rung mixed" in capsys.readouterr().err
    losses = [step.targets[0].mean_kld or 0.0 for step in every.escalation]
    kept = every.targets[0].accuracy
    assert kept is not None
    assert kept.mean_kld == min(losses)
    assert losses[1] < losses[0], "GPTQ loses less than RTN"
    assert all(step.seconds > 0 for step in every.escalation)

    code, one = climbed(tmp_path / "one", recipe, *ladder, limit((losses[0] + losses[1]) / 2))
    assert [step.rung for step in one.escalation] == ["rtn", "gptq"]
    code, none = climbed(tmp_path / "none", recipe, *ladder, limit(10 * losses[0]))
    assert [step.rung for step in none.escalation] == ["rtn"]
    assert code in (0, 3), "3 where the machine is too busy for a verdict on speed"
