"""The evaluation text and the logits that candidates are held against, computed by the decoder in torch.

The text is tokenized once and cut into chunks of `length`. In each chunk the first half is context
and the second half is scored: logits at positions length/2 − 1 … length − 2 predict the tokens
length/2 … length − 1. The logits of a model lie in one folder:

    logits.npy     (chunks, scored, vocab) float32, read as a memory map
    tokens.npz     TokenMetrics against the float model; only beside logits that are not its own

and those of the text in another: tokens.npy (chunks, length) int32 and evaluation.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lilliput.errors import InputError
from lilliput.grid import Float
from lilliput.model import DecoderConfig, SourceModel
from lilliput.progress import Progress, silent
from targets.metrics import TokenMetrics, log_softmax, reserve

Encode = Callable[[str], Sequence[int]]  # without special tokens


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Tokenized text that calibration did not see."""

    tokens: npt.NDArray[np.int32]  # (chunks, length)
    sha256: str  # of the tokens' bytes
    description: str  # where the text is from

    @property
    def length(self) -> int:
        """Tokens in a chunk."""
        return int(self.tokens.shape[1])

    @property
    def scored_from(self) -> int:
        """The first scored token's position in its chunk."""
        return self.length // 2

    @property
    def scored(self) -> int:
        """Scored positions in a chunk."""
        return self.length - self.scored_from

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "tokens.npy", self.tokens)
        text = {"sha256": self.sha256, "description": self.description}
        (folder / "evaluation.json").write_text(json.dumps(text, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> EvaluationSet:
        text = json.loads((folder / "evaluation.json").read_text())
        return cls(np.load(folder / "tokens.npy"), text["sha256"], text["description"])


def evaluation_set(encode: Encode, count: int, length: int, text: Path | str = "builtin") -> EvaluationSet:
    """`count` chunks of `length` tokens from a UTF-8 file, or from the text of that name in lilliput.texts.

    Raises InputError where the text cannot be read or does not have that many tokens.
    """
    from lilliput.texts import EVALUATION_TEXTS, evaluation_text

    if length < 2 or length % 2:
        raise InputError(f"evaluation length is {length}, wanted an even number of at least 2")
    where = str(text) if isinstance(text, Path) else EVALUATION_TEXTS[text]
    tokens = encode(_read(text) if isinstance(text, Path) else evaluation_text(text))
    if len(tokens) < count * length:
        raise InputError(
            f"evaluation text {where} has {len(tokens)} tokens, wanted {count} chunks of {length} = {count * length}: "
            "give a longer text, or lower evaluation.count or evaluation.length"
        )
    chunks = np.asarray(tokens[: count * length], dtype=np.int32).reshape(count, length)
    return EvaluationSet(chunks, hashlib.sha256(chunks.tobytes()).hexdigest(), where)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"evaluation text {path} cannot be read as UTF-8 text: {error}") from error


@dataclass(frozen=True)
class Logits:
    """The folder of one model's logits on an evaluation set."""

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "logits.npy"

    @property
    def metrics_path(self) -> Path:
        return self.folder / "tokens.npz"

    def open(self) -> Float:
        """(chunks, scored, vocab) float32, memory-mapped read-only."""
        rows: Float = np.load(self.path, mmap_mode="r")
        return rows

    def metrics(self) -> TokenMetrics:
        """Against the float model: only for logits that `compute_against` made."""
        return TokenMetrics.load(self.metrics_path)


def size_bytes(config: DecoderConfig, evaluation: EvaluationSet) -> int:
    """What the logits of one model take on disk."""
    return len(evaluation.tokens) * evaluation.scored * config.vocab_size * 4


def compute(
    config: DecoderConfig,
    weights: Mapping[str, Float],
    evaluation: EvaluationSet,
    folder: Path,
    progress: Progress = silent,
) -> Logits:
    """Logits of the decoder with these weights, chunk by chunk. Memory: the weights, one chunk's logits."""
    import torch

    from lilliput import decoder

    source = SourceModel("reference", config, weights, tokenizer=folder, sha256="", origin="")
    model = decoder.build(source)
    folder.mkdir(parents=True, exist_ok=True)
    logits = Logits(folder)
    shape = (len(evaluation.tokens), evaluation.scored, config.vocab_size)
    rows = np.lib.format.open_memmap(logits.path, mode="w+", dtype=np.float32, shape=shape)
    reserve(logits.path)
    for index, chunk in enumerate(evaluation.tokens):
        with torch.inference_mode():
            hidden = model.hidden(torch.from_numpy(chunk[None].astype(np.int64)))
            rows[index] = model.logits(hidden[0, evaluation.scored_from - 1 : -1]).numpy()
        progress(index + 1, len(evaluation.tokens))
    rows.flush()
    return logits


def compute_against(
    reference: Logits,
    config: DecoderConfig,
    weights: Mapping[str, Float],
    evaluation: EvaluationSet,
    folder: Path,
    progress: Progress = silent,
) -> Logits:
    """`compute`, and beside the logits each token's metrics against the float model's."""
    logits = compute(config, weights, evaluation, folder, progress)
    compare(reference, logits, evaluation).save(logits.metrics_path)
    return logits


def compare(reference: Logits, candidate: Logits, evaluation: EvaluationSet) -> TokenMetrics:
    """Each scored token's metrics of one model's logits against another's; step_kld is left at zero."""
    references, candidates = reference.open(), candidate.open()
    metrics = TokenMetrics.empty(*references.shape[:2])
    for chunk, position in np.ndindex(*references.shape[:2]):
        p = log_softmax(references[chunk, position], f"{reference.folder}, chunk {chunk}, position {position}")
        q = log_softmax(candidates[chunk, position], f"{candidate.folder}, chunk {chunk}, position {position}")
        target = int(evaluation.tokens[chunk, evaluation.scored_from + position])
        metrics.put(chunk, position, p, q, target, step_kld=0.0)
    return metrics


def greedy(
    config: DecoderConfig,
    weights: Mapping[str, Float],
    prompt: Sequence[int],
    max_tokens: int,
    stop_tokens: Sequence[int] = (),
) -> tuple[int, ...]:
    """What the decoder with these weights says after a prompt, the stop token left out. No cache: for short texts."""
    import torch

    from lilliput import decoder

    model = decoder.build(SourceModel("reference", config, weights, tokenizer=Path(), sha256="", origin=""))
    tokens = list(prompt)
    with torch.inference_mode():
        while len(tokens) < len(prompt) + max_tokens:
            hidden = model.hidden(torch.tensor([tokens]))
            token = int(model.logits(hidden[0, -1]).argmax())
            if token in stop_tokens:
                break
            tokens.append(token)
    return tuple(tokens[len(prompt) :])
