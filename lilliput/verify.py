"""Verify an artifact's folder: every byte against its manifest, and, where asked, the manifest against a new solve.

    1. every file's sha256 is the one that manifest.json lists, none is missing, none is foreign
    2. what the model file says of its making (lilliput.embedded) is what the manifest says: so a manifest that
       belongs to another file is found, and so is one that was edited
    3. rebuild: the stages that lead to the file are done again, in a store of their own, and the bytes compared

A rebuild needs what the artifact was made from: the same source (by sha256), texts, code and packages, and a
processor that rounds alike. Where bytes differ, all of these that changed are named. A training that ended by the clock
does not repeat.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from lilliput import embedded, manifest, provenance
from lilliput import graph as graphs
from lilliput.errors import ArtifactError, MissingError, MissingPackageError, SourceError
from lilliput.estimate import estimate
from lilliput.graph import Graph, Stage, TargetStages
from lilliput.manifest import Manifest
from lilliput.pipeline import Work
from lilliput.planning import check_target, config_of, source_sha256
from lilliput.recipe_schema import Recipe
from lilliput.results import Record
from lilliput.run import PlannedStage, Watcher
from lilliput.stages import export as exporting
from lilliput.store import Store

Watch = Callable[[tuple[PlannedStage, ...]], AbstractContextManager[Watcher]]
SHOWN = 160  # characters of a value that differs


class Verification(Record):
    """`differences` are what is not as the manifest says; `notes` what could not be compared, or may explain them."""

    folder: str
    target: str
    files: int  # that were hashed
    embedded: int | None  # entries that the model file holds; None: its format or exporter embeds none
    rebuilt: tuple[str, ...]  # files that were made again and have the same bytes
    differences: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return 1 if self.differences else 0


@dataclass(frozen=True)
class Rebuild:
    """Where stages are done again, who is told, and where the source lies now (None: where the recipe says)."""

    store: Store
    watch: Watch
    model: str | None = None


def verify_all(
    folders: Sequence[Path], *, rebuild: bool = False, model: str | None = None, watch: Watch
) -> list[Verification]:
    """Each folder by itself; what the files of one solve have in common is done again once.

    Raises ArtifactError without a manifest; for a rebuild SourceError where the source is gone or another one.
    """
    with tempfile.TemporaryDirectory(prefix="lilliput-verify-") as scratch:
        again = Rebuild(Store(Path(scratch)), watch, model) if rebuild else None
        return [verify(folder, again) for folder in folders]


def verify(folder: Path, rebuild: Rebuild | None) -> Verification:
    """What differs."""
    described = manifest.read(folder)
    differences, notes = manifest.changes(described, folder), list[str]()
    held = _embedded(described, folder, differences, notes)
    rebuilt: tuple[str, ...] = ()
    if rebuild:
        rebuilt = _rebuild(described, rebuild, differences, notes)
    return Verification(
        folder=str(folder),
        target=described.target,
        files=len(described.files),
        embedded=None if held is None else len(held),
        rebuilt=rebuilt,
        differences=tuple(differences),
        notes=tuple(notes),
    )


def _embedded(
    described: Manifest, folder: Path, differences: list[str], notes: list[str]
) -> dict[str, str] | None:  # fmt: skip
    """What the model file embeds, held against the manifest."""
    path = folder / described.artifact.main_file
    differences += [f"{manifest.NAME}: {line}" for line in contradictions(described)]
    if not path.is_file():
        return None
    try:
        found = embedded.provenance(path)
    except ArtifactError as error:
        differences.append(str(error))
        return None
    if found is None and described.is_embedded:
        differences.append(f"{path.name} embeds no provenance, the manifest says that it does")
    elif found is None:
        notes.append(f"{path.name} embeds no provenance: exporter {described.artifact.exporter!r} writes none")
    else:
        differences += [f"{path.name} embeds another {line}" for line in changed(described.provenance, found)]
    return found


def changed(told: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    """A line for each entry that is not the same in both."""
    for key in sorted({*told, *found}):
        if told.get(key) != found.get(key):
            yield f"{key}: {_short(found.get(key))}, the manifest says {_short(told.get(key))}"


def _short(value: str | None) -> str:
    if value is None:
        return "nothing"
    return repr(value if len(value) <= SHOWN else f"{value[:SHOWN]}…")


def contradictions(described: Manifest) -> Iterator[str]:
    """Where a manifest's own parts disagree with what it says that the file was told. Older ones say nothing of it."""
    told, (target,) = described.provenance, described.recipe.targets
    if not told:
        return
    calibrated = "samples" in described.stages
    wanted = {
        "source_sha256": described.source.sha256,
        provenance.RECIPE: provenance.solve_part(described.recipe, target, calibrated=calibrated),
    }
    if "calibration_sha256" in told:
        wanted["calibration_sha256"] = described.calibration.sha256 if described.calibration else ""
    yield from (f"{key} is not that of its provenance" for key in wanted if told.get(key) != wanted[key])
    main = described.files.get(described.artifact.main_file)
    if main is None or main.sha256 != described.result.artifact.sha256:
        yield f"the figures are those of another {described.artifact.main_file}, by its sha256"


