"""What validation finds of one target: the figures of report.json's `targets`, frozen, with a JSON round trip.

The types stand below both the targets that fill them and the report that shows them. A figure that was
not measured is None, and a note beside it says why; it is never zero, infinite or NaN.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

Verdict = Literal["PASS", "INCONCLUSIVE", "FAIL"]  # from best to worst
RungName = Literal["float", "dequantized", "read_back", "exact", "shipped"]  # in the ladder's order
Metric = Literal[
    "mean_kld",
    "top1_agreement",
    "perplexity",
    "perplexity_ratio",
    "exact_step_kld",
    "shipped_step_kld",
    "size_mb",
    "load_ms",
    "ttft_ms",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "decode_ms_p90",
    "peak_rss_mb",
    "slice_drop",  # of every slice of the recipe's suites: one gate each
    "instructions_per_token",
]


class Record(BaseModel):
    """Base of every result: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Gate(Record):
    """A limit that a recipe sets on one metric: `max` or `min`, one of them. Megabytes are 10⁶ bytes."""

    metric: Metric
    max: float | None = None
    min: float | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.max is None) == (self.min is None):
            seen = "none" if self.max is None else "both"
            raise ValueError(f"gate {self.metric!r} has {seen} of max and min, wanted one of them")
        return self


class ArtifactFigures(Record):
    """The shipped model file. `path` is relative to the target's folder; sha256 is the main file's."""

    path: str
    format: str  # the exporter that wrote it
    size_bytes: int  # of all model files
    sha256: str


class DepthLatency(Record):
    """Decoding from a cache that holds `depth_tokens` positions."""

    depth_tokens: int
    steps: int
    decode_tokens_per_s: float  # 1000 / decode_ms_p50
    decode_ms_p50: float
    decode_ms_p90: float


class Latency(Record):
    """Speed in a child process; the decode figures of the top level are those of depths[0]."""

    load_ms: float  # opening the model and its first token: mapped weights are touched by then
    ttft_ms: float  # a prompt of `prompt_tokens` in an empty cache, to its logits: median over blocks
    prompt_tokens: int
    prefill_tokens_per_s: float  # prompt_tokens / ttft
    decode_tokens_per_s: float
    decode_ms_p50: float
    decode_ms_p90: float
    depths: tuple[DepthLatency, ...]
    threads: int
    probe_ms: tuple[float, ...]  # the fixed host probe, before, between and after the blocks
    unstable: str | None = None  # why the figures are not to be trusted, where they are not


class Memory(Record):
    """Resident memory of the latency child. Mapped file pages count: they are in memory while the model runs."""

    peak_rss_bytes: int
    baseline_rss_bytes: int  # the interpreter and the runtime's packages, before a model is opened


SensorKind = Literal["temperature_c", "frequency_mhz", "power_w", "throttling"]


class SensorFigures(Record):
    """One sensor around a measurement of speed. `source` is the file or the command that it was read from."""

    kind: SensorKind
    name: str
    source: str
    before: float
    lowest: float  # of all samples, before and after included
    mean: float
    highest: float
    after: float


class Conditions(Record):
    """What the device's own sensors said while its speed was measured. What is absent is said, and is no figure."""

    sensors: tuple[SensorFigures, ...]
    samples: int
    absent: dict[SensorKind, str]  # kind → what was looked for and not found
    throttled: str | None = None  # why the device held its processor back, where it says so
    joules_per_token: float | None = None  # of decoding; the board's power, not the process's share of it
    power_source: str | None = None  # what that power was read from


class Instructions(Record):
    """Instructions that a decoded token took on an emulated processor, on one thread. No measure of time."""

    tokens: int
    per_token: float
    dot_per_token: float  # SDOT, UDOT, USDOT
    mmla_per_token: float  # SMMLA, UMMLA, USMMLA
    fma_per_token: float  # vector FMLA


class Interval(Record):
    """A 95 % bootstrap interval of a mean; chunks are the blocks that are drawn."""

    low: float
    high: float


class Accuracy(Record):
    """Against the float model, teacher-forced on the evaluation text. Divergence in nats a token."""

    mean_kld: float
    top1_agreement: float  # share of positions, 0 to 1
    perplexity: float
    reference_perplexity: float
    tokens: int  # scored positions
    mean_kld_interval: Interval | None = None  # None: a single chunk has none
    top1_agreement_interval: Interval | None = None
    perplexity_ratio_interval: Interval | None = None

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.reference_perplexity


class Example(Record):
    """One question, and what the float model and the artifact answer."""

    id: str
    prompt: str
    float_answer: str
    answer: str


class SliceFigures(Record):
    """One kind of task (lilliput.suites), against the float model. Scores 0 to 1; `drop` is what was lost."""

    name: str
    items: int
    float_score: float
    score: float
    drop: float
    drop_interval: Interval  # 95 %, paired, over the items
    mean_kld: float  # nats a token along the float model's answers
    answer_tokens: int
    chance: float = 0.0  # what guessing among the choices would score
    lost: tuple[Example, ...] = ()  # some that the float model answered right and the artifact wrong


class SuiteFigures(Record):
    """All slices. The errors are expected calibration errors of the items with choices, 0 to 1."""

    slices: tuple[SliceFigures, ...]
    float_calibration_error: float | None = None
    calibration_error: float | None = None


class Rung(Record):
    """One rung of the ladder. Both divergences are means over the same `tokens` positions."""

    rung: RungName
    mean_kld: float | None  # from the float model
    step_kld: float | None  # from the dequantized weights in torch
    tokens: int
    note: str = ""


class GateResult(Record):
    """One gate's outcome. `limit` is an upper limit where `kind` is "max"."""

    name: str
    kind: Literal["max", "min"]
    limit: float
    value: float | None
    verdict: Verdict
    note: str = ""


class Generation(Record):
    """Greedy tokens after a prompt: the smoke check that the artifact speaks."""

    prompt: str
    text: str
    tokens: tuple[int, ...]


class Host(Record):
    """The machine that measured."""

    device: str
    cpu: str
    architecture: str
    isa: tuple[str, ...]  # vector and matrix extensions that kernels choose by
    cores: int  # physical cores that this process may use
    logical_cores: int
    memory_bytes: int
    system: str
    python: str
    emulated: str | None = None  # by what, where the processor is not a real one: then nothing is timed


class TargetResult(Record):
    """One target of report.json."""

    name: str
    verdict: Verdict
    runtime: str
    device: str
    host: Host | None = None  # the device's machine
    versions: dict[str, str]
    artifact: ArtifactFigures
    latency: Latency | None
    memory: Memory | None
    instructions: Instructions | None = None  # of a token; only where they are counted
    conditions: Conditions | None = None  # of the measurement of speed; None: nothing was timed
    accuracy: Accuracy | None
    ladder: tuple[Rung, ...]
    gates: tuple[GateResult, ...]
    generation: Generation | None = None
    suites: SuiteFigures | None = None  # None: the recipe names none, or a note says why
    notes: tuple[str, ...] = ()  # what could not be measured or was refused, by name


def worst(verdicts: list[Verdict]) -> Verdict:
    """The overall verdict: FAIL before INCONCLUSIVE before PASS. No verdict at all is INCONCLUSIVE."""
    for verdict in ("FAIL", "INCONCLUSIVE"):
        if verdict in verdicts:
            return verdict
    return "PASS" if verdicts else "INCONCLUSIVE"
