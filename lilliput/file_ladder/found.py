"""What a ladder of a file finds: its rungs, and for each that is off the first place that diverges.

    float         the source model in torch
    weights       the same decoder in torch with the numbers that the file holds, dequantized exactly
    graph         the file's own graph with those numbers, in float32: no integer product, no rounded activation
    arithmetic    the file's operators as they are defined, integer sums exact: the arithmetic that the file asks for
    kernels       the file on its runtime, on a processor, with whatever its kernels do

A rung's divergence is from the one before it, as mean KLD over the same positions; "off" is more than a limit. The rung
`weights` is the price of quantization and never off: its place is the parameter that is furthest from the source's.
"""

from __future__ import annotations

from typing import Literal

from lilliput.results import Record

RungName = Literal["float", "weights", "graph", "arithmetic", "kernels"]
WHO: dict[RungName, str] = {
    "float": "the source model",
    "weights": "quantization: the numbers that the file holds",
    "graph": "the converter: the file's graph is not the source's",
    "arithmetic": "the arithmetic that the file asks for: activations rounded to few bits",
    "kernels": "the runtime's kernels on this processor: not what the operators are defined to give",
}


class Place(Record):
    """Where a rung first leaves the one before it. `error` is the relative RMS difference of `value` there."""

    layer: str  # "layers.3", "embedding", "head", or "" where the graph does not say
    operator: str  # the operator's kind
    node: str  # its name in the file
    value: str  # what it computes: a parameter of the decoder, or a tensor of the graph
    error: float
    agrees: str = ""  # the last value before it that is as it should be


class FileRung(Record):
    """One rung. `step_kld` is from the rung before that was computed, `mean_kld` from the float model."""

    rung: RungName
    mean_kld: float | None  # None: not computed, `note` says why
    step_kld: float | None
    flips: float | None  # share of positions whose likeliest token is not the rung's before
    off: bool = False
    place: Place | None = None
    unseen: str = ""  # why there is no place, where the rung is off
    note: str = ""


class FileLadder(Record):
    """A file's ladder, over `tokens` positions of a text. `limit` is the step in nats a token that is off."""

    path: str
    format: str
    source: str
    runtime: str
    processor: str
    tokens: int
    limit: float
    rungs: tuple[FileRung, ...]
    notes: tuple[str, ...] = ()

    @property
    def off(self) -> tuple[FileRung, ...]:
        return tuple(rung for rung in self.rungs if rung.off)

    @property
    def exit_code(self) -> int:
        """0 no rung is off, 1 one is, 3 one could not be computed."""
        if self.off:
            return 1
        return 3 if any(rung.mean_kld is None for rung in self.rungs) else 0