def _rebuild(described: Manifest, rebuild: Rebuild, differences: list[str], notes: list[str]) -> tuple[str, ...]:
    """The files that come out the same."""
    recipe = _recipe(described, rebuild.model)
    graph = graphs.build(recipe, _source_sha256(recipe), host="")
    (stages,) = graph.targets
    check_target(stages, config_of(recipe))
    order = tuple(stage for stage in graph.order if stage in set(_ancestry(stages.export)))
    planned = tuple(
        PlannedStage(s.kind, s.subject, s.key, rebuild.store.find(s.kind, s.key) is not None, 0.0) for s in order
    )
    _check_machine(recipe, [stage for stage in planned if not stage.cached], rebuild.store.root)
    with rebuild.watch(planned) as watcher:
        work = Work(rebuild.store, watcher, fresh=False)
        _check_source(described, work, graph)
        made = work.verified(stages.export)
    again, told = manifest.files_of(made / exporting.FILES), exporting.provenance_in(made).told
    same = tuple(name for name, file in described.files.items() if again.get(name) == file)
    other = [f"{name} comes out with other bytes" for name in described.files if name in again and name not in same]
    other += [f"{name} does not come out" for name in described.files if name not in again]
    other += [f"{name} comes out too" for name in again if name not in described.files]
    differences += other
    if other:
        notes += _explanations(described, stages, told)
    return same


def _recipe(described: Manifest, model: str | None) -> Recipe:
    """The manifest's, with the artifact's name fixed where the source lies elsewhere now."""
    spec = described.recipe.model
    if model is not None:
        spec = spec.model_copy(update={"source": model, "name": described.name})
    return described.recipe.model_copy(update={"model": spec})


def _source_sha256(recipe: Recipe) -> str:
    try:
        return source_sha256(recipe.model)
    except MissingPackageError:
        raise
    except (SourceError, MissingError) as error:
        raise type(error)(f"a rebuild needs the float model: {error}; say where it lies now by --model") from error


def _check_source(described: Manifest, work: Work, graph: Graph) -> None:
    """The source's stage is quick; what follows is not."""
    found = json.loads((work.folder(graph.source) / "source.json").read_text(encoding="utf-8"))["sha256"]
    if found != described.source.sha256:
        raise SourceError(
            f"{graph.recipe.model.source}: its sha256 is {found}, the artifact was made from "
            f"{described.source.sha256}: give the same source by --model"
        )


def _ancestry(stage: Stage) -> list[Stage]:
    return [s for needed in stage.inputs for s in _ancestry(needed)] + [stage]


def _check_machine(recipe: Recipe, left: Sequence[PlannedStage], scratch: Path) -> None:
    from targets.machine import check_disk, check_memory

    found = estimate(recipe, config_of(recipe))
    check_disk(scratch, sum(found.disk_bytes.get(stage.kind, 0) for stage in left), "a rebuild (TMPDIR)")
    check_memory(found.ram_bytes, "a rebuild (estimate)")


def _explanations(described: Manifest, stages: TargetStages, told: Mapping[str, str]) -> Iterator[str]:
    """What is not as it was, of all that bytes depend on."""
    from targets import machine

    if told.get(provenance.SOLVED) == described.provenance.get(provenance.SOLVED):
        yield "the weights come out the same: what differs is around them"
    before = json.loads(described.provenance.get(provenance.TOOLS, "{}"))
    now = json.loads(told[provenance.TOOLS])
    moved = [
        f"{n} {before.get(n, 'none')} → {now.get(n, 'none')}" for n in {**before, **now} if before.get(n) != now.get(n)
    ]
    if moved:
        yield f"other versions: {', '.join(moved)}"
    if described.stages.get(stages.export.name) != stages.export.key and not moved:
        yield "Lilliput's code, or a text that the recipe names, is not what it was"
    here = machine.describe("host")
    if described.host.device == "host" and (here.cpu, here.cores, here.isa) != (
        described.host.cpu, described.host.cores, described.host.isa
    ):  # fmt: skip
        yield f"another machine: {described.host.cpu}, {described.host.cores} cores → {here.cpu}, {here.cores} cores"
    training = described.recipe.recover_of(described.recipe.targets[0])
    if training is not None and training.minutes is not None:
        yield f"its training ended after {training.minutes:g} minutes, by the clock: it does not repeat (give steps)"
