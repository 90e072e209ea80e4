"""A model that is no decoder, from where it is, as a proven Network.

    folder       a Hugging Face encoder or classifier: config.json, safetensors. Inputs input_ids and attention_mask
                 (1, positions) int32; padding is on the right
    model.pt2    a program of torch.export with fixed shapes, a user's CNN say. It is a pickle: only when asked for

A classifier gives `logits`. An encoder gives what its sentence-transformers folder says: the mean over real tokens, or
the first token; without one the hidden states. The mean is attention with equal scores,
softmax(−∞ · (1 − mask)) · hidden, as sums over all positions and a quotient would not fit one integer grid. Norming an
embedding is left to the caller: cosine similarity needs none.

The proof compares the network with the source's own module, masks untouched, on padded inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.errors import SourceError
from lilliput.network import Network
from lilliput.network.encoder import OUTPUTS, Gives
from lilliput.network.run import run
from lilliput.network.trace import MASKED_BELOW, read, trace
from lilliput.sources import text_encoder

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
POOLING = Path("1_Pooling") / "config.json"
TOLERANCE = 1e-4  # of the outputs' spread
PROOFS = 4
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")  # first position is padding_idx + 1


@dataclass(frozen=True, eq=False)
class NetworkSource:
    """A float network, and the folder that transformers' AutoTokenizer opens where it reads token ids."""

    network: Network
    tokenizer: Path | None
    proof: str  # a sentence for the report


class EncoderModule(nn.Module):
    """(input_ids, attention_mask) → what the folder's kind of model gives."""

    def __init__(self, model: nn.Module, gives: Gives, first_position: int | None) -> None:
        super().__init__()
        self.model, self.gives, self.first_position = model, gives, first_position

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        more = {}
        if self.first_position is not None:
            more["position_ids"] = torch.arange(input_ids.shape[1])[None] + self.first_position
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **more)
        if self.gives == "logits":
            logits: Tensor = found.logits
            return logits
        hidden: Tensor = found.last_hidden_state
        if self.gives == "mean":
            scores = (1.0 - attention_mask.to(torch.float32)) * (10 * MASKED_BELOW)
            return torch.matmul(scores.softmax(-1)[:, None, :], hidden)[:, 0]
        return hidden[:, 0] if self.gives == "first" else hidden


def open_network(path: Path, *, positions: int = 128, allow_pickle: bool = False) -> NetworkSource:
    """Read, trace and prove. Raises SourceError for what is missing, not supported, not allowed or not proven."""
    if path.is_dir():
        return _folder(path, positions)
    if path.suffix == ".pt2":
        return _program(path, allow_pickle)
    raise SourceError(f"{path}: wanted a Hugging Face folder, a .pt2 of torch.export, a Keras model or a SavedModel")


def _folder(path: Path, positions: int) -> NetworkSource:
    config = _config(path)
    module = EncoderModule(*_model(path, config))
    most = int(config.get("max_position_embeddings", positions)) - (module.first_position or 0)
    if not 1 <= positions <= most:
        raise SourceError(f"{path}: {positions} positions are asked for, the model has 1 to {most}")
    module.eval()
    batches = [_sentence(int(config["vocab_size"]), positions, i) for i in range(PROOFS)]
    given = (OUTPUTS[module.gives],)
    network = trace(module, batches[0], name=path.resolve().name, mask="attention_mask", outputs=given)
    encoder = text_encoder.describe(module.model, module.gives, module.first_position or 0, path, "model")
    with torch.no_grad():
        proof = prove(network, batches, [module(**batch) for batch in batches], "transformers'")
    return NetworkSource(replace(network, encoder=encoder), path, proof)


def _config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: no readable config.json ({error}), wanted a Hugging Face folder") from error
    if not isinstance(config, dict) or not isinstance(config.get("vocab_size"), int):
        raise SourceError(f"{path / 'config.json'}: no vocab_size, wanted a text encoder: export others as .pt2")
    if config.get("auto_map"):
        raise SourceError(f"{path / 'config.json'}: auto_map asks to run code of the folder itself, which is refused")
    names = config.get("architectures") or []
    if config.get("is_encoder_decoder") or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise SourceError(f"{path}: {', '.join(names)} generates text: give it as the source of a decoder's recipe")
    if not any((path / name).is_file() for name in WEIGHTS):
        raise SourceError(f"{path}: no weights, wanted {' or '.join(WEIGHTS)}")
    return config


