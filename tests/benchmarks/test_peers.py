"""The peers' files compute the model: each is made by the peer's own code from a tiny folder, and held against torch.

A benchmark against a file that computes something else would be worth nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, source_of, tiny_llama

from benchmarks import overlay
from benchmarks.models import SMOLLM2
from benchmarks.subjects import Subject, open_session
from lilliput import decoder
from lilliput.grid import Float
from targets.base import Session

TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, 150).tolist()
PROMPT = 140  # a whole chunk of 128 and some


def made(name: str, tmp_path: Path, beside: Path | None = None) -> tuple[Path, Float]:
    """The peer's folder, made in a process of its own, and torch's logits (T, vocab)."""
    hf = tiny_llama(tmp_path / "tiny", max_position_embeddings=512)
    shutil.copytree(hf, tmp_path / "hf")
    (tmp_path / f"{name}.partial").mkdir()
    command = [sys.executable, "-m", "benchmarks.peers", name, str(tmp_path), SMOLLM2]
    environment = os.environ | {"USE_TF": "0", "HF_HUB_OFFLINE": "1"}
    if beside is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(beside), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.inference_mode():
        logits = decoder.build(source_of(hf))(torch.tensor([TOKENS]))[0].numpy()
    return tmp_path / f"{name}.partial", logits


def logits_of(session: Session) -> Float:
    """(T - PROMPT + 1, vocab) from a prompt and the rest decoded, twice, with a reset between."""
    for _ in range(2):
        session.reset()
        found = [session.prefill(TOKENS[:PROMPT])] + [session.decode(token) for token in TOKENS[PROMPT:]]
    session.close()
    return np.stack(found)


def divergence(wanted: Float, found: Float) -> float:
    """Mean KLD of the positions from the prompt's last."""
    p = torch.log_softmax(torch.from_numpy(wanted[PROMPT - 1 :]).double(), -1)
    q = torch.log_softmax(torch.from_numpy(found).double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_optimums_graph_computes_the_model(tmp_path: Path) -> None:
    folder, wanted = made("optimum_fp32", tmp_path)
    subject = Subject(name="x", maker="peer", driver="optimum_onnx", path=folder / "model.onnx", context=512)
    found = logits_of(open_session(subject, 1))
    assert np.abs(found - wanted[PROMPT - 1 :]).max() <= 1e-4


def test_the_genai_builders_graph_computes_the_model_in_4_bit(tmp_path: Path) -> None:
    """Its logits are those of all positions, and its caches are bound in place as ours are."""
    try:
        beside = overlay.ensure(overlay.GENAI, tmp_path / "overlay")
    except subprocess.CalledProcessError:
        pytest.skip(f"pip cannot get {', '.join(overlay.GENAI)}: no network, or the package is not there")
    folder, wanted = made("genai_int4", tmp_path, beside)
    subject = Subject(name="x", maker="peer", driver="genai_onnx", path=folder / "model.onnx", context=512)
    assert divergence(wanted, logits_of(open_session(subject, 1))) < 0.1


def test_litert_torchs_plain_export_computes_the_model_in_8_bit(tmp_path: Path) -> None:
    """Its caches are bound in place as ours are, which its scatter must bear."""
    folder, wanted = made("litert_torch", tmp_path)
    subject = Subject(
        name="x", maker="peer", driver="litert_cpu", path=folder / "model.tflite", context=512, prefill=128
    )
    assert divergence(wanted, logits_of(open_session(subject, 1))) < 0.01
