"""The folder is the registry: a plugin's file name in its folder is its name in a recipe.

Names are checked against the folder's listing (sources are parsed, nothing is imported); a module is
imported when its class is asked for. Class constants that planning needs (`packages`, `extra`,
`needs_statistics`) are read from the source too, so that a plan imports no runtime.

    solvers    calibration/        class Solver
    transforms calibration/        class Transform
    exporters  exporters/          class Exporter
    runtimes   targets/runtimes/   class Runtime
    devices    targets/devices/    class Device
    network_exporters  exporters/         class NetworkExporter     (of networks that are no decoder)
    network_runtimes   targets/runtimes/  class NetworkRuntime

Other distributions add theirs through the entry-point groups `lilliput.<kind>` (value: a module, or module:class).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from lilliput.errors import MissingPackageError, RecipeError, did_you_mean
from lilliput.listing import FOLDERS, ROOT, entries

Kind = Literal[
    "solvers", "transforms", "exporters", "runtimes", "devices", "network_exporters", "network_runtimes",
]  # fmt: skip
OURS = ("lilliput", "calibration", "exporters", "targets")


@lru_cache
def known(kind: Kind) -> tuple[str, ...]:
    """The names that a recipe may use."""
    return tuple(entry.name for entry in entries(kind))


def check_name(kind: Kind, name: str) -> None:
    """Raise RecipeError naming the known ones where `name` is not one of them."""
    if name not in known(kind):
        raise RecipeError(f"unknown {kind.removesuffix('s')} {name!r}: {did_you_mean(name, known(kind))}")


def module_name(kind: Kind, name: str) -> str:
    """The import path of a plugin's module."""
    folder, _ = FOLDERS[kind]
    path = ROOT / folder / name
    if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
        return f"{folder.replace('/', '.')}.{name}"
    (point,) = entry_points(group=f"lilliput.{kind}", name=name)
    return point.module


def load(kind: Kind, name: str) -> type[Any]:
    """The plugin's class. Raises MissingPackageError where its module needs a package that is not installed."""
    check_name(kind, name)
    path = module_name(kind, name)
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OURS:
            raise
        raise MissingPackageError(package, extra_of(package), f"{kind.removesuffix('s')} {name!r}") from error
    plugin: type[Any] = getattr(module, FOLDERS[kind][1])
    return plugin


def constant(kind: Kind, name: str, attribute: str) -> object:
    """A class constant of a plugin: read from its source where it stands there as a literal, else from the class."""
    check_name(kind, name)
    for path in source_files(kind, name):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef) and node.name == FOLDERS[kind][1]:
                found = [s for s in node.body if isinstance(s, ast.AnnAssign | ast.Assign) and _assigns(s, attribute)]
                if found and isinstance(found[-1].value, ast.Constant | ast.Tuple):
                    return ast.literal_eval(found[-1].value)
    return getattr(load(kind, name), attribute)


def _assigns(node: ast.AnnAssign | ast.Assign, attribute: str) -> bool:
    targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
    return any(isinstance(target, ast.Name) and target.id == attribute for target in targets)


def extra_of(package: str) -> str:
    """The extra of lilliput that installs an imported package; "all" where the name tells nothing."""
    extras = {
        "onnx": ("onnx", "onnxruntime", "onnxruntime_genai"),
        "qnn": ("onnxruntime_qnn",),
        "llamacpp": ("llama_cpp",),
        "data": ("datasets",),
    }
    extras["litert"] = ("ai_edge_litert", "flatbuffers", "litert_lm", "litert_lm_builder", "tensorflow")
    return next((extra for extra, packages in extras.items() if package in packages), "all")


def missing_packages(kind: Kind, name: str) -> list[tuple[str, str]]:
    """(package, extra) of each package that the plugin says it needs and that is not installed."""
    needed, extra = constant(kind, name, "packages"), constant(kind, name, "extra")
    assert isinstance(needed, tuple)
    return [(package, str(extra)) for package in needed if importlib.util.find_spec(package) is None]


def options(kind: Kind, name: str, given: dict[str, Any]) -> BaseModel | None:
    """The plugin's own Options with the given values; None where it has none.

    Raises RecipeError naming the option that is unknown or of a wrong type.
    """
    model = getattr(load(kind, name), "Options", None)
    what = f"{kind.removesuffix('s')} {name!r}"
    if model is None or not issubclass(model, BaseModel):
        if given:
            raise RecipeError(f"{what} takes no options, but {sorted(given)} were given: remove them")
        return None
    try:
        checked: BaseModel = model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise RecipeError(f"{what} has no option {where!r}: {did_you_mean(where, model.model_fields)}") from error
        raise RecipeError(f"{what}, option {where}: {first['msg'].lower()}, seen {first['input']!r}") from error
    return checked


def source_files(kind: Kind, name: str) -> list[Path]:
    """The plugin's own source files: what its results depend on."""
    spec = importlib.util.find_spec(module_name(kind, name))
    if spec is None or spec.origin is None:
        return [Path(inspect.getfile(load(kind, name)))]
    origin = Path(spec.origin)
    return sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
