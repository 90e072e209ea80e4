"""Which rule each matrix of a model has."""

from __future__ import annotations

from fnmatch import fnmatchcase

from lilliput.errors import RecipeError
from lilliput.model import DecoderConfig, role_of
from lilliput.recipe_schema import FLOAT, Rule


def assign(rules: tuple[Rule, ...], config: DecoderConfig) -> dict[str, Rule]:
    """The rule of every matrix of the model; the first that matches.

    Raises RecipeError naming a matrix without a rule, or a rule whose pattern fits no matrix: it is misspelt.
    `head` fits a tied model too, which has none.
    """
    names = [name for name in config.parameter_shapes() if role_of(name) != "vector"]
    parameters = parameter_count(config)
    live = [rule for rule in rules if rule.below_parameters is None or parameters < rule.below_parameters]
    for pattern in (rule.match for rule in rules):
        if not any(fnmatchcase(name, pattern) for name in [*names, "head"]):
            shown = ", ".join(names[:4])
            raise RecipeError(f"quantize: rule {pattern!r} matches no matrix: their names are like {shown}")
    assigned: dict[str, Rule] = {}
    for name in names:
        rule = next((r for r in live if fnmatchcase(name, r.match)), None)
        if rule is None:
            raise RecipeError(
                f"quantize: no rule matches {name!r} (seen: {[r.match for r in live]}); add one, "
                f"e.g. {{match: {name!r}, grid: int8-channel, solver: rtn}}, or grid: {FLOAT} to keep it as it is"
            )
        assigned[name] = rule
    return assigned


def parameter_count(config: DecoderConfig) -> int:
    """Elements of all parameters, tied ones once."""
    total = 0
    for shape in config.parameter_shapes().values():
        elements = 1
        for size in shape:
            elements *= size
        total += elements
    return total
