"""What a file will say of its making, known before it is written: the recipe's part that decides its bytes, and tools.

    recipe           JSON: seed, lengths, calibration, grids and solvers, training, exporter; neither gates nor devices
    tools            JSON: versions of Lilliput and of the packages that the weights pass through
    solved_sha256    of the codes, scales and floats that were packed: equal in all files of one solve

The solved model's own provenance (source and calibration by sha256, solver by rule) stands beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lilliput import __version__, registry
from lilliput.artifact import canonical
from lilliput.fingerprint import version
from lilliput.recipe_schema import Budget, Recipe, Target

SHARED_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "gguf", "tokenizers")
RECIPE, TOOLS, SOLVED = "recipe", "tools", "solved_sha256"
RECOVERED = {"qat": "qat", "adapters": "low-rank adapters, merged and solved again by gptq"}  # by recover's method
UNSOLVED = "0" * 64  # stands for the digest where only a file's size is asked for


def known(recipe: Recipe, target: Target, *, calibrated: bool) -> dict[str, str]:
    """What is known of a target's file before any work. `calibrated`: its solve reads calibration samples."""
    return {RECIPE: solve_part(recipe, target, calibrated=calibrated), TOOLS: canonical(tools(target.exporter.name))}


def solve_part(recipe: Recipe, target: Target, *, calibrated: bool) -> str:
    """The part of a recipe that decides the bytes of one target's file, as canonical JSON."""
    rules, training = recipe.quantize_of(target), recipe.recover_of(target)
    return canonical(
        {
            "seed": recipe.seed,
            "context": recipe.context,
            "prefill": recipe.prefill,
            "calibration": recipe.calibration.model_dump(mode="json") if calibrated else None,
            "quantize": rules.model_dump(mode="json")
            if isinstance(rules, Budget)
            else [rule.model_dump(mode="json") for rule in rules],
            "recover": training.model_dump(mode="json") if training else None,
            "exporter": target.exporter.model_dump(mode="json"),
        }
    )


def tools(exporter: str) -> dict[str, str]:
    """Versions by package, of those that are installed."""
    packages = registry.constant("exporters", exporter, "packages")
    assert isinstance(packages, tuple)
    found = {name: version(name) for name in (*SHARED_PACKAGES, *packages)}
    return {"lilliput": __version__} | {name: value for name, value in found.items() if value}


def told(solved: Mapping[str, str], known: Mapping[str, str], digest: str) -> dict[str, str]:
    """All that a file says: of the solved model, of what was known before, and the digest of what is packed."""
    return {**_public(solved), **known, SOLVED: digest}


def _public(provenance: Mapping[str, str]) -> dict[str, str]:
    """The same without the folder of a source on this machine: a file moves, its bytes should not tell from where."""
    origin = provenance.get("source", "")
    return {**provenance, "source": Path(origin).name} if Path(origin).exists() else dict(provenance)
