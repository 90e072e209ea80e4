"""Boards as data: one YAML file a board, its name is the board's name; each figure stands with its source.

    name: Raspberry Pi 5
    soc: Broadcom BCM2712
    device: ssh                        how it is reached
    clusters:                          fastest first
      - {cpu: cortex-a76, count: 4, max_mhz: 2400, source: …}
    isa: {features: [asimd, …], source: …}        what every core has, as /proc/cpuinfo names it
    memory: {sizes_gb: [4, 8], kind: LPDDR4X-4267, peak_gb_per_s: 17.1, source: …}     null: not published
    runtimes: {ort_cpu: how to get it there, …}
    sensors: {temperature_c: where, …}            what is left out is absent on the board
    emulation: {…}                     the processor as qemu-user and /proc/cpuinfo show it; only where it is proven

The roofline (Williams, Waterman, Patterson 2009) bounds speed by what a token must read and compute:

    decode tokens/s  ≤ peak bandwidth / bytes read a token
    prefill tokens/s ≤ peak 8-bit multiply-adds a second of one cluster / weights a token

It is an estimate that nothing on the board has confirmed, and it is labelled so wherever it is shown.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lilliput.errors import InputError, did_you_mean
from lilliput.results import Host, SensorKind

FOLDER = Path(__file__).resolve().parent
ESTIMATE = "estimate, uncalibrated: an upper bound from peak figures, not a measurement"

# 8-bit multiply-adds a cycle and core. Arm's software optimization guides: the throughput of SDOT (vector form) an
# issue slot is 16 (or MMLA's 32); cores without them multiply 8 bytes at a time into 16 bit (SMULL, SMLAL).
MACS_PER_CYCLE: dict[str, tuple[int, str]] = {
    "cortex-a55": (16, "Arm Cortex-A55 Software Optimization Guide: one 128-bit SDOT a cycle"),
    "cortex-a72": (8, "Arm Cortex-A72 Software Optimization Guide: one SMLAL of 8 bytes a cycle, no dot product"),
    "cortex-a76": (32, "Arm Cortex-A76 Software Optimization Guide: two SDOT a cycle"),
    "cortex-a78ae": (32, "Arm Cortex-A78AE Software Optimization Guide: two SDOT a cycle"),
    "cortex-x3": (128, "Arm Cortex-X3 Software Optimization Guide: four SMMLA a cycle"),
    "cortex-x4": (128, "Arm Cortex-X4 Software Optimization Guide: four SMMLA a cycle"),
}


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cluster(_Data):
    """Cores of one kind."""

    cpu: str
    count: int = Field(ge=1)
    max_mhz: int = Field(ge=100)
    source: str


class Isa(_Data):
    features: tuple[str, ...]
    source: str


class BoardMemory(_Data):
    """`peak_gb_per_s` is transfers a second × bus width, in 10⁹ bytes; None where the vendor does not publish it."""

    sizes_gb: tuple[int, ...]
    kind: str
    peak_gb_per_s: float | None
    source: str


class Emulation(_Data):
    """What qemu-user is given, and the lines of /proc/cpuinfo that runtimes choose their kernels by."""

    qemu_cpu: str
    implementer: str
    variant: str
    part: str
    revision: int
    features: tuple[str, ...]


class Board(_Data):
    name: str
    soc: str
    device: Literal["ssh", "adb", "host"]
    clusters: tuple[Cluster, ...] = Field(min_length=1)
    isa: Isa
    memory: BoardMemory
    runtimes: dict[str, str]
    sensors: dict[SensorKind, str]
    emulation: Emulation | None = None

    @property
    def cores(self) -> int:
        return sum(cluster.count for cluster in self.clusters)

    @property
    def summary(self) -> str:
        cores = " + ".join(f"{c.count} × {c.cpu} {c.max_mhz / 1000:g} GHz" for c in self.clusters)
        peak = self.memory.peak_gb_per_s
        bandwidth = f"{peak:g} GB/s peak" if peak else "bandwidth not published"
        return f"{self.name}: {self.soc}, {cores}, {self.memory.kind}, {bandwidth}, by {self.device}"


class Roofline(_Data):
    """Upper bounds in tokens a second; None where a figure is not known, `missing` says which."""

    decode_tokens_per_s: float | None
    prefill_tokens_per_s: float | None
    label: str
    missing: tuple[str, ...]


def names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@cache
def load(name: str) -> Board:
    """A board by its name. Raises InputError where there is none, or its file does not fit."""
    import yaml

    if name not in names():
        raise InputError(f"unknown board {name!r}: {did_you_mean(name, names())}")
    path = FOLDER / f"{name}.yaml"
    try:
        return Board.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {where}: {first['msg']}") from error


def roofline(board: Board, read_bytes: int, weights: int) -> Roofline:
    """Bounds for a model whose token reads `read_bytes` (matrices and cache) and multiplies `weights` weights.

    Prefill runs on the cluster that computes most: runtimes keep their threads there.
    """
    missing = []
    peak = board.memory.peak_gb_per_s
    if peak is None:
        missing.append("memory bandwidth: not published")
    known = [(c, MACS_PER_CYCLE[c.cpu][0]) for c in board.clusters if c.cpu in MACS_PER_CYCLE]
    if not known:
        missing.append(f"multiply-adds a cycle of {board.clusters[0].cpu}: not published")
    macs = max((c.count * c.max_mhz * 1e6 * per_cycle for c, per_cycle in known), default=None)
    return Roofline(
        decode_tokens_per_s=None if peak is None else peak * 1e9 / read_bytes,
        prefill_tokens_per_s=None if macs is None else macs / weights,
        label=ESTIMATE,
        missing=tuple(missing),
    )


def shown(board: Board, read_bytes: int, weights: int) -> str:
    """The roofline in one line, with its label."""
    found = roofline(board, read_bytes, weights)
    rates = {"decode": found.decode_tokens_per_s, "prefill": found.prefill_tokens_per_s}
    said = [f"{name} at most {rate:.3g} tok/s" for name, rate in rates.items() if rate is not None]
    return f"{board.name}: {'; '.join([*said, *found.missing])} ({found.label})"


def differences(board: Board, host: Host) -> str | None:
    """Why a machine is not such a board: what it lacks of it; None where it could be one."""
    lacks = [feature for feature in board.isa.features if feature not in host.isa]
    if lacks:
        return (
            f"{host.device} ({host.cpu}) lacks {', '.join(lacks)} of a {board.name}: its figures are not that board's"
        )
    if host.emulated is None and host.cores < board.clusters[0].count:
        return f"{host.device} has {host.cores} cores, a {board.name} {board.cores}: its figures are not that board's"
    return None
