"""The kinds of the support table that are no decoder: each by the whole route of `lilliput network`, on each target.

A cell traces a tiny random model, proves the trace, calibrates, solves, exports, reads back and runs as `Target` says.
It shows the SQNR in dB against float on held-out samples, and in brackets that of the solved network in torch. A Keras
model's codes are its converter's, so there is no such network, and it takes only the converter's own file and runtimes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiny_keras
import tiny_networks
import torch
from torch import Tensor

from lilliput import converted, registry
from lilliput.errors import InputError, LilliputError, MissingPackageError
from lilliput.static_network import NetworkReport, Request, quantize

SAMPLES = 24
LEAST_SQNR_DB = 20.0  # random weights on 8-bit activations; a wrong operator gives 0 dB and less


@dataclass(frozen=True)
class Cell:
    text: str
    failed: bool = False


@dataclass(frozen=True)
class Target:
    exporter: str
    runtime: str
    activations: Literal["uint8", "int8", "uint16", "int16"]


TARGETS = {
    "ONNX Runtime, QDQ (a8)": Target("onnx_qdq", "ort_static_cpu", "uint8"),
    "LiteRT int8 (a8)": Target("litert_static", "litert_static_cpu", "int8"),
    "the same in tensorflow (a8)": Target("litert_static", "tensorflow_cpu", "int8"),
    "Qualcomm's NPU, emulated (a16)": Target("onnx_qdq", "qnn_npu", "uint16"),
}


@dataclass(frozen=True)
class Model:
    """What `lilliput network` is given."""

    source: Path
    samples: Path


def bert_encoder(folder: Path) -> Model:
    from transformers import BertModel

    return _pretrained(BertModel(_bert()), folder, "mean")


def bert_classifier(folder: Path) -> Model:
    from transformers import BertForSequenceClassification

    return _pretrained(BertForSequenceClassification(_bert()), folder)


def roberta_encoder(folder: Path) -> Model:
    """Its positions begin at 2; it gives the hidden states."""
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(**_sizes(), max_position_embeddings=tiny_networks.LENGTH + 2, pad_token_id=1)
    return _pretrained(RobertaModel(config), folder)


def distilbert_classifier(folder: Path) -> Model:
    """Without token types; its head has ReLU."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=tiny_networks.VOCAB, dim=32, n_layers=2, n_heads=2, hidden_dim=64,
        max_position_embeddings=tiny_networks.LENGTH, initializer_range=0.2,
    )  # fmt: skip
    return _pretrained(DistilBertForSequenceClassification(config), folder)


def cnn(folder: Path) -> Model:
    batches = tiny_networks.images(SAMPLES)
    program = torch.export.export(tiny_networks.cnn(), (batches[0]["image"],))
    torch.export.save(program, folder / "cnn.pt2")
    return Model(folder / "cnn.pt2", _saved(folder, {"x": torch.cat([batch["image"] for batch in batches])}))


def keras_cnn(folder: Path) -> Model:
    if find_spec("tensorflow") is None:
        raise MissingPackageError("tensorflow", "litert", "a Keras model")
    import keras

    keras.utils.set_random_seed(0)
    tiny_keras.cnn(keras).save(folder / "cnn.keras")
    np.savez(folder / "samples.npz", image=tiny_keras.images(np.random.default_rng(0)))
    return Model(folder / "cnn.keras", folder / "samples.npz")


KINDS: Mapping[str, tuple[str, Callable[[Path], Model]]] = {
    "bert": ("BERT encoder, mean of tokens", bert_encoder),
    "roberta": ("RoBERTa encoder, hidden states", roberta_encoder),
    "bert-classifier": ("BERT classifier", bert_classifier),
    "distilbert-classifier": ("DistilBERT classifier", distilbert_classifier),
    "cnn": ("CNN of torch (strided, depthwise, concat)", cnn),
    "keras-cnn": ("CNN of Keras, by tensorflow's converter", keras_cnn),
}
LABELS = {name: label for name, (label, _) in KINDS.items()}


def cells(name: str, folder: Path, targets: Sequence[Target] = tuple(TARGETS.values())) -> list[Cell]:
    """One row."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        model = KINDS[name][1](folder)
    except MissingPackageError as error:
        print(error, file=sys.stderr)
        return [Cell("not installed (`litert`)")] * len(targets)
    return [cell(model, target) for target in targets]


def cell(model: Model, target: Target) -> Cell:
    """What is refused says so, and what this machine lacks too."""
    try:
        return shown(proven(_request(model, target)), target)
    except MissingPackageError as error:
        print(error, file=sys.stderr)
        return Cell(f"not installed (`{registry.constant('network_runtimes', target.runtime, 'extra')}`)")
    except InputError as error:
        print(f"refused: {error}", file=sys.stderr)
        return Cell("refused")
    except LilliputError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return Cell("**fails**", failed=True)


@cache
def proven(request: Request) -> NetworkReport:
    """Once each: a converter's file is judged on both its runtimes together."""
    return quantize(request)


def shown(report: NetworkReport, target: Target) -> Cell:
    broken = [f"{gate.name} {gate.seen:.3g}" for gate in report.gates if gate.verdict != "PASS"]
    if broken:
        print(f"FAILED: {', '.join(broken)}; {'; '.join(report.differences)}", file=sys.stderr)
        return Cell(f"**fails** ({', '.join(broken)})", failed=True)
    found = report.sqnr_db
    if "twin" not in found:
        return Cell(f"{found[target.runtime]:.1f}")
    return Cell(f"{found['runtime']:.1f} ({found['twin']:.1f})")


def _request(model: Model, target: Target) -> Request:
    """A converter's own runtimes are not asked for: its file is judged on both."""
    folder, converts = model.source.parent, converted.is_source(model.source)
    asked: dict[str, object] = {
        "source": str(model.source), "out": folder / "converted", "samples": model.samples,
        "min_sqnr_db": LEAST_SQNR_DB, "allow_pickle": model.source.suffix == ".pt2",
    }  # fmt: skip
    if not converts:
        asked["positions"] = tiny_networks.LENGTH
    if not (converts and target.runtime in converted.RUNTIMES):
        asked |= {"exporter": target.exporter, "runtime": target.runtime, "activations": target.activations}
        asked["out"] = folder / f"{target.exporter}-{target.runtime}"
    return Request.model_validate(asked)


def _sizes() -> dict[str, int | float]:
    """Weights ten times as wide as at the start of a training: the layers, not the embeddings, make the output."""
    return {
        "vocab_size": tiny_networks.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "initializer_range": 0.2,
    }  # fmt: skip


def _bert() -> Any:
    from transformers import BertConfig

    return BertConfig(**_sizes(), max_position_embeddings=tiny_networks.LENGTH)


def _pretrained(module: Any, folder: Path, pooling: str | None = None) -> Model:
    """A Hugging Face folder; `pooling` as sentence-transformers says it."""
    source = folder / "model"
    module.save_pretrained(source)
    if pooling is not None:
        (source / "1_Pooling").mkdir()
        (source / "1_Pooling" / "config.json").write_text(f'{{"pooling_mode_{pooling}_tokens": true}}')
    batches = tiny_networks.sentences(SAMPLES)
    return Model(source, _saved(folder, {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}))


def _saved(folder: Path, arrays: Mapping[str, Tensor]) -> Path:
    np.savez(folder / "samples.npz", **{name: array.numpy() for name, array in arrays.items()})
    return folder / "samples.npz"
