"""What a task is: a module of this folder with one class `Task` and its pydantic `Options`.

A task reads labelled data, trains a small float classifier on a part of it, and holds the rest back: only that judges.
Which part an example falls into depends on its own bytes alone (`held_out`), so the split never moves, and two copies
of one example never stand on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from torch import nn

from lilliput.progress import Progress

Labels = npt.NDArray[np.int64]


class TaskOptions(BaseModel):
    """Base of every task's options: unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs by the name of the module's argument, (n, …) float32 or int32 each, in the order of its `forward`."""

    inputs: Mapping[str, npt.NDArray[np.float32] | npt.NDArray[np.int32]]
    labels: Labels  # (n,)

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Examples:
        return Examples({name: array[:count] for name, array in self.inputs.items()}, self.labels[:count])


@dataclass(frozen=True)
class TaskFacts:
    """What the report says of a task. `origin` is the data's, `sha256` of the examples themselves."""

    name: str
    origin: str
    license: str | None
    classes: tuple[str, ...]
    sha256: str
    training: str  # how the float model came to be, in a sentence


@dataclass(frozen=True, eq=False)
class Trained:
    """The float classifier, in eval mode: `forward(*inputs) → logits (n, classes)`, and what it is proven with."""

    module: nn.Module
    training: Examples  # calibration draws from these
    evaluation: Examples  # held out
    facts: TaskFacts


class Task(Protocol):
    """One task. Stateless; the same options and seed give the same weights on one machine."""

    Options: ClassVar[type[TaskOptions]]
    packages: ClassVar[tuple[str, ...]]  # imported packages it needs, checked before work
    extra: ClassVar[str]  # the extra of lilliput that installs them

    def source_sha256(self, options: TaskOptions) -> str:
        """Of the files that data and weights are read from. Raises SourceError or MissingError where they are not."""
        ...

    def module(self, options: TaskOptions) -> nn.Module:
        """The classifier without its trained weights, in eval mode."""
        ...

    def train(self, options: TaskOptions, seed: int, progress: Progress) -> Trained:
        """Train it. Raises SourceError where the data are not what they should be."""
        ...


def held_out(content: bytes, share: float) -> bool:
    """Whether an example judges: a share of all contents does, each by its own sha256."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") < share * 2.0**64


def accuracy(logits: npt.NDArray[np.float32], labels: Labels) -> float:
    """Share of examples whose largest logit (n, classes) is their label's."""
    return float((logits.argmax(1) == labels).mean())
