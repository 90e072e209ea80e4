"""Handwritten digits: scikit-learn's 1797 images of 8 × 8 pixels, and a CNN that is trained in seconds.

    image (1, 8, 8) in 0..1 → conv 3 × 3, 16 → conv 3 × 3 stride 2, 32 → conv 3 × 3, 32 → mean → linear, 10 logits

ReLU after each convolution. Batch norms serve the training and are folded into the convolutions before anything else
sees the model (torch.nn.utils.fusion). Half of the images judge.

Data: the UCI ML hand-written digits' test set (Alpaydin and Kaynak), as sklearn.datasets.load_digits has it.
"""

from __future__ import annotations

import hashlib
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lilliput.errors import MissingPackageError
from lilliput.progress import Progress
from lilliput.tasks.base import Examples, TaskFacts, TaskOptions, Trained, held_out

CLASSES = tuple("0123456789")
BRIGHTEST = 16.0  # load_digits counts 0..16
BATCH = 64


class Options(TaskOptions):
    epochs: int = Field(default=30, ge=1)
    learning_rate: float = Field(default=0.01, gt=0)
    held_out: float = Field(default=0.5, gt=0, lt=1)  # share of the images


class Convolution(nn.Module):
    """3 × 3, with a batch norm while it is trained."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1)
        self.norm: nn.Module = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.convolution(x)))

    def fold(self) -> None:
        """Put the batch norm into the convolution."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.convolution = fuse_conv_bn_eval(self.convolution.eval(), self.norm.eval())
            self.norm = nn.Identity()


class DigitsCnn(nn.Module):
    """image (n, 1, 8, 8) → logits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Convolution(1, 16, 1), Convolution(16, 32, 2), Convolution(32, 32, 1)
        self.head = nn.Linear(32, len(CLASSES))

    def forward(self, image: Tensor) -> Tensor:
        x = self.third(self.second(self.first(image)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits

    def folded(self) -> DigitsCnn:
        """The same without batch norms, in eval mode."""
        for part in (self.first, self.second, self.third):
            part.fold()
        return self.eval()


class Task:
    Options: ClassVar[type[TaskOptions]] = Options
    packages: ClassVar[tuple[str, ...]] = ("sklearn",)
    extra: ClassVar[str] = "tasks"

    def source_sha256(self, options: TaskOptions) -> str:
        images, labels = _images()
        return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()

    def module(self, options: TaskOptions) -> nn.Module:
        return DigitsCnn().folded()

    def train(self, options: TaskOptions, seed: int, progress: Progress) -> Trained:
        assert isinstance(options, Options)
        images, labels = _images()
        judges = np.array([held_out(image.tobytes(), options.held_out) for image in images])
        training, evaluation = (Examples({"image": images[part]}, labels[part]) for part in (~judges, judges))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = _trained(training, options, progress)
        facts = TaskFacts(
            name="digits",
            origin="sklearn.datasets.load_digits",
            license="CC BY 4.0",
            classes=CLASSES,
            sha256=self.source_sha256(options),
            training=f"a CNN of three convolutions, {options.epochs} epochs over {len(training)} images",
        )
        return Trained(module, training, evaluation, facts)


def _images() -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """(n, 1, 8, 8) float32 in 0..1, and (n,) int64. Raises MissingPackageError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingPackageError("scikit-learn", "tasks", "task 'digits'") from error
    found = load_digits()
    return (found.images[:, None] / BRIGHTEST).astype(np.float32), found.target.astype(np.int64)


def _trained(training: Examples, options: Options, progress: Progress) -> nn.Module:
    module = DigitsCnn()
    images, labels = torch.from_numpy(training.inputs["image"]), torch.from_numpy(training.labels)
    optimizer = torch.optim.Adam(module.parameters(), options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    for epoch in range(options.epochs):
        for picked in torch.split(torch.randperm(len(labels)), BATCH):
            loss = F.cross_entropy(module(images[picked]), labels[picked])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
        progress(epoch + 1, options.epochs)
    return module.folded()
