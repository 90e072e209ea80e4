"""The command line: exit codes, one-line errors, what it imports, and what it prints."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from sample_report import failing, inconclusive, passing, report

from lilliput import cli, pipeline
from lilliput.errors import MissingPackageError, RecipeError
from lilliput.recipe import load
from lilliput.report import Report, StageTime
from lilliput.run import Plan, PlannedStage, PlannedTarget, Run, Watcher

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "tensorflow", "numpy", "pydantic", "gguf", "jinja2", "yaml")
COMMANDS = (
    "run",
    "validate",
    "inspect",
    "ladder",
    "network",
    "npu",
    "compare",
    "ab",
    "chat",
    "list",
    "schema",
    "doctor",
)


RECIPE = """
name: tiny
model: {source: nowhere}
context: 512
quantize: [{match: "*", grid: int8-channel, solver: rtn}]
targets:
  - {name: onnx, exporter: onnx_int4, runtime: ort_cpu}
  - {name: gguf, exporter: gguf_llamacpp, runtime: llamacpp_cpu}
"""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(RECIPE)
    return str(path)


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in this process."""
    code = cli.answer(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def one_line(err: str) -> str:
    """The error's text; fails unless stderr is exactly one line in the one style."""
    assert re.fullmatch(r"lilliput: error: [^\n]+\n", err), err
    return err.removeprefix("lilliput: error: ").strip()


def a_plan(recipe: str, out: Path) -> Plan:
    stages = (
        PlannedStage("source", "", "ab" * 32, cached=True, seconds=0.0),
        PlannedStage("export", "onnx", "cd" * 32, cached=False, seconds=75.0),
        PlannedStage("report", "", "", cached=False, seconds=0.0),
    )
    return Plan(
        recipe=load(recipe),
        recipe_sha256="ef" * 32,
        source_sha256="01" * 32,
        host=report().host,
        out=out,
        store=out / "store",
        fresh=False,
        parameters=134_515_008,
        stages=stages,
        targets=(PlannedTarget("onnx", "onnx_int4", "ort_cpu", "host", 96_300_000),),
        ram_bytes=3 * 2**30,
        disk_bytes=2**30,
        seconds=75.0,
    )


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch, recipe: str, tmp_path: Path) -> list[Report]:
    """A pipeline that answers with the report in the list (put it there), after its stages."""
    reports: list[Report] = [report()]

    def run(plan: Plan, watcher: Watcher, *_: object) -> Run:
        for stage in plan.stages:
            if not stage.cached:
                watcher.started(stage)(1, 2)
            watcher.finished(StageTime(name=stage.name, seconds=stage.seconds, cached=stage.cached))
        return Run(plan, reports[-1])

    monkeypatch.setattr(pipeline, "plan", lambda *_: a_plan(recipe, tmp_path))
    monkeypatch.setattr(pipeline, "run", run)
    return reports


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lilliput import cli; code = cli.answer(['--help']); "
        f"print(code, [m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "0 []"
    assert all(re.search(rf"│ {command}\b", done.stdout) for command in COMMANDS)


