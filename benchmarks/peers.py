"""The peers' files, each made once from the same source by the peer's own code, and kept.

    source          the model as Lilliput loads it (float32 weights, tokenizer)
    hf              the same as a Hugging Face folder, written by transformers: what exporters of such folders start
                    from; of a shape (benchmarks/models.py) it is made first, and source is loaded from it
    llama_quantize  llama.cpp's own quantizer on a GGUF of the float weights (peer_gguf.py)
    llama_4bit      the same for its 4-bit types alone, without an importance matrix
    onnx_nbits      ONNX Runtime's own quantizers on the graph of our ONNX files (peer_onnx.py)
    litert_aeq      ai-edge-quantizer on the graph of our LiteRT files (peer_aeq.py)
    litert_gptq     the same, its GPTQ
    genai_int4      onnxruntime-genai's own builder, int4 on the CPU, otherwise its defaults
    optimum_fp32    optimum's ONNX export with past (main_export, text-generation-with-past), float32
    optimum_int8    the same in 8 bits by optimum's own quantizer (dynamic, as for a processor with AVX2)
    litert_torch    litert-torch's plain export of transformers' LlamaForCausalLM with a KV cache, then
                    ai-edge-quantizer's recipe dynamic_wi8_afp32
    litert_export   litert-torch's generative export (export_hf) with its own default, the same recipe

Each is made in a process of its own (`python -m benchmarks.peers NAME FOLDER MODEL`), as converters take gigabytes, and
published under its name only when it is whole. Those that need other versions of packages than ours have an overlay
(overlay.py). What is kept beside a folder's files (kept.py) are the model, the versions of the packages that made it
and the context; where these are others now, it is made anew.
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

from benchmarks import overlay
from benchmarks.kept import is_kept, keep
from benchmarks.models import SHAPES, SMOLLM2, SOURCE, make_random
from benchmarks.subjects import CONTEXT
from lilliput.model import SourceModel

MADE_BY = {
    "source": ("gguf", "transformers"),
    "hf": ("transformers", "torch"),
    "llama_quantize": ("llama-cpp-python",),
    "llama_4bit": ("llama-cpp-python",),
    "onnx_nbits": ("onnxruntime", "onnx-ir"),
    "litert_aeq": ("ai-edge-quantizer", "ai-edge-litert"),
    "litert_gptq": ("ai-edge-quantizer", "ai-edge-litert"),
    "genai_int4": ("onnxruntime-genai", "onnxruntime", "torch", "transformers"),
    "optimum_fp32": ("optimum", "optimum-onnx", "torch", "transformers"),
    "optimum_int8": ("optimum", "optimum-onnx", "onnxruntime"),
    "litert_torch": ("litert-torch", "litert-converter", "ai-edge-quantizer", "torch", "transformers"),
    "litert_export": ("litert-torch", "litert-converter", "ai-edge-quantizer", "torch", "transformers"),
}
NEEDS = {
    "hf": ("source",), "llama_quantize": ("source",), "llama_4bit": ("source",), "genai_int4": ("hf",),
    "optimum_fp32": ("hf",), "optimum_int8": ("optimum_fp32",), "litert_torch": ("hf",), "litert_export": ("hf",),
    "onnx_nbits": ("source",), "litert_aeq": ("source",), "litert_gptq": ("source",),
}  # fmt: skip
OVERLAYS = {"genai_int4": overlay.GENAI, "litert_export": overlay.TRANSFORMERS_5}
LLAMA_4BIT = ("Q4_0", "Q4_K_M")


def ensure(name: str, folder: Path, log: Callable[[str], None], model: str = SMOLLM2) -> Path:
    """The folder of a peer's files, made if it is not there. `model`: a name of benchmarks/models.py, or a source.

    Raises subprocess.CalledProcessError where that fails.
    """
    versions = {package: version(package) for package in MADE_BY[name]} | overlay.pinned(OVERLAYS.get(name, ()))
    record = versions | {"context": str(CONTEXT)} | ({"model": model} if model != SMOLLM2 else {})
    if not is_kept(folder / name, record):
        for needed in needs(name, model):
            ensure(needed, folder, log, model)
        log(f"making {name} with {', '.join(f'{k} {v}' for k, v in record.items())}")
    return keep(folder / name, record, lambda _: _make_apart(name, folder, model))


def needs(name: str, model: str) -> tuple[str, ...]:
    """What is made first. A shape starts as a Hugging Face folder, SmolLM2 as the package's file."""
    if name in ("hf", "source") and model in SHAPES:
        return ("hf",) if name == "source" else ()
    return NEEDS.get(name, ())


