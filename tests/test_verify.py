"""verify: what a file says of its making, what is found that is not so, and the same bytes from a new solve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import gguf
import onnxruntime
import pytest
import tiny_recipe
from tiny_models import tiny_llama

from lilliput import cli, embedded, manifest, pipeline
from lilliput.errors import ArtifactError, SourceError
from lilliput.report import StageTime
from lilliput.run import PlannedStage, Quiet, Watcher
from lilliput.verify import Verification, verify_all

TARGETS = ("onnx", "litert", "gguf")
MAIN = {"onnx": "model.onnx", "litert": "model.tflite", "gguf": "model.gguf"}


@dataclass(frozen=True)
class Made:
    model: Path
    out: Path

    def copy(self, target: str, folder: Path) -> Path:
        return Path(shutil.copytree(self.out / target, folder / target))


def quiet(stages: Sequence[PlannedStage]) -> nullcontext[Watcher]:
    return nullcontext(Quiet())


def look(folder: Path, *, rebuild: bool = False, model: str | None = None) -> Verification:
    (found,) = verify_all([folder], rebuild=rebuild, model=model, watch=quiet)
    return found


def edit(folder: Path, **values: object) -> None:
    """Change values of a manifest, by name."""
    path = folder / manifest.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One whole run of all three targets."""
    folder = tmp_path_factory.mktemp("verify")
    model = tiny_llama(folder / "llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LILLIPUT_CACHE", str(folder / "cache"))
        pipeline.run(pipeline.plan(tiny_recipe.recipe(folder, model), folder / "out"))
    return Made(model, folder / "out")


def test_each_file_says_what_it_was_made_from(made: Made) -> None:
    """As the formats' own readers see it."""
    import torch

    session = onnxruntime.InferenceSession(made.out / "onnx" / MAIN["onnx"], providers=["CPUExecutionProvider"])
    field = gguf.GGUFReader(made.out / "gguf" / MAIN["gguf"]).get_field("lilliput.provenance")
    assert field is not None
    found: Mapping[str, dict[str, str]] = {
        "onnx": json.loads(session.get_modelmeta().custom_metadata_map["lilliput.provenance"]),
        "gguf": json.loads(field.contents()),
        "litert": embedded.provenance(made.out / "litert" / MAIN["litert"]) or {},
    }
    for target in TARGETS:
        said, described = found[target], manifest.read(made.out / target)
        assert said == described.provenance
        assert said["source_sha256"] == described.source.sha256
        assert described.calibration is not None
        assert said["calibration_sha256"] == described.calibration.sha256
        assert said["source"] == "llama", "the folder's name, not where it lies"
        assert said["rule layers.*"] == "int4-b32 by gptq"
        assert json.loads(said["tools"])["torch"] == torch.__version__
        recipe = json.loads(said["recipe"])
        assert (recipe["seed"], recipe["context"], recipe["calibration"]["count"]) == (3, 64, 4)
        assert "gates" not in recipe
        assert recipe["exporter"] == described.artifact.exporter
    assert len({said["solved_sha256"] for said in found.values()}) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_an_untouched_folder_is_verified_wherever_it_lies(made: Made, tmp_path: Path, target: str) -> None:
    folder = made.copy(target, tmp_path)
    found = look(folder)
    assert found.differences == found.notes == ()
    assert found.embedded == len(manifest.read(folder).provenance) > 8
    assert cli.answer(["verify", str(folder)]) == 0


@pytest.mark.parametrize("target", TARGETS)
def test_files_that_changed_are_named(made: Made, tmp_path: Path, target: str) -> None:
    folder = made.copy(target, tmp_path)
    content = (folder / MAIN[target]).read_bytes()
    at = len(content) // 2 if target == "onnx" else len(content) - 1  # among the weights
    (folder / MAIN[target]).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    (folder / "stranger").write_text("x")
    assert look(folder).differences == (f"{MAIN[target]} has changed", "stranger is foreign")
    (folder / MAIN[target]).write_bytes(content[:40])
    cut = look(folder)
    assert f"{MAIN[target]} has changed" in cut.differences
    assert any("it is damaged" in line for line in cut.differences)
    (folder / MAIN[target]).unlink()
    assert f"{MAIN[target]} is missing" in look(folder).differences
    assert cli.answer(["verify", str(folder)]) == 1