def _model(path: Path, config: Mapping[str, Any]) -> tuple[nn.Module, Gives, int | None]:
    """The module, what it gives, and its first position where that is not 0."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    classifies = any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or [])
    kind = AutoModelForSequenceClassification if classifies else AutoModel
    try:
        model = kind.from_pretrained(
            str(path), attn_implementation="eager", use_safetensors=True, local_files_only=True, dtype=torch.float32
        )
    except Exception as error:  # transformers raises many kinds
        raise SourceError(f"{path}: transformers cannot open it ({str(error).splitlines()[0]})") from error
    offset = config.get("model_type") in OFFSET_POSITIONS
    first_position = int(config.get("pad_token_id", 1)) + 1 if offset else None
    return model, "logits" if classifies else _pooling(path), first_position


def _pooling(path: Path) -> Gives:
    if not (path / POOLING).is_file():
        return "hidden"
    pooling = json.loads((path / POOLING).read_text(encoding="utf-8"))
    asked = {key.removeprefix("pooling_mode_") for key, value in pooling.items() if value is True}
    asked -= {"include_prompt"}
    if asked not in ({"mean_tokens"}, {"cls_token"}):
        raise SourceError(f"{path / POOLING}: pools by {sorted(asked)}, supported are mean_tokens and cls_token")
    return "mean" if asked == {"mean_tokens"} else "first"


def _sentence(vocab_size: int, positions: int, seed: int) -> dict[str, Tensor]:
    """Random ids with some padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    real = max(1, positions - seed * positions // (PROOFS + 1))
    mask = (torch.arange(positions) < real).to(torch.int32)[None]
    ids = torch.randint(0, vocab_size, (1, positions), generator=generator, dtype=torch.int32)
    return {"input_ids": ids * mask, "attention_mask": mask}


def _program(path: Path, allow_pickle: bool) -> NetworkSource:
    if not allow_pickle:
        raise SourceError(
            f"{path}: torch.export's files are pickles, and pickles can run code: "
            "allow it explicitly (allow_pickle) if you trust where it is from"
        )
    if not path.is_file():
        raise SourceError(f"{path}: there is no such file")
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch raises many kinds
        raise SourceError(f"{path}: torch.export cannot read it ({str(error).splitlines()[0]})") from error
    network = read(program, name=path.stem)
    generator = torch.Generator().manual_seed(0)
    batches = [
        {info.name: _random(info.dtype, info.shape, generator) for info in network.inputs} for _ in range(PROOFS)
    ]
    module = program.module()
    with torch.no_grad():
        wanted = [module(*batch.values()) for batch in batches]
    return NetworkSource(network, None, prove(network, batches, wanted, "the program's"))


def _random(dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if dtype == "int32":
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.int32)
    return torch.randn(shape, generator=generator)


def prove(network: Network, batches: list[dict[str, Tensor]], wanted: list[Any], whose: str) -> str:
    """The sentence of the proof: the network's outputs beside the source's own.

    Hidden states (1, positions, …) are compared where the mask is 1. Raises SourceError where they differ.
    """
    worst = 0.0
    for batch, answers in zip(batches, wanted, strict=True):
        found = run(network, batch)
        given = answers if isinstance(answers, tuple | list) else (answers,)
        for name, answer in zip(network.outputs, given, strict=True):
            ours, theirs = found[name], answer
            if network.mask and ours.dim() == 3:
                real = batch[network.mask].bool()
                ours, theirs = ours[real], theirs[real]
            spread = float(theirs.std(correction=0)) or 1.0
            worst = max(worst, float((ours - theirs).abs().max()) / spread)
    if not worst <= TOLERANCE:
        raise SourceError(
            f"{network.name}: the traced network differs from {whose} own outputs by {worst:.1e} of their spread, "
            f"wanted at most {TOLERANCE:.0e}"
        )
    return f"the traced network gives {whose} own outputs within {worst:.1e} of their spread on {len(batches)} inputs"
