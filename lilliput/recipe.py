"""Reading a recipe's file: YAML → Recipe, with one-line errors that name recipe, line, key path and the way out.

    recipe my.yaml line 9: targets[0].exporter: unknown exporter 'onx_int4': did you mean 'onnx_int4'? known: …

`key=value` overrides set a value by its dotted path before the recipe is checked; a target is reached by its name or
index (`targets.onnx.threads=1`, `context=512`), a plugin's option by the plugin (`targets.onnx.exporter.opset=21`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lilliput import registry
from lilliput.errors import RecipeError, did_you_mean
from lilliput.listing import recipes_folder
from lilliput.recipe_schema import (
    QUANTIZE_TAGS,
    Auto,
    Budget,
    Calibration,
    Evaluation,
    FromSource,
    ModelSpec,
    Plugin,
    Recipe,
    Recover,
    Rule,
    SamplePart,
    Target,
)
from lilliput.results import Gate

__all__ = [
    "DEFAULT",
    "Auto",
    "Budget",
    "Calibration",
    "Evaluation",
    "ModelSpec",
    "Plugin",
    "Recipe",
    "Rule",
    "Target",
    "find",
    "json_schema",
    "load",
]

DEFAULT = "smollm2-135m-everywhere"
SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSpec,
    "calibration": Calibration,
    "mix": SamplePart,
    "evaluation": Evaluation,
    "targets": Target,
    "quantize": Rule,
    "recover": Recover,
    "gates": Gate,
}
Path_ = tuple[str | int, ...]


def find(name_or_path: str) -> Path:
    """A recipe's file: a path, or the name of a ready recipe. Raises RecipeError naming the ready ones."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    ready = {p.stem: p for p in sorted(recipes_folder().glob("*.yaml"))}
    if name_or_path.removesuffix(".yaml") in ready:
        return ready[name_or_path.removesuffix(".yaml")]
    raise RecipeError(f"recipe {name_or_path!r} is neither a file nor a ready recipe: {did_you_mean(path.stem, ready)}")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at a path (or a ready one by name) with `key=value` overrides. Raises RecipeError in one line."""
    file = find(str(path))
    tree, lines = _parse(file)
    for override in overrides:
        _override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        # A misspelt key is reported rather than the required one that is then missing.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise RecipeError(_explain(file, lines, first)) from error


def json_schema() -> str:
    """The recipe's JSON schema, with the names of this installation's plugins."""
    tree = Recipe.model_json_schema()
    return json.dumps(_name_plugins(tree), indent=2) + "\n"


def _name_plugins(tree: Any) -> Any:
    """Replace the marker {"plugin": kind} by the names that there are."""
    if isinstance(tree, dict):
        if set(tree) >= {"plugin"} and isinstance(tree["plugin"], str):
            names = {"type": "string", "enum": list(registry.known(tree["plugin"]))}
            mapping = {"type": "object", "required": ["name"], "properties": {"name": names}}
            forms = [names, mapping]
            if tree["plugin"] == "devices":
                forms.append({"type": "string", "pattern": f"^({'|'.join(registry.known('devices'))})://"})
            return {k: v for k, v in tree.items() if k != "plugin"} | {"anyOf": forms}
        return {key: _name_plugins(value) for key, value in tree.items()}
    return [_name_plugins(value) for value in tree] if isinstance(tree, list) else tree


def _parse(file: Path) -> tuple[dict[str, Any], dict[Path_, int]]:
    """The file's values, and the line (from 1) of each key path."""
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[Path_, int] = {}
        if node is not None:
            _lines(file, node, (), lines)
        tree = yaml.safe_load(text)
    except OSError as error:
        raise RecipeError(f"recipe {file}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise RecipeError(
            f"recipe {file}: wanted a mapping with keys {', '.join(Recipe.model_fields)}, seen {tree!r:.60}"
        )
    return tree, lines


def _lines(file: Path, node: yaml.Node, path: Path_, lines: dict[Path_, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            if inner in lines:
                raise RecipeError(f"recipe {file} line {key.start_mark.line + 1}: {dotted(inner)} is there twice")
            lines[inner] = key.start_mark.line + 1
            _lines(file, value, inner, lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*path, i)] = value.start_mark.line + 1
            _lines(file, value, (*path, i), lines)


def dotted(path: Path_) -> str:
    """("targets", 0, "exporter") → targets[0].exporter"""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")


def _explain(file: Path, lines: dict[Path_, int], error: ErrorDetails) -> str:
    loc = error["loc"]
    path = tuple(p for i, p in enumerate(loc) if not (p in QUANTIZE_TAGS and loc[i - 1 : i] == ("quantize",)))
    place = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    where = f"recipe {file}" + (f" line {place}" if place else "")
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key {dotted(path)!r}: {did_you_mean(str(path[-1]), _keys_beside(path))}"
    if error["type"] == "missing":
        return f"{where}: {dotted(path)}: this key is required"
    context = error.get("ctx", {}).get("error")
    message = str(context) if context is not None else f"{error['msg']}, seen {error['input']!r:.80}"
    return f"{where}: {dotted(path)}: {message}" if path else f"{where}: {message}"


def _keys_beside(path: Path_) -> list[str]:
    """The keys that are known where an unknown one stands."""
    sections = [SECTIONS[p] for p in path[:-1] if isinstance(p, str) and p in SECTIONS]
    if path[-2:-1] == ("quantize",):
        return [*Budget.model_fields, *FromSource.model_fields, *(Auto.model_fields if len(path) == 2 else ())]
    return list((sections[-1] if sections else Recipe).model_fields)


def _override(tree: dict[str, Any], override: str) -> None:
    """Set one `key=value` in place. Raises RecipeError for a path that leads nowhere."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override!r}: wanted key=value, e.g. --set context=512")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    node: Any = tree
    parts = key.split(".")
    for done, part in enumerate(parts[:-1]):
        node = _descend(node, part, f"--set {override!r}: {'.'.join(parts[: done + 1])!r}")
    if isinstance(node, list):
        node[_index(node, parts[-1], f"--set {override!r}")] = value
    else:
        node[parts[-1]] = value


def _descend(node: Any, part: str, what: str) -> Any:
    """The mapping or list below; a missing one is made, a plugin's plain name becomes its mapping."""
    if isinstance(node, list):
        return node[_index(node, part, what)]
    below = node.setdefault(part, {})
    if isinstance(below, str):
        below = node[part] = {"name": below}
    if not isinstance(below, dict | list):
        raise RecipeError(f"{what} is {below!r}, which has no keys")
    return below


def _index(items: list[Any], part: str, what: str) -> int:
    """An item of a list by its name or its index."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    choices = [str(n) for n in names if n] or [str(i) for i in range(len(items))]
    raise RecipeError(f"{what}: there is no {part!r}: {did_you_mean(part, choices)}")
