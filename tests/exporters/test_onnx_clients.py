"""Clients that know models by their Hugging Face configuration open our folders as they are, and say what we say.

optimum's ORTModelForCausalLM, and Transformers.js under Node (npm `@huggingface/transformers`, installed by name once,
into the folder LILLIPUT_TEST_CACHE, by default beside the store).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import tools
import torch
from tiny_models import tiny_quantized_model

from exporters.onnx_int4 import MAIN_FILES, Exporter, Layout, Options
from lilliput.artifact import Artifact
from lilliput.decoder import Decoder
from lilliput.store import default_root
from lilliput.trace import trace
from targets.runtimes.ort_cpu import Runtime

CONTEXT, STEPS = 48, 12
PROMPT = [272, 204, 164, 87, 99, 15, 25]
KINDS = ("llama", "gpt2", "qwen2", "qwen3", "gemma3", "phi3")
# optimum-onnx 0.1 makes caches of hidden / heads for Qwen 3, whatever its head_dim, and of all heads for Phi 3.
OPTIMUM = ("llama", "gpt2", "qwen2", "gemma3")
TRANSFORMERS_JS = "@huggingface/transformers@4.3.1"
SCRIPT = """
import { env, AutoModelForCausalLM, AutoTokenizer, Tensor } from '@huggingface/transformers';
env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const name = process.argv[3], prompt = JSON.parse(process.argv[4]), steps = Number(process.argv[5]);
const model = await AutoModelForCausalLM.from_pretrained(name, { dtype: 'q4', device: 'cpu' });
const tokenizer = await AutoTokenizer.from_pretrained(name);
const tensor = (values) => new Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length]);
const inputs = { input_ids: tensor(prompt), attention_mask: tensor(prompt.map(() => 1)) };
const made = await model.generate({ ...inputs, max_new_tokens: steps, min_new_tokens: steps, do_sample: false });
const text = tokenizer('def add(a, b): Katze 42', { return_tensor: false }).input_ids;
console.log(JSON.stringify([made.tolist()[0].map(Number), text.map(Number)]));
"""


def export(folder: Path, kind: str, layout: Layout) -> Artifact:
    model = tiny_quantized_model(folder, kind)
    with torch.device("meta"):
        traced = trace(Decoder(model.config), CONTEXT, 8)
    (folder / "out").mkdir()
    return Exporter().export(model, traced, Options(layout=layout), folder / "out")


def greedy(artifact: Artifact, prompt: Sequence[int]) -> list[int]:
    """What our own session says; the end of text is not chosen, as the clients are told."""
    session = Runtime().open(artifact, threads=1)
    logits, tokens = session.prefill(prompt), list(prompt)
    while len(tokens) < len(prompt) + STEPS:
        logits[1] = -torch.inf
        tokens.append(int(logits.argmax()))
        logits = session.decode(tokens[-1])
    return tokens


@pytest.mark.parametrize("kind", OPTIMUM)
def test_optimum_opens_the_folder_and_generates_the_same(kind: str, tmp_path: Path) -> None:
    from optimum.onnxruntime import ORTModelForCausalLM

    artifact = export(tmp_path, kind, "genai")
    model = ORTModelForCausalLM.from_pretrained(artifact.folder, use_io_binding=False)
    ids = torch.tensor([PROMPT])
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, min_new_tokens=STEPS,
        do_sample=False, pad_token_id=1,
    )  # fmt: skip
    assert made[0].tolist() == greedy(artifact, PROMPT)


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """A folder in which Transformers.js is installed."""
    tools.needs("node", "nodejs")
    npm = tools.needs("npm", "npm")
    root = Path(os.environ.get("LILLIPUT_TEST_CACHE", default_root().with_name("lilliput-tests")))
    folder = root / TRANSFORMERS_JS.replace("/", "-")
    if not (folder / "installed").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"name": "clients", "private": true, "type": "module"}')
        command = [npm, "install", "--ignore-scripts", "--no-package-lock", "--no-audit", "--no-fund", TRANSFORMERS_JS]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"npm cannot install {TRANSFORMERS_JS}: {done.stderr.strip()[-300:]}")
        (folder / "installed").touch()
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_js_opens_the_folder_and_generates_the_same(kind: str, tmp_path: Path, node_modules: Path) -> None:
    from transformers import AutoTokenizer

    artifact = export(tmp_path, kind, "transformers.js")
    assert artifact.main_file == MAIN_FILES["transformers.js"] == "onnx/model_q4.onnx"
    script = node_modules / "generate.mjs"
    script.write_text(SCRIPT)
    arguments = [f"{tmp_path}/", "out", json.dumps(PROMPT), str(STEPS)]
    done = subprocess.run(["node", script, *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    made, text = json.loads(done.stdout.splitlines()[-1])
    assert made == greedy(artifact, PROMPT)
    assert text == AutoTokenizer.from_pretrained(artifact.folder)("def add(a, b): Katze 42")["input_ids"]


def test_a_folder_of_that_layout_reads_back_and_counts_its_bytes(tmp_path: Path) -> None:
    artifact = export(tmp_path, "llama", "transformers.js")
    assert artifact.size_bytes == artifact.path.stat().st_size
    assert "layers.0.attention.q" in Exporter().read(artifact)
