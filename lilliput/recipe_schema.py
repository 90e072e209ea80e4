"""The recipe's schema: what to quantize, on which grids, for which targets, what must hold. Frozen models of its YAML.

    name: tiny-demo
    model: {source: "path/to/folder"}            # or a .gguf file, package:<package>/<file>, a hub id
    seed: 0
    context: 1024                                # KV cache positions of the artifacts
    prefill: 128                                 # prompt chunk where a format needs a fixed one
    calibration: {samples: self, count: 48, length: 512}     # or samples: [{samples: self, count: 24}, …]
    quantize:                                    # first match wins; a matrix that matches no rule is an error
      - {match: "layers.*", grid: int4-b32, solver: gptq}
      - {match: "embedding", grid: int8-channel, solver: rtn}
    recover: {method: qat, minutes: 30}          # training on those grids; left out: none
    evaluation: {text: builtin, count: 8, length: 512}
    targets:
      - {name: onnx, exporter: onnx_int4, runtime: ort_cpu, device: host}
    gates: [{metric: mean_kld, max: 0.15}]

`solver: [awq, gptq]` is a chain: the last chooses codes, the transforms before it rescale the float model for that.

`quantize: {budget_mb: 63}` gives each matrix the grid that keeps the model file within 63 · 10⁶ bytes at the least
predicted loss; `{bits_per_weight: 4.5}` counts the bits of all matrices instead, scales included.

`quantize: auto` climbs a ladder from the cheapest, each target until its accuracy gates pass; `{auto: [rtn, awq]}`
names the rungs (lilliput.escalation).

`quantize: source` keeps the grids and codes of a quantized source; `{keep: source, otherwise: int4-b32}` solves anew
what a target's format cannot hold (lilliput.source_grids).

`quantize: int4-b32` is short for three rules: GPTQ on that grid for every linear layer; RTN on int8-channel for
embedding and head below a billion parameters; RTN on the same grid for them from there on. A solver, exporter,
runtime or device is a name, or a mapping of `name` and its options; `device: ssh://pi@board` has its address.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from lilliput import registry
from lilliput.errors import GridError, LilliputError, RecipeError, did_you_mean
from lilliput.grid import COMMON_GRIDS, GGUF_GRIDS, grid
from lilliput.listing import entries
from lilliput.results import Gate
from lilliput.suites import FIRST as FIRST_ITEMS

MEGA, BILLION = 1_000_000, 1_000_000_000
FLOAT = "float32"  # the rule's grid that keeps a matrix as it is
PASSTHROUGH = "passthrough"  # the solver that takes the source's codes


class Strict(BaseModel):
    """Frozen; unknown keys are refused; a number is not a string, nor the other way round."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Plugin(Strict):
    """A named solver, exporter, runtime or device. Its options are checked by its own `Options` when planned."""

    name: str
    options: dict[str, Any] = {}

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def described(self) -> str:
        """With its options: "gptq, damping 0.05"."""
        return self.name + "".join(f", {key} {value}" for key, value in sorted(self.options.items()))

    @property
    def url(self) -> str:
        """A device's short form: ssh://pi@board; the name alone where it has no address."""
        address = self.options.get("address")
        return self.name if address is None else f"{self.name}://{address}"

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        return {"name": self.name, **self.options} if self.options else self.name


def _read_plugin(value: object) -> object:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping) and "name" in value:
        return {"name": value["name"], "options": {k: v for k, v in value.items() if k != "name"}}
    if isinstance(value, Plugin):
        return value
    raise ValueError(f"wanted a name, or a mapping of `name` and options, seen {value!r}")


def _read_device(value: object) -> object:
    """`ssh://pi@board` is short for {name: ssh, address: pi@board}."""
    if not isinstance(value, str) or "://" not in value:
        return value
    return dict(zip(("name", "address"), value.split("://", 1), strict=True))


