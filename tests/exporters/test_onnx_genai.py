"""onnxruntime-genai opens tiny folders as they are and generates what our own session computes."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import pytest
import torch
from tiny_models import tiny_quantized_model
from transformers import AutoTokenizer

from exporters.onnx_int4 import Exporter, Options
from lilliput.artifact import Artifact
from lilliput.decoder import Decoder
from lilliput.parity_texts import TEXTS
from lilliput.trace import trace
from targets.runtimes.ort_cpu import Runtime

CONTEXT, STEPS, PAD = 40, 8, 1
LONG, SHORT = [272, 204, 164, 87, 99, 15, 25], [7, 57, 260, 208]


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3", "gemma2", "gemma3"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("genai")
    model = tiny_quantized_model(folder, request.param)
    with torch.device("meta"):
        traced = trace(Decoder(model.config), CONTEXT, 8)
    (folder / "out").mkdir()
    return Exporter().export(model, traced, Options(), folder / "out", exact=True)


def greedy(artifact: Artifact, prompt: Sequence[int]) -> list[int]:
    session = Runtime().open(artifact, threads=1, exact=True)
    tokens = [int(session.prefill(prompt).argmax())]
    while len(tokens) < STEPS:
        tokens.append(int(session.decode(tokens[-1]).argmax()))
    return tokens


def generate(artifact: Artifact, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    model = genai.Model(str(artifact.folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=CONTEXT, min_length=CONTEXT, batch_size=len(prompts))
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompts, np.int32))
    steps = []
    for _ in range(STEPS):
        generator.generate_next_token()
        steps.append([int(token) for token in generator.get_next_tokens()])
    return [list(tokens) for tokens in zip(*steps, strict=True)]


def test_generates_what_the_session_computes(artifact: Artifact) -> None:
    assert generate(artifact, [LONG]) == [greedy(artifact, LONG)]


def test_a_batch_of_unequal_prompts_is_each_as_if_alone(artifact: Artifact) -> None:
    padded = SHORT + [PAD] * (len(LONG) - len(SHORT))
    assert generate(artifact, [LONG, padded]) == [greedy(artifact, LONG), greedy(artifact, SHORT)]


def test_tokenizes_as_the_source_does(artifact: Artifact) -> None:
    ours = genai.Tokenizer(genai.Model(str(artifact.folder)))
    theirs = AutoTokenizer.from_pretrained(artifact.folder)
    assert [text for text in TEXTS if [int(i) for i in ours.encode(text)] != theirs.encode(text)] == []


def test_text_that_its_tokenizer_does_not_compose_is_noted(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, normalizers

    model = tiny_quantized_model(tmp_path, "qwen2")
    path = model.tokenizer / "tokenizer.json"
    own = Tokenizer.from_file(str(path))
    own.normalizer = normalizers.NFC()
    own.save(str(path))
    with torch.device("meta"):
        traced = trace(Decoder(model.config), CONTEXT, 8)
    (tmp_path / "out").mkdir()
    artifact = Exporter().export(model, traced, Options(), tmp_path / "out")
    ours = genai.Tokenizer(genai.Model(str(artifact.folder)))
    differing = [text for text in TEXTS if [int(i) for i in ours.encode(text)] != own.encode(text).ids]
    assert differing == [text for text in TEXTS if unicodedata.normalize("NFC", text) != text]
    assert differing
    assert "does not compose characters (NFC)" in artifact.notes[0]


def test_other_tokenizers_have_no_note(artifact: Artifact) -> None:
    assert artifact.notes == ()
