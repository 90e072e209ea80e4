"""What a runtime is: a module of targets/runtimes/ with one class `Runtime`; and the session it opens.
What a device is: a module of targets/devices/ with one class `Device` that runs requests.

All runtimes are driven through the same few calls, so that speed and accuracy are measured by one protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from pydantic import BaseModel

from lilliput.artifact import Artifact
from lilliput.grid import Float
from lilliput.progress import Progress
from lilliput.results import Host
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


class Device(Protocol):
    """Where runtimes run: this machine, or one that it reaches. Stateless."""

    Options: ClassVar[type[BaseModel]]

    def describe(self) -> Host:
        """The machine that measures."""
        ...

    def threads(self) -> int:
        """Threads that a runtime gets where the recipe does not say."""
        ...

    def run(self, request: Request, options: BaseModel, progress: Progress) -> Reply:
        """Answer the request away from this process.

        Raises MissingPackageError where the runtime's package is missing, MeasurementError where it fails or hangs.
        """
        ...