def _known(kind: registry.Kind) -> AfterValidator:
    def check(plugin: Plugin) -> Plugin:
        try:
            registry.check_name(kind, plugin.name)
        except LilliputError as error:
            raise ValueError(str(error)) from error
        return plugin

    return AfterValidator(check)


def _grid_name(name: str) -> str:
    try:
        return name if name == FLOAT else grid(name).name
    except GridError as error:
        raise ValueError(str(error)) from error


def _board_name(name: str) -> str:
    if name not in (known := [entry.name for entry in entries("boards")]):
        raise ValueError(f"unknown board {name!r}: {did_you_mean(name, known)}")
    return name


def _tuple(value: object) -> object:
    """YAML has lists; frozen models have tuples."""
    return tuple(value) if isinstance(value, list) else value


_REFERENCE = BeforeValidator(_read_plugin)
TransformRef = Annotated[Plugin, _REFERENCE, _known("transforms"), WithJsonSchema({"plugin": "transforms"})]
_CHAIN = {"type": "array", "items": {"anyOf": [{"plugin": "transforms"}, {"plugin": "solvers"}]}}
SolverRef = Annotated[Plugin, _REFERENCE, _known("solvers"), WithJsonSchema({"anyOf": [{"plugin": "solvers"}, _CHAIN]})]
ExporterRef = Annotated[Plugin, _REFERENCE, _known("exporters"), WithJsonSchema({"plugin": "exporters"})]
RuntimeRef = Annotated[Plugin, _REFERENCE, _known("runtimes"), WithJsonSchema({"plugin": "runtimes"})]
DeviceRef = Annotated[
    Plugin, _REFERENCE, BeforeValidator(_read_device), _known("devices"), WithJsonSchema({"plugin": "devices"})
]
GridName = Annotated[str, AfterValidator(_grid_name), Field(examples=[*COMMON_GRIDS, *GGUF_GRIDS, FLOAT])]


class ModelSpec(Strict):
    """Where the float model is. Pickled weights and remote code are refused unless asked for."""

    source: str = Field(min_length=1)
    name: str | None = None  # the artifacts' name; default: the source's own
    allow_pickle: bool = False
    allow_remote_code: bool = False


class SamplePart(Strict):
    """One source of a mix, and how many samples it gives; `split` and `field` default to the calibration's own."""

    samples: str = Field(min_length=1)
    count: int = Field(ge=1)
    split: str | None = None
    field: str | None = None


Mix = Annotated[tuple[SamplePart, ...], Field(min_length=1), BeforeValidator(_tuple)]
Samples = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")] | Annotated[Mix, Tag("mix")],
    Discriminator(lambda value: "mix" if isinstance(value, list | tuple) else "text"),
]


class Calibration(Strict):
    """Samples: `self` (the model writes them), `builtin`, `docstrings`, dataset:<id or path>, a .jsonl file or a text.

    A list of {samples, count} mixes several; `count` is then their sum.
    """

    samples: Samples = "self"
    count: int = Field(default=48, ge=1)
    length: int = Field(default=512, ge=2)  # tokens in a sample
    temperature: float = Field(default=1.0, gt=0)  # of self-generated samples
    top_k: int = Field(default=0, ge=0)  # likewise; 0 draws from the whole vocabulary
    split: str = "train"  # of a dataset
    field: str = "text"  # of a dataset or JSONL file

    @model_validator(mode="before")
    @classmethod
    def _count_of_mix(cls, value: object) -> object:
        """Without a count of its own, a mix has the sum of its parts'."""
        if not isinstance(value, dict) or not isinstance(parts := value.get("samples"), list | tuple):
            return value
        counts = [part.get("count") for part in parts if isinstance(part, dict)]
        return {"count": sum(c for c in counts if isinstance(c, int)) or 1, **value}

    @model_validator(mode="after")
    def _count_is_the_sum(self) -> Self:
        total = sum(part.count for part in self.parts)
        if self.count != total:
            raise ValueError(f"count is {self.count}, the parts of the mix have {total}: leave count out, or mend it")
        return self

    @property
    def parts(self) -> tuple[SamplePart, ...]:
        """The sources, each with its count: one where `samples` is no list."""
        return (SamplePart(samples=self.samples, count=self.count),) if isinstance(self.samples, str) else self.samples

    @property
    def generated(self) -> int:
        """Samples that the model writes itself."""
        return sum(part.count for part in self.parts if part.samples == "self")


