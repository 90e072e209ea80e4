"""Our files, and what all files are held against, made as a recipe's run makes them: by the stages of the pipeline.

The recipe is benchmarks/quality.yaml, or another that is given. Its stages up to `export` are done, the validation is
left out: the benchmark scores our files and the peers' in one way. What is in the store is not made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import SMOLLM2
from benchmarks.subjects import CONTEXT, Subject
from calibration.statistics import Statistics
from lilliput import graph, pipeline, planning
from lilliput import recipe as recipes
from lilliput.artifact import Artifact
from lilliput.model import SourceModel
from lilliput.recipe_schema import Budget, Recipe, Target
from lilliput.store import Store, default_root

RECIPE = Path(__file__).with_name("quality.yaml")
# The ready recipe, and its target, whose rules a target has: what a user gets is what is measured.
READY = {
    "gguf-int4": ("smollm2-135m-everywhere", "gguf"),
    "onnx-int4": ("smollm2-135m-everywhere", "onnx"),
    "litert-int4": ("smollm2-135m-everywhere", "litert"),
    "litert-int8": ("smollm2-135m-litert-int8", "litert"),
}


@dataclass(frozen=True)
class Judge:
    """One evaluation text: the folders of its chunks and of the float model's logits on them."""

    text: str
    evaluation: Path  # EvaluationSet
    reference: Path  # Logits


class Ours:
    """The recipe's stages, each done when it is asked for."""

    def __init__(self, overrides: Sequence[str] = (), recipe: Recipe | None = None) -> None:
        self._recipe = recipe or _ready(recipes.load(str(RECIPE), [f"context={CONTEXT}", *overrides]))
        self._sha256 = planning.source_sha256(self._recipe.model)
        self._work = pipeline.Work(Store(default_root()), pipeline.Quiet(), fresh=False)
        self._graph = self._build(self._recipe)

    def _build(self, recipe: Recipe) -> graph.Graph:
        return graph.build(recipe, self._sha256, planning.host_of(recipe))

    def source(self) -> SourceModel:
        from lilliput.source import open_stage

        return open_stage(self._work.folder(self._graph.source))

    def statistics(self) -> Statistics:
        assert self._graph.statistics is not None
        return Statistics(self._work.folder(self._graph.statistics))

    def judge(self, text: str, chunks: int) -> Judge:
        wanted = self._recipe.evaluation.model_copy(update={"text": text, "count": chunks})
        built = self._build(self._recipe.model_copy(update={"evaluation": wanted}))
        return Judge(text, self._work.folder(built.evaluation), self._work.folder(built.reference))

    def uniform(self, prefix: str) -> tuple[str, ...]:
        """Targets whose names start so and that have rules."""
        return tuple(t.name for t in self._targets(prefix) if not isinstance(self._recipe.quantize_of(t), Budget))

    def mixed(self, prefix: str) -> tuple[str, ...]:
        """Targets whose names start so and that have a budget."""
        return tuple(t.name for t in self._targets(prefix) if isinstance(self._recipe.quantize_of(t), Budget))

    def _targets(self, prefix: str) -> tuple[Target, ...]:
        return tuple(target for target in self._recipe.targets if target.name.startswith(prefix))

    def file(self, target: str) -> Path:
        """The main file of a target."""
        return self.artifact(target).path

    def artifact(self, target: str) -> Artifact:
        from lilliput.stages.export import open_artifact

        found = next(stages for stages in self._graph.targets if stages.target.name == target)
        return open_artifact(self._work.folder(found.export))

    def subject(self, target: str, name: str) -> Subject:
        """A target's file on the target's runtime, as the benchmark calls it."""
        artifact = self.artifact(target)
        runtime = next(t.runtime.name for t in self._recipe.targets if t.name == target)
        return Subject(
            name=name, maker="ours", driver=runtime, path=artifact.path, context=artifact.context,
            prefill=artifact.prefill,
        )  # fmt: skip


def source_override(model: str) -> list[str]:
    """Of the recipe, whose source is SmolLM2: for another model."""
    return [] if model == SMOLLM2 else [f"model.source={model}"]


def _ready(recipe: Recipe) -> Recipe:
    """With the ready recipes' rules for the targets in READY."""
    targets = []
    for target in recipe.targets:
        if target.name in READY:
            name, like = READY[target.name]
            ready = recipes.load(name)
            found = ready.quantize_of(next(t for t in ready.targets if t.name == like))
            target = target.model_copy(update={"quantize": found})
        targets.append(target)
    return recipe.model_copy(update={"targets": tuple(targets)})
