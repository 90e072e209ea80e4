"""The pipeline on a tiny random Llama and the real runtimes: what is done, what is not done again, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_recipe

from lilliput import manifest, report
from lilliput.results import TargetResult

TARGETS = ("onnx", "litert", "gguf")
SOLVED = ["trace", "reference", "statistics", "quantize:int4-b32+int8-channel", "dequantized:int4-b32+int8-channel"]
COMMON = ["source", "evaluation", "samples", *SOLVED]  # what each artifact comes from
SHARED = ["source", "evaluation", "samples", "coverage", *SOLVED]
STAGES = [*SHARED, *(f"{kind}:{name}" for name in TARGETS for kind in ("export", "validate")), "report"]


@dataclass(frozen=True)
class Events:
    """What the jobs of one driver did."""

    lines: list[list[Any]]

    def of(self, job: int, event: str) -> list[Any]:
        return [what for number, kind, what in self.lines if number == job and kind == event]

    def exit_code(self, job: int) -> int:
        return int(self.of(job, "exit")[0])


def drive(folder: Path, jobs: list[dict[str, Any]]) -> Events:
    """Run jobs in the driver's process; its errors are shown where it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs_path, events_path = folder / "jobs.json", folder / "events.jsonl"
    events_path.unlink(missing_ok=True)
    jobs_path.write_text(json.dumps(jobs))
    driver = Path(__file__).with_name("run_driver.py")
    done = subprocess.run([sys.executable, driver, jobs_path, events_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    events = Events([json.loads(line) for line in events_path.read_text().splitlines()])
    assert 70 not in [events.exit_code(number) for number in range(len(jobs))], done.stderr
    return events


def artifact_hashes(out: Path) -> dict[str, str]:
    """The sha256 of every artifact file by target and name."""
    return {
        f"{name}/{file}": facts.sha256
        for name in TARGETS
        if (out / name).is_dir()
        for file, facts in manifest.read(out / name).files.items()
    }


@dataclass(frozen=True)
class Undisturbed:
    recipe: Path
    out: Path
    cache: Path
    events: Events
    job: dict[str, Any]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """One whole run of all three targets."""
    from tiny_models import tiny_llama

    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = tiny_recipe.write(folder, tiny_llama(folder / "llama"))
    job = {"recipe": str(recipe), "out": str(folder / "out"), "cache": str(folder / "cache")}
    events = drive(folder, [job])
    assert events.exit_code(0) in (0, 3), events.lines
    return Undisturbed(recipe, folder / "out", folder / "cache", events, job)


def test_stages_are_done_in_order_and_once(undisturbed: Undisturbed) -> None:
    assert undisturbed.events.of(0, "built") == STAGES
    assert undisturbed.events.of(0, "cached") == []


def test_each_artifact_has_a_manifest_that_holds_its_files_and_figures(undisturbed: Undisturbed) -> None:
    made = report.load(undisturbed.out)
    assert [target.name for target in made.targets] == list(TARGETS)
    for target in made.targets:
        found = manifest.opened(undisturbed.out / target.name)
        assert found.result == target
        assert found.files[found.artifact.main_file].sha256 == target.artifact.sha256
        assert (found.seed, found.calibration, found.evaluation) == (3, made.calibration, made.evaluation)
        assert [t.name for t in found.recipe.targets] == [target.name]
        assert set(COMMON) | {f"export:{target.name}", f"validate:{target.name}"} == set(found.stages)
        assert {"lilliput", "torch"} < set(found.versions)
        assert [rung.rung for rung in target.ladder] == ["float", "dequantized", "read_back", "exact", "shipped"]


def test_all_three_files_lose_the_same_and_the_converters_nothing(undisturbed: Undisturbed) -> None:
    targets = report.load(undisturbed.out).targets
    assert len({t.ladder[1].mean_kld for t in targets}) == 1
    for target in targets:
        gates = {gate.name: gate.verdict for gate in target.gates}
        assert gates["read_back"] == "PASS", target
        assert gates["exact_step_kld"] == "PASS", target


def test_a_chain_of_solvers_is_exact_in_every_format_and_its_steps_are_reported(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    chained = {"out": str(tmp_path / "out"), "overrides": ["quantize.0.solver=[smoothquant, awq, gptq]"]}
    events = drive(tmp_path, [undisturbed.job | chained])
    assert {"source", "samples", "statistics", "reference"} <= set(events.of(0, "cached"))
    made = report.load(tmp_path / "out")
    assert [step.step for step in made.steps] == ["rtn", "smoothquant", "awq", "gptq"]
    assert made.steps[-1].relative_error < made.steps[0].relative_error
    for target in made.targets:
        gates = {gate.name: gate.verdict for gate in target.gates}
        assert gates["read_back"] == gates["exact_step_kld"] == "PASS", target
    assert artifact_hashes(tmp_path / "out") != artifact_hashes(undisturbed.out)


def test_nothing_changed_is_answered_from_the_store(undisturbed: Undisturbed, tmp_path: Path) -> None:
    before = artifact_hashes(undisturbed.out)
    manifests = [(undisturbed.out / name / manifest.NAME).read_bytes() for name in TARGETS]
    events = drive(tmp_path, [undisturbed.job])
    assert events.of(0, "cached") == STAGES[:-1]
    assert events.of(0, "built") == ["report"]
    assert artifact_hashes(undisturbed.out) == before
    assert [(undisturbed.out / name / manifest.NAME).read_bytes() for name in TARGETS] == manifests


CACHED_RUN = """
import sys
from pathlib import Path
from lilliput import pipeline
from lilliput.recipe import load
plan = pipeline.plan(load(sys.argv[1]), Path(sys.argv[2]))
assert plan.cached and plan.ram_bytes == 0 and plan.disk_bytes == 0
pipeline.run(plan)
print(sorted({"torch", "transformers", "onnx", "onnxruntime", "tensorflow", "llama_cpp"} & set(sys.modules)))
"""


def test_a_run_from_the_store_imports_nothing_heavy(undisturbed: Undisturbed) -> None:
    environment = os.environ | {"LILLIPUT_CACHE": str(undisturbed.cache)}
    command = [sys.executable, "-c", CACHED_RUN, str(undisturbed.recipe), str(undisturbed.out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_kill_9_anywhere_repeats_no_finished_stage_and_changes_no_byte(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Killed at the start of each stage and in its middle, one process after the other, on one store."""
    job = undisturbed.job | {"out": str(tmp_path / "out"), "cache": str(tmp_path / "cache")}
    kills = [[name, when] for name in STAGES for when in ("start", "middle") if (name, when) != ("report", "middle")]
    events = drive(tmp_path, [*(job | {"kill": kill} for kill in kills), job])
    assert [events.exit_code(n) for n in range(len(kills))] == [-9] * len(kills)
    assert events.exit_code(len(kills)) in (0, 3)
    built = [what for _, kind, what in events.lines if kind == "built"]
    assert built == STAGES, "each stage was finished once"
    for name in STAGES[:-1]:
        finished = next(i for i, (_, kind, what) in enumerate(events.lines) if (kind, what) == ("built", name))
        assert [kind for _, kind, what in events.lines[finished + 1 :] if what == name and kind == "started"] == []
    assert artifact_hashes(tmp_path / "out") == artifact_hashes(undisturbed.out)
    assert list((tmp_path / "cache").glob("*/*.tmp")) == []


def test_fresh_does_all_again_and_gives_the_same_bytes(undisturbed: Undisturbed, tmp_path: Path) -> None:
    events = drive(tmp_path, [undisturbed.job | {"out": str(tmp_path / "out"), "fresh": True, "targets": ["onnx"]}])
    assert events.of(0, "built") == [*SHARED, "export:onnx", "validate:onnx", "report"]
    expected = {name: value for name, value in artifact_hashes(undisturbed.out).items() if name.startswith("onnx/")}
    assert artifact_hashes(tmp_path / "out") == expected


def test_what_changes_decides_what_is_done(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Gates: nothing. The evaluation: what measures. The context: what has a cache. One target's grid: its own."""
    job = undisturbed.job | {"targets": ["gguf"]}
    changes = [
        ["gates=[{metric: mean_kld, max: 1.0e-9}]"],
        ["evaluation.count=3"],
        ["context=48"],
        ["targets.gguf.quantize=[{match: '*', grid: int8-b32}]"],
    ]
    jobs = [job | {"out": str(tmp_path / str(n)), "overrides": change} for n, change in enumerate(changes)]
    events = drive(tmp_path, jobs)
    measures = ["evaluation", "coverage", "reference", "dequantized:int4-b32+int8-channel", "validate:gguf", "report"]
    own = ["quantize:int8-b32", "dequantized:int8-b32", "export:gguf", "validate:gguf", "report"]
    assert events.of(0, "built") == ["report"]
    assert events.exit_code(0) == 1, "the new limit is missed"
    assert events.of(1, "built") == measures
    assert events.of(2, "built") == ["trace", "export:gguf", "validate:gguf", "report"]
    assert events.of(3, "built") == own


def test_calibrating_on_the_text_that_judges_is_refused_before_long_work(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    from tiny_models import TEXT

    path = tmp_path / "text.txt"
    path.write_text(TEXT * 8)
    sizes = ["calibration.count=16", "evaluation.count=8"]
    job = undisturbed.job | {"out": str(tmp_path / "out"), "targets": ["gguf"]}
    texts = [
        f"evaluation.text={path}",
        f"calibration.samples=[{{samples: {path}, count: 14}}, {{samples: self, count: 2}}]",
    ]
    events = drive(tmp_path, [job | {"overrides": [*sizes, *texts]}])
    assert events.exit_code(0) == 2
    assert f"share text with the evaluation text '{path}'" in events.of(0, "error")[0]
    assert events.of(0, "built") == ["evaluation", "samples"]


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_result_is_made_anew_when_it_is_needed(undisturbed: Undisturbed, tmp_path: Path, damage: str) -> None:
    """The checkpoint loses bytes or has some changed; the validation that reads it is asked for again."""
    key = manifest.read(undisturbed.out / "onnx").stages["quantize:int4-b32+int8-channel"]
    codes = undisturbed.cache / "quantize" / key / "codes.safetensors"
    content = codes.read_bytes()
    codes.write_bytes(content[:-8] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    threads = {"truncated": 1, "changed": 2}[damage]
    job = undisturbed.job | {"out": str(tmp_path / "out"), "targets": ["onnx"]}
    events = drive(tmp_path, [job | {"overrides": [f"targets.onnx.threads={threads}"]}])
    assert "quantize:int4-b32+int8-channel" in events.of(0, "built")
    assert "export:onnx" not in events.of(0, "built")
    assert codes.read_bytes() == content


def prove_again(undisturbed: Undisturbed, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lilliput", "validate", str(folder), "--json"]
    environment = os.environ | {"LILLIPUT_CACHE": str(undisturbed.cache)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_an_artifact_is_proven_again_wherever_it_lies(undisturbed: Undisturbed, tmp_path: Path) -> None:
    folder = shutil.copytree(undisturbed.out / "onnx", tmp_path / "moved")
    done = prove_again(undisturbed, folder)
    assert done.returncode in (0, 3), done.stderr
    again, first = TargetResult.model_validate_json(done.stdout), manifest.read(folder).result
    assert (again.artifact, again.accuracy) == (first.artifact, first.accuracy)
    assert [gate.name for gate in again.gates] == [gate.name for gate in first.gates]
    assert manifest.changes(manifest.read(folder), folder) == [], "nothing is written beside the artifact"


def test_a_changed_artifact_is_not_proven(undisturbed: Undisturbed, tmp_path: Path) -> None:
    folder = shutil.copytree(undisturbed.out / "gguf", tmp_path / "changed")
    main_file = folder / manifest.read(folder).artifact.main_file
    main_file.write_bytes(main_file.read_bytes()[:-1] + b"\x00\x01")
    done = prove_again(undisturbed, folder)
    assert done.returncode == 2
    assert f"{main_file.name} has changed" in done.stderr