class Rule(Strict):
    """Matrices whose name matches (shell wildcards) go on `grid`; `float32` keeps them as they are.

    `solver` may be a chain, `[awq, gptq]`: it is read as the transforms before the last, and the last.
    """

    match: str = Field(min_length=1)
    grid: GridName
    transforms: tuple[TransformRef, ...] = ()
    solver: SolverRef = Plugin(name="rtn")
    below_parameters: int | None = Field(default=None, ge=1)  # the rule holds only for models with fewer parameters

    @model_validator(mode="before")
    @classmethod
    def _read_chain(cls, value: object) -> object:
        chain = value.get("solver") if isinstance(value, Mapping) else None
        return value if not isinstance(chain, list | tuple) else {**dict(value), **_split(chain)}  # type: ignore[call-overload]

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        transforms = written.pop("transforms", ())
        return {**written, "solver": [*transforms, written["solver"]]} if transforms else written

    @property
    def chain(self) -> str:
        """What is done to a matrix, in order: "awq, then gptq"."""
        return ", then ".join(plugin.name for plugin in (*self.transforms, self.solver))


def _split(chain: Sequence[object]) -> dict[str, object]:
    """A chain as `transforms` and `solver`. Raises ValueError where its parts are not in order."""
    names = [part.get("name") if isinstance(part, Mapping) else part for part in chain]
    transforms, solvers = registry.known("transforms"), registry.known("solvers")
    if not chain or names[-1] in transforms:
        raise ValueError(f"solver: a chain ends with one of {', '.join(solvers)}, seen {names}; e.g. [awq, gptq]")
    if early := [name for name in names[:-1] if name in solvers]:
        raise ValueError(f"solver: {early[0]} chooses codes, so it is the last of a chain, seen {names}")
    return {"transforms": tuple(chain[:-1]), "solver": chain[-1]}


DEFAULT_STEPS = 600


