"""What a runtime is: a module of targets/runtimes/ with one class `Runtime`; and the session it opens.
For networks that are no decoder the class is `NetworkRuntime`, and a session runs whole inputs.
What a device is: a module of targets/devices/ with one class `Device`, and the connection that it opens, which runs
requests there: push, run, pull, probe, close.

All runtimes are driven through the same few calls, so that speed and accuracy are measured by one protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from lilliput.artifact import Artifact
from lilliput.grid import Float
from lilliput.progress import Progress
from lilliput.results import Host
from targets.probe import Probe
from targets.request import Reply, Request


class Session(Protocol):
    """A loaded model with one KV cache (batch 1). Logits are (vocab,) float32, owned by the caller."""

    def reset(self) -> None:
        """Forget the cache: the next token is at position 0."""
        ...

    def prefill(self, tokens: Sequence[int]) -> Float:
        """Append a prompt (at least 1 token) to the cache; the logits after its last token."""
        ...

    def decode(self, token: int) -> Float:
        """Append one token; the logits after it."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class Runtime(Protocol):
    """One runtime on the machine that this process runs on. Stateless."""

    exporters: ClassVar[tuple[str, ...]]  # whose artifacts it opens
    packages: ClassVar[tuple[str, ...]]  # imported packages it needs
    extra: ClassVar[str]  # the extra of lilliput that installs them

    def open(self, artifact: Artifact, threads: int, *, exact: bool = False) -> Session:
        """Load. `exact` (for an artifact exported exact): every option of the runtime that trades precision is off."""
        ...

    def versions(self) -> dict[str, str]:
        """Versions of the runtime's packages."""
        ...


class NetworkSession(Protocol):
    """A loaded network of fixed shapes."""

    def run(self, inputs: Mapping[str, npt.NDArray[np.float32] | npt.NDArray[np.int32]]) -> dict[str, Float]:
        """The outputs by name, float32; images are (N, C, H, W). Raises InputError for inputs that are not its own."""
        ...

    def close(self) -> None:
        """Free the network."""
        ...


class NetworkRuntime(Protocol):
    """One runtime of static networks on the machine that this process runs on. Stateless."""

    exporters: ClassVar[tuple[str, ...]]  # whose artifacts it opens
    packages: ClassVar[tuple[str, ...]]  # imported packages it needs
    extra: ClassVar[str]  # the extra of lilliput that installs them

    def open(self, artifact: Artifact, threads: int) -> NetworkSession:
        """Load. Raises ArtifactError for a file that the runtime does not take, naming the node where it says it."""
        ...

    def versions(self) -> dict[str, str]:
        """Versions of the runtime's packages."""
        ...


class Connection(Protocol):
    """An open device. What it put there is in one folder, which is gone after `close`."""

    def probe(self) -> Probe:
        """What the machine is, and what it has free now."""
        ...

    def push(self, path: Path) -> PurePath:
        """Copy a file or folder to the device, once; where it lies there.

        Raises MeasurementError where the device is full or gone.
        """
        ...

    def run(self, request: Request, progress: Progress) -> Reply:
        """Answer the request away from this process. Its paths are this machine's, and so are the reply's.

        Raises MissingPackageError where the runtime's package is missing, MeasurementError where the runtime fails or
        hangs, or the device is gone: within the limits of its options, and nothing of the work is left running.
        """
        ...

    def pull(self, there: PurePath, here: Path) -> None:
        """Copy a file of the device to this machine. Raises MeasurementError where that fails."""
        ...

    def close(self) -> None:
        """End whatever runs there, and remove what was put there. Never raises: the device may be gone."""
        ...


class Device(Protocol):
    """A way to a machine where runtimes run: this one, or one that it reaches. Stateless."""

    Options: ClassVar[type[BaseModel]]

    def describe(self, options: BaseModel) -> Host:
        """The machine that would measure, as cheaply as it can be known. Raises MeasurementError where it is away."""
        ...

    def open(self, options: BaseModel) -> Connection:
        """Reach the device. Raises MeasurementError where it is away or refuses, MissingError without the tool."""
        ...
