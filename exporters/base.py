"""What an exporter is: a module of this folder with one class `Exporter` and its pydantic `Options`; for models that
are no decoder (lilliput.network) the class is `NetworkExporter`.

An exporter packs what it is given and writes files; it never chooses a number. `read` gives the
weights back from the written file with the format's own reader, so that the caller can prove
`read(export(model)) == model`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from lilliput.artifact import Artifact
from lilliput.errors import ExportError
from lilliput.grid import Float, GridSpec, QuantizedTensor
from lilliput.model import FEATURES, DecoderConfig, Feature, QuantizedModel, Role, TracedModel
from lilliput.network import Network, QuantizedNetwork


class ExporterOptions(BaseModel):
    """Base of every exporter's options: unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def refuse_features(config: DecoderConfig, lowered: frozenset[Feature], runtime: str) -> None:
    """Raise ExportError naming what the decoder has and this exporter does not lower."""
    strange = [feature for feature in FEATURES if feature in config.features - lowered]
    if strange:
        raise ExportError(
            f"{runtime}: no lowering yet of {', '.join(strange)}, which this {config.family!r} model has: "
            "choose another target"
        )


class Exporter(Protocol):
    """One format. Stateless."""

    Options: ClassVar[type[ExporterOptions]]
    packages: ClassVar[tuple[str, ...]]  # imported packages it needs, checked before work
    extra: ClassVar[str]  # the extra of lilliput that installs them
    budget_grids: ClassVar[tuple[str, ...]]  # what a byte budget chooses from: grids that the runtime runs fast

    def refuses(self, spec: GridSpec, role: Role, shape: tuple[int, int]) -> str | None:
        """Why the format cannot hold such a tensor exactly, or None where it can."""
        ...

    def export(
        self, model: QuantizedModel, traced: TracedModel, options: ExporterOptions, folder: Path, *, exact: bool = False
    ) -> Artifact:
        """Write the model into `folder` (exists, empty).

        `exact` writes the twin that the runtime computes without loss beyond float32: the same
        dequantized weights, with no 8-bit activations. It serves the ladder and is not shipped.
        Raises ExportError where the format cannot hold the model.
        """
        ...

    def read(self, artifact: Artifact) -> Mapping[str, QuantizedTensor | Float]:
        """The weights in the file by decoder parameter name: fused q, k, v and gate, up are apart again."""
        ...


class NetworkExporter(Protocol):
    """One format of networks that are no decoder. Stateless."""

    Options: ClassVar[type[ExporterOptions]]
    packages: ClassVar[tuple[str, ...]]  # imported packages it needs, checked before work
    extra: ClassVar[str]  # the extra of lilliput that installs them
    activations: ClassVar[tuple[str, ...]]  # dtypes of activation grids that the format holds, the usual first; or none

    def export(self, model: QuantizedNetwork, options: ExporterOptions, folder: Path) -> tuple[Artifact, list[str]]:
        """Write the network into `folder` (exists, empty); what stays in float, a sentence each.

        Raises ExportError naming the node that the format cannot hold.
        """
        ...

    def differences(self, model: QuantizedNetwork, artifact: Artifact) -> list[str]:
        """Where codes, scales, zero points or biases in the file are not the model's, by name; empty where all are."""
        ...


class WeightsExporter(NetworkExporter, Protocol):
    """A network's format that holds weights alone: `activations` is empty, its runtime chooses those as it runs."""

    def check(self, network: Network) -> None:
        """Raise ExportError for a network that the runtime does not compute."""
        ...

    def refuses(self, spec: GridSpec, cols: int) -> str | None:
        """Why the format cannot hold a matrix of `cols` columns on such a grid exactly, or None where it can."""
        ...