class Recover(Strict):
    """Training after the solve, on the same grids, from the samples that calibration used.

    Rates are of Adam: `learning_rate` in steps of the grid, `scale_learning_rate` relative to a scale.
    """

    method: Literal["qat", "adapters"] = "qat"
    steps: int | None = Field(default=None, ge=0)  # 0: reconstruct only; DEFAULT_STEPS where no minutes are given too
    minutes: float | None = Field(default=None, gt=0)  # ends the training where that is sooner
    match: str = Field(default="layers.*", min_length=1)  # the matrices that are trained
    reconstruct: bool | None = None  # before training (calibration.reconstruction); None: where nothing was folded in
    learning_rate: float = Field(default=0.0, ge=0)  # 0: codes stay as they were solved (calibration.qat says why)
    scale_learning_rate: float = Field(default=0.0005, ge=0)
    float_learning_rate: float = Field(default=0.0005, ge=0)  # of norms and biases, relative to their mean size
    rank: int = Field(default=16, ge=1)  # of adapters
    alpha: float = Field(default=32.0, gt=0)  # of adapters: they are added alpha / rank times
    adapter_learning_rate: float = Field(default=0.001, ge=0)
    batch: int = Field(default=2, ge=1)  # sequences a step
    micro_batch: int = Field(default=2, ge=1)  # sequences at a time
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = Field(default="cpu", min_length=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _reconstruction_is_qats(self) -> Self:
        if self.method == "adapters" and (self.reconstruct or self.steps == 0):
            raise ValueError("adapters are trained on the solved codes: reconstruct and steps: 0 are of method: qat")
        return self

    @property
    def limits(self) -> tuple[float, float]:
        """Steps and seconds, either of which ends the training."""
        default = DEFAULT_STEPS if self.minutes is None else math.inf
        return default if self.steps is None else self.steps, 60 * self.minutes if self.minutes else math.inf


def _rules(value: object) -> object:
    """Expand the shorthand: one grid's name."""
    return uniform(value) if isinstance(value, str) else _tuple(value)


def uniform(grid_name: str, *chain: str) -> tuple[dict[str, object], ...]:
    """The rules that one grid's name is short for; `chain` are other solvers for the linear layers."""
    solver = list(chain) or ["rtn" if grid_name == FLOAT else "gptq"]
    return (
        {"match": "layers.*", "grid": grid_name, "solver": solver},
        {"match": "*", "grid": "int8-channel", "solver": "rtn", "below_parameters": BILLION},
        {"match": "*", "grid": grid_name, "solver": "rtn"},
    )


Rules = Annotated[
    tuple[Rule, ...], Field(min_length=1), BeforeValidator(_rules, json_schema_input_type=str | list[Rule])
]


class Budget(Strict):
    """Mixed precision: grids by measured sensitivity, within a size. One of budget_mb and bits_per_weight is given."""

    budget_mb: float | None = Field(default=None, gt=0)  # 10⁶ bytes of the model file
    bits_per_weight: float | None = Field(default=None, gt=0)  # of all matrices together
    grids: Annotated[tuple[GridName, ...], Field(min_length=1), BeforeValidator(_tuple)] | None = None
    solver: SolverRef = Plugin(name="gptq")

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.budget_mb is None) == (self.bits_per_weight is None):
            seen = "none" if self.budget_mb is None else "both"
            raise ValueError(f"{seen} of budget_mb and bits_per_weight is given, wanted one of them")
        if self.grids and FLOAT in self.grids:
            raise ValueError(f"grids: {FLOAT} is no grid to choose: a budget quantizes every matrix")
        return self

    @property
    def limit_bytes(self) -> int | None:
        """Of the model file; None where the budget is bits per weight."""
        return None if self.budget_mb is None else round(self.budget_mb * MEGA)


class FromSource(Strict):
    """The source's own grids and codes; `otherwise` are the rules for matrices that cannot keep them."""

    keep: Literal["source"] = "source"
    otherwise: Rules | None = None


RungName = Literal["rtn", "gptq", "awq", "mixed", "qat"]
LADDER: tuple[RungName, ...] = ("rtn", "gptq", "mixed", "qat")


class Auto(Strict):
    """Escalation (lilliput.escalation): the rungs that are tried in turn, until a target's accuracy gates pass.

    The recipe's `recover` is the training of the rung qat.
    """

    auto: Annotated[tuple[RungName, ...], Field(min_length=1), BeforeValidator(_tuple)] = LADDER

    @model_validator(mode="after")
    def _once(self) -> Self:
        if len(set(self.auto)) < len(self.auto):
            raise ValueError(f"auto: each rung once, seen {list(self.auto)}")
        return self


QUANTIZE_TAGS = ("rules", "budget", "source", "auto")  # in pydantic's error locations


def _quantize_tag(value: object) -> Literal["rules", "budget", "source"]:
    if value == "source" or isinstance(value, FromSource) or (isinstance(value, Mapping) and "keep" in value):
        return "source"
    return "budget" if isinstance(value, Mapping | Budget) else "rules"


def _quantize_or_auto_tag(value: object) -> Literal["rules", "budget", "source", "auto"]:
    named = isinstance(value, Mapping) and "auto" in value
    return "auto" if named or value == "auto" or isinstance(value, Auto) else _quantize_tag(value)


