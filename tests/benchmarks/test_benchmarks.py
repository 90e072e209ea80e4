"""The benchmarks' own arithmetic, and llama.cpp's quantizer driven as they drive it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_models import VOCAB_SIZE, tiny_source

from benchmarks import peer_gguf, runtimes
from benchmarks.child import Reply, Request, read_bandwidth_gb_s
from benchmarks.subjects import Subject
from lilliput.ggml import blocks
from lilliput.grid import grid
from lilliput.results import DepthLatency, Latency


def latency(decode: float, prefill: float = 500.0) -> Latency:
    depth = DepthLatency(
        depth_tokens=128, steps=8, decode_tokens_per_s=decode, decode_ms_p50=1000 / decode, decode_ms_p90=1200 / decode
    )
    return Latency(
        load_ms=100, ttft_ms=128_000 / prefill, prompt_tokens=128, prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode, decode_ms_p50=1000 / decode, decode_ms_p90=1200 / decode, depths=(depth,),
        threads=2, probe_ms=(10.0, 10.0),
    )  # fmt: skip


def subject(path: Path, name: str = runtimes.LLAMACPP) -> Subject:
    return Subject(name=name, maker="ours", driver="llamacpp_cpu", path=path, context=64, decode_steps=4)


def row_of(tmp_path: Path, name: str, decode: tuple[float, ...], disturbed: tuple[int, ...] = ()) -> runtimes.Row:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"x" * 1000)
    unstable = dict.fromkeys(disturbed, "something else used this machine")
    replies = [
        Reply(latency=latency(value).model_copy(update={"unstable": unstable.get(i)})) for i, value in enumerate(decode)
    ]
    return runtimes.row(subject(path, name), replies, 20.0)


def test_a_ratio_compares_figures_of_the_same_round(tmp_path: Path) -> None:
    """The machine halves its speed in the second round: medians of each alone would say otherwise."""
    theirs = row_of(tmp_path, runtimes.QUANTIZE, (100.0, 50.0, 100.0))
    (even,) = runtimes.ratios((row_of(tmp_path, runtimes.LLAMACPP, (100.0, 50.0, 98.0)), theirs))
    assert (even.value, even.rounds, even.verdict) == (1.0, 3, "PASS")
    (slow,) = runtimes.ratios((row_of(tmp_path, runtimes.LLAMACPP, (90.0, 45.0, 90.0)), theirs))
    assert slow.value == pytest.approx(0.9)
    assert slow.verdict == "MISS"


def test_disturbed_rounds_are_left_out(tmp_path: Path) -> None:
    theirs = row_of(tmp_path, runtimes.QUANTIZE, (100.0, 10.0, 100.0), disturbed=(1,))
    ours = row_of(tmp_path, runtimes.LLAMACPP, (90.0, 100.0, 5.0), disturbed=(2,))
    assert (ours.decode_tokens_per_s, theirs.decode_tokens_per_s) == (95.0, 100.0)
    (ratio,) = runtimes.ratios((ours, theirs))
    assert (ratio.value, ratio.rounds, ratio.verdict) == (0.9, 1, "MISS")
    (none,) = runtimes.ratios((ours, row_of(tmp_path, runtimes.QUANTIZE, (1.0, 1.0, 1.0), disturbed=(0, 1))))
    assert (none.value, none.rounds, none.verdict) == (None, 0, "INCONCLUSIVE")


def test_the_share_of_the_read_bandwidth(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"x" * 1000)
    (tmp_path / "model.gguf.data").write_bytes(b"x" * 500)
    row = runtimes.row(subject(path), [Reply(latency=latency(value)) for value in (90.0, 100.0, 200.0)], 1e-3)
    assert row.size_bytes == 1500
    assert row.decode_tokens_per_s == 100
    assert row.bandwidth_share == pytest.approx(1500 * 100 / 1e6)


def test_the_table_says_pass_and_miss(tmp_path: Path) -> None:
    rows = (
        row_of(tmp_path, runtimes.LLAMACPP, (100.0,)),
        row_of(tmp_path, runtimes.QUANTIZE, (100.0,)),
        row_of(tmp_path, runtimes.ORT, (50.0,)),
    )
    comparison = runtimes.Comparison(
        cpu="a CPU", threads=2, rounds=1, prompt_tokens=128, bandwidth_gb_s=20.0, bandwidth_rounds=(20.0,), rows=rows,
        ratios=runtimes.ratios(rows), versions={},
    )  # fmt: skip
    text = runtimes.markdown(comparison)
    assert "| decode | gguf (ours) | llama-quantize Q4_0 | 1.00 | 1.00, 1.00 | ≥ 0.97 | 1 | PASS |" in text
    assert "| decode | onnx (ours) | llama-quantize Q4_0 | 0.50 | 0.50, 0.50 | ≥ 0.90 | 1 | MISS |" in text


def test_a_child_process_measures_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    peer_gguf.write_float(tiny_source(tmp_path), path)
    request = Request(subject=subject(path), threads=1, tokens=tuple(range(32)), prompt_tokens=16)
    reply = runtimes.measure(request)
    assert reply.latency is not None
    assert reply.latency.depths[0].depth_tokens == 16
    assert reply.latency.decode_tokens_per_s > 0


def test_the_bandwidth_probe_reads_memory() -> None:
    assert 0.1 < read_bandwidth_gb_s(1, repeats=1) < 2000


def test_llama_quantize_makes_q4_0_and_heeds_importance(tmp_path: Path) -> None:
    source = tiny_source(tmp_path)
    paths = {name: tmp_path / f"{name}.gguf" for name in ("float", "plain", "weighted")}
    peer_gguf.write_float(source, paths["float"])
    name = "blk.0.ffn_up.weight"
    importance = np.ones(source.config.hidden_size, np.float32)
    importance[:3] = 1000.0
    peer_gguf.quantize(paths["float"], paths["plain"])
    peer_gguf.quantize(paths["float"], paths["weighted"], "Q4_0", {name: importance})
    wanted = source.weights["layers.0.mlp.up"]
    errors = {}
    for kind in ("plain", "weighted"):
        (stored,) = (t for t in gguf.GGUFReader(paths[kind]).tensors if t.name == name)
        assert stored.tensor_type == gguf.GGMLQuantizationType.Q4_0
        found = blocks.unpack(stored.data, grid("int4-b32-f16"), name).dequantize()
        errors[kind] = float(np.square(found - wanted)[:, :3].mean())
    assert errors["weighted"] < errors["plain"] / 2
    assert source.config.vocab_size == VOCAB_SIZE