def test_a_manifest_of_another_file_is_found(made: Made, tmp_path: Path) -> None:
    folder = made.copy("gguf", tmp_path)
    described = manifest.read(folder)
    edit(folder, provenance=described.provenance | {"license": "other", "extra": "1"})
    assert look(folder).differences == (
        "model.gguf embeds another extra: nothing, the manifest says '1'",
        "model.gguf embeds another license: 'unknown', the manifest says 'other'",
    )


def test_an_edited_manifest_contradicts_itself(made: Made, tmp_path: Path) -> None:
    folder = made.copy("gguf", tmp_path)
    described = json.loads((folder / manifest.NAME).read_text())
    edit(folder, source=described["source"] | {"sha256": "0" * 64}, recipe=described["recipe"] | {"seed": 4})
    assert look(folder).differences == (
        "manifest.json: source_sha256 is not that of its provenance",
        "manifest.json: recipe is not that of its provenance",
    )


def test_a_file_that_lost_its_provenance_is_found(made: Made, tmp_path: Path) -> None:
    """The hashes are made to fit, as one would who hides something."""
    import onnx

    folder = made.copy("onnx", tmp_path)
    model = onnx.load(folder / "model.onnx")
    kept = [(entry.key, entry.value) for entry in model.metadata_props if entry.key != "lilliput.provenance"]
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(kept))
    onnx.save(model, folder / "model.onnx")
    files = {name: file.model_dump() for name, file in manifest.files_of(folder).items()}
    edit(folder, files=files)
    found = look(folder)
    assert "model.onnx embeds no provenance, the manifest says that it does" in found.differences
    edit(folder, is_embedded=False)
    assert any("exporter 'onnx_int4' writes none" in note for note in look(folder).notes)


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no manifest.json"):
        look(tmp_path)
    assert cli.answer(["verify", str(tmp_path)]) == 2


def test_a_rebuild_gives_the_same_bytes_and_solves_once_for_all(made: Made) -> None:
    done: list[str] = []

    class Listening(Quiet):
        def finished(self, stage: StageTime) -> None:
            done.extend([] if stage.cached else [stage.name])

    folders = [made.out / target for target in TARGETS]
    for folder, found in zip(
        folders, verify_all(folders, rebuild=True, watch=lambda _: nullcontext(Listening())), strict=True
    ):
        assert found.differences == ()
        assert set(found.rebuilt) == set(manifest.read(folder).files)
        assert len(found.rebuilt) == found.files
    common = ["source", "samples", "statistics", "quantize:int4-b32+int8-channel", "trace"]
    assert sorted(done) == sorted([*common, *(f"export:{target}" for target in TARGETS)])


def test_a_rebuild_takes_the_source_from_where_it_lies_now(made: Made, tmp_path: Path) -> None:
    folder = made.copy("gguf", tmp_path)
    described = json.loads((folder / manifest.NAME).read_text())
    recipe = described["recipe"] | {"model": described["recipe"]["model"] | {"source": str(tmp_path / "gone")}}
    edit(folder, recipe=recipe)
    with pytest.raises(SourceError, match=r"a rebuild needs the float model: .*gone.*by --model"):
        look(folder, rebuild=True)
    assert cli.answer(["verify", str(folder), "--rebuild"]) == 2
    moved = shutil.copytree(made.model, tmp_path / "elsewhere" / "llama")
    assert look(folder, rebuild=True, model=str(moved)).rebuilt == ("model.gguf",)
    other = tiny_llama(tmp_path / "other", seed=9)
    with pytest.raises(SourceError, match=r"its sha256 is .*, the artifact was made from .*by --model"):
        look(folder, rebuild=True, model=str(other))


def test_a_rebuild_that_differs_says_why(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    from lilliput import provenance

    seen = provenance.version
    monkeypatch.setattr(provenance, "version", lambda name: "0.0.1" if name == "numpy" else seen(name))
    found = look(made.out / "gguf", rebuild=True)
    assert found.differences == ("model.gguf comes out with other bytes",)
    assert found.notes[0] == "the weights come out the same: what differs is around them"
    assert found.notes[1].startswith("other versions: numpy ")
    assert found.exit_code == 1
