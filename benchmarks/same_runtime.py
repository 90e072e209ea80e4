"""Decode and prefill of our files beside the best that others make, on the same runtime, in one run.

    [BENCH_CONTEXT=512] [BENCH_PROMPT=256] python -m benchmarks.same_runtime
        [--model smollm2-135m | gpt2-shape | gemma3-270m-shape | qwen3-0.6b-shape] [--out out/bench] [--rounds N]

The models are those of benchmarks/models.py, the protocol is that of `python -m benchmarks`. Peers:

    ONNX Runtime   onnxruntime-genai's own builder (int4); of GPT-2, which it does not know, optimum's exports
    llama.cpp      llama-quantize's Q4_0 and Q4_K_M
    LiteRT         litert-torch's generative export, with its own 8-bit recipe

A file of ours is judged against every peer's of its runtime in which the matrices have as many bits: all of them 4 in
ONNX Runtime, the types of Q4_0 in llama.cpp, 8 in LiteRT. Those with the ready recipes' grids stand beside it, and are
not judged. Codes are rounded to nearest: a step takes as long whatever they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import peers, runtimes
from benchmarks.models import GPT2, MODELS, SHAPES, SMOLLM2, SOURCE
from benchmarks.ours import Ours
from benchmarks.runtimes import Limit
from benchmarks.subjects import CONTEXT, PREFILL, Subject
from lilliput.ggml import blocks
from lilliput.grid import grid
from lilliput.model import DecoderConfig
from lilliput.recipe_schema import Recipe
from targets import machine

ROUNDS = 6
EXPORT_STEPS = 16  # of litert-torch's files, which decode slowly


@dataclass(frozen=True)
class Peer:
    """A file in a peer's folder (benchmarks/peers.py)."""

    name: str
    kind: str
    driver: str
    file: str
    steps: int = 48


BUILDER = Peer("genai builder int4", "genai_int4", "genai_onnx", "model.onnx")
OPTIMUM = Peer("optimum float32", "optimum_fp32", "optimum_onnx", "model.onnx", EXPORT_STEPS)
OPTIMUM_INT8 = Peer("optimum int8", "optimum_int8", "optimum_onnx", "model.onnx")
Q4_0 = Peer("llama-quantize Q4_0", "llama_4bit", "llamacpp_cpu", "Q4_0.gguf")
Q4_K_M = Peer("llama-quantize Q4_K_M", "llama_4bit", "llamacpp_cpu", "Q4_K_M.gguf")
EXPORT = Peer("litert-torch export int8", "litert_export", "litert_cpu", "model.tflite", EXPORT_STEPS)


@dataclass(frozen=True)
class Made:
    """One of our files: the grids of linears and of the embedding, which is also the head. None: `head_type`'s."""

    name: str
    exporter: str
    runtime: str
    linears: str
    embedding: str | None
    judged: bool


OURS = (
    Made("onnx-int4", "onnx_int4", "ort_cpu", "int4-b32", "int4-b32", judged=True),
    Made("onnx-ready", "onnx_int4", "ort_cpu", "int4-b32", "int8-channel", judged=False),
    Made("gguf-int4", "gguf_llamacpp", "llamacpp_cpu", "int4-b32", None, judged=True),
    Made("litert-int8", "litert_int8", "litert_cpu", "int8-channel", "int8-channel", judged=True),
    Made("litert-ready", "litert_int8", "litert_cpu", "int4-b32", "int8-channel", judged=False),
)


def peers_of(model: str) -> tuple[Peer, ...]:
    """The builder has no GPT-2; optimum's float32 graphs of the larger shapes have seven times the builder's bytes."""
    others = {SMOLLM2: (BUILDER, OPTIMUM), GPT2: (OPTIMUM, OPTIMUM_INT8)}
    return (*others.get(model, (BUILDER,)), Q4_0, Q4_K_M, EXPORT)


def limits(theirs: Sequence[Peer]) -> tuple[Limit, ...]:
    """Of every file that is judged, against every peer on its runtime: so it is the best of them that counts."""
    onnx = ("genai_onnx", "optimum_onnx")
    return tuple(
        Limit(subject=title(made), peer=peer.name, least=1.0, phase=phase)
        for made in OURS
        for peer in theirs
        for phase in ("decode", "prefill")
        if made.judged and made.runtime == ("ort_cpu" if peer.driver in onnx else peer.driver)
    )


def title(made: Made) -> str:
    return f"{made.name} (ours)"


def head_type(config: DecoderConfig) -> str:
    """The grid that llama-quantize gives a tied embedding in a Q4_0 file."""
    return "q6_k" if blocks.refusal(grid("q6_k"), config.hidden_size) is None else "int8-b32"


def recipe(model: str, source: str, config: DecoderConfig) -> Recipe:
    """What makes our files; its targets have the names of OURS."""
    targets = []
    for made in OURS:
        rules = [
            {"match": "layers.*", "grid": made.linears, "solver": "rtn"},
            {"match": "*", "grid": made.embedding or head_type(config), "solver": "rtn"},
        ]
        options = {"bundle": False} if made.exporter == "litert_int8" else {}
        exporter = {"name": made.exporter, **options}
        targets.append({"name": made.name, "exporter": exporter, "runtime": made.runtime, "quantize": rules})
    whole = {
        "name": model, "model": {"source": source, "name": model}, "context": CONTEXT, "prefill": PREFILL,
        "evaluation": {"length": min(CONTEXT, 512)}, "quantize": "int4-b32", "targets": targets,
    }  # fmt: skip
    return Recipe.model_validate(whole)


def subjects(model: str, folder: Path) -> tuple[list[Subject], list[Subject]]:
    """Ours and theirs, made where they are not there."""
    theirs = []
    for peer in peers_of(model):
        path = peers.ensure(peer.kind, folder, runtimes.say, model) / peer.file
        theirs.append(
            Subject(
                name=peer.name, maker="peer", driver=peer.driver, path=path, context=CONTEXT,
                prefill=PREFILL if peer.driver == "litert_cpu" else 0, decode_steps=peer.steps,
            )
        )  # fmt: skip
    peers.ensure("source", folder, runtimes.say, model)
    config = peers.open_source(folder).config
    source = str(folder / "hf") if model in SHAPES else SOURCE
    return ours(Ours(recipe=recipe(model, source, config))), theirs


def ours(made_by: Ours) -> list[Subject]:
    runtimes.say("making our files (what is cached is not made again)")
    return [made_by.subject(made.name, title(made)) for made in OURS]


def peers_folder(out: Path, model: str) -> Path:
    """SmolLM2's is the one of the other benchmarks."""
    folder = out.resolve() / ("peers" if model == SMOLLM2 else f"peers-{model}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 where every ratio passes, 1 where one misses, else 3."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_runtime", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--model", choices=MODELS, default=SMOLLM2)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    options = parser.parse_args(arguments)
    folder = peers_folder(options.out, options.model)
    mine, theirs = subjects(options.model, folder)
    wanted = limits(peers_of(options.model))
    given = runtimes.tokens(folder)
    comparison = runtimes.compare([*mine, *theirs], given, options.threads, options.rounds, wanted)
    verdicts = [ratio.verdict for ratio in comparison.ratios]
    path = options.out.resolve() / f"same_runtime-{options.model}"
    return runtimes.publish(comparison, runtimes.markdown(comparison), path, verdicts)


if __name__ == "__main__":
    raise SystemExit(main())
