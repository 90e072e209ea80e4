"""NPUs: which nodes of a static network run there, said by the vendor's compiler or, without it, by a static check.

Qualcomm's HTP is reached through ONNX Runtime's QNN provider (the extra `qnn`), whose x86 build holds the compiler and
an emulator of the NPU's arithmetic: coverage, context binary and accuracy need no phone. Latency does: the emulator's
says nothing of a phone's.

SoC numbers and HTP architectures: ExecuTorch's backends/qualcomm/serialization/qc_schema.py; sc8380xp: ONNX Runtime's
documentation of the QNN provider.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lilliput.errors import RecipeError, did_you_mean
from lilliput.results import Record

Method = Literal["compiled", "static"]


@dataclass(frozen=True)
class Soc:
    """A chip by Qualcomm's number, and the version of its HTP."""

    name: str
    model: int
    htp_arch: int
    called: str


SOCS = {
    soc.name: soc
    for soc in (
        Soc("sm8350", 30, 68, "Snapdragon 888"),
        Soc("sm8450", 36, 69, "Snapdragon 8 Gen 1"),
        Soc("sm8475", 42, 69, "Snapdragon 8+ Gen 1"),
        Soc("sm8550", 43, 73, "Snapdragon 8 Gen 2"),
        Soc("sm8650", 57, 75, "Snapdragon 8 Gen 3"),
        Soc("sm8750", 69, 79, "Snapdragon 8 Elite"),
        Soc("sm8850", 87, 81, "Snapdragon 8 Elite Gen 5"),
        Soc("sc8380xp", 60, 73, "Snapdragon X Elite"),
    )
}


def soc(name: str) -> Soc:
    """Raises RecipeError for an unknown one."""
    if name not in SOCS:
        raise RecipeError(f"unknown SoC {name!r}: {did_you_mean(name, SOCS)}")
    return SOCS[name]


class Coverage(Record):
    """Where a graph's nodes run.

    `compiled`: the provider's own assignment, and all of its nodes were finalized for the SoC. `static`: an operator
    check that reads the file alone; a compiler may still refuse what it lets through.
    """

    method: Method
    soc: str
    nodes: int
    on_npu: int
    operators: dict[str, int]  # on the NPU, by type
    elsewhere: tuple[str, ...]  # `name (Type)`, with the reason where it is known

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.on_npu / self.nodes if self.nodes else 0.0

    def sentence(self) -> str:
        """For the report."""
        how = "as QNN's compiler assigned them" if self.method == "compiled" else "by a static operator check only"
        rest = f"; elsewhere: {', '.join(self.elsewhere)}" if self.elsewhere else ""
        return f"{self.on_npu} of {self.nodes} nodes on the NPU of {self.soc}, {how}{rest}"