_BySource: TypeAlias = Annotated[FromSource, BeforeValidator(lambda v: {} if v == "source" else v), Tag("source")]
Quantize = Annotated[
    Annotated[Rules, Tag("rules")] | Annotated[Budget, Tag("budget")] | _BySource, Discriminator(_quantize_tag)
]
QuantizeOrAuto = Annotated[
    Annotated[Rules, Tag("rules")]
    | Annotated[Budget, Tag("budget")]
    | _BySource
    | Annotated[Auto, BeforeValidator(lambda value: {} if value == "auto" else value), Tag("auto")],
    Discriminator(_quantize_or_auto_tag),
]
Gates = Annotated[tuple[Gate, ...], BeforeValidator(_tuple)]


class Evaluation(Strict):
    """Text that calibration did not see: `builtin`, `docstrings` or a path. The second half of each chunk is scored."""

    text: str = Field(default="builtin", min_length=1)
    count: int = Field(default=8, ge=1)
    most: int | None = Field(default=None, ge=1)  # chunks that open gates may draw (lilliput.decide); None: no more
    length: int = Field(default=512, ge=4)  # tokens in a chunk
    suites: Annotated[tuple[str, ...], BeforeValidator(_tuple)] = ()  # questions too: built-in suites, JSONL files
    items: int | None = Field(default=None, ge=1)  # of each slice; None: all of a file's, 12 of a built-in slice
    most_items: int | None = Field(default=None, ge=1)  # that open gates may draw; `items` is then 12, or as given

    @model_validator(mode="before")
    @classmethod
    def _items_of_a_budget(cls, value: object) -> object:
        if isinstance(value, dict) and value.get("most_items") is not None and value.get("items") is None:
            return {**value, "items": FIRST_ITEMS}
        return value


class Target(Strict):
    """One artifact and where it runs. Its `quantize` and `recover` replace the recipe's; its `gates` are added."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    exporter: ExporterRef
    runtime: RuntimeRef
    device: DeviceRef = Plugin(name="host")
    board: Annotated[str, AfterValidator(_board_name)] | None = None  # what the device is, or stands for
    threads: int | None = Field(default=None, ge=1)  # default: the device's physical cores
    quantize: Quantize | None = None
    recover: Recover | None = None
    gates: Gates = ()


class Recipe(Strict):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: ModelSpec
    seed: int = Field(default=0, ge=0, lt=2**31)
    context: int = Field(default=1024, ge=8)
    prefill: int = Field(default=128, ge=1)
    calibration: Calibration = Calibration()
    quantize: QuantizeOrAuto
    recover: Recover | None = None
    evaluation: Evaluation = Evaluation()
    targets: Annotated[tuple[Target, ...], Field(min_length=1), BeforeValidator(_tuple)]
    gates: Gates = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [target.name for target in self.targets]
        if len(set(names)) < len(names):
            raise ValueError(f"targets: names must differ, seen {names}")
        if self.prefill > self.context:
            raise ValueError(f"prefill {self.prefill} is longer than context {self.context}")
        if self.evaluation.length > self.context:
            raise ValueError(f"evaluation.length {self.evaluation.length} is longer than context {self.context}")
        return self

    def quantize_of(self, target: Target) -> tuple[Rule, ...] | Budget:
        """The quantization rules that hold for a target, or its budget. Raises RecipeError for a ladder of them."""
        found = target.quantize or self.quantize
        if isinstance(found, Auto):
            raise RecipeError(
                f"recipe {self.name}: quantize: auto is a ladder of recipes, which only `lilliput run` climbs: "
                "give one set of rules, e.g. --set quantize=int4-b32"
            )
        if isinstance(found, FromSource):
            raise RecipeError(f"recipe {self.name}: quantize: source becomes rules only in `lilliput run`: give rules")
        return found

    def recover_of(self, target: Target) -> Recover | None:
        """The training after the solve: the target's own, or the recipe's."""
        return target.recover or self.recover

    def gates_of(self, target: Target) -> tuple[Gate, ...]:
        """The recipe's gates and the target's own; its own limit replaces the recipe's on the same metric."""
        own = {gate.metric for gate in target.gates}
        return (*(gate for gate in self.gates if gate.metric not in own), *target.gates)
