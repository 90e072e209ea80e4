"""What a plan will take: time, memory, disk and file sizes. Estimates, and labelled so wherever they are shown.

Sizes of artifacts are counted: exact bytes of each matrix on its grid, 4 bytes for every other number. Times are
linear in the model's parameters and the tokens that pass through it, with rates measured on two cores with AVX2;
they serve to tell minutes from hours, not to promise.
"""

from __future__ import annotations

from collections.abc import Mapping

from lilliput.assignment import parameter_count
from lilliput.grid import grid
from lilliput.model import DecoderConfig, role_of
from lilliput.recipe_schema import FLOAT, Budget, Recipe, Recover, Rule
from lilliput.results import Record
from lilliput.run import StageKind

GIGA = 10**9
SENSITIVITY_SAMPLES = 16  # calibration.sensitivity.SAMPLES, without importing torch
FLOAT32_BYTES = 4
TORCH_BYTES = 700_000_000  # the interpreter with torch and transformers
CACHE_BYTES = 1 << 30  # of a batch of self-generated samples, at most

# Seconds per (10⁹ parameters × unit), measured on SmolLM2-135M; the unit is in the comment.
SOURCE_S = 130.0  # once: reading, dequantizing, proving
FORWARD_S = 0.015  # per token of a batched forward pass
GENERATE_S = 0.031  # per sampled token, 48 samples a step
STATISTICS_S = 0.019  # per token: the forward pass and its second moments
SOLVE_S = 250.0  # once: GPTQ
SENSITIVITY_S = 0.065  # per token: forward twice, back, and the weighted second moments
PRICE_S = 60.0  # once a grid: rounding to nearest, and the predicted loss
TRAIN_S = 0.045  # per trained token: forward and backward
EXPORT_S = 8.0  # once: packing, writing, reading back
DECODE_S = 0.055  # per decoded token on a runtime
SPEED_TOKENS = 600  # decoded to measure speed
ASK_S = 200.0  # a suite of a dozen questions, answered by the float model
TRACE_S, TOKENIZE_S = 3.0, 2.0  # once, whatever the size


class Estimate(Record):
    """One recipe on one model."""

    seconds: Mapping[StageKind, float]  # of one stage of each kind
    disk_bytes: Mapping[StageKind, int]
    ram_bytes: int


def estimate(recipe: Recipe, config: DecoderConfig) -> Estimate:
    """Time and disk of one stage of each kind, and the peak of memory."""
    billions = parameter_count(config) / GIGA
    weights = parameter_count(config) * FLOAT32_BYTES
    evaluated, calibrated = recipe.evaluation, recipe.calibration
    texts = evaluated.count * evaluated.length
    logits = texts // 2 * config.vocab_size * FLOAT32_BYTES
    forward = FORWARD_S * billions * texts + TOKENIZE_S
    decoded = texts // 2 + 3 * evaluated.length // 2 + SPEED_TOKENS
    samples = calibrated.count * calibrated.length
    moments = config.num_layers * (3 * config.hidden_size**2 + config.intermediate_size**2) * FLOAT32_BYTES
    seconds: dict[StageKind, float] = {
        "source": SOURCE_S * billions + TOKENIZE_S,
        "evaluation": TOKENIZE_S,
        "samples": GENERATE_S * billions * calibrated.generated * calibrated.length + TOKENIZE_S,
        "coverage": TOKENIZE_S,
        "statistics": STATISTICS_S * billions * samples,
        "sensitivity": SENSITIVITY_S * billions * min(SENSITIVITY_SAMPLES, calibrated.count) * calibrated.length,
        "correction": SOLVE_S * billions,
        "price": PRICE_S * billions,
        "allocate": 3 * EXPORT_S * billions,  # files whose size is counted
        "trace": TRACE_S,
        "reference": forward,
        "suites": TOKENIZE_S * len(evaluated.suites),
        "answers": ASK_S * billions * len(evaluated.suites),
        "dequantized": forward,
        "quantize": SOLVE_S * billions,
        "recover": _training_s(recipe, billions),
        "export": EXPORT_S * billions + TRACE_S,
        # half of the text on the shipped file, one chunk on the exact twin at a third of the speed, then speed itself
        "validate": EXPORT_S * billions + DECODE_S * billions * decoded + 3 * TOKENIZE_S,
        "report": 1.0,
    }
    disk: dict[StageKind, int] = {
        "source": weights + weights // 3,  # beside the float weights the codes of a quantized source
        "statistics": moments,
        "sensitivity": 2 * moments,
        "reference": logits,
        "dequantized": logits,
        "quantize": weights // 3,
        "recover": 4 * weights,  # its checkpoint: positions and two moments, and the codes
        "export": 2 * weights // 4,  # in the store and in --out
        "validate": weights + weights // 4,  # the exact twin, while it is measured
    }
    caches = 2 * config.num_layers * config.num_kv_heads * config.head_dim * samples * FLOAT32_BYTES
    drawn = min(caches, CACHE_BYTES, weights // 4)
    kept = drawn if calibrated.generated else samples * config.hidden_size * FLOAT32_BYTES
    trained = max((_training_bytes(r, config, calibrated.length) for r in _trainings(recipe)), default=0)
    ram = max(3 * weights + kept + logits // 2, trained)
    return Estimate(seconds=seconds, disk_bytes=disk, ram_bytes=TORCH_BYTES + ram)


def _training_s(recipe: Recipe, billions: float) -> float:
    """The longest training of a target."""
    tokens = recipe.calibration.length
    return max(
        (min(TRAIN_S * billions * r.limits[0] * r.batch * tokens, r.limits[1]) for r in _trainings(recipe)), default=0.0
    )


def _trainings(recipe: Recipe) -> list[Recover]:
    return [recover for target in recipe.targets if (recover := recipe.recover_of(target))]


def _training_bytes(wanted: Recover, config: DecoderConfig, length: int) -> int:
    """Values, positions and gradients of the weights, Adam's moments of codes, and activations of all layers."""
    numbers = 3 + (3 if wanted.learning_rate else 0)
    layers = 1 if wanted.checkpointing else config.num_layers
    inner = 12 * config.hidden_size + 6 * config.intermediate_size  # numbers kept of a token in a layer
    attention = 3 * config.num_heads * length
    activations = wanted.micro_batch * length * layers * (inner + attention)
    return FLOAT32_BYTES * (numbers * parameter_count(config) + activations)


def artifact_bytes(assigned: Mapping[str, Rule], config: DecoderConfig) -> int:
    """Bytes of a model file without its format's overhead."""
    total = 0.0
    for name, shape in config.parameter_shapes().items():
        rule = assigned.get(name)
        if rule is None or rule.grid == FLOAT:
            elements = shape[0] * (shape[1] if len(shape) > 1 else 1)
            total += elements * FLOAT32_BYTES
        else:
            total += shape[0] * shape[1] * grid(rule.grid).bits_per_weight(shape[1]) / 8
    return round(total)


def budget_bytes(budget: Budget, config: DecoderConfig) -> int:
    """Bytes of a model file that keeps to a budget."""
    if budget.limit_bytes is not None:
        return budget.limit_bytes
    assert budget.bits_per_weight is not None
    shapes = config.parameter_shapes()
    weights = sum(shape[0] * shape[1] for name, shape in shapes.items() if role_of(name) != "vector")
    vectors = parameter_count(config) - weights
    return round(weights * budget.bits_per_weight / 8) + vectors * FLOAT32_BYTES
