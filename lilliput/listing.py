"""What a recipe can name: solvers, transforms, exporters, runtimes, devices, boards, families, grids, suites, recipes.
Exporters and runtimes of networks that are no decoder stand in the same folders. And the rules of the truth-check.

A folder is a registry: a plugin is a module or package of it that defines (or imports from its own parts) the
folder's class. Its source is parsed, never imported, so that listing needs neither torch nor any runtime;
the summary is the first line of the module's docstring. Plugins of other distributions come from the
entry-point groups `lilliput.<kind>` and are listed by name and distribution, as their source is theirs.
"""

from __future__ import annotations

import ast
import json
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from lilliput.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from lilliput.grid import GridSpec

ROOT = Path(__file__).resolve().parent.parent

# kind → (folder, the name that a module must define to be one)
FOLDERS = {
    "solvers": ("calibration", "Solver"),
    "transforms": ("calibration", "Transform"),
    "exporters": ("exporters", "Exporter"),
    "runtimes": ("targets/runtimes", "Runtime"),
    "devices": ("targets/devices", "Device"),
    "network_exporters": ("exporters", "NetworkExporter"),
    "network_runtimes": ("targets/runtimes", "NetworkRuntime"),
    "families": ("lilliput/families", "ARCHITECTURES"),
}
RULES_FOLDER = "lilliput/checks/rules"
KINDS = (*FOLDERS, "boards", "grids", "recipes", "rules", "suites")


@dataclass(frozen=True)
class Entry:
    """One line of a list."""

    name: str
    summary: str


def entries(kind: str) -> list[Entry]:
    """All entries of a kind, by name. Raises InputError naming the kinds where it is unknown."""
    if kind in FOLDERS:
        folder, symbol = FOLDERS[kind]
        return sorted([*_modules(ROOT / folder, symbol), *_foreign(kind)], key=lambda e: e.name)
    if kind == "grids":
        return _grids()
    if kind == "boards":
        return _commented(ROOT / "targets" / "boards")
    if kind == "recipes":
        return _commented(recipes_folder())
    if kind == "suites":
        return _suites()
    if kind == "rules":
        return _rules()
    raise InputError(f"unknown kind {kind!r}: {did_you_mean(kind, KINDS)}")


def _modules(folder: Path, symbol: str) -> list[Entry]:
    found = []
    for path in sorted(folder.iterdir()):
        source = path / "__init__.py" if path.is_dir() else path
        name = path.stem
        if name.startswith("_") or name == "base" or source.suffix != ".py" or not source.is_file():
            continue
        tree = ast.parse(source.read_text(encoding="utf-8"))
        if symbol in _top_level_names(tree):
            found.append(Entry(name, _summary(ast.get_docstring(tree))))
    return found


def _top_level_names(tree: ast.Module) -> set[str]:
    """Names that a module defines, or imports from elsewhere than a contract (`….base`)."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").endswith("base"):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def _summary(docstring: str | None) -> str:
    return docstring.strip().splitlines()[0] if docstring else ""


def _foreign(kind: str) -> list[Entry]:
    points = entry_points(group=f"lilliput.{kind}")
    return [Entry(p.name, f"{p.value}, from {p.dist.name if p.dist else 'another distribution'}") for p in points]


def _grids() -> list[Entry]:
    from lilliput.grid import COMMON_GRIDS, GGUF_GRIDS, grid

    return [Entry(name, _describe(grid(name))) for name in (*COMMON_GRIDS, *GGUF_GRIDS)]


def _describe(spec: GridSpec) -> str:
    codes = f"{len(spec.codebook)} uneven codes" if spec.codebook else "codes"
    block = f"blocks of {spec.block_size}" if spec.block_size else "one block a row"
    offset = {"none": "symmetric", "zero_point": "zero points", "minimum": "minima"}[spec.offset]
    scale = {"bf16_f16": "bfloat16 ∩ float16"}.get(spec.scale_dtype, spec.scale_dtype)
    if spec.super_blocks:
        scale = f"{spec.super_blocks.integer_bits}-bit times {scale} of {spec.super_blocks.cols} columns"
    return f"{codes} {spec.qmin}..{spec.qmax}, {block}, {offset}, scales {scale}"


def recipes_folder() -> Path:
    """Where the ready recipes are: in the installed package, or at the root of a checkout."""
    packaged = Path(__file__).resolve().parent / "recipes"
    return packaged if packaged.is_dir() else ROOT / "recipes"


def _commented(folder: Path) -> list[Entry]:
    """YAML files; a file's summary is the comment on its first line."""
    found = []
    for path in sorted(folder.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found.append(Entry(path.stem, first.lstrip("# ").strip() if first.startswith("#") else ""))
    return found


def _suites() -> list[Entry]:
    """A suite's summary is what it holds: its slices."""
    from lilliput import suites

    loaded = {name: suites.load(name) for name in suites.known()}
    slices = {name: list(dict.fromkeys(item.slice for item in items)) for name, items in loaded.items()}
    return [Entry(name, f"{len(items)} items: {', '.join(slices[name])}") for name, items in loaded.items()]


def _rules() -> list[Entry]:
    """Every `Rule(id=…, severity=…, formats=…, summary=…)` of the folder, by id, as its source says."""
    sources = (ast.parse(p.read_bytes()) for p in sorted((ROOT / RULES_FOLDER).glob("*.py")))
    calls = [n for tree in sources for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "Rule"]
    said = [{k.arg: str(ast.literal_eval(k.value)) for k in c.keywords if _is_literal(k.value)} for c in calls]
    return sorted((Entry(r["id"], f"{r['severity']}: {r['summary']}") for r in said), key=lambda e: e.name)


def _is_literal(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant)


def as_json(found: list[Entry]) -> str:
    """The list for programs."""
    return json.dumps([asdict(entry) for entry in found], indent=2, ensure_ascii=False)