@pytest.mark.parametrize("kind", ["solvers", "exporters", "runtimes", "devices", "boards", "families", "recipes"])
def test_listing_imports_no_framework(kind: str) -> None:
    code = (
        f"import sys; from lilliput import cli; code = cli.answer(['list', {kind!r}]); "
        "heavy = ('torch', 'transformers', 'onnx', 'ai_edge_litert', 'llama_cpp'); "
        "print(code, [m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "0 []"
    assert done.stdout.strip()


def test_what_draws_on_the_terminal_loads_no_framework() -> None:
    code = (
        f"import sys; import lilliput.terminal; heavy = set({HEAVY!r}) - {{'numpy', 'pydantic'}}; "
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_module_runs_and_exits_with_the_code() -> None:
    done = subprocess.run([sys.executable, "-m", "lilliput", "list", "nothing"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "known: boards, devices, exporters, families, grids" in one_line(done.stderr)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answered(capsys, "--version")
    assert code == 0
    assert re.fullmatch(r"lilliput \d+\.\d+\.\d+\n", out)


def test_bare_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = answered(capsys)
    assert code == 2
    assert "Usage: lilliput" in out + err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rnu",), r"no such command 'rnu'.*did you mean 'run'"),
        (("run", "x", "--dryrun"), r"--dryrun.*--dry-run"),
        (("run",), r"missing argument"),
        (("chat", "x", "--max-tokens", "0"), r"--max-tokens"),
        (("chat", "x", "--seed", "one"), r"--seed.*integer"),
        (("list", "solver"), r"unknown kind 'solver': did you mean 'solvers'"),
        (("run", "no-such-recipe"), r"no-such-recipe.*smollm2-135m-everywhere"),
        (("run", "TINY", "--set", "contxt=5"), r"contxt.*context"),
        (("run", "TINY", "--target", "onx"), r"onx.*did you mean 'onnx'"),
        (("inspect", "/nowhere/at/all.gguf"), r"/nowhere/at/all.gguf.*does not exist"),
        (("chat", "/nowhere"), r"/nowhere.*manifest.json.*lilliput run"),
        (("validate", "/nowhere"), r"/nowhere.*manifest.json.*lilliput run"),
        (("compare", "/nowhere", "/nowhere"), r"/nowhere.*report"),
        (("doctor", "no-such-recipe"), r"no-such-recipe"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = answered(capsys, *(recipe if word == "TINY" else word for word in arguments))
    assert (code, out) == (2, "")
    assert re.search(said, one_line(err), re.IGNORECASE)
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RecipeError("my.yaml line 3:\n  wrong"), 2, "my.yaml line 3: wrong"),
        (MissingPackageError("onnxruntime", "onnx", "runtime 'ort_cpu'"), 4, 'pip install "lilliput[onnx]"'),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), 4, "/out/x: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "/out/x"), 4, "/out/x: the disk is read-only"),
        (MemoryError(), 4, "out of memory"),
    ],
)
def test_errors_of_a_run(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    error: Exception,
    code: int,
    said: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "plan", fail)
    seen, out, err = answered(capsys, "run", recipe)
    assert (seen, out) == (code, "")
    assert said in one_line(err)


def test_a_defect_is_one_line_and_a_saved_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recipe: str, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(pipeline, "plan", lambda *_: 1 / 0)
    code, out, err = answered(capsys, "run", recipe)
    assert (code, out) == (70, "")
    saved = re.search(r"ZeroDivisionError: division by zero.*traceback is in (\S+)", one_line(err))
    assert saved
    assert "ZeroDivisionError" in Path(saved[1]).read_text()


def test_interrupt_is_130_and_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "plan", interrupt)
    assert answered(capsys, "run", recipe) == (
        130, "", "lilliput: interrupted; finished stages are kept\n",
    )  # fmt: skip


def test_closed_pipe_says_nothing() -> None:
    command = f"{sys.executable} -m lilliput list recipes | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")  # 0 where all was written before the reader went


@pytest.mark.parametrize(
    ("made", "code"), [(report(passing()), 0), (report(failing()), 1), (report(inconclusive()), 3), (report(), 1)]
)
def test_run_exits_with_the_verdict(
    capsys: pytest.CaptureFixture[str], finished: list[Report], recipe: str, made: Report, code: int
) -> None:
    finished.append(made)
    seen, out, err = answered(capsys, "run", recipe)
    assert seen == code
    assert made.verdict in out
    assert err.splitlines() == [
        "[1/3] source: from the store",
        "[2/3] export:onnx: 1 min 15 s",
        "[3/3] report: 0.0 s",
    ]


def test_run_names_gate_and_rung_of_a_failure(
    capsys: pytest.CaptureFixture[str], finished: list[Report], recipe: str
) -> None:
    _, out, _ = answered(capsys, "run", recipe)
    text = " ".join(out.split())
    assert "litert mean_kld is 0.242 nats, wanted ≤ 0.15 nats; the loss is at rung shipped (+0.139 nats)" in text
    for figure in ("118 MB", "79.8 tok/s", "402 tok/s", "318 ms", "412 MB", "0.242", "86.1 %", "22.1 (float 20.3)"):
        assert figure in text


def test_json_prints_only_the_report(capsys: pytest.CaptureFixture[str], finished: list[Report], recipe: str) -> None:
    code, out, _ = answered(capsys, "run", recipe, "--json")
    assert code == 1
    assert Report.model_validate_json(out) == report()


