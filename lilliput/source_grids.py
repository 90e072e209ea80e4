"""`quantize: source`: each matrix of a quantized checkpoint keeps the grid and the codes that it has there.

Rules for one target: solver passthrough for every matrix whose grid the target's format holds. What the checkpoint
keeps in float stays so. Any other matrix, whose grid the format or Lilliput does not hold, goes by the rules of
`otherwise`, and what quantizing it anew costs is in the report; without `otherwise` it is refused by name. With it,
`otherwise` also holds for what the checkpoint keeps in float.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lilliput import registry
from lilliput.assignment import assign
from lilliput.errors import RecipeError
from lilliput.grid import grid
from lilliput.model import DecoderConfig, role_of
from lilliput.recipe_schema import FLOAT, PASSTHROUGH, FromSource, Plugin, Recipe, Rule, Target

if TYPE_CHECKING:
    from exporters.base import Exporter


@dataclass(frozen=True)
class SourceGrids:
    """Of a quantized source's matrices: the grid of each, and why others that it quantizes lie on none."""

    grids: Mapping[str, str]
    not_passed: Mapping[str, str]


def of_stage(folder: Path) -> SourceGrids:
    """From a source stage's folder."""
    facts = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    return SourceGrids(facts.get("grids", {}), facts.get("not_passed", {}))


def of_original(path: Path, *, allow_pickle: bool = False, allow_remote_code: bool = False) -> SourceGrids:
    """From the source itself: its codes are read, one matrix at a time."""
    from lilliput.source import open_original
    from lilliput.sources.codes import grids

    found = grids(open_original(path, allow_pickle=allow_pickle, allow_remote_code=allow_remote_code))
    return SourceGrids(*found)


def asked(recipe: Recipe) -> bool:
    """Whether any target takes codes from the source."""
    return any(map(_asks, (target.quantize or recipe.quantize for target in recipe.targets)))


def _asks(quantize: object) -> bool:
    rules = quantize if isinstance(quantize, tuple) else ()
    return isinstance(quantize, FromSource) or any(rule.solver.name == PASSTHROUGH for rule in rules)


def resolved(recipe: Recipe, held: SourceGrids, config: DecoderConfig) -> Recipe:
    """The recipe with rules for every target that says `source`. Raises RecipeError naming a matrix that has none."""
    targets = []
    for target in recipe.targets:
        wanted = target.quantize or recipe.quantize
        rules = _rules(wanted, target, held, config) if isinstance(wanted, FromSource) else target.quantize
        targets.append(target.model_copy(update={"quantize": rules}))
    return recipe.model_copy(update={"targets": tuple(targets)})


def _rules(wanted: FromSource, target: Target, held: SourceGrids, config: DecoderConfig) -> tuple[Rule, ...]:
    if not held.grids:
        why = f" ({next(iter(held.not_passed.values()))})" if held.not_passed else ": it is float"
        raise RecipeError(
            f"target {target.name!r}: quantize: source, and the source holds no codes to pass through{why}: "
            "give a grid, e.g. quantize: int4-b32"
        )
    exporter: Exporter = registry.load("exporters", target.exporter.name)()
    others = assign(wanted.otherwise, config) if wanted.otherwise else {}
    found = {}
    for name, shape in config.parameter_shapes().items():
        if role_of(name) == "vector":
            continue
        refused = held.not_passed.get(name)
        if name in held.grids:
            refused = exporter.refuses(grid(held.grids[name]), role_of(name), (shape[0], shape[1]))
            if refused is None:
                found[name] = Rule(match=name, grid=held.grids[name], solver=Plugin(name=PASSTHROUGH))
                continue
        if name in others:
            found[name] = others[name].model_copy(update={"match": name, "below_parameters": None})
        elif refused is None:
            found[name] = Rule(match=name, grid=FLOAT)
        else:
            raise RecipeError(
                f"target {target.name!r}: {name} is on {held.grids.get(name, 'no grid')} in the source, which "
                f"{target.exporter.name} does not hold as it is: {refused}; or quantize what cannot pass anew: "
                "quantize: {keep: source, otherwise: int4-b32}"
            )
    return compact(found)


def compact(rules: Mapping[str, Rule]) -> tuple[Rule, ...]:
    """One rule for all layers, or for all matrices of a kind, where they are the same; else one a matrix."""
    kinds = {name: re.sub(r"^layers\.\d+\.", "layers.*.", name) for name in rules}
    alike = {name: rule.model_copy(update={"match": ""}) for name, rule in rules.items()}
    of_layers = {rule.model_dump_json() for name, rule in alike.items() if kinds[name] != name}
    found: dict[str, Rule] = {}
    for name, rule in alike.items():
        same = all(alike[other] == rule for other in rules if kinds[other] == kinds[name])
        pattern = kinds[name] if same else name
        if len(of_layers) == 1 and kinds[name] != name:
            pattern = "layers.*"
        found[pattern] = rule.model_copy(update={"match": pattern})
    return tuple(found.values())


def check(rules: Mapping[str, Rule], held: SourceGrids, config: DecoderConfig) -> None:
    """Raise RecipeError for a matrix whose rule wants codes that the source does not hold on that grid."""
    shapes = config.parameter_shapes()
    for name, rule in rules.items():
        if rule.solver.name != PASSTHROUGH or rule.grid == FLOAT:
            continue
        if rule.transforms:
            raise RecipeError(
                f"quantize: rule {rule.match!r}: {PASSTHROUGH} takes codes as they are, and no transform comes before "
                f"it: leave out {rule.transforms[0].name}"
            )
        seen = held.grids.get(name)
        if seen is None:
            raise RecipeError(
                f"quantize: rule {rule.match!r}: solver {PASSTHROUGH} on {name}, of which the source holds no codes "
                f"({held.not_passed.get(name, 'it is float there')}): name another solver, e.g. gptq"
            )
        if not grid(rule.grid).holds(grid(seen), shapes[name][1]):
            raise RecipeError(
                f"quantize: rule {rule.match!r}: the source holds {name} on {seen}, the rule wants {rule.grid}: give "
                "the rule the source's grid, or another solver, which quantizes it anew"
            )