def _make_apart(name: str, folder: Path, model: str) -> None:
    environment = os.environ | {"USE_TF": "0", "HF_HUB_OFFLINE": "1"}
    if name in OVERLAYS:
        beside = overlay.ensure(OVERLAYS[name], folder.parent / "overlays" / name)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(beside), os.environ.get("PYTHONPATH"))))
    with (folder / f"{name}.log").open("wb") as output:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.peers", name, str(folder), model],
            env=environment, stdout=output, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip


def open_source(folder: Path) -> SourceModel:
    """The model in the peers' folder."""
    from lilliput.source import open_stage

    return open_stage(folder / "source")


def make_source(folder: Path, destination: Path, model: str) -> None:
    from lilliput import source

    destination.rmdir()
    source.load(str(folder / "hf") if model in SHAPES else SOURCE if model == SMOLLM2 else model, destination)


def make_hf(folder: Path, destination: Path, model: str) -> None:
    if model in SHAPES:
        make_random(SHAPES[model], destination)
    else:
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


def make_llama_quantize(folder: Path, destination: Path, model: str) -> None:
    from benchmarks import peer_gguf
    from benchmarks.ours import Ours, source_override

    peer_gguf.make(open_source(folder), Ours(source_override(model)).statistics(), destination)


def make_llama_4bit(folder: Path, destination: Path) -> None:
    from benchmarks import peer_gguf

    peer_gguf.make(open_source(folder), None, destination, LLAMA_4BIT)


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


def make_genai_int4(folder: Path, destination: Path) -> None:
    from onnxruntime_genai.models import builder

    cache = destination / "cache"  # for downloads, of which there are none: the builder removes it when it is empty
    builder.create_model("", str(folder / "hf"), str(destination), "int4", "cpu", str(cache), hf_token="false")


def make_optimum_int8(folder: Path, destination: Path) -> None:
    from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer

    quantizer = ORTQuantizer.from_pretrained(folder / "optimum_fp32", file_name="model.onnx")
    wanted = AutoQuantizationConfig.avx2(is_static=False, per_channel=True)
    quantizer.quantize(wanted, save_dir=destination, file_suffix="")


def make_litert_torch(folder: Path, destination: Path) -> None:
    from benchmarks import peer_litert

    peer_litert.export(folder / "hf", destination)


def make_litert_export(folder: Path, destination: Path) -> None:
    """model.tflite with the signatures that Lilliput's files have; its default recipe is dynamic_wi8_afp32."""
    from litert_torch.generative.export_hf import export

    from benchmarks.subjects import PREFILL

    export.export(
        model=str(folder / "hf"), output_dir=str(destination), prefill_lengths=[PREFILL], cache_length=CONTEXT,
        keep_temporary_files=True,
    )  # fmt: skip
    quantized = next(destination.rglob("*quantized*.tflite"))
    quantized.rename(destination / "model.tflite.kept")
    for path in [*destination.rglob("*.tflite"), *destination.rglob("*.litertlm")]:
        path.unlink()
    (destination / "model.tflite.kept").rename(destination / "model.tflite")


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "llama_4bit": make_llama_4bit, "genai_int4": make_genai_int4,
    "optimum_fp32": make_optimum_fp32, "optimum_int8": make_optimum_int8, "litert_torch": make_litert_torch,
    "litert_export": make_litert_export, "onnx_nbits": make_onnx_nbits, "litert_aeq": make_litert_aeq,
    "litert_gptq": partial(make_litert_aeq, names=("GPTQ",)),
}  # fmt: skip


def main() -> None:
    name, root, model = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    of_model = {"source": make_source, "hf": make_hf, "llama_quantize": make_llama_quantize}
    makers = MAKERS | {kind: partial(make, model=model) for kind, make in of_model.items()}
    makers[name](root, root / f"{name}.partial")


if __name__ == "__main__":
    main()