def test_dry_run_shows_the_plan_and_does_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recipe: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(pipeline, "plan", lambda *_: a_plan(recipe, tmp_path))
    monkeypatch.setattr(pipeline, "run", lambda *_: pytest.fail("a dry run must not run"))
    code, out, err = answered(capsys, "run", recipe, "--dry-run")
    assert (code, err) == (0, "")
    assert re.search(r"source\s+cached", out)
    assert re.search(r"export:onnx\s+to do\s+about 1 min 15 s", out)
    assert "about 96.3 MB" in out
    assert "memory about 3.00 GiB" in " ".join(out.split())
    assert not list(tmp_path.iterdir())


def test_dry_run_as_json(capsys: pytest.CaptureFixture[str], finished: list[Report], recipe: str) -> None:
    code, out, _ = answered(capsys, "run", recipe, "--dry-run", "--json")
    facts = json.loads(out)
    assert code == 0
    assert [stage["name"] for stage in facts["stages"]] == ["source", "export:onnx", "report"]
    assert facts["ram_bytes"] == 3 * 2**30


def test_run_hands_on_what_was_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    asked: list[object] = []

    def plan(*arguments: object) -> Plan:
        asked.extend(arguments)
        raise RecipeError("enough")

    monkeypatch.setattr(pipeline, "plan", plan)
    options = "-t onnx --target gguf --model m.gguf --set context=768 --out there --fresh"
    _, _, err = answered(capsys, "run", recipe, *options.split())
    assert one_line(err) == "enough"
    loaded, *rest = asked
    assert rest == [Path("there"), ["onnx", "gguf"], "m.gguf", True]
    assert loaded == load(recipe, ["context=768"])


def test_validate_exits_with_the_verdict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "validate", lambda folder, progress: failing())
    code, out, _ = answered(capsys, "validate", "somewhere")
    assert code == 1
    assert "FAIL litert" in out


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answered(capsys, "schema")
    assert code == 0
    assert "$defs" in json.loads(out)


def test_list_says_what_each_is(capsys: pytest.CaptureFixture[str]) -> None:
    _, solvers, _ = answered(capsys, "list", "solvers")
    assert re.search(r"^gptq\s+\S", solvers, re.MULTILINE)
    assert not re.search(r"^(samples|statistics|base|generation)\b", solvers, re.MULTILINE)
    _, exporters, _ = answered(capsys, "list", "exporters")
    assert re.findall(r"^(\w+)\s+\S", exporters, re.MULTILINE) == ["gguf_llamacpp", "litert_int8", "onnx_int4"]
    _, families, _ = answered(capsys, "list", "families", "--json")
    assert {"gemma3", "gpt2", "llama"} <= {entry["name"] for entry in json.loads(families)}


def test_progress_counts_a_stage_that_is_done_again(
    capsys: pytest.CaptureFixture[str], recipe: str, tmp_path: Path
) -> None:
    from lilliput.terminal_progress import StageDisplay

    plan = replace(a_plan(recipe, tmp_path), stages=a_plan(recipe, tmp_path).stages[:2])
    with StageDisplay(plan.stages) as display:
        display.finished(StageTime(name="source", seconds=0, cached=True))
        display.finished(StageTime(name="source", seconds=2, cached=False))
    assert capsys.readouterr().err.splitlines() == [
        "[1/2] source: from the store",
        "[again] source: 2.0 s, about 1 min 15 s left",
    ]


def test_remaining_time_follows_the_pace_of_this_machine(
    capsys: pytest.CaptureFixture[str], recipe: str, tmp_path: Path
) -> None:
    from lilliput.terminal_progress import StageDisplay

    first = PlannedStage("source", "", "ab" * 32, cached=False, seconds=10.0)
    plan = replace(a_plan(recipe, tmp_path), stages=(first, *a_plan(recipe, tmp_path).stages[1:]))
    with StageDisplay(plan.stages) as display:
        display.finished(StageTime(name="source", seconds=20, cached=False))
    assert capsys.readouterr().err == "[1/3] source: 20 s, about 2 min 30 s left\n"
