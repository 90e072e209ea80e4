"""What XNNPACK, LiteRT's CPU delegate, takes of a `.tflite`: measured by opening it in LiteRT's interpreter.

The delegate cuts a graph into parts that it runs whole; what it does not take runs on LiteRT's own kernels between
them. An operator costs little there unless it moves much (a BROADCAST_TO of a cache), but each part ends in a wait.
Which operators it takes depends on types and shapes, so no list of names says it: the interpreter is asked.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Delegation:
    """What XNNPACK took of a file's first subgraph (of a decoder's file, the decode step): how many parts it made of
    it, the operators that run in them, and those left to LiteRT's own kernels, by name and count."""

    partitions: int
    taken: dict[str, int]
    left: dict[str, int]

    @property
    def delegated(self) -> int:
        return sum(self.taken.values())

    @property
    def share(self) -> float:
        """Of all operators, those that the delegate runs: 0 to 1."""
        return self.delegated / max(1, self.delegated + sum(self.left.values()))

    def __str__(self) -> str:
        return (
            f"{self.delegated} of {self.delegated + sum(self.left.values())} operators ({self.share:.1%}) in "
            f"{self.partitions} parts, left to LiteRT's own kernels: {counted(self.left)} (asked of the interpreter, "
            "first subgraph)"
        )


def counted(operators: dict[str, int]) -> str:
    """ "CONV_2D 3, MEAN 1", or "nothing"."""
    return ", ".join(f"{name} {count}" for name, count in operators.items()) or "nothing"


def delegation(path: Path) -> Delegation:
    """Ask LiteRT's interpreter after its delegate has partitioned the graph. Weights are packed for it meanwhile.

    The interpreter lists the operators of the file's first subgraph and the delegate's behind them. What runs is what
    the outputs need, a tensor coming from a delegate's part where there is one. Raises what the interpreter raises.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    operators = interpreter._get_ops_details()
    parts = [o for o in operators if o["op_name"] == "DELEGATE"]
    makers = {int(t): o for o in operators if o["op_name"] != "DELEGATE" for t in o["outputs"]}
    makers |= {int(t): o for o in parts for t in o["outputs"]}
    running: dict[int, Any] = {}
    wanted = [int(d["index"]) for d in interpreter.get_output_details()]
    while wanted:
        maker = makers.get(wanted.pop())
        if maker is not None and maker["index"] not in running:
            running[maker["index"]] = maker
            wanted += [int(t) for t in maker["inputs"] if t >= 0]
    left = Counter(o["op_name"] for o in running.values() if o["op_name"] != "DELEGATE")
    taken = Counter(o["op_name"] for o in operators if o["op_name"] != "DELEGATE") - left
    return Delegation(len(parts), dict(sorted(taken.items())), dict(sorted(left.items())))
