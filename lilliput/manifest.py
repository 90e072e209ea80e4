"""The manifest beside each artifact: what it was made from, by what, and everything that was measured of it.

`manifest.json` lies in the artifact's folder and lists every other file there with size and sha256. The recipe is
in it whole, with one target, so that the artifact can be made or proven again from the manifest alone.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from lilliput.artifact import Artifact, sha256
from lilliput.errors import ArtifactError
from lilliput.recipe_schema import Recipe
from lilliput.report import SourceFacts, TensorClass, TextFacts
from lilliput.results import Host, Record, TargetResult

NAME = "manifest.json"


class File(Record):
    size_bytes: int
    sha256: str


class ArtifactFacts(Record):
    """lilliput.artifact.Artifact without its folder: that is where the manifest lies."""

    exporter: str
    main_file: str
    context: int
    prefill: int


class Manifest(Record):
    """One artifact. `stages` are the store's keys of the results that it came from: equal keys, equal inputs."""

    format: int = 1
    name: str  # the model's
    target: str
    artifact: ArtifactFacts
    files: dict[str, File]  # by path below the folder
    recipe: Recipe
    recipe_sha256: str
    source: SourceFacts
    calibration: TextFacts | None
    evaluation: TextFacts
    tensors: tuple[TensorClass, ...]
    seed: int
    stages: dict[str, str]
    versions: dict[str, str]
    host: Host
    result: TargetResult
    provenance: dict[str, str] = Field(default_factory=dict)  # what the model file was told of its making
    is_embedded: bool = False  # whether the model file holds it
    created: str  # UTC, ISO 8601: when it was measured

    def open(self, folder: Path) -> Artifact:
        """The artifact, where its folder is."""
        facts = self.artifact
        return Artifact(folder, facts.exporter, facts.main_file, facts.context, facts.prefill)


def files_of(folder: Path) -> dict[str, File]:
    """Every file below a folder but the manifest, with size and sha256."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / NAME)
    return {p.relative_to(folder).as_posix(): File(size_bytes=p.stat().st_size, sha256=sha256(p)) for p in paths}


def write(manifest: Manifest, folder: Path) -> None:
    """Write `manifest` into the artifact's folder, as a whole or not at all."""
    temporary = folder / f".{NAME}.tmp"
    temporary.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / NAME)


def read(folder: Path) -> Manifest:
    """The manifest of an artifact's folder. Raises ArtifactError where there is none of this version."""
    path = folder / NAME
    if not path.is_file():
        raise ArtifactError(
            f"{folder}: has no {NAME}, wanted the folder of one artifact: DIR/<target> of `lilliput run --out DIR`"
        )
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        detail = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, detail["loc"])) or "the file"
        raise ArtifactError(f"{path}: not a manifest of this version ({where}: {detail['msg']}): run again") from error


def changes(manifest: Manifest, folder: Path) -> list[str]:
    """What is not as the manifest lists it, by file name; empty where all is."""
    seen = files_of(folder)
    missing = [f"{name} is missing" for name in manifest.files if name not in seen]
    changed = [f"{name} has changed" for name, file in manifest.files.items() if name in seen and seen[name] != file]
    return [*missing, *changed, *(f"{name} is foreign" for name in seen if name not in manifest.files)]


def opened(folder: Path) -> Manifest:
    """The manifest, where all files are as it lists them. Raises ArtifactError naming those that are not."""
    manifest = read(folder)
    if found := changes(manifest, folder):
        raise ArtifactError(f"{folder}: {'; '.join(found[:3])}; wanted the files that {NAME} lists: run again")
    return manifest
