"""What a report and a manifest say beside the measured figures, read from the stages' results and the installation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lilliput import __version__
from lilliput.allocated import Allocation, classes
from lilliput.assignment import assign, parameter_count
from lilliput.fingerprint import version
from lilliput.grid import grid
from lilliput.model import DecoderConfig, role_of
from lilliput.provenance import SHARED_PACKAGES
from lilliput.recipe_schema import FLOAT, Recipe, Rule
from lilliput.report import RecipeFacts, SourceFacts, StepLoss, TensorClass, TextFacts

FLOAT32_BITS = 32


def versions() -> dict[str, str]:
    """Lilliput's own version and those of the packages that every target passes through."""
    return {"lilliput": __version__} | {name: version(name) for name in SHARED_PACKAGES if version(name)}


def recipe_facts(recipe: Recipe, sha256: str) -> RecipeFacts:
    return RecipeFacts(
        name=recipe.name, sha256=sha256, seed=recipe.seed, context=recipe.context, prefill=recipe.prefill
    )


def config_of(source: Path) -> DecoderConfig:
    """The configuration in a source stage's folder."""
    return DecoderConfig(**json.loads((source / "config.json").read_text(encoding="utf-8")))


def source_facts(recipe: Recipe, source: Path) -> SourceFacts:
    found, config = json.loads((source / "source.json").read_text(encoding="utf-8")), config_of(source)
    return SourceFacts(
        name=recipe.model.name or found["name"],
        origin=found["origin"],
        family=config.family,
        parameters=parameter_count(config),
        sha256=found["sha256"],
        license=found["license"],
    )


def proofs(source: Path) -> tuple[str, ...]:
    """What was proven of tokenizer and decoder when the source was loaded, and which of its codes no grid holds, in a
    sentence each."""
    found = json.loads((source / "source.json").read_text(encoding="utf-8"))
    sentences = [found[key] for key in ("tokenizer_parity", "decoder_proof") if found.get(key)]
    reasons: dict[str, list[str]] = {}
    for name, reason in found.get("not_passed", {}).items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        sentences.append(
            f"the source's codes of {len(names)} matrices ({names[0]} first) lie on no grid here: {reason}"
        )
    return tuple(sentences)


def calibration_facts(samples: Path) -> TextFacts:
    found = json.loads((samples / "samples.json").read_text(encoding="utf-8"))
    return TextFacts(origin=found["description"], tokens=found["count"] * found["length"], sha256=found["sha256"])


def evaluation_facts(recipe: Recipe, evaluation: Path) -> TextFacts:
    found = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    tokens = recipe.evaluation.count * recipe.evaluation.length
    return TextFacts(origin=found["description"], tokens=tokens, sha256=found["sha256"])


def tensor_classes(rules: Sequence[Rule], config: DecoderConfig) -> tuple[TensorClass, ...]:
    """The matrices of each rule that has any, then all that is never quantized."""
    assigned, shapes = assign(tuple(rules), config), config.parameter_shapes()
    found = []
    for rule in rules:
        sizes = [shapes[name] for name, its in assigned.items() if its is rule]
        if sizes:
            found.append(_matrices(rule, [(rows, cols) for rows, cols in sizes]))
    return (*found, _vectors(config))


def allocated_classes(allocation: Allocation, solver: str, config: DecoderConfig) -> tuple[TensorClass, ...]:
    """The matrices of each kind and grid that a budget gave, then all that is never quantized."""
    found = [
        _class(
            f"layers.*.{c.kind}" if c.layers else c.kind,
            c.grid,
            solver,
            max(1, len(c.layers)),
            c.weights,
            8 * c.size_bytes,
        ).model_copy(update={"targets": (allocation.target,)})
        for c in classes(allocation)
    ]
    return (*found, _vectors(config))


def _vectors(config: DecoderConfig) -> TensorClass:
    shapes = [shape for name, shape in config.parameter_shapes().items() if role_of(name) == "vector"]
    weights = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)
    return _class("norms, biases and positions", FLOAT, None, len(shapes), weights, weights * FLOAT32_BITS)


def solve_steps(quantized: Path) -> tuple[StepLoss, ...]:
    """What each step of the solvers left, from a quantize stage's folder."""
    found = json.loads((quantized / "model.json").read_text(encoding="utf-8"))
    return tuple(StepLoss(**step) for step in found["steps"])


def _matrices(rule: Rule, shapes: list[tuple[int, int]]) -> TensorClass:
    weights = sum(rows * cols for rows, cols in shapes)
    if rule.grid == FLOAT:
        return _class(rule.match, FLOAT, None, len(shapes), weights, weights * FLOAT32_BITS)
    bits = sum(rows * cols * grid(rule.grid).bits_per_weight(cols) for rows, cols in shapes)
    return _class(rule.match, rule.grid, rule.chain, len(shapes), weights, bits)


def _class(match: str, grid_name: str, solver: str | None, tensors: int, weights: int, bits: float) -> TensorClass:
    return TensorClass(
        match=match,
        grid=grid_name,
        solver=solver,
        tensors=tensors,
        weights=weights,
        bits_per_weight=bits / weights,
        size_bytes=round(bits / 8),
    )
