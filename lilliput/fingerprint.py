"""What code a stage's result depends on: the sha256 of its modules' sources and of what they import.

Imports are followed through our four packages by reading the sources, those inside functions too; a third-party
import counts with its installed version, and a package that looks its modules up when it runs
(`iter_modules(__path__)`) imports them all. So a change in a solver makes its own stage anew and what comes after it,
and nothing before. A package's `__init__` is part of every module below it; contracts (`base`) count as any other.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from lilliput.listing import ROOT
from lilliput.registry import OURS

# Imported names whose distribution is called otherwise.
DISTRIBUTIONS = {
    "yaml": "PyYAML",
    "llama_cpp": "llama-cpp-python",
    "litert_lm": "litert-lm-api",
    "litert_lm_builder": "litert-lm-builder",
    "ai_edge_litert": "ai-edge-litert",
    "onnxruntime_genai": "onnxruntime-genai",
    "onnxruntime_qnn": "onnxruntime-qnn",
    "jinja2": "Jinja2",
}


def fingerprint(modules: Iterable[str]) -> str:
    """Hex sha256 over the sources and versions that `modules` (import paths) reach."""
    sources, packages = reach(modules)
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(f"{name}\n{hashlib.sha256(_path(name).read_bytes()).hexdigest()}\n".encode())
    for name in sorted(packages):
        digest.update(f"{name}=={version(name)}\n".encode())
    return digest.hexdigest()


def reach(modules: Iterable[str]) -> tuple[set[str], set[str]]:
    """Our modules and the third-party packages that are reached from `modules`, these included."""
    seen: set[str] = set()
    packages: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for found in _imports(name):
            if found.partition(".")[0] in OURS:
                waiting.append(found)
            else:
                packages.add(found)
    return seen, packages


@cache
def version(package: str) -> str:
    """The installed version of an imported top-level package; "" where it is not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(package, package))
    except importlib.metadata.PackageNotFoundError:
        return ""


@cache
def _path(module: str) -> Path:
    """A module's source file. Plugins of other distributions are found where Python finds them."""
    path = ROOT.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return Path(spec.origin)


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@cache
def _imports(module: str) -> frozenset[str]:
    """What a module imports: our modules by full name, others by their top-level package."""
    path = _path(module)
    found = {module.rpartition(".")[0]} if "." in module else set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, path, node)
            found |= {f"{base}.{a.name}" if _is_module(f"{base}.{a.name}") else base for a in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node).endswith("iter_modules(__path__)"):
            found |= {f"{module}.{name.stem}" for name in path.parent.glob("[!_]*.py")}
    ours = {name for name in found if name.partition(".")[0] in OURS}
    others = {name.partition(".")[0] for name in found - ours} - set(sys.stdlib_module_names) - {"__future__"}
    return frozenset(ours | others)


def _absolute(module: str, path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".") + (["__init__"] if path.name == "__init__.py" else [])
    return ".".join([*parts[: -node.level], *([node.module] if node.module else [])])
