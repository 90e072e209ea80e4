"""The registry: every plugin of the four folders keeps its contract, and is known without being imported."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from lilliput import families, fingerprint, listing, registry
from lilliput.errors import MissingPackageError, RecipeError

KINDS: tuple[registry.Kind, ...] = (
    "solvers", "transforms", "exporters", "runtimes", "devices", "network_exporters", "network_runtimes",
)  # fmt: skip
PLUGINS = [(kind, name) for kind in KINDS for name in registry.known(kind)]
METHODS = {
    "solvers": ("solve",),
    "transforms": ("factors",),
    "exporters": ("refuses", "export", "read"),
    "runtimes": ("open", "versions"),
    "devices": ("describe", "open"),
    "network_exporters": ("export", "differences"),
    "network_runtimes": ("open", "versions"),
}
CONSTANTS = {
    "solvers": {"needs_statistics": bool},
    "transforms": dict[str, type](),
    "exporters": {"packages": tuple, "extra": str},
    "runtimes": {"packages": tuple, "extra": str, "exporters": tuple},
    "devices": dict[str, type](),
    "network_exporters": {"packages": tuple, "extra": str, "activations": tuple},
    "network_runtimes": {"packages": tuple, "extra": str, "exporters": tuple},
}


def test_the_folders_hold_what_the_recipes_name() -> None:
    assert {"rtn", "gptq"} <= set(registry.known("solvers"))
    assert {"onnx_int4", "litert_int8", "gguf_llamacpp"} <= set(registry.known("exporters"))
    assert {"ort_cpu", "litert_cpu", "llamacpp_cpu"} <= set(registry.known("runtimes"))
    assert {"host", "ssh"} <= set(registry.known("devices"))


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_a_plugin_keeps_its_contract(kind: registry.Kind, name: str) -> None:
    plugin = registry.load(kind, name)
    made = plugin()
    for method in METHODS[kind]:
        assert callable(getattr(made, method))
    for attribute, wanted in CONSTANTS[kind].items():
        value = getattr(plugin, attribute)
        assert isinstance(value, wanted)
        assert registry.constant(kind, name, attribute) == value, "read from the source as from the class"
    assert (sys.modules[plugin.__module__].__doc__ or "").strip()


@pytest.mark.parametrize(("kind", "name"), [p for p in PLUGINS if not p[0].endswith("runtimes")])
def test_options_are_frozen_and_refuse_unknown_keys(kind: registry.Kind, name: str) -> None:
    needed = {"address": "board"} if (kind, name) == ("devices", "ssh") else {}
    made = registry.options(kind, name, needed)
    assert isinstance(made, BaseModel)
    with pytest.raises(RecipeError, match="has no option 'no_such'"):
        registry.options(kind, name, {**needed, "no_such": 1})
    for field in type(made).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(made, field, None)


def test_options_of_a_plugin_without_any_are_refused() -> None:
    assert registry.options("runtimes", "ort_cpu", {}) is None
    with pytest.raises(RecipeError, match="runtime 'ort_cpu' takes no options"):
        registry.options("runtimes", "ort_cpu", {"provider": "cuda"})


def test_names_are_listed_without_importing_anything_heavy() -> None:
    code = (
        "import sys; from lilliput import registry, recipe; recipe.load('smollm2-135m-everywhere');"
        "[registry.constant('runtimes', n, 'exporters') for n in registry.known('runtimes')];"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'llama_cpp', 'transformers', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


PLUGIN = '''
"""A solver of another distribution."""
import absent_package_of_nobody
class Solver: ...
'''


def test_a_plugin_of_another_distribution_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign_solver.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    point = importlib.metadata.EntryPoint("foreign", "foreign_solver:Solver", "lilliput.solvers")

    def points(**query: Any) -> tuple[importlib.metadata.EntryPoint, ...]:
        return (point,) if query["group"] == "lilliput.solvers" and query.get("name", "foreign") == "foreign" else ()

    monkeypatch.setattr(registry, "entry_points", points)
    monkeypatch.setattr(listing, "entry_points", points)
    registry.known.cache_clear()
    try:
        assert "foreign" in registry.known("solvers")
        with pytest.raises(MissingPackageError, match="'absent_package_of_nobody' is not installed, solver 'foreign'"):
            registry.load("solvers", "foreign")
        assert registry.source_files("solvers", "foreign") == [tmp_path / "foreign_solver.py"]
    finally:
        registry.known.cache_clear()


def test_a_fingerprint_reaches_what_is_imported_late_and_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    modules, packages = fingerprint.reach(["lilliput.stages.trace"])
    assert {"lilliput.trace", "lilliput.decoder", "lilliput.model", "lilliput"} <= modules
    assert "exporters.onnx_int4" not in modules
    assert "torch" in packages
    before = fingerprint.fingerprint(["lilliput.stages.trace"])
    assert before == fingerprint.fingerprint(["lilliput.stages.trace"])
    assert before != fingerprint.fingerprint(["lilliput.stages.source"])
    monkeypatch.setattr(fingerprint, "version", lambda package: "another")
    assert before != fingerprint.fingerprint(["lilliput.stages.trace"])


def test_a_fingerprint_reaches_families_which_are_looked_up_when_it_runs() -> None:
    modules, _ = fingerprint.reach(["lilliput.stages.source"])
    assert {f"lilliput.families.{name}" for name in families.known()} <= modules
    assert "lilliput.rope" in modules


def test_a_fingerprint_changes_with_a_source_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lilliput", "lilliput/stages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "lilliput" / "inner.py").write_text("X = 1\n")
    (tmp_path / "lilliput" / "stages" / "one.py").write_text("def work():\n    from ..inner import X\n")
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    caches = (fingerprint._path, fingerprint._imports)

    def found() -> str:
        for cached in caches:
            cached.cache_clear()
        return fingerprint.fingerprint(["lilliput.stages.one"])

    try:
        before = found()
        assert fingerprint.reach(["lilliput.stages.one"])[0] == {
            "lilliput", "lilliput.inner", "lilliput.stages", "lilliput.stages.one",
        }  # fmt: skip
        (tmp_path / "lilliput" / "inner.py").write_text("X = 2\n")
        assert found() != before
    finally:
        for cached in caches:
            cached.cache_clear()
