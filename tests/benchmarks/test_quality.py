"""The quality table: its arithmetic, and a whole run of it on a tiny model with each runtime's own quantizers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_models import source_of, tiny_llama

from benchmarks import kept, peer_aeq, peer_gguf, peer_onnx, peers, quality
from benchmarks.ours import Ours
from benchmarks.quality import Limit, Row
from lilliput.errors import MeasurementError, RecipeError
from lilliput.model import SourceModel
from lilliput.results import Accuracy


def accuracy(kld: float) -> Accuracy:
    return Accuracy(mean_kld=kld, top1_agreement=0.9, perplexity=10.0, reference_perplexity=9.0, tokens=100)


def row(file: str, size_bytes: int, kld: float, other: float | None = None) -> Row:
    maker = "ours" if file.startswith("onnx-") else "peer"
    texts = {"builtin": accuracy(kld)} | ({} if other is None else {"docstrings": accuracy(other)})
    return Row(part="onnx", file=file, maker=maker, size_bytes=size_bytes, accuracy=texts)


PRESERVES = "ignore:Warning. Enabling `experimental_preserve_all_tensors`"  # ai-edge-quantizer's calibrator asks for it
READ_ONLY = "ignore:The given NumPy array is not writable"  # ONNX Runtime's HQQ hands torch an array of its own
SHARE = Limit(part="onnx", subject="onnx-int4", peers=("RTN", "HQQ"), share=0.5)


@pytest.mark.parametrize(("kld", "verdict"), [(0.05, "PASS"), (0.1, "PASS"), (0.11, "MISS")])
def test_a_limit_is_a_share_of_the_best_peer(kld: float, verdict: str) -> None:
    rows = [row("onnx-int4", 100, kld), row("RTN", 100, 0.3), row("HQQ", 150, 0.2), row("DEFAULT", 100, 0.01)]
    (found,) = quality.ratios(rows, [SHARE])
    assert (found.peer, found.peer_value, found.verdict) == ("HQQ", 0.2, verdict)


def test_a_smaller_peer_does_not_count() -> None:
    rows = [row("onnx-int4", 100, 0.1), row("RTN", 99, 0.01), row("HQQ", 100, 0.2)]
    (found,) = quality.ratios(rows, [SHARE])
    assert (found.peer, found.verdict) == ("HQQ", "PASS")
    (bigger,) = quality.ratios(rows[:2], [SHARE])
    assert (bigger.peer, bigger.verdict) == ("RTN", "BIGGER")


def test_every_text_has_its_own_verdict() -> None:
    limit = Limit(part="onnx", subject="onnx-int4", peers=("RTN",), most=0.075)
    found = quality.ratios([row("onnx-int4", 100, 0.07, 0.08), row("RTN", 100, 0.3, 0.4)], [limit])
    assert [(r.text, r.verdict) for r in found] == [("builtin", "PASS"), ("docstrings", "MISS")]


def test_a_limit_without_its_files_is_left_out() -> None:
    assert quality.ratios([row("onnx-int4", 100, 0.1)], [SHARE]) == ()
    assert quality.ratios([row("RTN", 100, 0.1)], [SHARE]) == ()


def test_the_table_says_what_was_refused_and_by_how_much_a_limit_is_met() -> None:
    rows = (row("onnx-int4", 100, 0.05), row("RTN", 120, 0.2))
    made = quality.Quality(rows=rows, ratios=quality.ratios(rows, [SHARE]), refused={"int4-MSE": "no blocks"}, chunks=8)
    text = quality.markdown(made)
    assert "| **onnx-int4** | ours | 100 | 0.0500 | 90.0% | 10.00 |" in text
    assert "| onnx-int4 | builtin | 0.0500 | ≤ 0.5 x | RTN 0.2000 | 0.25 | PASS |" in text
    assert "- int4-MSE: no blocks" in text


def test_one_of_ours_that_cannot_be_made_is_said_and_no_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        def file(self, target: str) -> Path:
            raise RecipeError(f"target {target!r}: budget of 1 MB is too small")

    refused: dict[str, str] = {}
    assert quality._ours(Failing(), "onnx", ["onnx-int4"], refused) == []  # type: ignore[arg-type]
    made = quality.Quality(rows=(row("RTN", 120, 0.2),), ratios=(), refused=refused, chunks=8)
    monkeypatch.setattr(quality, "measure", lambda *_: made)
    assert quality.main(["--out", str(tmp_path)]) == 1
    assert "- onnx-int4: target 'onnx-int4': budget of 1 MB is too small" in capsys.readouterr().out


def test_a_folder_is_made_once_and_anew_for_another_record(tmp_path: Path) -> None:
    calls = []

    def make(folder: Path) -> None:
        calls.append(folder.name)
        (folder / "file").write_text(str(len(calls)))

    for version in ("1", "1", "2"):
        found = kept.keep(tmp_path / "made", {"package": version}, make)
    assert calls == ["made.partial"] * 2
    assert (found / "file").read_text() == "2"
    with pytest.raises(ZeroDivisionError):
        kept.keep(tmp_path / "other", {}, lambda _: 1 / 0)  # type: ignore[arg-type,return-value]
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=512)


@pytest.fixture(scope="module")
def source(hf: Path) -> SourceModel:
    return source_of(hf)


def test_onnx_quantizers_leave_no_linear_in_float(source: SourceModel, tmp_path: Path) -> None:
    floats = peer_onnx.float_graph(source, tmp_path)
    assert len(peer_onnx.linears(floats)) == 14
    made = peer_onnx.quantize(floats, peer_onnx.Variant("RTN", symmetric=True))
    assert peer_onnx.linears(made) == []
    wanted = source.weights["layers.0.mlp.down"]
    twin = {t.name: onnx.numpy_helper.to_array(t) for t in peer_onnx.dequantized(made).graph.initializer}
    (found,) = (array.T for name, array in twin.items() if name.startswith("layers.0.mlp.down"))
    steps = np.abs(wanted.reshape(len(wanted), -1, 32)).max(-1, keepdims=True) / 7.5
    assert (np.abs((found - wanted).reshape(*steps.shape[:2], 32)) <= steps * 1.01).all()


def test_a_graph_that_the_quantizers_do_not_know_is_no_peer(source: SourceModel, tmp_path: Path) -> None:
    """What they do to a Gemm: nothing, and they say that all is well."""
    floats = peer_onnx.float_graph(source, tmp_path)
    node = next(node for node in floats.graph.node if node.op_type == "MatMul")
    shape = next(t.dims for t in floats.graph.initializer if t.name == node.input[1])
    floats.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape[1], np.float16), "other"))
    weight = next(t for t in floats.graph.initializer if t.name == node.input[1])
    weight.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight)[None, None].repeat(2, 0), weight.name)
    )
    with pytest.raises(MeasurementError, match="13 of 14 linears"):
        peer_onnx.quantize(floats, peer_onnx.Variant("DEFAULT", symmetric=True))


@pytest.mark.filterwarnings(PRESERVES)
def test_ai_edge_quantizer_gets_the_grids_of_our_files(source: SourceModel, tmp_path: Path) -> None:
    from exporters.litert_int8.flatbuffer import Blocks, read_constants

    chunks = np.random.default_rng(0).integers(0, source.config.vocab_size, (4, peer_aeq.PREFILL)).tolist()
    peer_aeq.make(source, chunks, ("OCTAV", "MSE", "GPTQ"), tmp_path)
    refused = json.loads((tmp_path / "failures.json").read_text())
    assert list(refused) == ["int4-MSE"]
    assert "Blockwise quantization is not supported" in refused["int4-MSE"]
    stored = {t.name.split(peer_aeq.MARK)[1]: t for t in read_constants(tmp_path / "int4-GPTQ.tflite")}
    down = stored["layers.1.mlp.down"]
    assert (down.type, type(down.scales)) == ("int4", Blocks)
    assert isinstance(down.scales, Blocks)
    assert down.scales.block_size == 32
    assert stored["embedding"].type == "int8"
    assert stored["rope"].type == "float32"
    names = {path.stem for path in tmp_path.glob("*.tflite")}
    assert names == {"int8-OCTAV", "int8-MSE", "int8-GPTQ", "int4-OCTAV", "int4-GPTQ"}


@pytest.mark.filterwarnings(PRESERVES, READ_ONLY)
def test_a_whole_run_on_a_tiny_model(
    hf: Path, source: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each runtime's peers and ours, made and scored; a second run scores nothing again."""
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    small = ["calibration.count=2", "calibration.length=32", "evaluation.length=32", f"model.source={hf}"]
    makers = {
        "llama_quantize": lambda folder: peer_gguf.make(source, Ours(small).statistics(), folder),
        "onnx_nbits": lambda folder: peer_onnx.make(source, folder),
        "litert_aeq": lambda folder: peer_aeq.make(source, [], ("min-max",), folder),
        "litert_gptq": lambda folder: peer_aeq.make(source, [[1] * peer_aeq.PREFILL], ("GPTQ",), folder),
    }
    monkeypatch.setattr(peers, "ensure", lambda name, folder, say, model: kept.keep(folder / name, {}, makers[name]))
    monkeypatch.setattr(quality, "Ours", lambda overrides=(): Ours([*small, *overrides]))
    found = quality.measure(quality.PARTS, tmp_path, chunks=2, workers=1)
    ours = {r.file for r in found.rows if r.maker == "ours"}
    # a file names each rule that it was made by: on this tiny model a rule a matrix weighs more than bits can save
    refused = {"litert-at-int4"} & set(found.refused)
    assert all("smallest file is" in found.refused[name] for name in refused)
    assert ours | refused == {
        "gguf-int4", "onnx-int4", "onnx-int4-zero-points", "litert-int8", "litert-int4", *quality.BUDGETS
    }  # fmt: skip
    bytes_of = {r.file: r.size_bytes for r in found.rows}
    within = [(bytes_of[t], bytes_of[n]) for t, names in quality.BUDGETS.items() if t in ours for n in names]
    assert within
    assert all(mine <= theirs for mine, theirs in within)
    assert len([r for r in found.rows if r.part == "gguf" and r.maker == "peer"]) == 8
    assert {len(r.accuracy) for r in found.rows} == {2}
    assert all(0 < r.accuracy["builtin"].mean_kld < 1 for r in found.rows)
    assert len(found.ratios) == 2 * sum(limit.subject not in refused for limit in quality.LIMITS)
    # our GGUF says each matrix's grid in its metadata, and this model is tiny
    assert {r.limit.subject for r in found.ratios if r.verdict == "BIGGER"} <= {"gguf-int4"}, bytes_of
    monkeypatch.setattr("benchmarks.scoring.ProcessPoolExecutor", None)
    assert quality.measure(quality.PARTS, tmp_path, chunks=2, workers=1) == found
