"""Networks from where they are: folders of encoders and classifiers, programs of torch.export; refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_networks import cnn, encoder, images

from lilliput.errors import SourceError
from lilliput.network.run import run
from lilliput.sources.network import open_network


def folder(path: Path) -> Path:
    """A saved classifier."""
    encoder().model.save_pretrained(path)
    return path


def edited(path: Path, **changes: Any) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def test_a_classifier_is_traced_and_proven(tmp_path: Path) -> None:
    source = open_network(folder(tmp_path / "tiny"), positions=10)
    assert "transformers' own outputs within" in source.proof
    assert source.tokenizer == tmp_path / "tiny"
    assert [(info.name, info.shape) for info in source.network.inputs] == [
        ("input_ids", (1, 10)), ("attention_mask", (1, 10)),
    ]  # fmt: skip
    assert source.network.outputs == ("logits",)
    assert source.network.shape("logits") == (1, 2)


@pytest.mark.parametrize(
    ("pooling", "shape"),
    [(None, (1, 8, 16)), ("pooling_mode_mean_tokens", (1, 16)), ("pooling_mode_cls_token", (1, 16))],
)
def test_an_encoder_gives_what_its_folder_says(pooling: str | None, shape: tuple[int, ...], tmp_path: Path) -> None:
    encoder().model.bert.save_pretrained(tmp_path)
    if pooling:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({pooling: True, "word_embedding_dimension": 16}))
    network = open_network(tmp_path, positions=8).network
    assert network.shape(network.outputs[0]) == shape
    ids, mask = torch.tensor([[3, 9, 4, 0, 0, 0, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]])
    (found,) = run(network, {"input_ids": ids.int(), "attention_mask": mask.int()}).values()
    hidden = encoder().model.bert(input_ids=ids[:, :3]).last_hidden_state  # no padding at all
    wanted = {None: hidden, "pooling_mode_mean_tokens": hidden.mean(1), "pooling_mode_cls_token": hidden[:, 0]}[pooling]
    torch.testing.assert_close(found[:, :3] if pooling is None else found, wanted, rtol=1e-4, atol=1e-5)


def test_roberta_counts_positions_from_its_padding(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=14,
    )  # fmt: skip
    model = RobertaModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    network = open_network(tmp_path, positions=12).network
    ids = torch.randint(2, 50, (1, 12), dtype=torch.int32)  # no padding: transformers then counts as we do
    found = run(network, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[network.outputs[0]]
    torch.testing.assert_close(found, model(ids).last_hidden_state, rtol=1e-4, atol=1e-5)
    with pytest.raises(SourceError, match="13 positions are asked for, the model has 1 to 12"):
        open_network(tmp_path, positions=13)


def test_a_program_of_torch_export_is_read_when_it_is_trusted(tmp_path: Path) -> None:
    path = tmp_path / "digits.pt2"
    (x,) = images(1)[0].values()
    torch.export.save(torch.export.export(cnn(), (x,)), path)
    with pytest.raises(SourceError, match="pickles can run code: allow it explicitly"):
        open_network(path)
    source = open_network(path, allow_pickle=True)
    assert source.network.name == "digits"
    assert source.tokenizer is None
    (found,) = run(source.network, {"x": x}).values()
    torch.testing.assert_close(found, cnn()(x), rtol=1e-4, atol=1e-5)
    path.write_bytes(b"no program")
    with pytest.raises(SourceError, match=r"torch\.export cannot read it"):
        open_network(path, allow_pickle=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "generates text"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map asks to run code"),
        ({"vocab_size": None}, "no vocab_size"),
        ({"model_type": "no-such"}, "transformers cannot open it"),
    ],
)
def test_what_is_no_plain_encoder_is_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=named):
        open_network(edited(folder(tmp_path), **changes), positions=8)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no readable config\.json"):
        open_network(tmp_path)
    with pytest.raises(SourceError, match=r"wanted a Hugging Face folder, a \.pt2"):
        open_network(tmp_path / "model.onnx")
    with pytest.raises(SourceError, match="the model has 1 to 12"):
        open_network(folder(tmp_path / "tiny"), positions=64)
    (tmp_path / "tiny" / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"no weights, wanted model\.safetensors"):
        open_network(tmp_path / "tiny", positions=8)
