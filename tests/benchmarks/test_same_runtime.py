"""The commands on speed beside peers, bandwidth shares and the cost of exports: their judgement, and tiny runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from tiny_models import source_of, tiny_gpt2, tiny_llama

from benchmarks import bandwidth_share, export_cost, models, peers, same_runtime
from benchmarks.calibration_cost import RANDOM_1B
from benchmarks.cost import StageCost
from benchmarks.export_cost import Costs, TargetCost
from benchmarks.models import GPT2, QWEN3, SHAPES, SMOLLM2, Shape
from benchmarks.ours import Ours
from benchmarks.runtimes import Limit, Row, ratios
from lilliput import source
from lilliput.grid import grid


def row(name: str, decode: tuple[float, ...], prefill: tuple[float, ...], runtime: str = "LiteRT") -> Row:
    return Row(
        name=name, runtime=runtime, size_bytes=50_000_000, prefill_tokens_per_s=prefill[0],
        decode_tokens_per_s=decode[0], bandwidth_share=0.5, decode_rounds=decode, prefill_rounds=prefill,
        disturbed_rounds=(False,) * len(decode),
    )  # fmt: skip


def test_prefill_has_limits_of_its_own() -> None:
    both = tuple(Limit(subject="a", peer="b", least=1.0, phase=phase) for phase in ("decode", "prefill"))
    found = ratios((row("a", (110.0, 110.0), (90.0, 90.0)), row("b", (100.0, 100.0), (100.0, 100.0))), both)
    assert [(r.limit.phase, r.verdict) for r in found] == [("decode", "PASS"), ("prefill", "MISS")]


def test_a_miss_is_below_the_limit_in_every_round() -> None:
    limit = Limit(subject="a", peer="b", least=1.0)
    (found,) = ratios((row("a", (97.0, 98.0, 103.0), (1.0,)), row("b", (100.0, 100.0, 100.0), (1.0,))), (limit,))
    assert (found.value, found.low, found.high, found.verdict) == (0.98, 0.97, 1.03, "INCONCLUSIVE")


@pytest.mark.parametrize("model", models.MODELS)
def test_every_runtime_has_a_judged_file_and_every_peer_a_rival(model: str) -> None:
    theirs = same_runtime.peers_of(model)
    wanted = same_runtime.limits(theirs)
    assert {limit.peer for limit in wanted} == {peer.name for peer in theirs}
    assert {limit.subject for limit in wanted} == {same_runtime.title(m) for m in same_runtime.OURS if m.judged}
    assert sum(limit.phase == "prefill" for limit in wanted) == len(wanted) / 2 == len(theirs)
    assert {peer.kind for peer in theirs} <= set(peers.MAKERS)


def test_a_shape_starts_as_a_folder_and_smollm2_as_the_packages_file() -> None:
    assert (peers.needs("source", QWEN3), peers.needs("hf", QWEN3)) == (("hf",), ())
    assert (peers.needs("source", SMOLLM2), peers.needs("hf", SMOLLM2)) == ((), ("source",))


@pytest.mark.parametrize(("model", "millions"), [(GPT2, 124.4), (models.GEMMA3, 268.1), (QWEN3, 596.0)])
def test_a_shape_has_the_published_models_parameters(model: str, millions: float) -> None:
    """Published: GPT-2 124 M, Gemma 3 270M (its card: 170 M embedding, 100 M blocks), Qwen3-0.6B (0.6 B)."""
    import torch
    import transformers

    shape = SHAPES[model]
    with torch.device("meta"):
        made = getattr(transformers, shape.model)(getattr(transformers, shape.config)(**shape.settings))
    assert made.num_parameters() / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.real
def test_a_random_shape_loads_with_its_tokenizer(tmp_path: Path) -> None:
    tiny = Shape("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64})
    models.make_random(tiny, tmp_path)
    assert source.load(str(tmp_path), tmp_path / "source").config.vocab_size == 50257


def test_our_files_have_the_grids_that_they_are_compared_on(tmp_path: Path) -> None:
    folder = tiny_gpt2(tmp_path / "tiny", n_positions=512)
    made = Ours(recipe=same_runtime.recipe("tiny", str(folder), source_of(folder).config))
    found = {subject.name: subject for subject in same_runtime.ours(made)}
    assert [s.runtime for s in found.values()] == ["ONNX Runtime", "ONNX Runtime", "llama.cpp", "LiteRT", "LiteRT"]
    grids = {name: _grids(made, name.split()[0]) for name in found}
    assert grids["onnx-int4 (ours)"] == {"int4-b32"}
    assert grids["gguf-int4 (ours)"] == {"int4-b32", "int8-b32"}  # 64 columns: no q6_k
    assert grids["litert-int8 (ours)"] == {"int8-channel"}


def _grids(made: Ours, target: str) -> set[str]:
    from exporters import gguf_llamacpp, litert_int8, onnx_int4
    from lilliput.grid import QuantizedTensor

    artifact = made.artifact(target)
    exporter = {"onnx": onnx_int4, "gguf": gguf_llamacpp, "lite": litert_int8}[target[:4]].Exporter()
    return {t.spec.name for t in exporter.read(artifact).values() if isinstance(t, QuantizedTensor)}


def test_llama_quantizes_head_type_is_chosen_by_width() -> None:
    config = RANDOM_1B
    assert same_runtime.head_type(dataclasses.replace(config, hidden_size=768)) == "q6_k"
    assert grid(same_runtime.head_type(dataclasses.replace(config, hidden_size=576))).bits == 8


def test_a_share_is_of_the_runs_fastest_bandwidth_and_a_large_file_misses() -> None:
    found = bandwidth_share.share(row("a", (200.0, 210.0, 190.0), (1.0,)), (18.0, 20.0))
    assert (found.value, found.low, found.high, found.verdict) == (0.5, 0.475, 0.525, "PASS")
    slow = bandwidth_share.share(row("a", (200.0,), (1.0,), "llama.cpp"), (20.0,))
    assert slow.verdict == "MISS"
    large = row("a", (900.0,), (1.0,)).model_copy(update={"size_bytes": 63_000_001})
    assert bandwidth_share.share(large, (20.0,)).verdict == "MISS"


def test_exports_cost_is_that_of_whole_processes(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    recipe = {
        "name": "tiny", "model": {"source": str(folder)}, "context": 64, "prefill": 8,
        "evaluation": {"length": 64}, "quantize": [{"match": "*", "grid": "int8-channel", "solver": "rtn"}],
        "targets": [{"name": "gguf", "exporter": "gguf_llamacpp", "runtime": "llamacpp_cpu"}],
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    export_cost.main(["--recipe", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out")])
    (found,) = json.loads((tmp_path / "out" / "export_cost.json").read_text())["targets"]
    stages = {s["stage"]: s for s in found["export"]["stages"]}
    assert list(stages) == ["trace", "export"]
    assert found["export_s"] > sum(s["seconds"] for s in stages.values())
    assert all(s["peak_rss_bytes"] > 50e6 for s in stages.values())  # an interpreter with torch
    assert found["size_bytes"] == (tmp_path / "out/gguf/export/files/model.gguf").stat().st_size


def test_an_export_is_judged_by_time_and_memory() -> None:
    stage = StageCost(stage="export", seconds=30.0, peak_rss_bytes=1000)
    cheap = TargetCost(
        target="onnx", exporter="onnx_int4", size_bytes=1, export_s=40.0, solve_s=90.0,
        export=Costs(stages=(stage, stage)), solve=Costs(stages=(stage,)),
    )  # fmt: skip
    report = export_cost.Report(model="m", cores=2, load=(0.1, 0.2), weights_bytes=400, targets=(cheap,))
    assert report.verdict(cheap) == "PASS"
    assert report.verdict(cheap.model_copy(update={"export_s": 40.1})) == "MISS"
    assert report.model_copy(update={"weights_bytes": 399}).verdict(cheap) == "MISS"
    assert "| 2.50 | ≤ 2.5 | PASS |" in export_cost.markdown(report)
